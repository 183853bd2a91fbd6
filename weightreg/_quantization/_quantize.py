"""Binary and ternary weights: each weight goes to one of two or three levels."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from optax._src.base import NO_PARAMS_MSG  # not public, but the error users know

from weightreg._core._numbers import at, check_count, is_real
from weightreg._core._trees import leaves_like, show_path
from weightreg._core._weights import Dims, Mask, stack_axes
from weightreg._volumization._reach import compute_dtype, land, reach, round_to
from weightreg._volumization._volumes import check_argument, volumes_of

# How many bits of a weight `codes` gives.
PLANES = {"binary": 1, "ternary": 2}


class QuantizeState(NamedTuple):
    """State of `quantize_every`.

    Attributes:
      count: Steps taken; int32 scalar.
    """

    count: jax.typing.ArrayLike


def binarize(params: Any, volume: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    r"""Moves every weight to one of two levels, the walls of its box.

    .. math::
      w \mapsto \begin{cases} V & w \ge 0 \\ -V & \text{otherwise} \end{cases}

    in the weights' own dtype, to which ``V`` is rounded. NaN stays NaN; where hardware
    takes subnormal numbers for 0, so does this. The derivative by the weights is 0.

    Args:
      params: Any tree of parameters.
      volume: As in `volumize`, finite, but no schedule, since there is no step count.
      mask: Which leaves to binarize: a tree of booleans, or a function of the
        parameters that makes one. By default all weights, as `weight_mask` says.
      dims: What the axes of the weights mean, for rules: see `weight_layers`.

    Returns:
      The parameters, of the same structure, shapes and dtypes. Leaves that are no
      weights are passed on as they are.

    Raises:
      ValueError: ``V`` is negative, NaN, or infinite or rounded to 0 in the weights'
        dtype, as far as it is known before tracing; trees do not match; a rule for a
        leaf without fans; ``params`` are packed.
      TypeError: ``volume`` is a schedule, or a weight no floating-point array of 16, 32
        or 64 bits.

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
      params: As in `binarize`.
      volume: As in `binarize`.
      mask: As in `binarize`.
      dims: As in `binarize`.

    Returns:
      As `binarize`.

    Raises:
      ValueError: As `binarize`.
      TypeError: As `binarize`.

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
      params: As in `binarize`.
      volume: As in `binarize`.
      levels: ``"binary"`` or ``"ternary"``.
      mask: As in `binarize`.
      dims: As in `binarize`; axes that it does not name stack layers.

    Returns:
      One number a weight, or one for each of the layers that are stacked in it, by the
      leaf's path. In float32 at least; 0 for a leaf without elements; infinite if ``V``
      is 0 and the weights are not.

    Raises:
      ValueError: As `binarize`, or ``levels`` is neither.
      TypeError: As `binarize`.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"kernel": jnp.array([[0.5, -0.5, 0.0, 0.25]])}
      >>> wr.level_distances(params, 0.5, "ternary")
      {"['kernel']": Array(0.125, dtype=float32)}
    """
    check_levels(levels)
    return {
        weight.path: _distance(weight.leaf, weight.scale, levels, weight.stacked)
        for weight in weights_with_scales(
            "level_distances", params, volume, mask, dims
        ).values()
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
      It must be the last link of a chain. Updates that a later link changes do not
      land on a level. Running statistics of batch normalizations are those of weights
      before they are quantized: renew them before such a network is used, by some
      forward passes in training mode.

    Args:
      steps: How many steps lie between: 1 or more, in 32 bits; may be traced.
      levels: ``"binary"`` or ``"ternary"``.
      volume: As in `volumize`, finite; numbers may be schedules of the steps.
      mask: As in `binarize`.
      dims: As in `binarize`.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, except that
      one that cannot hold all of the parameter's values is widened.

    Raises:
      ValueError: On construction or in ``init``: ``steps`` less than 1 or too large,
        ``levels`` is neither, or as `binarize`. In ``update``: ``params`` not passed.
      TypeError: ``steps`` is no integer, or a weight as in `binarize`.

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
    steps = _check_steps(steps)
    check_levels(levels)
    check_argument(volume)

    def scales(params, count=None):
        return weights_with_scales("quantize_every", params, volume, mask, dims, count)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        scales(params, count)
        return QuantizeState(count=count)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        count = optax.safe_increment(state.count)
        due = count % steps == 0
        weights = scales(params, state.count)
        flat = leaves_like("updates", updates, params, list(weights))
        for index, weight in weights.items():
            update = jnp.asarray(flat[index])
            flat[index] = _to_level(weight.leaf, update, weight.scale, levels, due)
        updates = jax.tree.unflatten(jax.tree.structure(params), flat)
        return updates, QuantizeState(count=count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Weight(NamedTuple):
    """One weight, and the height of its levels.

    Attributes:
      path: Of the leaf.
      leaf: The weight.
      scale: ``V``, in the weight's dtype, which broadcasts to its shape.
      stacked: Axes that stack layers.
    """

    path: str
    leaf: jax.Array
    scale: jax.Array
    stacked: tuple[int, ...]


def weights_with_scales(
    caller: str,
    params: Any,
    volume: Any,
    mask: Mask,
    dims: Dims,
    count: jax.Array | None = None,
) -> dict[int, Weight]:
    """All weights of a tree by their position among its leaves."""
    check_argument(volume)
    _, volumes = volumes_of(caller, params, volume, mask, dims)
    stacked = stack_axes(params, dims)
    weights = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for index, (path, leaf) in enumerate(leaves):
        volume = volumes[index]
        if volume is None:
            continue
        leaf, where = jnp.asarray(leaf), show_path(path)
        if count is not None:
            volume = at(f"volume at {where}", volume, count, leaf.shape)
        scale = _scale(f"volume at {where}", volume, leaf)
        weights[index] = Weight(where, leaf, scale, stacked[index])
    return weights


def codes(
    w: jax.Array, scale: jax.Array, levels: str
) -> tuple[jax.Array | None, jax.Array]:
    """Whether a weight's level is not 0 (None: it never is), and whether negative."""
    if levels == "binary":
        return None, ~(w >= 0)
    # Twice a number is exact, half of V might not be; an overflow is on the right side.
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
    return jnp.where(nonzero, outer, jnp.where(jnp.isnan(scale), scale, 0))


