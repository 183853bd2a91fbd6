"""The numerics of WEISSI: value and gradient from the norms of all layers.

The energy may be a product of a thousand norms, and is only formed as a fraction and a
power of two. Gradients are in closed form, since the chain rule would pass through the
energy, which may be out of range where the gradient is not.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from weightreg._core._arguments import check_boolean, check_scalar, compute_dtype
from weightreg._core._norms import (
    Axes,
    Norm,
    Scaled,
    add,
    common_exponent,
    halve,
    measure,
    or_one,
    parse_norm,
    power_iteration,
    scaled,
    start_vector,
    times_power,
)
from weightreg._weissi._exponents import Weights

_WARM_UP = 30  # This is the number of power iterations in init, which runs once.


class Form(NamedTuple):
    """What a penalty computes, which is static under ``jit``."""

    energy: bool
    complexity: bool
    log: bool
    norm: Norm
    complexity_norm: Norm
    log_of_zero: bool = False  # If not, the sum leaves layers of zeros out.

    @classmethod
    def parse(cls, energy, complexity, log, norm, complexity_norm) -> "Form":
        """Checks what a user has given, and leaves out terms of strength 0."""
        check_boolean("log", log)
        return cls(
            _is_wanted("energy", energy),
            _is_wanted("complexity", complexity),
            log,
            parse_norm("norm", norm),
            parse_norm("complexity_norm", complexity_norm),
        )

    def is_spectral(self) -> bool:
        return "spectral" in (self.norm, self.complexity_norm)


class Hyper(NamedTuple):
    """The strengths and the exponent of every weight, scalars that may be traced."""

    energy: Scaled
    complexity: Scaled
    powers: list[jax.Array]

    @classmethod
    def of(cls, energy: Any, complexity: Any, weights: Weights) -> "Hyper":
        dtype = compute_dtype(*(jnp.result_type(leaf) for leaf in weights.leaves))
        return cls(scaled(energy, dtype), scaled(complexity, dtype), weights.powers)


class Size(NamedTuple):
    """A leaf's norms, with ones for the axes of a layer, and their gradients."""

    eta: Scaled
    eta_gradient: jax.Array
    g: Scaled
    g_gradient: jax.Array


class _Layers(NamedTuple):
    """The exponents and norms of all layers as vectors, with stacked ones in a row."""

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

    def energy(self, strength: Scaled) -> Scaled:
        """``lambda_e`` times the product of powers of norms."""
        fraction, exponent = self.sum_of_logs()
        carry = lax.stop_gradient(jnp.round(fraction))
        product = jnp.exp2(fraction - carry)
        # Powers of two past this limit are out of range, and int32 still holds them.
        exponent = jnp.clip(exponent + carry, -(2**20), 2**20).astype(jnp.int32)
        product = jnp.where(self.any_zero(), 0 * product, product)  # NaN stays NaN.
        return Scaled(strength.fraction * product, strength.exponent + exponent)

    def sum_of_logs(self) -> tuple[jax.Array, jax.Array]:
        """``sum_l n_l log2(eta_l)`` without layers of zeros, as two numbers to add.

        The second is a sum of integers, hence exact, and the first is small. In one
        float32 the sum over a thousand layers would lose four digits.
        """
        rest, whole = _log2(self.eta)
        # A power of few digits has an exact product with an integer.
        digits = jnp.finfo(whole.dtype).nmant // 2
        coarse = lax.stop_gradient(_coarse(self.powers, digits))
        exponents = jnp.round(coarse * whole)
        rest = self.powers * rest + (self.powers - coarse) * whole
        rest += coarse * whole - exponents
        return jnp.sum(rest), jnp.sum(lax.stop_gradient(exponents))

    def any_zero(self) -> jax.Array:
        """Whether the product is 0."""
        return jnp.any((self.eta.fraction == 0) & (self.powers > 0))

    def ratio(self) -> jax.Array:
        """The ratios ``g(W) / eta(W)``, which are 0 for layers of zeros."""
        fraction = self.g.fraction / or_one(self.eta.fraction)
        return times_power(fraction, self.g.exponent - self.eta.exponent)


