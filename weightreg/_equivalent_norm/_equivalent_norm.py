"""Equivalent norms: a map to parameters in which every layer has the same norm."""

import dataclasses
import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from weightreg._core._arguments import (
    EqualByFields,
    check_scalar,
    compute_dtype,
    each,
    replaced,
)
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
      log_alpha: The logarithm of ``alpha``, a scalar, which keeps ``alpha`` positive.
    """

    params: Any
    log_alpha: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class NormMap(EqualByFields):
    """The map that `equivalent_norm` returns, from stored to effective parameters."""

    scope: str
    center: bool
    alpha: jax.typing.ArrayLike
    learn: bool
    mask: Mask
    dims: Dims

    def init(self, params: Any) -> Any:
        """What is to be trained: ``params``, in a `LearntNorm` if alpha is learnt."""
        layers, leaves = self._layers(params), jax.tree.leaves(params)
        if not self.learn:
            return params
        dtype = compute_dtype(*(jnp.result_type(leaves[x.index]) for x in layers))
        return LearntNorm(params, self.initial_log_alpha(dtype))

    def initial_log_alpha(self, dtype: Any = jnp.float32) -> jax.Array:
        """The logarithm of alpha with which learning starts."""
        if isinstance(self.alpha, Tracer):
            return jnp.log(self.alpha).astype(dtype)
        return jnp.asarray(math.log(np.asarray(self.alpha)), dtype)

    def __call__(self, params: Any) -> Any:
        """The effective parameters, of the same structure, shapes and dtypes."""
        if not self.learn:
            return self.apply(params)
        if not isinstance(params, LearntNorm):
            raise TypeError(
                "params must be the LearntNorm that init returns, since alpha is "
                f"learnt, not of type {type(params).__name__}."
            )
        return self.apply(params.params, params.log_alpha)

    def apply(self, params: Any, log_alpha: jax.Array | None = None) -> Any:
        """The effective parameters, with a learnt alpha if one is given."""
        if log_alpha is not None:
            norm = jnp.exp(log_alpha / 2)
        elif isinstance(self.alpha, Tracer):
            norm = jnp.sqrt(self.alpha)
        else:  # Alpha may be out of the range of the weights' dtype.
            norm = math.sqrt(np.asarray(self.alpha))
        axes = {x.index: Axes.of(x) for x in self._layers(params)}
        mapped = {
            i: _mapped(w, norm, self.scope, self.center, axes[i])
            for i, w in each(params, axes)
        }
        return replaced(params, mapped, params)

    def _layers(self, params: Any) -> list[WeightLayer]:
        form = self.scope, self.center, self.mask, self.dims
        return layers_of("equivalent_norm", params, *form)


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

    The network runs on :math:`\hat W` and the optimizer changes :math:`W`. Gradients
    flow through the map, which makes :math:`\|\hat W_l\|_F^2 = \alpha` in every layer:

    ========  ========  ==========================================================
    scope     center    effective weights
    ========  ========  ==========================================================
    "layer"   False     :math:`\sqrt\alpha \, W / \|W\|_F` (eq. 20)
    "unit"    False     :math:`\sqrt{\alpha / m} \, W_j / \|W_j\|` (eq. 21)
    "unit"    True      eq. 21 of :math:`W_j - \mathrm{mean}(W_j)` (eq. 22)
    "layer"   True      eq. 20 of :math:`W - \mathrm{mean}(W)` (eq. 23)
    ========  ========  ==========================================================

    Here :math:`W_j` is all that feeds unit ``j`` of ``m``. As printed, the constant of
    eq. 22 would make norms unequal.

    The map does not depend on the scale of the stored weights, nor on their means if it
    centres them. Gradients are therefore orthogonal to both, and weight decay changes
    nothing but how fast weights turn. `shifted_l2` keeps their norms from collapsing.
    A normalization should follow every layer, the last one too, since the map takes
    away its freedom of scale. For inference, apply the map once:
    ``params = enc(params)``.

    A unit (a layer, with ``scope="layer"``) whose weights are all 0, or all equal where
    they are centred, has no direction. It is mapped to 0, with a gradient of 0, and the
    squared norm of its layer is smaller by its share, ``alpha / m``. Layers that are
    initialized with zeros (LoRA's ``b``, zero heads, Fixup) therefore stay 0: give them
    another initializer, or leave them out with ``mask``.

    Args:
      scope: What norms and means are taken over, ``"unit"`` or ``"layer"``.
      center: Whether means are taken away first.
      alpha: The squared norm of every layer, positive, which may be traced. The paper
        takes 1.
      learn: Whether alpha is learnt, starting from this value. Train
        ``enc.init(params)`` then, a `LearntNorm` with the logarithm of alpha beside the
        parameters, and pass it to ``enc``.
      mask: Which leaves to map, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which are mapped one by one.

    Returns:
      The map, a function from parameters to parameters of the same structure, shapes
      and dtypes, with a method ``init``. Leaves that are no weights are passed on as
      they are. Arithmetic is in float32 at least, and right for weights of any size.
      Inside of ``jax.shard_map`` the weights must be whole, since the norm of a shard
      is not the norm of its unit or layer.

    Raises:
      ValueError: ``scope`` is neither, or ``alpha`` is not positive and finite. On a
        call, ``mask`` or ``dims`` does not match the parameters, or a weight that is to
        be centred has one input a unit (one element, with ``scope="layer"``), which
        would always be mapped to 0.
      TypeError: ``alpha`` is no scalar, or ``center`` or ``learn`` no boolean. On a
        call, alpha is learnt and the argument is no `LearntNorm`.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eqs. 19 to 23.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> enc = wr.equivalent_norm()
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [5.0, 0.0]]), "bias": jnp.ones(2)}
      >>> jax.tree.map(lambda x: x.round(4), enc(params))
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
    """Refuses a module that is not of Flax's ``kind``, and a norm that is no map."""
    if not isinstance(module, kind):
        raise TypeError(
            f"module must be a {kind.__module__}.{kind.__name__}, not {module!r}."
        )
    if not isinstance(norm, NormMap):
        raise TypeError(f"norm must be what equivalent_norm returns, not {norm!r}.")


