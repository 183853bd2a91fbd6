"""Binary and ternary weights: each weight goes to one of two or three levels."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from weightreg._core._arguments import (
    CountState,
    check_count,
    check_params,
    compute_dtype,
    each,
    each_with_update,
    is_real,
    leaf_path,
    replaced,
)
from weightreg._core._weights import Dims, Mask, stack_axes
from weightreg._volumization._box import land, reach, round_to
from weightreg._volumization._volumes import check_argument, volumes_of

# The number of bits that `codes` gives for a weight.
PLANES = {"binary": 1, "ternary": 2}


def binarize(params: Any, volume: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    r"""Moves every weight to one of two levels, the walls of its box.

    .. math::
      w \mapsto \begin{cases} V & w \ge 0 \\ -V & \text{otherwise} \end{cases}

    in the weights' own dtype, to which ``V`` is rounded. NaN stays NaN. Where hardware
    takes subnormal numbers for 0, so does this function. The derivative by the weights
    is 0.

    Args:
      params: Any tree of parameters.
      volume: The height ``V`` of the levels: a finite number, a tree of these (or a
        prefix), or a function of the parameters such as `he_volume`.
      mask: Which leaves to binarize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      The parameters, of the same structure, shapes and dtypes. Leaves that are no
      weights are passed on as they are.

    Raises:
      ValueError: ``V`` is negative, NaN, or infinite or rounded to 0 in the weights'
        dtype, as far as it is known before tracing; a tree does not match the
        parameters; a rule meets a leaf without fans; or weights are packed.
      TypeError: ``volume`` is a schedule, or a weight is no floating-point array of 16,
        32 or 64 bits.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, section 5.4.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.binarize({"kernel": jnp.array([[0.3, -0.1, 0.0]])}, 0.5)
      {'kernel': Array([[ 0.5, -0.5,  0.5]], dtype=float32)}
    """
    return _quantize("binarize", params, volume, "binary", mask, dims)


def ternarize(params: Any, volume: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    r"""Moves every weight to one of three levels, the walls of its box and 0.

    .. math::
      w \mapsto \begin{cases}
        V & w > V / 2 \\ -V & w < -V / 2 \\ 0 & \text{otherwise}
      \end{cases}

    in the weights' own dtype, to which ``V`` is rounded. NaN stays NaN. The derivative
    by the weights is 0.

    Args:
      params: Any tree of parameters.
      volume: The height ``V`` of the levels: a finite number, a tree of these (or a
        prefix), or a function of the parameters such as `he_volume`.
      mask: Which leaves to ternarize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      The parameters, of the same structure, shapes and dtypes. Leaves that are no
      weights are passed on as they are.

    Raises:
      ValueError: ``V`` is negative, NaN, or infinite or rounded to 0 in the weights'
        dtype, as far as it is known before tracing; a tree does not match the
        parameters; a rule meets a leaf without fans; or weights are packed.
      TypeError: ``volume`` is a schedule, or a weight is no floating-point array of 16,
        32 or 64 bits.

    References:
      Ziyin et al., 2020, section 5.4, where the second threshold lacks its sign.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.ternarize({"kernel": jnp.array([[0.3, -0.1, -0.26, 0.25]])}, 0.5)
      {'kernel': Array([[ 0.5,  0. , -0.5,  0. ]], dtype=float32)}
    """
    return _quantize("ternarize", params, volume, "ternary", mask, dims)


def level_distances(
    params: Any, volume: Any, levels: str, *, mask: Mask = None, dims: Dims = None
) -> dict[str, jax.Array]:
    r"""How far a network is from a binary or ternary one.

    .. math::
      \frac{\mathrm{mean}_i \, |w_i - Q(w_i)|}{V}

    for every layer, with :math:`Q` as `binarize` or `ternarize`: 0 where all weights
    are at their levels. Weights spread evenly over the box have 1/2 (binary) or 1/4
    (ternary).

    Args:
      params: Any tree of parameters.
      volume: The height ``V`` of the levels: a finite number, a tree of these (or a
        prefix), or a function of the parameters such as `he_volume`.
      levels: ``"binary"`` or ``"ternary"``.
      mask: Which leaves to measure, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one.

    Returns:
      One number a weight, or one for each of the layers that are stacked in it, by the
      leaf's path. In float32 at least; 0 for a leaf without elements; infinite if ``V``
      is 0 and the weights are not.

    Raises:
      ValueError: ``V`` is negative, NaN, or infinite or rounded to 0 in the weights'
        dtype, as far as it is known before tracing; a tree does not match the
        parameters; a rule meets a leaf without fans; weights are packed; or
        ``levels`` is neither.
      TypeError: ``volume`` is a schedule, or a weight is no floating-point array of 16,
        32 or 64 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"kernel": jnp.array([[0.5, -0.5, 0.0, 0.25]])}
      >>> wr.level_distances(params, 0.5, "ternary")
      {"['kernel']": Array(0.125, dtype=float32)}
    """
    check_levels(levels)
    scales = scales_of("level_distances", params, volume, mask, dims)
    paths = jax.tree_util.tree_leaves_with_path(params)
    stacked = stack_axes("level_distances", params, mask, dims, known=True)
    return {
        leaf_path(paths[i][0]): _distance(w, scales[i], levels, stacked[i])
        for i, w in each(params, scales)
    }


def quantize_every(
    steps: Any,
    levels: str,
    volume: Any,
    *,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Quantizes the weights after every so many steps; training goes on from there.

    With :math:`\hat w = w + u` the weight that the updates propose, in each step whose
    number (from 1) is a multiple of ``steps``

    .. math::
      w \leftarrow Q(\hat w)

    with :math:`Q` as `binarize` or `ternarize`; in the others updates are left as they
    are, bit for bit. The optimizer's state is not changed.

    After ``optax.apply_updates`` weights are at their levels exactly, wherever some
    update leads there: always at 0, and at ``V`` for weights of the same sign from
    ``V / 2`` to ``2 V``. Others may stop short of it by a rounding of the old weight or
    of the update, whichever is coarser. `binarize` and `ternarize` leave none. From
    infinity no update leads back: such a weight becomes NaN.

    The paper quantizes every two epochs under `volumized` Adam, which draws weights to
    the walls in between, with the same volume:

        >>> import optax
        >>> import weightreg as wr
        >>> V, two_epochs = 0.1, 2 * 468
        >>> tx = optax.chain(
        ...     wr.volumized(optax.adam(2e-4), V, alpha=0.95),
        ...     wr.quantize_every(two_epochs, "ternary", V),
        ... )

    .. warning::
      This must be the last link of a chain. Updates that a later link changes do not
      land on a level. Leaves that an earlier link freezes it moves, unless ``mask``
      leaves them out. Running statistics of batch normalizations are those of weights
      before they are quantized: renew them before such a network is used, by some
      forward passes in training mode.

    Args:
      steps: How many steps lie between: 1 or more, in 32 bits; may be traced.
      levels: ``"binary"`` or ``"ternary"``.
      volume: The height ``V`` of the levels: a finite number, schedule or traced array,
        a tree of these or a prefix of one, or a function of the parameters.
      mask: Which leaves to quantize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, except that
      one that cannot hold all of the parameter's values is widened.

    Raises:
      ValueError: ``steps`` is less than 1 or too large; ``levels`` is neither; ``V`` is
        negative, NaN, or infinite or rounded to 0 in the weights' dtype, as far as it
        is known before tracing; a tree does not match the parameters; a rule meets a
        leaf without fans; or ``update`` is not given ``params``.
      TypeError: ``steps`` is no integer, or a weight is no floating-point array of 16,
        32 or 64 bits.

    References:
      Ziyin et al., 2020, section 5.4.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(optax.sgd(0.1), wr.quantize_every(2, "binary", 0.5))
      >>> params, grads = jnp.array([[0.375, -0.25]]), jnp.array([[1.25, 1.25]])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params)
      [[ 0.25  -0.375]]
      [[ 0.5 -0.5]]
    """
    steps = check_count("steps", steps, 1, traced=True)
    if not isinstance(steps, Tracer) and steps > np.iinfo(np.int32).max:
        raise ValueError(f"steps must be less than 2**31, but is {steps}.")
    check_levels(levels)
    check_argument(volume)

    def init_fn(params):
        state = CountState.zero()
        scales_of("quantize_every", params, volume, mask, dims, state.count)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        after = state.next()
        due = after.count % jnp.asarray(steps, jnp.int32) == 0
        scales = scales_of("quantize_every", params, volume, mask, dims, state.count)
        quantized = {
            i: _to_level(w, u, scales[i], levels, due)
            for i, w, u in each_with_update(params, updates, scales)
        }
        return replaced(updates, quantized, params), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scales_of(
    caller: str,
    params: Any,
    volume: Any,
    mask: Mask,
    dims: Dims,
    count: jax.typing.ArrayLike | None = None,
) -> dict[int, jax.Array]:
    """The height ``V`` of every weight's levels, by its position among the leaves.

    It is in the weight's dtype and broadcasts to its shape. Schedules are evaluated at
    the step ``count``; without one they are refused.
    """
    check_argument(volume)
    volumes = volumes_of(caller, params, volume, mask, dims, count)
    stack_axes(caller, params, mask, dims, known=False)  # refuses a dims that is wrong
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {
        i: _scale(f"volume at {leaf_path(paths[i][0])}", volumes[i], w)
        for i, w in each(params, volumes)
    }


