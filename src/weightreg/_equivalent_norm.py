"""Equivalent norms: a map to parameters in which every layer has the same norm."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from weightreg._groups import check_form, deviation, group_of, layers_of, measure
from weightreg._norms import Axes
from weightreg._numbers import check_scalar
from weightreg._reach import compute_dtype
from weightreg._scaled import or_one
from weightreg._weights import Dims, Mask, WeightLayer


class LearntNorm(NamedTuple):
    """Parameters to be trained together with the norm that they are mapped to.

    Attributes:
      params: The stored parameters.
      log_alpha: The logarithm of ``alpha``, a scalar: so ``alpha`` stays positive.
    """

    params: Any
    log_alpha: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class NormMap:
    """The map that `equivalent_norm` returns, from stored to effective parameters."""

    scope: str
    center: bool
    alpha: jax.typing.ArrayLike
    learn: bool
    mask: Mask
    dims: Dims

    def init(self, params: Any) -> Any:
        """What is to be trained: ``params``, as a `LearntNorm` if alpha is learnt."""
        self._layers(params)
        return LearntNorm(params, self.initial_log_alpha()) if self.learn else params

    def initial_log_alpha(self) -> jax.Array:
        """Where a learnt logarithm of alpha starts."""
        return jnp.log(jnp.asarray(self.alpha, jnp.float32))

    def __call__(self, params: Any) -> Any:
        """The effective parameters, of the structure, shapes and dtypes of ``params``.

        Raises:
          TypeError: Alpha is learnt, and ``params`` is not what ``init`` made.
          ValueError: ``mask`` or ``dims`` does not match, or a weight cannot be
            centred.
        """
        if not self.learn:
            return self.apply(params, self.alpha)
        if not isinstance(params, LearntNorm):
            raise TypeError(
                "params must be the LearntNorm that init returns, since alpha is "
                f"learnt, not of type {type(params).__name__}."
            )
        return self.apply(params.params, jnp.exp(params.log_alpha))

    def apply(self, params: Any, alpha: jax.typing.ArrayLike) -> Any:
        """The effective parameters for an alpha from elsewhere."""
        leaves, treedef = jax.tree.flatten(params)
        for layer in self._layers(params):
            weight = jnp.asarray(leaves[layer.index])
            if weight.size:
                leaves[layer.index] = _mapped(
                    weight, alpha, self.scope, self.center, Axes.of(layer)
                )
        return jax.tree.unflatten(treedef, leaves)

    def _layers(self, params: Any) -> tuple[WeightLayer, ...]:
        return layers_of(params, self.scope, self.center, self.mask, self.dims)


def equivalent_norm(
    scope: str = "unit",
    center: bool = True,
    alpha: jax.typing.ArrayLike = 1.0,
    *,
    learn: bool = False,
    mask: Mask = None,
    dims: Dims = None,
) -> NormMap:
    r"""Maps stored parameters to effective ones whose layers all have the same norm.

    The network runs on :math:`\hat W`, the optimizer changes :math:`W`, and gradients
    flow through the map, which makes :math:`\|\hat W_l\|_F^2 = \alpha` in every layer:

    ========  ========  ==========================================================
    scope     center    effective weights
    ========  ========  ==========================================================
    "layer"   False     :math:`\sqrt\alpha \, W / \|W\|_F` (eq. 20)
    "unit"    False     :math:`\sqrt{\alpha / m} \, W_j / \|W_j\|` (eq. 21)
    "unit"    True      eq. 21 of :math:`W_j - \mathrm{mean}(W_j)` (eq. 22)
    "layer"   True      eq. 20 of :math:`W - \mathrm{mean}(W)` (eq. 23)
    ========  ========  ==========================================================

    with :math:`W_j` all that feeds unit ``j`` of ``m``. As printed, the constant of
    eq. 22 would make norms unequal.

    The map does not depend on the scale of the stored weights, nor on their means if it
    centres them, so that gradients are orthogonal to both, and weight decay changes
    nothing but how fast weights turn: `shifted_l2` keeps their norms from collapsing.
    Every layer should be followed by a normalization, the last one too, since the map
    takes away its freedom of scale.

    For inference, fold the map in by applying it once: ``params = enc(params)``.

    A unit (or, with ``scope="layer"``, a layer) whose weights are all 0, or all equal
    where they are centred, has no direction: it is mapped to 0, with a gradient of 0,
    and its layer's squared norm is smaller by its share, ``alpha / m``.

    Args:
      scope: ``"unit"`` or ``"layer"``: over what norms and means are taken.
      center: Whether means are taken away first.
      alpha: The squared norm of every layer, positive; may be traced. The paper takes
        1.
      learn: Whether alpha is learnt, starting from this value. What is trained is then
        ``enc.init(params)``, a `LearntNorm` with the logarithm of alpha beside the
        parameters, for ``enc`` and for the optimizer.
      mask: Which leaves to map: a tree of booleans, or a function of the parameters
        that makes one. By default all weights, as `weight_mask` says.
      dims: What the axes of weights mean: see `weight_layers`. Stacked layers are
        mapped one by one.

    Returns:
      The map, a function from parameters to parameters of the same structure, shapes
      and dtypes, with a method ``init``. Leaves that are no weights are passed on as
      they are. Arithmetic is in float32 at least, and right for weights of any size.

    Raises:
      ValueError: ``scope`` is neither, ``alpha`` is not positive and finite; or on a
        call, a weight that is to be centred has one input a unit (one element, with
        ``scope="layer"``), which would always be mapped to 0; or trees do not match.
      TypeError: ``alpha`` is no scalar, or ``center`` or ``learn`` no boolean.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eqs. 19 to 23.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> enc = wr.equivalent_norm()
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [5.0, 0.0]]), "bias": jnp.ones(2)}
      >>> enc(params)
      {'bias': Array([1., 1.], dtype=float32),
       'kernel': Array([[-0.5,  0.5],
              [ 0.5, -0.5]], dtype=float32)}
    """
    check_form(scope, center)
    if not isinstance(learn, bool):
        raise TypeError(f"learn must be a boolean, not {learn!r}.")
    check_scalar("alpha", alpha, 0, math.inf)
    if not isinstance(alpha, Tracer) and not np.asarray(alpha) > 0:
        raise ValueError(f"alpha must be positive, but is {alpha}.")
    return NormMap(scope, center, alpha, learn, mask, dims)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # traced once for one shape
def _mapped(
    w: jax.Array, alpha: jax.typing.ArrayLike, scope: str, center: bool, axes: Axes
) -> jax.Array:
    """One leaf's effective weights."""
    dtype = compute_dtype(w.dtype)
    share = math.prod(w.shape[a] for a in axes.outputs) if scope == "unit" else 1
    norm = jnp.sqrt(jnp.asarray(alpha, dtype) / share)
    wide = w.astype(dtype)
    # The derivative needs nothing but what there is: the weights and few statistics.
    statistics = measure(group_of(axes, scope), center, wide)
    scaled = jax.checkpoint(
        lambda w, s, norm: deviation(w, s) * (norm / or_one(s.size))
    )
    return scaled(wide, statistics, norm).astype(w.dtype)
