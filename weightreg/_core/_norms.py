"""Norms of weights of any size, and numbers of any size that are made of them.

The square of a weight of 1e-30 is out of the range of float32, and so is a product of
a thousand norms. Weights are therefore scaled by powers of two, which is exact, and
results are kept as a fraction and a power of two.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from weightreg._core._arguments import compute_dtype
from weightreg._core._mesh import gathered, placed
from weightreg._core._weights import Need, WeightLayer

Norm: TypeAlias = str | tuple[float, float]
"""One of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair ``(p, q)``."""

FROBENIUS: Norm = (2.0, 2.0)
_NAMED: dict[str, Norm] = {
    "frobenius": FROBENIUS,
    "l1": (1.0, 1.0),
    "spectral": "spectral",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """The number ``fraction * 2**exponent``, with which one can calculate.

    Attributes:
      fraction: A number in float32 or float64.
      exponent: An integer in int32, of a shape that broadcasts against it.
    """

    fraction: jax.Array
    exponent: Any = 0

    def value(self) -> jax.Array:
        """The number itself, or infinity or 0 where it is out of the dtype's range."""
        return times_power(self.fraction, self.exponent)

    def at(self, exponent: jax.Array) -> jax.Array:
        """The fraction of the number with another exponent."""
        return times_power(self.fraction, self.exponent - exponent)

    def normal(self) -> "Scaled":
        """The same number with its fraction in [1/2, 1), or 0 if the number is 0."""
        exponent = jnp.where(self.fraction == 0, 0, exponent_of(self.fraction))
        fraction = times_power(self.fraction, -exponent)
        return Scaled(fraction, self.exponent + exponent)

    def log2(self) -> tuple[jax.Array, jax.Array]:
        """The logarithm as a number of at most 1/2 and an integer, both 0 for 0."""
        fraction = or_one(self.fraction)
        whole = exponent_of(fraction * math.sqrt(2)) - 1
        rest = jnp.log2(times_power(fraction, -whole))
        return rest, jnp.where(self.fraction == 0, 0, self.exponent + whole)

    def __mul__(self, other: Any) -> "Scaled":
        """The product with another such number, or with an ordinary one."""
        if not isinstance(other, Scaled):
            other = Scaled(other)
        return Scaled(self.fraction * other.fraction, self.exponent + other.exponent)

    def __truediv__(self, other: "Scaled") -> "Scaled":
        """The quotient, where division by 0 is taken for division by 1."""
        fraction = self.fraction / or_one(other.fraction)
        return Scaled(fraction, self.exponent - other.exponent)

    def __sub__(self, other: "Scaled") -> "Scaled":
        """The difference."""
        exponent = common_exponent(self, other)
        return Scaled(self.at(exponent) - other.at(exponent), exponent)


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


def need_of(*norms: Norm) -> Need:
    """What of a layer's axes its norms depend on."""
    by_unit = any(norm != "spectral" and norm[0] != norm[1] for norm in norms)

    def need(layer: WeightLayer) -> Hashable:
        if by_unit:
            return layer.stack_axes, layer.output_axes
        # A matrix has the singular values of its transpose.
        sides = frozenset(layer.input_axes), frozenset(layer.output_axes)
        return layer.stack_axes, "spectral" in norms and frozenset(sides)

    return need


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


