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
    alpha = jnp.asarray(alpha, dtype)
    wall = round_to(jnp.asarray(volume, dtype), p_dtype)
    p, u = p.astype(dtype), u.astype(dtype)

    positive = u > -p
    proposed = land(p, u, p_dtype, u_dtype)
    outside = (jnp.abs(proposed) > wall) & stepped
    excess = jnp.where(outside, jnp.abs(proposed) - wall, 0)
    target = round_to(wall + damp(alpha, excess), p_dtype)
    target = jnp.where(positive, target, -target)
    increment = reach(p, target, positive, p_dtype, u_dtype)

    passes = jnp.where(positive, u > increment, u < increment)
    hard = (alpha == 0) & (wall < jnp.inf) & stepped
    # At alpha = 1 the increment is u but for rounding, and the derivative the same.
    exact = jnp.where(alpha == 1, _with_derivative_of(increment, u), increment)
    kept = jnp.where(outside | (passes & hard), exact, u)
    return kept.astype(u_dtype), outside


def damp(alpha: jax.Array, x: jax.Array) -> jax.Array:
    """``alpha x``, but 0 for ``alpha = 0`` also where ``x`` is infinite."""
    return jnp.where((alpha == 0) & jnp.isinf(x), 0, alpha * x)


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
    # increments). Adding and taking away a large number rounds to its grid instead.
    tiny, grid = float(info.tiny), float(info.smallest_subnormal)
    large = 1.5 * 2.0 ** jnp.finfo(x.dtype).nmant * grid
    return jnp.where(jnp.abs(x) < tiny, (x + large) - large, rounded)


def land(p: jax.Array, d: jax.Array, p_dtype, d_dtype) -> jax.Array:
    """What ``optax.apply_updates`` makes of parameter ``p`` and increment ``d``."""
    return round_to(round_to(p + d, jnp.promote_types(p_dtype, d_dtype)), p_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
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

    def within(w):  # false for NaN
        return jnp.where(outward, w <= t, w >= t)

    # The exact t - p lies between the nearest increment and its neighbour on the side
    # on which that one misses, and landing is monotone: one of the two is the answer.
    nearest = round_to(t - p, d_dtype)
    w = land(p, nearest, p_dtype, d_dtype)
    other = _neighbour(nearest, w < t, d_dtype)
    other_within = within(land(p, other, p_dtype, d_dtype))
    best = jnp.where((w != t) & other_within, other, nearest)
    # But where the hardware flushes subnormal numbers both may be past t, and an
    # infinite p is past any. Zero is reached from everywhere else.
    return jnp.where(within(w) | other_within, best, -p)


@reach.defjvp
def _reach_jvp(p_dtype, d_dtype, primals, tangents):
    p, t, outward = primals
    p_dot, t_dot, _ = tangents
    return reach(p, t, outward, p_dtype, d_dtype), t_dot - p_dot


def _neighbour(d: jax.Array, upward: jax.Array, dtype) -> jax.Array:
    """The next value of ``dtype``; NaN past infinity and below a positive zero.

    ``lax.nextafter`` says the same with thrice the operations, for cases that
    increments do not need.
    """
    bits = jnp.int16 if dtype.itemsize == 2 else jnp.int32
    bits = jnp.int64 if dtype.itemsize == 8 else bits
    pattern = lax.bitcast_convert_type(d.astype(dtype), bits)
    step = jnp.where((d > 0) == upward, 1, -1).astype(bits)
    return lax.bitcast_convert_type(pattern + step, dtype).astype(d.dtype)


@jax.custom_jvp
def _with_derivative_of(function: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, which is differentiated as if it were ``function``."""
    del function
    return value


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals, tangents):
    return _with_derivative_of(*primals), tangents[0]


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
