"""Norms of weights and their gradients, without overflow or underflow.

The square of a weight of 1e-30 is in the range of no dtype. So norms are `Scaled`, and
weights are scaled by a power of two, which is exact, before anything is summed.
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
from weightreg._core._scaled import (
    Scaled,
    exponent_of,
    or_one,
    power_of_two,
    times_power,
)
from weightreg._core._weights import WeightLayer

Norm: TypeAlias = str | tuple[float, float]
"""``"frobenius"``, ``"l1"``, ``"spectral"``, or ``(p, q)``: see `parse_norm`."""

_NAMED: dict[str, Norm] = {
    "frobenius": (2.0, 2.0),
    "l1": (1.0, 1.0),
    "spectral": "spectral",
}


class Axes(NamedTuple):
    """The roles of a weight's axes, as in `WeightLayer`; all others are stacked."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, layer: WeightLayer) -> "Axes":
        """The axes of a layer."""
        return cls(layer.input_axes, layer.output_axes)

    def stack(self, ndim: int) -> tuple[int, ...]:
        """The other axes of a leaf."""
        return tuple(a for a in range(ndim) if a not in self.inputs + self.outputs)


def parse_norm(argument: str, norm: Any) -> Norm:
    r"""Checks a norm: ``(p, q)`` for an entrywise one, or ``"spectral"``.

    .. math::
      \|W\|_{p,q} = \Big( \sum_j \|W_j\|_p^q \Big)^{1/q}

    with ``W_j`` all that feeds unit ``j`` (Liu et al., eq. 4).

    Raises:
      ValueError: It is neither a name nor a pair of numbers from 1 to infinity.
    """
    if isinstance(norm, str) and norm in _NAMED:
        return _NAMED[norm]
    if isinstance(norm, tuple | list) and len(norm) == 2:
        kinds = int | float | np.number
        numbers = all(isinstance(x, kinds) and not isinstance(x, bool) for x in norm)
        if numbers and all(x >= 1 for x in norm):  # below 1 it is no norm
            return float(norm[0]), float(norm[1])
    raise ValueError(
        f"{argument} must be one of {', '.join(map(repr, _NAMED))}, or a pair (p, q) "
        f"of numbers from 1 to infinity, not {norm!r}."
    )


def measure(weight: jax.Array, norm: Norm, axes: Axes) -> tuple[Scaled, jax.Array]:
    """The norm of every layer in a leaf, and its gradient by the leaf.

    Args:
      weight: The leaf, of any real floating dtype.
      norm: As `parse_norm` returns it.
      axes: Roles of the leaf's axes.

    Returns:
      The norms, of the leaf's shape with ones for the layer's own axes; and the
      gradient, of the leaf's shape. It is 0 for a layer of zeros, where the norm has
      none, and 0 at zeros of weights and units where it has several. Both are in
      float32 at least.
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
    # Units are scaled one by one: next to a large one, a small one's part in the norm
    # may be nothing, but not its gradient.
    scaled, exponents = _normalize(weight, axes.inputs)
    units, within = _entrywise(scaled, p, axes.inputs)
    least = -(2**20)  # of no units; that of a unit of zeros is less than any other
    exponent = jnp.max(exponents, axes.outputs, keepdims=True, initial=least)
    size, across = _entrywise(times_power(units, exponents - exponent), q, axes.outputs)
    return Scaled(size, exponent), within * across


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all of one shape
def norm_of(x: jax.Array, norm: Norm, axes: Axes) -> Scaled:
    """The norms that `measure` gives, differentiated as it says: in closed form.

    Derivatives of its steps pass through numbers that may be out of range.
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
    """The spectral norm and its gradient as `measure` gives them, but approximately.

    Args:
      weight: The leaf.
      vector: Estimate of the right singular vectors, as `start_vector` makes it.
      axes: Roles of the leaf's axes.
      iterations: How often to improve the estimate.

    Returns:
      The norms (never too large but for rounding), the gradient, and the better
      estimate, which stays what it was where the weight is 0.
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

    def product(x, of_x, y, of_y, out) -> jax.Array:  # no sharding survives a reshape
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
    """The sum of ``abs(x)**p`` for p of 1 or 2, scaled if it or its terms need it."""
    maxexp = jnp.finfo(x.dtype).maxexp
    scale = 25 * maxexp // 32  # 100 for float32
    total = lambda x: jnp.sum(jnp.abs(x) ** p, axes, keepdims=True)  # noqa: E731
    plain = total(x)
    too_small = plain < 2.0 ** (-9 * maxexp // 16)  # 2e-22: terms below 1e-38 are lost
    too_large = plain > 2.0 ** (maxexp - 2)
    shift = jnp.where(too_small, scale, jnp.where(too_large, -scale, 0))
    rescaled = lambda: total(x * power_of_two(shift, x.dtype))  # noqa: E731
    # A CPU would store the products. A GPU forms them in passing, while a condition
    # would have it wait for the host.
    ordinary = ~jnp.any(too_small | too_large)
    value = lax.platform_dependent(
        cpu=lambda: lax.cond(ordinary, lambda: plain, rescaled), default=rescaled
    )
    exponent = exponent_of(value) & ~1  # even, for its root
    return Scaled(times_power(value, -exponent), exponent - p * shift)


def _normalize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Scales by a power of two, so that the largest entry is in [1/2, 1)."""
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
    ratio = magnitude / or_one(largest)  # exactly 1 somewhere, for 1 has any power
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
    # Zeros have no singular vectors; those of ones will do, times 0.
    zero = jnp.all(matrix == 0, axis=(-2, -1), keepdims=True)
    left, sigma, right = jnp.linalg.svd(jnp.where(zero, 1, matrix), full_matrices=False)
    direction = jnp.where(zero, 0, left[..., :, :1] * right[..., :1, :])
    direction = direction.reshape(moved.shape)
    direction = jnp.transpose(direction, [order.index(a) for a in range(x.ndim)])
    if spec is not None:
        direction = jax.sharding.reshard(direction, spec)
    sigma = jnp.where(zero[..., 0, 0], 0, sigma[..., 0])
    return jnp.expand_dims(sigma, own), direction
