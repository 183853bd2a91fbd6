"""The box: weights that leave it are pulled to its wall, and land there exactly.

An Optax transformation returns an increment, and ``optax.apply_updates`` adds it in
floating point. ``p + (t - p)`` misses ``t`` by one rounding for about every tenth
float32 weight, and by far in bfloat16. `reach` finds the increment that does not
miss, or that stops short of ``t`` where no increment reaches it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from weightreg._core._arguments import compute_dtype, each_with_update, replaced


def confine(
    updates: Any,
    params: Any,
    volumes: Mapping[int, Any],
    alpha: Any,
    stepped: jax.Array | bool = True,
) -> tuple[Any, dict[int, jax.Array]]:
    """Changes updates so that weights stay in their boxes.

    Args:
      updates: What the optimizer would add to the parameters.
      params: The parameters.
      volumes: The wall of every weight that has one, by its position in ``params``.
      alpha: How much of what is outside is left there.
      stepped: Whether the updates are a step at all; if not, they stay as they are.

    Returns:
      The updates, and by position where the weights would have left their boxes.
    """
    walled = {i: v for i, v in volumes.items() if not _is_infinite(v)}
    pulled = {
        i: _pull(w, u, _broadcast(walled[i], w), alpha, stepped)
        for i, w, u in each_with_update(params, updates, walled)
    }
    updates = replaced(updates, {i: u for i, (u, _) in pulled.items()}, params)
    return updates, {i: outside for i, (_, outside) in pulled.items()}


@jax.jit  # Equal shapes share a trace.
def _pull(p, u, volume, alpha, stepped):
    """One weight's update, and where the weight was outside.

    Comparisons are such that rounding cannot turn them. XLA may contract a product
    inside of ``u`` and the sum with ``p`` to one rounding here and to two in
    ``optax.apply_updates``. So the sign is read off ``u > -p``, and with ``alpha = 0``
    an update is held back also where it passes the one that reaches the wall, whatever
    the sum says.
    """
    p_dtype, u_dtype = p.dtype, jnp.promote_types(p.dtype, u.dtype)
    dtype = compute_dtype(u_dtype)
    p, u, volume, alpha = (
        lax.convert_element_type(x, dtype) for x in (p, u, volume, alpha)
    )
    wall = round_to(volume, p_dtype)

    positive = lax.gt(u, lax.neg(p))
    distance = lax.abs(land(p, u, p_dtype, u_dtype))
    outside = _all(lax.gt(distance, wall), stepped)
    excess = lax.select(outside, lax.sub(distance, wall), lax.full_like(p, 0))
    target = round_to(lax.add(wall, damp(alpha, excess)), p_dtype)
    target = lax.select(positive, target, lax.neg(target))
    increment = _increment(p, target, positive, p_dtype, u_dtype)

    passes = lax.select(positive, lax.gt(u, increment), lax.lt(u, increment))
    hard = _all(lax.eq(alpha, dtype.type(0)), lax.lt(wall, dtype.type(np.inf)), stepped)
    # At alpha = 1 the increment is u but for rounding, and the derivative the same.
    exact = lax.select(lax.eq(alpha, dtype.type(1)), u, increment)
    exact = _with_derivative_of(lax.sub(target, p), exact)
    kept = lax.select(lax.bitwise_or(outside, _all(passes, hard)), exact, u)
    return lax.convert_element_type(kept, u_dtype), outside


def tied(update: jax.Array, moment: jax.Array) -> jax.Array:
    """``update`` as it is, computed from what it does not depend on.

    XLA makes weight and moment in one pass over memory if one is made of the other,
    and else computes the optimizer's step once for each: on TPUs that moves 65 bytes a
    parameter, and not Adam's 36. It does not see that no magnitude is below -1.
    """
    never = lax.lt(lax.abs(moment), moment.dtype.type(-1))
    return lax.select(never, lax.full_like(update, 0), update)


def damp(alpha: jax.Array, x: jax.Array) -> jax.Array:
    """``alpha x``, but 0 for ``alpha = 0`` also where ``x`` is infinite."""
    zero, infinity = x.dtype.type(0), x.dtype.type(np.inf)
    undefined = _all(lax.eq(lax.abs(x), infinity), lax.eq(alpha, zero))
    return lax.select(undefined, lax.full_like(x, 0), lax.mul(alpha, x))


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds to the nearest value of ``dtype``, in the dtype that ``x`` has.

    Casting there and back would say the same, but XLA may drop a pair of casts
    (``xla_allow_excess_precision``), and then the rounding is lost.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize >= x.dtype.itemsize:
        return x
    if x.dtype == jnp.float64 and dtype == jnp.float32:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype != jnp.float16:
        return rounded
    # reduce_precision flushes what is subnormal in float16 (below 6e-5: common
    # increments). Adding and taking away a large number rounds to its grid instead. The
    # sum is positive, which XLA does not see: without `abs` it takes both away.
    tiny, grid = float(info.tiny), float(info.smallest_subnormal)
    large = x.dtype.type(1.5 * 2.0 ** jnp.finfo(x.dtype).nmant * grid)
    is_subnormal = lax.lt(lax.abs(x), x.dtype.type(tiny))
    on_grid = lax.sub(lax.abs(lax.add(x, large)), large)
    return lax.select(is_subnormal, on_grid, rounded)


def land(p: jax.Array, d: jax.Array, p_dtype, d_dtype) -> jax.Array:
    """What ``optax.apply_updates`` makes of parameter ``p`` and increment ``d``."""
    both = jnp.promote_types(p_dtype, d_dtype)
    return round_to(round_to(lax.add(p, d), both), p_dtype)


def reach(p: jax.Array, t: jax.Array, outward: jax.Array, p_dtype, d_dtype):
    """The increment that takes ``p`` to ``t`` exactly, or else not quite to it.

    Args:
      p: Parameters, in the compute dtype.
      t: Targets, values of ``p_dtype`` in the compute dtype.
      outward: Whether "past ``t``" means above it (else below it).
      p_dtype: Dtype of the parameters as stored.
      d_dtype: Dtype of the increment as stored; holds every value of ``p_dtype``.

    Returns:
      Increments ``d``, values of ``d_dtype`` in the compute dtype, for which
      ``land(p, d)`` is ``t`` if some increment lands there, and else the nearest
      value that is not past ``t``. Its derivative is that of ``t - p``.
    """
    return _with_derivative_of(
        lax.sub(t, p), _increment(p, t, outward, p_dtype, d_dtype)
    )


def _increment(p, t, outward, p_dtype, d_dtype):
    """The increment that `reach` returns, without its derivative."""

    def within(w):  # false for NaN
        return lax.select(outward, lax.le(w, t), lax.ge(w, t))

    # The exact t - p lies between the nearest increment and its neighbour on the side
    # on which that one misses, and landing is monotone: one of the two is the answer.
    nearest = round_to(lax.sub(t, p), d_dtype)
    w = land(p, nearest, p_dtype, d_dtype)
    other = _neighbour(nearest, lax.lt(w, t), d_dtype)
    other_within = within(land(p, other, p_dtype, d_dtype))
    best = lax.select(_all(lax.ne(w, t), other_within), other, nearest)
    # But where the hardware flushes subnormal numbers both may be past t, and an
    # infinite p is past any. Zero is reached from everywhere else.
    return lax.select(lax.bitwise_or(within(w), other_within), best, lax.neg(p))


def _neighbour(d: jax.Array, upward: jax.Array, dtype) -> jax.Array:
    """The next value of ``dtype``; NaN past infinity and below a positive zero.

    ``lax.nextafter`` says the same with thrice the operations, for cases that
    increments do not need.
    """
    bits = jnp.dtype(f"int{8 * dtype.itemsize}")
    pattern = lax.bitcast_convert_type(lax.convert_element_type(d, dtype), bits)
    one = bits.type(1)
    away = lax.eq(lax.gt(d, d.dtype.type(0)), upward)
    moved = lax.select(away, lax.add(pattern, one), lax.sub(pattern, one))
    neighbour = lax.bitcast_convert_type(moved, dtype)
    return lax.convert_element_type(neighbour, d.dtype)


@jax.custom_jvp
def _with_derivative_of(function: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, which is differentiated as if it were ``function``."""
    del function
    return value


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals, tangents):
    return _with_derivative_of(*primals), tangents[0]


def _all(*conditions: jax.Array) -> jax.Array:
    return functools.reduce(lax.bitwise_and, conditions)


def _is_infinite(volume: Any) -> bool:
    """Whether it is known before tracing that no weight can be outside.

    Then nothing is computed at all: a comparison with infinity would already keep XLA
    from fusing the sum of weight and update as it does without.
    """
    return isinstance(volume, float | np.ndarray) and bool(np.all(np.isinf(volume)))


def _broadcast(volume: Any, weight: jax.Array) -> jax.Array:
    """A volume as an array, explicitly for users who forbid JAX to promote ranks."""
    volume = jnp.asarray(volume)
    return jnp.broadcast_to(volume, weight.shape) if volume.ndim else volume