def warn_of_zeros(norm: NormMap, params: Any) -> None:
    """Warns of layers that start at 0 under a map, where the weights' values are known.

    They are read back to the host for this.
    """
    leaves = jax.tree.leaves(params)
    if not all(map(_is_known, leaves)):
        return
    layers = norm._layers(params)
    paths = [x.path for x in layers if _has_zero_layer(norm, leaves[x.index], x)]
    if paths:
        equal = f" or all equal within each {norm.scope}" if norm.center else ""
        warnings.warn(
            "EquivalentNorm maps these weights to 0, with a gradient of 0, so that "
            f"they will never learn, since all of a layer are 0{equal}: "
            f"{', '.join(paths)}. "
            "Give their layers another initializer (kernel_init=...), or leave them "
            "out with the mask= of equivalent_norm.",
            UserWarning,
            stacklevel=3,
        )


def _is_known(leaf: Any) -> bool:
    """Whether the values of a leaf are known here, and not on other hosts alone."""
    is_array = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer)
    return is_array and getattr(leaf, "is_fully_addressable", True)


def _has_zero_layer(norm: NormMap, leaf: Any, layer: WeightLayer) -> bool:
    """Whether the map makes 0 of all weights of a layer, or of one that is stacked."""
    w, axes = np.asarray(leaf), Axes.of(layer)
    group = group_of(axes, norm.scope)
    first = tuple(slice(1) if a in group else slice(None) for a in range(w.ndim))
    still = w == w[first] if norm.center else w == 0
    return bool(np.any(np.all(still, axes.inputs + axes.outputs)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # Equal shapes share a trace.
def _mapped(
    w: jax.Array, norm: jax.typing.ArrayLike, scope: str, center: bool, axes: Axes
) -> jax.Array:
    """The effective weights of one leaf, of which every layer has norm ``norm``."""
    wide = w.astype(compute_dtype(w.dtype))
    share = math.prod(w.shape[a] for a in axes.outputs) if scope == "unit" else 1
    norm = jnp.asarray(norm, wide.dtype) / math.sqrt(share)
    return normalized(group_of(axes, scope), center, wide, norm).astype(w.dtype)
