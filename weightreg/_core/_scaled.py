"""Numbers out of the range of any dtype, as a fraction and a power of two.

A product of a thousand norms is one. Scaling by a power of two is exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Scaled(NamedTuple):
    """The number ``fraction * 2**exponent``.

    Attributes:
      fraction: Float32 or float64; of size one, or 0.
      exponent: int32, of a shape that broadcasts against it.
    """

    fraction: jax.Array
    exponent: jax.Array

    def value(self) -> jax.Array:
        """The number itself, infinite or 0 where the dtype's range ends."""
        return times_power(self.fraction, self.exponent)

    def at(self, exponent: jax.Array) -> jax.Array:
        """The fraction that goes with another exponent."""
        return times_power(self.fraction, self.exponent - exponent)


def common_exponent(x: Scaled, y: Scaled) -> jax.Array:
    """The larger exponent; but next to another number a 0 has no say in it."""
    low, no_x, no_y = -(2**24), x.fraction == 0, y.fraction == 0
    return jnp.maximum(
        jnp.where(no_x & ~no_y, low, x.exponent),
        jnp.where(no_y & ~no_x, low, y.exponent),
    )


def add(x: Scaled, y: Scaled) -> Scaled:
    """The sum of two numbers."""
    exponent = common_exponent(x, y)
    return Scaled(x.at(exponent) + y.at(exponent), exponent)


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``x * 2**exponent``, rounded only where it leaves the range of the dtype."""
    # Three factors, for from the least number to the largest two do not suffice.
    limit = jnp.finfo(x.dtype).maxexp - 2
    exponent = jnp.clip(exponent, -3 * limit, 3 * limit)
    third = exponent // 3
    half = (exponent - third) // 2
    parts = third, half, exponent - third - half
    first, second, last = (power_of_two(part, x.dtype) for part in parts)
    return x * first * second * last


def halve(exponent: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``2**-exponent`` as two factors, for what is multiplied by numbers of size one.

    One may be out of range where a product with it is not, but two are enough: beyond
    them every such number but 0 has become infinite, or 0.
    """
    limit = jnp.finfo(dtype).maxexp - 2
    exponent = jnp.clip(-exponent, -2 * limit, 2 * limit)
    half = exponent >> 1
    return power_of_two(half, dtype), power_of_two(exponent - half, dtype)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent`` for a normal number; ldexp would be thirty operations."""
    info = jnp.finfo(dtype)
    bits = lax.convert_element_type(exponent - info.minexp + 1, f"int{info.bits}")
    return lax.bitcast_convert_type(bits << info.nmant, dtype)


def exponent_of(x: jax.Array) -> jax.Array:
    """The exponent with which a number is in [1/2, 1), as ``frexp`` has it.

    Subnormal numbers, which XLA takes for 0, have that of the least normal one.
    """
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(jnp.abs(x)), f"int{info.bits}")
    return ((bits >> info.nmant) + info.minexp).astype(jnp.int32)


def split(x: jax.typing.ArrayLike, dtype: Any) -> Scaled:
    """A number of at least 0 as fraction and exponent; subnormal ones count too.

    (XLA takes subnormal operands for 0, and 1e-38 is one in float32.)
    """
    x, offset = jnp.asarray(x, dtype), 0
    if x.dtype == jnp.float32:
        bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
        subnormal = (bits > 0) & (bits < 2**23)
        x = jnp.where(subnormal, bits.astype(x.dtype), x)
        offset = jnp.where(subnormal, -149, 0)
    exponent = jnp.where(x == 0, 0, exponent_of(x))  # else 0 would lose its derivative
    return Scaled(times_power(x, -exponent), exponent + offset)


def scaled(x: jax.typing.ArrayLike, dtype: Any) -> Scaled:
    """A number of at least 0, which may be out of the range of the dtype."""
    if isinstance(x, jax.Array):  # traced ones too
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        parts = split(wide, wide.dtype)
        return Scaled(parts.fraction.astype(dtype), parts.exponent)
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return Scaled(jnp.asarray(fraction, dtype), jnp.asarray(exponent, jnp.int32))


def normalize(x: Scaled) -> Scaled:
    """The same number with its fraction in [1/2, 1), or 0."""
    fraction, exponent = split(x.fraction, x.fraction.dtype)
    return Scaled(fraction, exponent + x.exponent)


@jax.jit
def cumulative_product(factors: Scaled) -> Scaled:
    """The products of the first one, two, ... numbers of a vector, all in range."""

    def step(product: Scaled, factor: Scaled) -> tuple[Scaled, Scaled]:
        fraction = product.fraction * factor.fraction
        product = normalize(Scaled(fraction, product.exponent + factor.exponent))
        return product, product

    one = Scaled(jnp.ones([], factors.fraction.dtype), jnp.zeros([], jnp.int32))
    return lax.scan(step, one, normalize(factors))[1]


def or_one(x: jax.Array) -> jax.Array:
    """``x``, but 1 for 0: a divisor that spoils neither value nor derivative."""
    return jnp.where(x == 0, 1, x)
