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

    def neighbour(d, upward):
        limit = jnp.where(upward, jnp.inf, -jnp.inf).astype(d_dtype)
        return lax.nextafter(d.astype(d_dtype), limit).astype(d.dtype)

    def past(d):
        w = land(p, d, p_dtype, d_dtype)
        return jnp.where(outward, w > t, w < t)

    # The exact t - p lies between the nearest increment and one of its neighbours,
    # and landing is monotone, so that these three contain the answer ...
    nearest = round_to(t - p, d_dtype)
    outer = neighbour(nearest, outward)
    inner = neighbour(nearest, ~outward)
    short = land(p, nearest, p_dtype, d_dtype) != t
    best = jnp.where(short & ~past(outer), outer, nearest)
    best = jnp.where(past(nearest), inner, best)
    # ... but where the hardware flushes subnormal numbers: zero is always reached.
    return jnp.where(past(best), -p, best)


@reach.defjvp
def _reach_jvp(p_dtype, d_dtype, primals, tangents):
    p, t, outward = primals
    p_dot, t_dot, _ = tangents
    return reach(p, t, outward, p_dtype, d_dtype), t_dot - p_dot