def codes(
    w: jax.Array, scale: jax.Array, levels: str
) -> tuple[jax.Array | None, jax.Array]:
    """Whether a weight's level is not 0 (``None``: it never is), and is negative."""
    if levels == "binary":
        return None, ~(w >= 0)
    # Twice a number is exact, which half of V might not be, and where it overflows it
    # is still on the right side.
    nonzero = 2 * jnp.abs(w) > scale
    return nonzero, nonzero & (w < 0)


def level(
    nonzero: jax.Array | None, negative: jax.Array, scale: jax.Array
) -> jax.Array:
    """The inverse of `codes`: a choice between numbers, so that none is rounded.

    A scale that is NaN makes all of them NaN.
    """
    outer = jnp.where(negative, -scale, scale)
    if nonzero is None:
        return outer
    return jnp.where(nonzero | jnp.isnan(scale), outer, 0)


def check_levels(levels: Any) -> None:
    """Refuses all but the names of the two kinds of levels."""
    if not isinstance(levels, str) or levels not in PLANES:
        raise ValueError(f"levels must be 'binary' or 'ternary', not {levels!r}.")


def _scale(where: str, volume: Any, leaf: jax.Array) -> jax.Array:
    """Rounds a layer's ``V`` to the dtype of its weights, with as many axes or none."""
    if not is_real(volume):
        raise TypeError(
            f"{where} must be a number or an array (the value of a schedule, since "
            f"there is no step count), not {volume!r}."
        )
    if leaf.size and not isinstance(volume, Tracer):
        with np.errstate(over="ignore"):
            known = np.asarray(volume).astype(np.float64).astype(leaf.dtype)
        vanishes = (known == 0) & (np.asarray(volume) != 0)
        if np.any(vanishes) or not np.all(np.isfinite(known.astype(np.float64))):
            raise ValueError(
                f"{where} must be finite in {leaf.dtype}, the dtype of the weights "
                f"that are moved to it, and not vanish there, but is {volume}."
            )
    wide = compute_dtype(leaf.dtype)
    scale = round_to(jnp.asarray(volume, wide), leaf.dtype).astype(leaf.dtype)
    # It gets as many axes as the weight, for users who forbid JAX to promote ranks.
    missing = leaf.ndim - scale.ndim if scale.ndim else 0
    return scale.reshape((1,) * missing + scale.shape)