@functools.partial(jax.jit, static_argnums=(1, 2))  # Equal shapes share a trace.
def norm_of(x: jax.Array, norm: Norm, axes: Axes) -> Scaled:
    """The norm of every layer in a leaf, with ones for the layer's own axes.

    Its derivative is the gradient that `measure` gives, also where an automatic one has
    none, as that of a singular value which is there twice.
    """
    return _norm_of(x.astype(compute_dtype(x.dtype)), norm, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of(x: jax.Array, norm: Norm, axes: Axes) -> Scaled:
    return measure(x, (norm,), axes)[0][0]


@_norm_of.defjvp
def _norm_of_jvp(norm, axes, primals, tangents):
    ((size, gradient),) = measure(primals[0], (norm,), axes)
    return size, _derivative(gradient, tangents[0], size, axes.inputs + axes.outputs)


def measure(
    weight: jax.Array, norms: tuple[Norm, ...], axes: Axes
) -> list[tuple[Scaled, jax.Array]]:
    """Some norms of every layer in a leaf, each with its gradient by the leaf.

    The norms have the leaf's shape with ones for the layer's own axes, and gradients
    have the leaf's shape. They are 0 where there are none, at a layer of zeros, and
    where there are several, at a weight or unit of zeros. All are in float32 at least.
    """
    w = weight.astype(compute_dtype(weight.dtype))
    own = axes.inputs + axes.outputs
    ps = tuple({n[0]: None for n in norms if n in ((1, 1), (2, 2))})
    found = dict(zip(ps, p_norms(w, ps, own), strict=True)) if ps else {}

    def one(norm: Norm) -> tuple[Scaled, jax.Array]:
        if isinstance(norm, str):
            return _largest_singular(w, axes)
        p, q = norm
        if p == q:
            size = found[p] if p in found else p_norm(w, p, own)
            return size, slope(w, size, p, own)
        # Next to a large unit a small one may add nothing and still have a gradient.
        units = p_norm(w, p, axes.inputs)
        least = -(2**20)  # This is the exponent where there are no units.
        top = jnp.max(units.exponent, axes.outputs, keepdims=True, initial=least)
        across = units.at(top)
        size = p_norm(across, q, axes.outputs)
        gradient = slope(across, size, q, axes.outputs) * slope(
            w, units, p, axes.inputs
        )
        return Scaled(size.fraction, size.exponent + top), gradient

    return [one(norm) for norm in norms]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def p_norms(x: jax.Array, ps: tuple[float, ...], axes: tuple[int, ...]) -> list[Scaled]:
    """The p-norms over some axes, which are kept, for some p of 1 and 2, in one read.

    Squares are summed at three scales, of which one neither overflows nor loses digits.
    Sizes need no scale.
    """
    if math.prod(x.shape[a] for a in axes) == 1:
        # Any norm of one number is its size. Of its square XLA would multiply the
        # constants by themselves, which is out of range.
        return [p_norm(x, 1, axes) for _ in ps]
    maxexp = jnp.finfo(x.dtype).maxexp
    far = 25 * maxexp // 32 - 1  # This is 99 for float32.
    # In this order nothing is out of range for numbers that need it, nor for 0.
    up = x * 2.0 ** (maxexp - 1) * x * 2.0 ** (2 * far - maxexp + 1)
    terms = {1.0: [jnp.abs(x)], 2.0: [x * x, (x * 2.0**-far) ** 2, up]}
    total = iter(_sums([term for p in ps for term in terms[p]], axes))

    def norm(p: float) -> Scaled:
        plain = next(total)
        if p == 1:
            return Scaled(plain, jnp.zeros_like(plain, jnp.int32))
        down, up = next(total), next(total)
        small = plain < 2.0 ** (-9 * maxexp // 16)  # Terms below 1e-38 may be lost.
        large = plain > 2.0 ** (maxexp - 2)
        squares = jnp.where(small, up, jnp.where(large, down, plain))
        exponent = jnp.where(small, -far, jnp.where(large, far, 0))
        return Scaled(jnp.sqrt(squares), exponent.astype(jnp.int32))

    return [norm(p) for p in ps]


def _sums(terms: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of several arrays over some axes, which are kept.

    XLA makes one kernel of them on a GPU, and of their second stage another one, where
    they are one reduction. A CPU's loops are faster for each sum by itself.
    """

    def together(*terms: jax.Array) -> list[jax.Array]:
        add = lambda some, others: tuple(map(operator.add, some, others))  # noqa: E731
        zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
        return [jnp.expand_dims(x, axes) for x in lax.reduce(terms, zeros, add, axes)]

    def apart(*terms: jax.Array) -> list[jax.Array]:
        return [jnp.sum(x, axes, keepdims=True) for x in terms]

    gpus = {"cuda": together, "rocm": together}
    return lax.platform_dependent(*terms, default=apart, **gpus)


@p_norms.defjvp
def _p_norms_jvp(ps, axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    sizes = p_norms(x, ps, axes)
    slopes = [slope(x, size, p, axes) for size, p in zip(sizes, ps, strict=True)]
    pairs = zip(slopes, sizes, strict=True)
    return sizes, [_derivative(own, x_dot, size, axes) for own, size in pairs]


def p_norm(
    x: jax.Array, p: float, axes: tuple[int, ...], scale: jax.Array | None = None
) -> Scaled:
    """The p-norm over some axes, which are kept, of numbers that are scaled first.

    Where no ``scale`` is given it is `scale_of` these numbers, for which they are read
    once more.
    """
    return _p_norm(x, scale_of(x, axes) if scale is None else scale, p, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _p_norm(x: jax.Array, scale: jax.Array, p: float, axes: tuple[int, ...]) -> Scaled:
    y = x * scale
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    if p == 1:
        size = total(jnp.abs(y))
    elif p == 2:
        size = jnp.sqrt(total(y * y))
    else:  # The largest is 1 after division, and so is any power of it.
        largest = jnp.max(jnp.abs(y), axes, keepdims=True, initial=0)
        ratio = jnp.abs(y) * (1 / or_one(largest))
        size = largest * (total(ratio**p) ** (1 / p) if p < math.inf else 1)
    return Scaled(size, 1 - exponent_of(scale))


@_p_norm.defjvp
def _p_norm_jvp(p, axes, primals, tangents):
    (x, scale), (x_dot, _) = primals, tangents
    size = _p_norm(x, scale, p, axes)
    return size, _derivative(slope(x, size, p, axes), x_dot, size, axes)


def _derivative(
    gradient: jax.Array, x_dot: jax.Array, size: Scaled, axes: tuple[int, ...]
) -> Scaled:
    """The derivative of a norm along ``x_dot``, with the exponent of the norm."""
    terms = gradient * times_power(x_dot, -size.exponent)
    no_dot: Any = np.zeros(size.exponent.shape, jax.dtypes.float0)
    return Scaled(jnp.sum(terms, axes, keepdims=True), no_dot)


def slope(x: jax.Array, size: Scaled, p: float, axes: tuple[int, ...]) -> jax.Array:
    r"""The gradient of a p-norm, :math:`\mathrm{sgn}(x) (|x| / \|x\|_p)^{p - 1}`.

    For p of infinity, numbers of the largest size share it.
    """
    if p == 1:
        return jnp.sign(x)
    unit = x * power_of_two(-size.exponent, x.dtype) * (1 / or_one(size.fraction))
    if p == 2:
        return unit
    if p < math.inf:
        return jnp.sign(unit) * jnp.abs(unit) ** (p - 1)
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    ties = (jnp.abs(x) == largest) & (largest > 0)
    count = jnp.sum(ties, axes, keepdims=True, dtype=x.dtype)
    return jnp.sign(x) * ties * (1 / or_one(count))


def scale_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The power of two that takes the largest number over some axes to 2 to 4."""
    info = jnp.finfo(x.dtype)
    size = jnp.abs(lax.stop_gradient(x))
    largest = jnp.max(size, axes, keepdims=True, initial=float(info.tiny))
    bits = lax.bitcast_convert_type(largest, f"int{info.bits}")
    # The exponent's bits of 1 / x are these, but for a constant.
    infinity = ((1 << info.nexp) - 1) << info.nmant
    return lax.bitcast_convert_type(infinity - (bits & infinity), x.dtype)


def power_iteration(
    weight: jax.Array, vector: jax.Array, axes: Axes, iterations: int
) -> tuple[Scaled, jax.Array, jax.Array]:
    """Estimates the spectral norm and its gradient, which `measure` gives exactly.

    The vector is an estimate of the right singular vectors, such as `start_vector`
    makes. Each iteration improves it, except where the weight is 0, and the last one is
    returned as well. The norms are never too large but for rounding.
    """
    weight = weight.astype(compute_dtype(weight.dtype))
    scale = scale_of(weight, axes.inputs + axes.outputs)
    scaled = weight * scale
    stack = axes.stack(weight.ndim)
    rows, columns, both = (
        (*stack, *axes.inputs),
        (*stack, *axes.outputs),
        range(weight.ndim),
    )
    own = lambda x: tuple(range(len(stack), x.ndim))  # noqa: E731

    def product(x, of_x, y, of_y, out) -> jax.Array:  # A reshape loses shardings.
        where = placed(weight, out, None)
        return jnp.einsum(
            x, of_x, y, of_y, out, precision=lax.Precision.HIGHEST, out_sharding=where
        )

    def unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.sum(x * x, own(x), keepdims=True))
        return jnp.where(size > 0, x * (1 / or_one(size)), otherwise)

    fixed, right = lax.stop_gradient((scaled, vector.astype(scaled.dtype)))
    # The first vector is whole on every device. For its matrix product with a weight
    # that devices split, XLA may gather the weight, but not for a sum of products.
    beside = jnp.transpose(right, [columns.index(a) for a in sorted(columns)])
    image = jnp.einsum(fixed * jnp.expand_dims(beside, axes.inputs), both, rows)
    left = image * 0
    for _ in range(iterations):
        left = unit(image, left)
        right = unit(product(fixed, both, left, rows, columns), right)
        image = product(fixed, both, right, columns, rows)
    sigma = left * product(scaled, both, right, columns, rows)
    direction = product(left, rows, right, columns, both)
    sigma = jnp.expand_dims(jnp.sum(sigma, own(sigma)), axes.inputs + axes.outputs)
    right = gathered(right, range(len(stack)))  # as it was given
    return Scaled(sigma, 1 - exponent_of(scale)), direction, right.astype(vector.dtype)


def start_vector(weight: jax.Array, axes: Axes, key: jax.Array) -> jax.Array:
    """Random unit vectors ``(*stack, *outputs)`` to start `power_iteration` from."""
    stack = axes.stack(weight.ndim)
    shape = [weight.shape[a] for a in (*stack, *axes.outputs)]
    vector = jax.random.normal(key, shape, compute_dtype(weight.dtype))
    own = tuple(range(len(stack), vector.ndim))
    return vector / or_one(jnp.sqrt(jnp.sum(vector**2, own, keepdims=True)))


def _largest_singular(x: jax.Array, axes: Axes) -> tuple[Scaled, jax.Array]:
    """The largest singular value of every layer's kernel matrix, and its gradient."""
    own, stack = axes.inputs + axes.outputs, axes.stack(x.ndim)
    if not x.size:
        zero = jnp.sum(x, own, keepdims=True)
        return Scaled(zero, zero.astype(jnp.int32)), x
    scale = scale_of(x, own)
    x *= scale
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
    return Scaled(jnp.expand_dims(sigma, own), 1 - exponent_of(scale)), direction


def common_exponent(x: Scaled, y: Scaled) -> jax.Array:
    """The larger exponent of the two, where that of a 0 counts only next to a 0."""
    low, no_x, no_y = -(2**24), x.fraction == 0, y.fraction == 0
    return jnp.maximum(
        jnp.where(no_x & ~no_y, low, x.exponent),
        jnp.where(no_y & ~no_x, low, y.exponent),
    )


def concatenate(numbers: list[Scaled]) -> Scaled:
    """One vector of all the numbers of some arrays, whole on every device."""
    dtype = compute_dtype(*(x.fraction.dtype for x in numbers))

    def vector(x: jax.Array) -> jax.Array:
        return gathered(x, ()).reshape(-1)

    # Without this barrier XLA compiles all that makes the numbers into one large kernel
    # with what joins them; without the other it joins them wherever one is needed.
    numbers = lax.optimization_barrier(numbers)
    fractions = [vector(x.fraction.astype(dtype)) for x in numbers]
    exponents = [vector(x.exponent) for x in numbers]
    joined = Scaled(jnp.concatenate(fractions), jnp.concatenate(exponents))
    return lax.optimization_barrier(joined).normal()


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


def two_factors(exponent: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``2**exponent`` as two factors by which to multiply numbers of size one.

    One factor may be out of range where its product with such a number is not. Where
    two do not suffice, the product is infinite or 0 anyway.
    """
    limit = jnp.finfo(dtype).maxexp - 2
    exponent = jnp.clip(exponent, -2 * limit, 2 * limit)
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


def scaled(x: jax.typing.ArrayLike, dtype: Any) -> Scaled:
    """Numbers of at least 0, which may be subnormal or out of the dtype's range."""
    if not isinstance(x, jax.Array):  # Traced arrays are of this class.
        fraction, exponent = np.frexp(np.asarray(x, np.float64))
        return Scaled(jnp.asarray(fraction, dtype), jnp.asarray(exponent, jnp.int32))
    x, offset = x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0
    if x.dtype == jnp.float32:  # XLA takes subnormal operands, such as 1e-38, for 0.
        bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
        subnormal = (bits > 0) & (bits < 2**23)
        x = jnp.where(subnormal, bits.astype(x.dtype), x)
        offset = jnp.where(subnormal, -149, 0)
    parts = Scaled(x, offset).normal()
    return Scaled(parts.fraction.astype(dtype), parts.exponent)


@jax.jit
def cumulative_product(factors: Scaled) -> Scaled:
    """The products of the first one, two, ... numbers of a vector."""

    def step(product: Scaled, factor: Scaled) -> tuple[Scaled, Scaled]:
        product = (product * factor).normal()
        return product, product

    one = Scaled(jnp.ones([], factors.fraction.dtype), jnp.zeros([], jnp.int32))
    return lax.scan(step, one, factors.normal())[1]


def or_one(x: jax.Array) -> jax.Array:
    """``x`` with ones for zeros, to divide by without a NaN in the derivative."""
    return jnp.where(x == 0, 1, x)