def penalty_value(
    form: Form, energy: Any, complexity: Any, weights: Weights
) -> jax.Array:
    """The penalty, with its derivatives in closed form."""
    hyper = Hyper.of(energy, complexity, weights)
    return _value(form, weights.axes(), hyper, weights.arrays())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value(
    form: Form, axes: tuple[Axes, ...], hyper: Hyper, arrays: list[jax.Array]
) -> jax.Array:
    return _total(form, hyper, measure_all(form, axes, arrays))


def _value_jvp(form, axes, primals, tangents):
    """Derivatives by the weights are in closed form, and those by `Hyper` are JAX's."""
    hyper, arrays = primals
    sizes = measure_all(form, axes, arrays)
    value = _total(form, hyper, sizes)
    terms = [
        jnp.sum(gradient * dot.astype(gradient.dtype)).astype(value.dtype)
        for gradient, dot in zip(
            penalty_gradients(form, hyper, sizes), tangents[1], strict=True
        )
        if not isinstance(dot, SymbolicZero)
    ]
    if not all(isinstance(dot, SymbolicZero) for dot in jax.tree.leaves(tangents[0])):
        dots = jax.tree.map(_instantiate, hyper, tangents[0])
        total = lambda hyper: _total(form, hyper, sizes)  # noqa: E731
        terms.append(jax.jvp(total, (hyper,), (dots,))[1])
    return value, sum(terms, jnp.zeros_like(value))


_value.defjvp(_value_jvp, symbolic_zeros=True)


def _instantiate(primal: jax.Array, dot: Any) -> Any:
    """A tangent as an array, also where it is a symbolic zero."""
    if not isinstance(dot, SymbolicZero):
        return dot
    if jnp.issubdtype(primal.dtype, jnp.integer):
        return np.zeros(primal.shape, jax.dtypes.float0)
    return jnp.zeros_like(primal)


@functools.partial(jax.jit, static_argnums=0)
def _total(form: Form, hyper: Hyper, sizes: list[Size]) -> jax.Array:
    """The value of the penalty."""
    if not sizes:  # An empty product is 1.
        empty = form.energy and not form.log
        return hyper.energy.value() * float(empty)
    layers = _Layers.of(hyper.powers, sizes)
    total = jnp.zeros([], layers.eta.fraction.dtype)
    if form.energy and form.log:
        log = math.log(2) * sum(layers.sum_of_logs())
        total += Scaled(hyper.energy.fraction * log, hyper.energy.exponent).value()
        if form.log_of_zero:
            total += jnp.where(layers.any_zero(), -jnp.inf, 0)
    elif form.energy:
        total += layers.energy(hyper.energy).value()
    if form.complexity:
        ratios = hyper.complexity.fraction * jnp.sum(layers.ratio())
        total += Scaled(ratios, hyper.complexity.exponent).value()
    return total