def _quantize(
    caller: str, params: Any, volume: Any, levels: str, mask: Mask, dims: Dims
) -> Any:
    scales = scales_of(caller, params, volume, mask, dims)
    nearest = {i: _nearest(w, scales[i], levels) for i, w in each(params, scales)}
    return replaced(params, nearest, params)


@functools.partial(jax.jit, static_argnums=2)  # Equal shapes share a trace.
def _nearest(w: jax.Array, scale: jax.Array, levels: str) -> jax.Array:
    """Moves every weight to its level; NaN has none."""
    return jnp.where(jnp.isnan(w), w, level(*codes(w, scale, levels), scale))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _distance(w, scale, levels, stacked):
    dtype = compute_dtype(w.dtype)
    axes = [a for a in range(w.ndim) if a not in stacked]
    gap = jnp.abs(w.astype(dtype) - _nearest(w, scale, levels).astype(dtype))
    # Only what is not at its level is divided, or a V of 0 would divide 0.
    share = jnp.where(gap == 0, gap, gap / scale.astype(dtype))
    return jnp.sum(share, axes) / max(math.prod(w.shape[a] for a in axes), 1)


@functools.partial(jax.jit, static_argnums=3)
def _to_level(p, u, scale, levels, due):
    """Changes one weight's update to lead to a level if a quantization is due."""
    p_dtype, u_dtype = p.dtype, jnp.promote_types(p.dtype, u.dtype)
    dtype = compute_dtype(u_dtype)
    p, u = p.astype(dtype), u.astype(dtype)
    proposed = land(p, u, p_dtype, u_dtype)
    target = _nearest(proposed, scale.astype(dtype), levels)
    increment = reach(p, target, target > 0, p_dtype, u_dtype)
    return jnp.where(due & ~jnp.isnan(proposed), increment, u).astype(u_dtype)
