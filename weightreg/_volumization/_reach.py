"""Increments that land exactly where they should once they have been added.

An Optax transformation returns an increment, and ``optax.apply_updates`` adds it in
floating point. ``p + (t - p)`` misses ``t`` by one rounding for about every tenth
float32 weight, and by far in bfloat16. `reach` finds the increment that does not
miss, or that stops short of ``t`` where no increment reaches it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

SUPPORTED = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def compute_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """A dtype of at least 32 bits that holds values of all ``dtypes`` exactly."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


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
