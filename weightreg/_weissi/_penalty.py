"""The arithmetic of WEISSI: value and gradient from the norms of all layers.

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
    common_exponent,
    concatenate,
    measure,
    parse_norm,
    power_iteration,
    scaled,
    two_factors,
)


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

    def norms(self) -> tuple[Norm, ...]:
        """The norms that the terms need: ``eta``, and ``g`` for the second."""
        return (self.norm, self.complexity_norm)[: 1 + self.complexity]

    def is_spectral(self) -> bool:
        return "spectral" in self.norms()


class Hyper(NamedTuple):
    """The strengths, and the exponent of every weight: scalars that may be traced."""

    energy: Scaled
    complexity: Scaled
    powers: list[jax.Array]

    @classmethod
    def of(cls, energy: Any, complexity: Any, powers: list[jax.Array]) -> "Hyper":
        dtype = compute_dtype(*(n.dtype for n in powers))
        return cls(scaled(energy, dtype), scaled(complexity, dtype), powers)


Sizes = list[tuple[Scaled, jax.Array]]
"""Norms of the layers of one leaf, each with its gradient: `Form.norms`."""


class _Layers(NamedTuple):
    """The exponents and norms of all layers as vectors, with stacked ones in a row."""

    n: jax.Array
    eta: Scaled
    g: Scaled

    @classmethod
    def of(cls, powers: list[jax.Array], sizes: list[Sizes]) -> "_Layers":
        counts = [leaf[0][0].fraction.size for leaf in sizes]
        n = [jnp.broadcast_to(n, (k,)) for n, k in zip(powers, counts, strict=True)]
        eta, g = ([leaf[i][0] for leaf in sizes] for i in (0, -1))
        return cls(jnp.concatenate(n), concatenate(eta), concatenate(g))

    def energy(self) -> Scaled:
        r"""The product :math:`\prod_l \eta_l^{n_l}`."""
        rest, whole = self.log2_energy()
        carry = lax.stop_gradient(jnp.round(rest))
        # Powers of two past this limit are out of range, and int32 still holds them.
        exponent = jnp.clip(whole + carry, -(2**20), 2**20).astype(jnp.int32)
        product = jnp.exp2(rest - carry)
        product = jnp.where(self.any_zero(), 0 * product, product)  # NaN stays NaN.
        return Scaled(product, exponent)

    def log2_energy(self) -> tuple[jax.Array, jax.Array]:
        r"""The sum :math:`\sum_l n_l \log_2 \eta_l` without layers of zeros.

        It is two numbers to add. The second is a sum of integers, hence exact, and the
        first is small. In one float32 the sum over a thousand layers would lose four
        digits.
        """
        rest, exponent = self.eta.log2()
        whole = exponent.astype(rest.dtype)
        # A power of few digits has an exact product with an integer.
        digits = jnp.finfo(rest.dtype)
        n = lax.stop_gradient(
            lax.reduce_precision(self.n, digits.nexp, digits.nmant // 2)
        )
        integers = jnp.round(n * whole)
        rest = self.n * rest + (self.n - n) * whole + (n * whole - integers)
        return jnp.sum(rest), jnp.sum(integers)

    def any_zero(self) -> jax.Array:
        """Whether the product is 0."""
        return jnp.any((self.eta.fraction == 0) & (self.n > 0))

    def ratio(self) -> jax.Array:
        r"""The ratios :math:`g_l / \eta_l`, which are 0 for layers of zeros."""
        return (self.g / self.eta).value()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def penalty_value(
    form: Form, axes: tuple[Axes, ...], hyper: Hyper, arrays: list[jax.Array]
) -> jax.Array:
    """The penalty, with its derivatives by the weights in closed form."""
    return _total(form, hyper, measure_all(form, axes, arrays))


def _penalty_value_jvp(form, axes, primals, tangents):
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


penalty_value.defjvp(_penalty_value_jvp, symbolic_zeros=True)


def _instantiate(primal: jax.Array, dot: Any) -> Any:
    """A tangent as an array, also where it is a symbolic zero."""
    if not isinstance(dot, SymbolicZero):
        return dot
    if jnp.issubdtype(primal.dtype, jnp.integer):
        return np.zeros(primal.shape, jax.dtypes.float0)
    return jnp.zeros_like(primal)


@functools.partial(jax.jit, static_argnums=0)
def _total(form: Form, hyper: Hyper, sizes: list[Sizes]) -> jax.Array:
    r"""The penalty.

    .. math::
      \lambda_e \prod_l \eta_l^{n_l} + \lambda_c \sum_l g_l / \eta_l
    """
    if not sizes:  # An empty product is 1.
        empty = form.energy and not form.log
        return hyper.energy.value() * float(empty)
    layers = _Layers.of(hyper.powers, sizes)
    total = jnp.zeros([], layers.n.dtype)
    if form.energy and form.log:
        total += (hyper.energy * (math.log(2) * sum(layers.log2_energy()))).value()
        if form.log_of_zero:
            total += jnp.where(layers.any_zero(), -jnp.inf, 0)
    elif form.energy:
        total += (hyper.energy * layers.energy()).value()
    if form.complexity:
        total += (hyper.complexity * jnp.sum(layers.ratio())).value()
    return total


@functools.partial(jax.jit, static_argnums=0)
def penalty_gradients(form: Form, hyper: Hyper, sizes: list[Sizes]) -> list[jax.Array]:
    r"""The penalty's gradient by every weight.

    .. math::
      \frac{n_l E - \lambda_c g_l / \eta_l}{\eta_l} \nabla \eta_l
      + \frac{\lambda_c}{\eta_l} \nabla g_l

    Here ``E`` is the energy, strength included, or ``lambda_e`` for the sum of
    logarithms.
    """
    if not sizes:
        return []
    layers = _Layers.of(hyper.powers, sizes)
    energy, complexity, eta = hyper.energy, hyper.complexity, layers.eta
    if form.energy and not form.log:
        energy *= layers.energy()
    by_eta = energy * layers.n
    by_g = complexity / eta
    if form.complexity:
        by_eta -= complexity * layers.ratio()
    by_eta /= eta
    exponent = common_exponent(by_eta, by_g)
    powers = two_factors(exponent, layers.n.dtype)
    factors = jnp.stack([by_eta.at(exponent), by_g.at(exponent), *powers])
    factors = lax.optimization_barrier(factors)
    ends = np.cumsum([leaf[0][0].fraction.size for leaf in sizes])[:-1].tolist()
    rows = jnp.split(factors, ends, axis=1)
    return [_gradient(row, leaf) for row, leaf in zip(rows, sizes, strict=True)]


@jax.jit  # Equal shapes share a trace.
def _gradient(factors: jax.Array, sizes: Sizes) -> jax.Array:
    """The gradient by one leaf, from the factors of its norms' gradients."""
    *by_norm, first, second = factors.reshape(4, *sizes[0][0].fraction.shape)
    terms = [factor * slope for factor, (_, slope) in zip(by_norm, sizes, strict=False)]
    return sum(terms[1:], terms[0]) * first * second


def measure_all(
    form: Form, axes: tuple[Axes, ...], arrays: list[jax.Array]
) -> list[Sizes]:
    """The norms of all weights, and their gradients."""
    pairs = zip(arrays, axes, strict=True)
    return [_measure(array, form.norms(), its) for array, its in pairs]


_measure = jax.jit(measure, static_argnums=(1, 2))  # Equal shapes share a trace.


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def iterate(
    array: jax.Array,
    vector: jax.Array,
    norms: tuple[Norm, ...],
    axes: Axes,
    iterations: int,
) -> tuple[Sizes, jax.Array]:
    """The norms of one weight, spectral ones by power iterations, and a new vector."""
    sigma, direction, vector = power_iteration(array, vector, axes, iterations)
    others = iter(measure(array, tuple(n for n in norms if n != "spectral"), axes))
    spectral = sigma, direction
    return [spectral if n == "spectral" else next(others) for n in norms], vector


def _is_wanted(name: str, strength: Any) -> bool:
    """Checks a strength, and says whether its term may be other than 0."""
    if callable(strength):
        return True
    check_scalar(name, strength, 0, math.inf)
    return isinstance(strength, jax.Array) or strength != 0
