"""The numerics of WEISSI: value and gradient from the norms of all layers.

The energy, a product of a thousand norms, is never formed but as a fraction and a power
of two, and gradients are in closed form: a chain of derivatives would pass through the
energy, which may be out of range where the gradient is not.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from weightreg._exponents import Weights
from weightreg._norms import (
    Axes,
    Norm,
    measure,
    parse_norm,
    power_iteration,
    start_vector,
)
from weightreg._numbers import check_scalar
from weightreg._reach import compute_dtype
from weightreg._scaled import Scaled, add, halve, or_one, split, times_power

_WARM_UP = 30  # power iterations in init, where they cost nothing


class Form(NamedTuple):
    """What is computed; static under ``jit``."""

    energy: bool
    complexity: bool
    log: bool
    norm: Norm
    complexity_norm: Norm

    @classmethod
    def parse(cls, energy, complexity, log, norm, complexity_norm) -> "Form":
        """Checks what a user has given; strengths known to be 0 cost nothing."""
        return cls(
            _is_wanted("energy", energy),
            _is_wanted("complexity", complexity),
            bool(log),
            parse_norm("norm", norm),
            parse_norm("complexity_norm", complexity_norm),
        )

    def is_spectral(self) -> bool:
        return "spectral" in (self.norm, self.complexity_norm)


class Hyper(NamedTuple):
    """Strengths, and the exponent of every weight; scalars that may be traced."""

    energy: Any
    complexity: Any
    powers: list[jax.Array]


class Size(NamedTuple):
    """One leaf's norms, of its shape with ones for a layer's own axes."""

    eta: Scaled
    eta_gradient: jax.Array
    g: Scaled
    g_gradient: jax.Array


class _Layers(NamedTuple):
    """The numbers of all layers, stacked ones too, as vectors."""

    powers: jax.Array
    eta: Scaled
    g: Scaled

    @classmethod
    def of(cls, powers: list[jax.Array], sizes: list[Size]) -> "_Layers":
        spread = [
            jnp.broadcast_to(n, s.eta.fraction.shape)
            for n, s in zip(powers, sizes, strict=True)
        ]
        join = lambda *parts: jnp.concatenate([x.ravel() for x in parts])  # noqa: E731
        eta = jax.tree.map(join, *(s.eta for s in sizes))
        return cls(join(*spread), eta, jax.tree.map(join, *(s.g for s in sizes)))

    def product(self, strength: Scaled) -> Scaled:
        """``lambda_e`` times the product of powers of norms."""
        parts = zip(self.sum_of_logs(), _log2(strength), strict=True)
        fraction, exponent = (a + b for a, b in parts)
        whole = lax.stop_gradient(jnp.floor(exponent))
        rest = fraction + (exponent - whole)
        carry = lax.stop_gradient(jnp.round(rest))
        zero = self.any_zero() | (strength.fraction == 0)
        # What this limit is multiplied by is out of range, and int32 is not yet.
        exponent = jnp.clip(whole + carry, -(2**20), 2**20).astype(jnp.int32)
        return Scaled(jnp.where(zero, 0, jnp.exp2(rest - carry)), exponent)

    def sum_of_logs(self) -> tuple[jax.Array, jax.Array]:
        """``sum_l n_l log2(eta_l)`` without layers of zeros: two numbers to be added.

        Exponents are integers, whose sum is exact, and the rest of a logarithm is
        small: in one float32, the sum over a thousand layers would lose four digits.
        """
        fraction, exponent = (jnp.sum(self.powers * part) for part in _log2(self.eta))
        return fraction, exponent

    def any_zero(self) -> jax.Array:
        """Whether the product is 0."""
        return jnp.any((self.eta.fraction == 0) & (self.powers > 0))

    def ratio(self) -> jax.Array:
        """``g(W) / eta(W)``, and 0 for zeros."""
        fraction = self.g.fraction / or_one(self.eta.fraction)
        return times_power(fraction, self.g.exponent - self.eta.exponent)


def penalty_value(form: Form, energy: Any, complexity: Any, weights: Weights):
    """The value, to be differentiated by the weights as `penalty_gradients` says.

    The chain rule would pass through the energy, which may be out of range where the
    gradient is not.
    """
    hyper = Hyper(energy, complexity, weights.powers)
    sizes = measure_all(form, weights)
    value = _total(form, hyper, lax.stop_gradient(sizes))
    return value + _zero(penalty_gradients(form, hyper, sizes), weights.arrays)


@jax.custom_jvp
def _zero(gradients: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    """0, whose derivative by ``weights`` is ``gradients``."""
    del gradients
    return jnp.zeros([], _dtype(weights))


@_zero.defjvp
def _zero_jvp(primals, tangents):
    gradients, weights = primals
    zero = _zero(gradients, weights)
    terms = [
        jnp.sum(g * dw.astype(g.dtype)).astype(zero.dtype)
        for g, dw in zip(gradients, tangents[1], strict=True)
    ]
    return zero, sum(terms, jnp.zeros_like(zero))


def _dtype(arrays: list[jax.Array]) -> jnp.dtype:
    return compute_dtype(*(a.dtype for a in arrays))


@functools.partial(jax.jit, static_argnums=0)
def _total(form: Form, hyper: Hyper, sizes: list[Size]) -> jax.Array:
    """The penalty itself."""
    if not sizes:  # an empty product is 1
        empty = jnp.ones([]) if form.energy and not form.log else jnp.zeros([])
        return empty * jnp.asarray(hyper.energy, jnp.float32)
    layers = _Layers.of(hyper.powers, sizes)
    dtype = layers.eta.fraction.dtype
    energy, complexity = (split(x, dtype) for x in hyper[:2])
    total = jnp.zeros([], dtype)
    if form.energy and form.log:
        log = math.log(2) * sum(layers.sum_of_logs())
        total += Scaled(energy.fraction * log, energy.exponent).value()
    elif form.energy:
        total += layers.product(energy).value()
    if form.complexity:
        ratios = jnp.sum(layers.ratio())
        total += Scaled(complexity.fraction * ratios, complexity.exponent).value()
    return total


@functools.partial(jax.jit, static_argnums=0)
def penalty_gradients(form: Form, hyper: Hyper, sizes: list[Size]) -> list[jax.Array]:
    r"""The penalty's gradient by every weight.

    .. math::
      \Big( \frac{n_l E}{\eta_l} - \frac{\lambda_c g_l}{\eta_l^2} \Big) \nabla \eta_l
      + \frac{\lambda_c}{\eta_l} \nabla g_l

    with the energy ``E``, strength included, or ``lambda_e`` for the sum of logarithms.
    """
    if not sizes:
        return []
    layers = _Layers.of(hyper.powers, sizes)
    eta, dtype = layers.eta, layers.eta.fraction.dtype
    energy, complexity = (split(x, dtype) for x in hyper[:2])
    if form.energy and not form.log:
        energy = layers.product(energy)
    shift = energy.exponent - eta.exponent, complexity.exponent - eta.exponent
    by_energy = Scaled(layers.powers * energy.fraction * form.energy, shift[0])
    by_ratio = Scaled(-layers.ratio() * complexity.fraction * form.complexity, shift[1])
    total = add(by_energy, by_ratio)
    exponent = jnp.maximum(total.exponent, shift[1])
    by_g = Scaled(complexity.fraction, shift[1]).at(exponent)
    half, rest = halve(exponent, dtype)
    # XLA would compute these numbers anew in the loop over every weight, on CPU, if
    # they did not end in divisions, which it takes for too expensive.
    divisor = or_one(eta.fraction)
    numbers = total.at(exponent) / divisor, by_g / divisor, 1 / half, 1 / rest
    factors = jnp.stack(numbers)
    ends = np.cumsum([s.eta.fraction.size for s in sizes])[:-1].tolist()
    rows = jnp.split(factors, ends, axis=1)
    return [_gradient(form, row, size) for row, size in zip(rows, sizes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)  # traced once for all weights of a shape
def _gradient(form: Form, factors: jax.Array, size: Size) -> jax.Array:
    by_eta, by_g, *powers = factors.reshape(4, *size.eta.fraction.shape)
    gradient = by_eta * size.eta_gradient
    if form.complexity:
        gradient += by_g * size.g_gradient
    return gradient * powers[0] * powers[1]


def any_zero(hyper: Hyper, sizes: list[Size]) -> jax.Array:
    """Whether the energy is 0."""
    return _Layers.of(hyper.powers, sizes).any_zero() if sizes else jnp.array(False)


def _log2(x: Scaled) -> tuple[jax.Array, jax.Array]:
    """The logarithm, as a number of at most 1/2 and an integer; 0 and 0 for 0."""
    fraction = or_one(x.fraction)
    whole = lax.stop_gradient(jnp.round(jnp.log2(fraction)))
    rest = jnp.log2(times_power(fraction, -whole.astype(jnp.int32)))
    return rest, jnp.where(x.fraction == 0, 0, whole + x.exponent)


def measure_all(form: Form, weights: Weights) -> list[Size]:
    pairs = zip(weights.arrays, weights.axes(), strict=True)
    return [_measure_one(form, axes, array) for array, axes in pairs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure_one(form: Form, axes: Axes, array: jax.Array) -> Size:
    return Size(
        *measure(array, form.norm, axes), *measure(array, form.complexity_norm, axes)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _iterate_one(
    form: Form, axes: Axes, iterations: int, array: jax.Array, vector: jax.Array
) -> tuple[Size, jax.Array]:
    """`_measure_one` with power iterations for spectral norms, and new vectors."""
    sigma, direction, vector = power_iteration(array, vector, axes, iterations)

    def size(norm: Norm) -> tuple[Scaled, jax.Array]:
        if norm == "spectral":
            return sigma, direction
        return measure(array, norm, axes)

    return Size(*size(form.norm), *size(form.complexity_norm)), vector


def iterate_all(
    form: Form, weights: Weights, vectors: list[jax.Array], iterations: int
) -> tuple[list[Size], list[jax.Array]]:
    rows = zip(weights.arrays, weights.axes(), vectors, strict=True)
    sizes = [_iterate_one(form, axes, iterations, a, v) for a, axes, v in rows]
    return [size for size, _ in sizes], [vector for _, vector in sizes]


def start_vectors(form: Form, weights: Weights) -> list[jax.Array]:
    """Singular vectors of the weights as they are in the beginning."""
    key = jax.random.key(0)
    pairs = list(zip(weights.arrays, weights.axes(), strict=True))
    vectors = [
        start_vector(array, axes, jax.random.fold_in(key, i))
        for i, (array, axes) in enumerate(pairs)
    ]
    return iterate_all(form, weights, vectors, _WARM_UP)[1]


def _is_wanted(name: str, strength: Any) -> bool:
    """Checks a strength, and says whether its term is not known to be 0."""
    if callable(strength):
        return True
    check_scalar(name, strength, 0, math.inf)
    return isinstance(strength, jax.Array) or strength != 0
