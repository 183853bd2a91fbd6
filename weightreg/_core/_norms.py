"""Norms of weights and their gradients, without overflow or underflow.

The square of a weight of 1e-30 is out of the range of float32, and so is a product of a
thousand norms. Such numbers are a fraction and a power of two, by which weights are
scaled where sums need it. That is exact.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from weightreg._core._arguments import compute_dtype
from weightreg._core._mesh import placed
from weightreg._core._weights import WeightLayer

Norm: TypeAlias = str | tuple[float, float]
"""One of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair ``(p, q)``."""

FROBENIUS: Norm = (2.0, 2.0)
_NAMED: dict[str, Norm] = {
    "frobenius": FROBENIUS,
    "l1": (1.0, 1.0),
    "spectral": "spectral",
}


class Scaled(NamedTuple):
    """The number ``fraction * 2**exponent``.

    The fraction, in float32 or float64, is of size one or 0. The exponent, in int32, is
    of a shape that broadcasts against it.
    """

    fraction: jax.Array
    exponent: jax.Array

    def value(self) -> jax.Array:
        """The number itself, or infinity or 0 where it is out of the dtype's range."""
        return times_power(self.fraction, self.exponent)

    def at(self, exponent: jax.Array) -> jax.Array:
        """The fraction of the number with another exponent."""
        return times_power(self.fraction, self.exponent - exponent)


