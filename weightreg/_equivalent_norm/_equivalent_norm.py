"""Equivalent norms: a map to parameters in which every layer has the same norm."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from weightreg._core._arguments import check_scalar, compute_dtype, each, replaced
from weightreg._core._norms import Axes
from weightreg._core._weights import Dims, Mask, WeightLayer
from weightreg._equivalent_norm._groups import (
    check_form,
    group_of,
    layers_of,
    normalized,
)


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
        layers, leaves = self._layers(params), jax.tree.leaves(params)
        if not self.learn:
            return params
        dtypes = (jnp.result_type(leaves[layer.index]) for layer in layers)
        dtype = compute_dtype(*dtypes) if layers else jnp.float32
        return LearntNorm(params, self.initial_log_alpha(dtype))

    def initial_log_alpha(self, dtype: Any = jnp.float32) -> jax.Array:
        """Where a learnt logarithm of alpha starts."""
        if isinstance(self.alpha, Tracer):
            return jnp.log(self.alpha).astype(dtype)
        return jnp.asarray(math.log(np.asarray(self.alpha)), dtype)

    def __call__(self, params: Any) -> Any:
        """The effective parameters, of the structure, shapes and dtypes of ``params``.

        Raises:
          TypeError: Alpha is learnt, and ``params`` is not what ``init`` made.
          ValueError: ``mask`` or ``dims`` does not match, or a weight cannot be
            centred.
        """
        if not self.learn:
            return self.apply(params)
        if not isinstance(params, LearntNorm):
            raise TypeError(
                "params must be the LearntNorm that init returns, since alpha is "
                f"learnt, not of type {type(params).__name__}."
            )
        return self.apply(params.params, params.log_alpha)

    def apply(self, params: Any, log_alpha: jax.Array | None = None) -> Any:
        """The effective parameters, for a learnt alpha if one is given."""
        if log_alpha is not None:
            norm = jnp.exp(log_alpha / 2)
        elif isinstance(self.alpha, Tracer):
            norm = jnp.sqrt(self.alpha)
        else:  # alpha itself may be out of the range of the weights' dtype
            norm = math.sqrt(np.asarray(self.alpha))
        axes = {x.index: Axes.of(x) for x in self._layers(params)}
        mapped = {
            i: _mapped(w, norm, self.scope, self.center, axes[i])
            for i, w in each(params, axes)
        }
        return replaced(params, mapped, params)

    def _layers(self, params: Any) -> list[WeightLayer]:
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


def check_wrapped(module: Any, kind: type, norm: Any) -> None:
    """Refuses what is no module of Flax's, or no map."""
    if not isinstance(module, kind):
        raise TypeError(
            f"module must be a {kind.__module__}.{kind.__name__}, not {module!r}."
        )
    if not isinstance(norm, NormMap):
        raise TypeError(f"norm must be what equivalent_norm returns, not {norm!r}.")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # traced once for one shape
def _mapped(
    w: jax.Array, norm: jax.typing.ArrayLike, scope: str, center: bool, axes: Axes
) -> jax.Array:
    """One leaf's effective weights, every layer of a norm."""
    wide = w.astype(compute_dtype(w.dtype))
    share = math.prod(w.shape[a] for a in axes.outputs) if scope == "unit" else 1
    norm = jnp.asarray(norm, wide.dtype) / math.sqrt(share)
    return normalized(group_of(axes, scope), center, wide, norm).astype(w.dtype)