@functools.partial(jax.jit, static_argnums=0)
def penalty_gradients(form: Form, hyper: Hyper, sizes: list[Size]) -> list[jax.Array]:
    r"""The penalty's gradient by every weight.

    .. math::
      \Big( \frac{n_l E}{\eta_l} - \frac{\lambda_c g_l}{\eta_l^2} \Big) \nabla \eta_l
      + \frac{\lambda_c}{\eta_l} \nabla g_l

    Here ``E`` is the energy, strength included, or ``lambda_e`` for the sum of
    logarithms.
    """
    if not sizes:
        return []
    layers = _Layers.of(hyper.powers, sizes)
    eta, energy, complexity = layers.eta, hyper.energy, hyper.complexity
    if form.energy and not form.log:
        energy = layers.energy(energy)
    shift = energy.exponent - eta.exponent, complexity.exponent - eta.exponent
    by_energy = Scaled(layers.powers * energy.fraction * float(form.energy), shift[0])
    by_ratio = Scaled(
        -layers.ratio() * complexity.fraction * float(form.complexity), shift[1]
    )
    total = add(by_energy, by_ratio)
    by_g = Scaled(complexity.fraction, shift[1])
    exponent = common_exponent(total, by_g)
    half, rest = halve(exponent, eta.fraction.dtype)
    # The numbers end in divisions, which XLA takes for expensive. On CPU it would else
    # compute them anew in the loop over every weight.
    divisor = or_one(eta.fraction)
    numbers = (
        total.at(exponent) / divisor,
        by_g.at(exponent) / divisor,
        1 / half,
        1 / rest,
    )
    factors = jnp.stack(numbers)
    ends = np.cumsum([s.eta.fraction.size for s in sizes])[:-1].tolist()
    rows = jnp.split(factors, ends, axis=1)
    return [_gradient(form, row, size) for row, size in zip(rows, sizes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)  # Equal shapes share a trace.
def _gradient(form: Form, factors: jax.Array, size: Size) -> jax.Array:
    """The gradient by one weight, of which ``factors`` are the numbers by layer."""
    by_eta, by_g, *powers = factors.reshape(4, *size.eta.fraction.shape)
    gradient = by_eta * size.eta_gradient
    if form.complexity:
        gradient += by_g * size.g_gradient
    return gradient * powers[0] * powers[1]


def _coarse(x: jax.Array, digits: int) -> jax.Array:
    """A number rounded to so many binary digits."""
    return lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, digits)


def _log2(x: Scaled) -> tuple[jax.Array, jax.Array]:
    """The logarithm as a number of at most 1/2 and an integer, both 0 for 0."""
    fraction = or_one(x.fraction)
    whole = lax.stop_gradient(jnp.round(jnp.log2(fraction)))
    rest = jnp.log2(times_power(fraction, -whole.astype(jnp.int32)))
    exponent = x.exponent.astype(whole.dtype)
    return rest, jnp.where(x.fraction == 0, 0, whole + exponent)


def measure_all(
    form: Form, axes: tuple[Axes, ...], arrays: list[jax.Array]
) -> list[Size]:
    """The norms of all weights, and their gradients."""
    return [_measure_one(form, a, x) for a, x in zip(axes, arrays, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure_one(form: Form, axes: Axes, array: jax.Array) -> Size:
    """The norms of one weight, and their gradients."""
    return Size(
        *measure(array, form.norm, axes), *measure(array, form.complexity_norm, axes)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _iterate_one(
    form: Form, axes: Axes, iterations: int, array: jax.Array, vector: jax.Array
) -> tuple[Size, jax.Array]:
    """The norms of one weight, spectral ones by power iterations, and new vectors."""
    sigma, direction, vector = power_iteration(array, vector, axes, iterations)

    def size(norm: Norm) -> tuple[Scaled, jax.Array]:
        if norm == "spectral":
            return sigma, direction
        return measure(array, norm, axes)

    return Size(*size(form.norm), *size(form.complexity_norm)), vector


def iterate_all(
    form: Form, weights: Weights, vectors: list[jax.Array], iterations: int
) -> tuple[list[Size], list[jax.Array]]:
    """The norms of all weights, spectral ones by power iterations, and new vectors."""
    rows = zip(weights.arrays(), weights.axes(), vectors, strict=True)
    sizes = [_iterate_one(form, axes, iterations, a, v) for a, axes, v in rows]
    return [size for size, _ in sizes], [vector for _, vector in sizes]


def start_vectors(form: Form, weights: Weights) -> list[jax.Array]:
    """Estimates of the right singular vectors of the weights before the first step."""
    key = jax.random.key(0)
    pairs = zip(weights.arrays(), weights.axes(), strict=True)
    vectors = [
        start_vector(array, axes, jax.random.fold_in(key, i))
        for i, (array, axes) in enumerate(pairs)
    ]
    return iterate_all(form, weights, vectors, _WARM_UP)[1]


def _is_wanted(name: str, strength: Any) -> bool:
    """Checks a strength, and says whether its term may be other than 0."""
    if callable(strength):
        return True
    check_scalar(name, strength, 0, math.inf)
    return isinstance(strength, jax.Array) or strength != 0