class Axes(NamedTuple):
    """The input and output axes of a `WeightLayer`. All other axes stack layers."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, layer: WeightLayer) -> "Axes":
        """The axes of one layer."""
        return cls(layer.input_axes, layer.output_axes)

    def stack(self, ndim: int) -> tuple[int, ...]:
        """The axes of a leaf of so many dimensions that stack layers."""
        return tuple(a for a in range(ndim) if a not in self.inputs + self.outputs)


def parse_norm(argument: str, norm: Any) -> Norm:
    r"""Checks a norm, and gives it as a pair ``(p, q)`` or as ``"spectral"``.

    .. math::
      \|W\|_{p,q} = \Big( \sum_j \|W_j\|_p^q \Big)^{1/q}

    Here ``W_j`` is all that feeds unit ``j`` (Liu et al., eq. 4).

    Raises:
      ValueError: It is neither a name nor a pair of numbers from 1 to infinity.
    """
    if isinstance(norm, str) and norm in _NAMED:
        return _NAMED[norm]
    if isinstance(norm, tuple | list) and len(norm) == 2:
        kinds = int | float | np.number
        numbers = all(isinstance(x, kinds) and not isinstance(x, bool) for x in norm)
        if numbers and all(x >= 1 for x in norm):  # Below 1 it would be no norm.
            return float(norm[0]), float(norm[1])
    raise ValueError(
        f"{argument} must be one of {', '.join(map(repr, _NAMED))}, or a pair (p, q) "
        f"of numbers from 1 to infinity, not {norm!r}."
    )


def measure(weight: jax.Array, norm: Norm, axes: Axes) -> tuple[Scaled, jax.Array]:
    """The norm of every layer in a leaf, and its gradient by the leaf.

    The norms have the leaf's shape with ones for the layer's own axes, and the gradient
    has the leaf's shape. It is 0 where there is none, at a layer of zeros, and where
    there are several, at a weight or unit of zeros. Both are in float32 at least.
    """
    weight = weight.astype(compute_dtype(weight.dtype))
    both = axes.inputs + axes.outputs
    if isinstance(norm, str):
        scaled, exponent = _normalize(weight, both)
        sigma, direction = _largest_singular(scaled, axes)
        return Scaled(sigma, exponent), direction
    p, q = norm
    if p == q == 1:
        return _scaled_sum(weight, 1, both), jnp.sign(weight)
    if p == q == 2:
        squared = _scaled_sum(weight, 2, both)
        size = Scaled(_root(squared.fraction, 2), squared.exponent >> 1)
        unit = times_power(weight, -size.exponent) * (1 / or_one(size.fraction))
        return size, unit
    if p == q:
        scaled, exponent = _normalize(weight, both)
        size, direction = _entrywise(scaled, p, both)
        return Scaled(size, exponent), direction
    # Units are scaled one by one. Next to a large unit a small one may add nothing to
    # the norm and still have a gradient.
    scaled, exponents = _normalize(weight, axes.inputs)
    units, within = _entrywise(scaled, p, axes.inputs)
    least = -(2**20)  # This is the exponent where there are no units.
    exponent = jnp.max(exponents, axes.outputs, keepdims=True, initial=least)
    size, across = _entrywise(times_power(units, exponents - exponent), q, axes.outputs)
    return Scaled(size, exponent), within * across


@functools.partial(jax.jit, static_argnums=(1, 2))  # Equal shapes share a trace.
def norm_of(x: jax.Array, norm: Norm, axes: Axes) -> Scaled:
    """The norms that `measure` gives, whose derivative is the gradient that it gives.

    The chain rule would pass through numbers that may be out of range.
    """
    return _norm_of(x.astype(compute_dtype(x.dtype)), norm, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of(x: jax.Array, norm: Norm, axes: Axes) -> Scaled:
    size, _ = measure(x, norm, axes)
    return Scaled(size.fraction, jnp.broadcast_to(size.exponent, size.fraction.shape))


@_norm_of.defjvp
def _norm_of_jvp(norm, axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    size, gradient = measure(x, norm, axes)
    exponent = jnp.broadcast_to(size.exponent, size.fraction.shape)
    terms = gradient * times_power(x_dot, -exponent)
    fraction_dot = jnp.sum(terms, axes.inputs + axes.outputs, keepdims=True)
    no_dot: Any = np.zeros(exponent.shape, jax.dtypes.float0)
    return Scaled(size.fraction, exponent), Scaled(fraction_dot, no_dot)


def power_iteration(
    weight: jax.Array, vector: jax.Array, axes: Axes, iterations: int
) -> tuple[Scaled, jax.Array, jax.Array]:
    """Estimates the spectral norm and its gradient, which `measure` gives exactly.

    The vector is an estimate of the right singular vectors, such as `start_vector`
    makes. Each iteration improves it, except where the weight is 0, and the last one is
    returned as well. The norms are never too large but for rounding.
    """
    weight = weight.astype(compute_dtype(weight.dtype))
    scaled, exponent = _normalize(weight, axes.inputs + axes.outputs)
    stack = axes.stack(weight.ndim)
    rows, columns, both = (
        (*stack, *axes.inputs),
        (*stack, *axes.outputs),
        range(weight.ndim),
    )
    own = lambda x: tuple(range(len(stack), x.ndim))  # noqa: E731

    def product(x, of_x, y, of_y, out) -> jax.Array:  # A reshape loses shardings.
        where = placed(weight, out, None if out is both else stack)
        return jnp.einsum(
            x, of_x, y, of_y, out, precision=lax.Precision.HIGHEST, out_sharding=where
        )

    def unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.sum(x * x, own(x), keepdims=True))
        return jnp.where(size > 0, x * (1 / or_one(size)), otherwise)

    fixed, right = lax.stop_gradient((scaled, vector.astype(scaled.dtype)))
    left = product(fixed, both, right, columns, rows) * 0
    for _ in range(iterations):
        left = unit(product(fixed, both, right, columns, rows), left)
        right = unit(product(fixed, both, left, rows, columns), right)
    sigma = left * product(scaled, both, right, columns, rows)
    direction = product(left, rows, right, columns, both)
    sigma = jnp.expand_dims(jnp.sum(sigma, own(sigma)), axes.inputs + axes.outputs)
    return Scaled(sigma, exponent), direction, right.astype(vector.dtype)


def start_vector(weight: jax.Array, axes: Axes, key: jax.Array) -> jax.Array:
    """Random unit vectors ``(*stack, *outputs)`` to start `power_iteration` from."""
    stack = axes.stack(weight.ndim)
    shape = [weight.shape[a] for a in (*stack, *axes.outputs)]
    vector = jax.random.normal(key, shape, compute_dtype(weight.dtype))
    own = tuple(range(len(stack), vector.ndim))
    return vector / or_one(jnp.sqrt(jnp.sum(vector**2, own, keepdims=True)))


def _scaled_sum(x: jax.Array, p: int, axes: tuple[int, ...]) -> Scaled:
    """The sum of ``abs(x)**p`` for p of 1 or 2, whose terms are scaled if need be."""
    maxexp = jnp.finfo(x.dtype).maxexp
    scale = 25 * maxexp // 32  # This is 100 for float32.
    total = lambda x: jnp.sum(jnp.abs(x) ** p, axes, keepdims=True)  # noqa: E731
    plain = total(x)
    too_small = plain < 2.0 ** (-9 * maxexp // 16)  # Terms below 1e-38 may be lost.
    too_large = plain > 2.0 ** (maxexp - 2)
    shift = jnp.where(too_small, scale, jnp.where(too_large, -scale, 0))
    rescaled = lambda: total(x * power_of_two(shift, x.dtype))  # noqa: E731
    # A CPU would store the scaled weights, and should not where they are not needed. A
    # GPU forms them in passing, while a condition would make it wait for the host.
    ordinary = ~jnp.any(too_small | too_large)
    value = lax.platform_dependent(
        cpu=lambda: lax.cond(ordinary, lambda: plain, rescaled), default=rescaled
    )
    exponent = exponent_of(value) & ~1  # It is even, so that its half is an integer.
    return Scaled(times_power(value, -exponent), exponent - p * shift)


def _normalize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Scales by a power of two so that the largest entry is in [1/2, 1)."""
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    exponent = exponent_of(largest)
    return times_power(x, -exponent), exponent