def check_levels(levels: Any) -> None:
    """Refuses all but the two names."""
    if not isinstance(levels, str) or levels not in PLANES:
        raise ValueError(f"levels must be 'binary' or 'ternary', not {levels!r}.")


def _check_steps(steps: Any) -> Any:
    """Integers of Python and NumPy, or of JAX, as ``inject_hyperparams`` makes them."""
    if isinstance(steps, Tracer):
        if steps.shape or not jnp.issubdtype(steps.dtype, jnp.integer):
            raise TypeError(f"steps must be an integer, not {steps!r}.")
        return steps.astype(jnp.int32)
    count = check_count("steps", steps, 1)
    if count > np.iinfo(np.int32).max:
        raise ValueError(f"steps must be less than 2**31, but is {count}.")
    return count


def _scale(where: str, volume: Any, leaf: jax.Array) -> jax.Array:
    """A layer's ``V`` in the dtype of its weights, with as many axes or none."""
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
    # As many axes as the weight, for users who forbid JAX to promote ranks.
    missing = leaf.ndim - scale.ndim if scale.ndim else 0
    return scale.reshape((1,) * missing + scale.shape)


def _quantize(caller, params, volume, levels, mask, dims):
    leaves, treedef = jax.tree.flatten(params)
    weights = weights_with_scales(caller, params, volume, mask, dims)
    for index, weight in weights.items():
        leaves[index] = _nearest(weight.leaf, weight.scale, levels)
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnums=2)  # traced once for all weights of a shape
def _nearest(w: jax.Array, scale: jax.Array, levels: str) -> jax.Array:
    """Every weight's level; NaN has none."""
    return jnp.where(jnp.isnan(w), w, level(*codes(w, scale, levels), scale))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _distance(w, scale, levels, stacked):
    dtype = compute_dtype(w.dtype)
    axes = [a for a in range(w.ndim) if a not in stacked]
    gap = jnp.abs(w.astype(dtype) - _nearest(w, scale, levels).astype(dtype))
    # Of what is not at its level, or a V of 0 would divide 0.
    share = jnp.where(gap == 0, gap, gap / scale.astype(dtype))
    return jnp.sum(share, axes) / max(math.prod(w.shape[a] for a in axes), 1)


@functools.partial(jax.jit, static_argnums=3)
def _to_level(p, u, scale, levels, due):
    """One weight's update, which leads to its level if a quantization is due."""
    p_dtype, u_dtype = p.dtype, jnp.promote_types(p.dtype, u.dtype)
    dtype = compute_dtype(u_dtype)
    p, u = p.astype(dtype), u.astype(dtype)
    proposed = land(p, u, p_dtype, u_dtype)
    target = _nearest(proposed, scale.astype(dtype), levels)
    increment = reach(p, target, target > 0, p_dtype, u_dtype)
    return jnp.where(due & ~jnp.isnan(proposed), increment, u).astype(u_dtype)