def _entrywise(
    x: jax.Array, p: float, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The p-norm of numbers of size one, and its gradient."""
    magnitude = jnp.abs(x)
    if p == 1:
        return jnp.sum(magnitude, axes, keepdims=True), jnp.sign(x)
    if p == math.inf:
        size = jnp.max(magnitude, axes, keepdims=True, initial=0)
        largest = (magnitude == size) & (size > 0)
        ties = jnp.sum(largest, axes, keepdims=True, dtype=x.dtype)
        return size, jnp.sign(x) * largest / jnp.maximum(ties, 1)
    if p == 2:
        size = _root(jnp.sum(x * x, axes, keepdims=True), 2)
        return size, x * (1 / or_one(size))
    largest = lax.stop_gradient(jnp.max(magnitude, axes, keepdims=True, initial=0))
    ratio = magnitude / or_one(largest)  # The largest is 1, and so is any power of it.
    size = largest * _root(jnp.sum(ratio**p, axes, keepdims=True), p)
    return size, jnp.sign(x) * (magnitude / or_one(size)) ** (p - 1)


def _root(x: jax.Array, p: float) -> jax.Array:
    """The p-th root, with a derivative of 0 at 0."""
    safe = or_one(x)
    return jnp.where(x == 0, 0, jnp.sqrt(safe) if p == 2 else safe ** (1 / p))


def _largest_singular(x: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The largest singular value of every layer's kernel matrix, and its gradient."""
    own, stack = axes.inputs + axes.outputs, axes.stack(x.ndim)
    if not x.size:
        return jnp.zeros_like(jnp.sum(x, own, keepdims=True)), x
    whole, spec = placed(x, range(x.ndim), stack), placed(x, range(x.ndim), None)
    if whole is not None:
        x = jax.sharding.reshard(x, whole)
    order = (*stack, *own)
    moved = jnp.transpose(x, order)
    rows = math.prod(x.shape[a] for a in axes.inputs)
    matrix = moved.reshape(*moved.shape[: len(stack)], rows, -1)
    # A matrix of zeros has no singular vectors. Those of ones, times 0, serve for it.
    zero = jnp.all(matrix == 0, axis=(-2, -1), keepdims=True)
    left, sigma, right = jnp.linalg.svd(jnp.where(zero, 1, matrix), full_matrices=False)
    direction = jnp.where(zero, 0, left[..., :, :1] * right[..., :1, :])
    direction = direction.reshape(moved.shape)
    direction = jnp.transpose(direction, [order.index(a) for a in range(x.ndim)])
    if spec is not None:
        direction = jax.sharding.reshard(direction, spec)
    sigma = jnp.where(zero[..., 0, 0], 0, sigma[..., 0])
    return jnp.expand_dims(sigma, own), direction


def common_exponent(x: Scaled, y: Scaled) -> jax.Array:
    """The larger exponent of the two, where that of a 0 counts only next to a 0."""
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
    # Two factors do not suffice to go from the least number to the largest.
    limit = jnp.finfo(x.dtype).maxexp - 2
    exponent = jnp.clip(exponent, -3 * limit, 3 * limit)
    third = exponent // 3
    half = (exponent - third) // 2
    parts = third, half, exponent - third - half
    first, second, last = (power_of_two(part, x.dtype) for part in parts)
    return x * first * second * last


def halve(exponent: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``2**-exponent`` as two factors by which to multiply numbers of size one.

    One factor may be out of range where its product with such a number is not. Where
    two do not suffice, the product is infinite or 0 anyway.
    """
    limit = jnp.finfo(dtype).maxexp - 2
    exponent = jnp.clip(-exponent, -2 * limit, 2 * limit)
    half = exponent >> 1
    return power_of_two(half, dtype), power_of_two(exponent - half, dtype)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent``, a normal number, for which ``ldexp`` takes thirty operations."""
    info = jnp.finfo(dtype)
    bits = lax.convert_element_type(exponent - info.minexp + 1, f"int{info.bits}")
    return lax.bitcast_convert_type(bits << info.nmant, dtype)


def exponent_of(x: jax.Array) -> jax.Array:
    """The exponent that ``frexp`` gives, with a fraction in [1/2, 1).

    That of 0 and of subnormal numbers is one less than that of the least normal number.
    """
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(jnp.abs(x)), f"int{info.bits}")
    return ((bits >> info.nmant) + info.minexp).astype(jnp.int32)


def split(x: jax.typing.ArrayLike, dtype: Any) -> Scaled:
    """A number of at least 0 as fraction and exponent, even a subnormal one.

    XLA takes subnormal operands, such as 1e-38 in float32, for 0.
    """
    x, offset = jnp.asarray(x, dtype), 0
    if x.dtype == jnp.float32:
        bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
        subnormal = (bits > 0) & (bits < 2**23)
        x = jnp.where(subnormal, bits.astype(x.dtype), x)
        offset = jnp.where(subnormal, -149, 0)
    exponent = jnp.where(x == 0, 0, exponent_of(x))  # The 0 keeps the derivative at 0.
    return Scaled(times_power(x, -exponent), exponent + offset)


def scaled(x: jax.typing.ArrayLike, dtype: Any) -> Scaled:
    """A number of at least 0, which may be out of the range of the dtype."""
    if isinstance(x, jax.Array):  # Traced arrays are of this class too.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        parts = split(wide, wide.dtype)
        return Scaled(parts.fraction.astype(dtype), parts.exponent)
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return Scaled(jnp.asarray(fraction, dtype), jnp.asarray(exponent, jnp.int32))


def normalize(x: Scaled) -> Scaled:
    """The same number with its fraction in [1/2, 1), or 0 if the number is 0."""
    fraction, exponent = split(x.fraction, x.fraction.dtype)
    return Scaled(fraction, exponent + x.exponent)


@jax.jit
def cumulative_product(factors: Scaled) -> Scaled:
    """The products of the first one, two, ... numbers of a vector."""

    def step(product: Scaled, factor: Scaled) -> tuple[Scaled, Scaled]:
        fraction = product.fraction * factor.fraction
        product = normalize(Scaled(fraction, product.exponent + factor.exponent))
        return product, product

    one = Scaled(jnp.ones([], factors.fraction.dtype), jnp.zeros([], jnp.int32))
    return lax.scan(step, one, normalize(factors))[1]


def or_one(x: jax.Array) -> jax.Array:
    """``x`` with ones for zeros, to divide by without a NaN in the derivative."""
    return jnp.where(x == 0, 1, x)
