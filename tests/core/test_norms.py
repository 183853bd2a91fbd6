"""Norms and their gradients, and numbers as fractions and powers of two."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st

from weightreg._core._norms import (
    Axes,
    Scaled,
    measure,
    parse_norm,
    power_iteration,
    scaled,
    start_vector,
    times_power,
)

NORMS = [(1.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 3.5), (7.0, 7.0)]
NORMS += [(math.inf, math.inf), (math.inf, 2.0), (200.0, 200.0), "spectral"]
AXES = Axes((0, 2), (3,))  # axis 1 stacks two layers
SHAPE = (3, 2, 2, 4)


def layers(w):
    """Matrices (inputs, outputs) of a leaf of `SHAPE`."""
    return [w[:, i].reshape(6, 4) for i in range(2)]


def one_norm(w, norm, axes):
    return measure(w, (norm,), axes)[0]


def norm_of(matrix, norm):
    if norm == "spectral":
        return np.linalg.norm(matrix, 2)
    return np.linalg.norm([np.linalg.norm(unit, norm[0]) for unit in matrix.T], norm[1])


@quick.everything
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_and_gradients_of_stacked_layers(norm):
    w = np.random.default_rng(0).normal(size=SHAPE)
    size, gradient = jax.jit(one_norm, static_argnums=(1, 2))(
        jnp.asarray(w, jnp.float32), norm, AXES
    )
    expected = [norm_of(m, norm) for m in layers(w)]
    np.testing.assert_allclose(size.value().ravel(), expected, rtol=1e-5)
    assert size.fraction.shape == (1, 2, 1, 1)
    slope = np.zeros(SHAPE)
    for index in np.ndindex(*SHAPE):
        ends = []
        for step in (1e-6, -1e-6):
            moved = w.copy()
            moved[index] += step
            ends.append(sum(norm_of(m, norm) for m in layers(moved)))
        slope[index] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


@jax.jit
def all_norms(w):
    return measure(w, tuple(NORMS), AXES)


@settings(deadline=None, max_examples=100)
@given(
    power=st.integers(-125, 122),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_scale_changes_nothing_but_the_exponent(power, dtype, seed):
    """From the least normal numbers up to where norms are out of range."""
    w = np.random.default_rng(seed).uniform(0.5, 1, SHAPE)
    plain = jnp.asarray(w, dtype)
    scaled = jnp.asarray(np.asarray(plain, np.float64) * 2.0**power, dtype)
    for (a, grad_a), (b, grad_b) in zip(
        all_norms(plain), all_norms(scaled), strict=True
    ):
        exact = np.asarray(a.fraction, np.float64) * 2.0 ** np.asarray(a.exponent)
        other = np.asarray(b.fraction, np.float64) * 2.0 ** (
            np.asarray(b.exponent) - float(power)
        )
        np.testing.assert_allclose(other, exact, rtol=2e-6)
        np.testing.assert_allclose(grad_a, grad_b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_sums_of_a_gpu_are_those_of_a_cpu(size, monkeypatch):
    """Which a CPU can take as well: one reduction, of stacked and of mapped layers."""
    w = jnp.asarray(size * np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    both = lambda w: measure(w, ((1.0, 1.0), (2.0, 2.0)), AXES)  # noqa: E731
    run = lambda: (both(w), jax.vmap(both)(jnp.stack([w, 2 * w])))  # noqa: E731
    expected = run()
    taken = []

    def of_a_gpu(*terms, default, cuda, rocm):
        assert cuda is rocm
        taken.append(len(terms))
        return cuda(*terms)

    monkeypatch.setattr(jax.lax, "platform_dependent", of_a_gpu)
    chex.assert_trees_all_close(run(), expected, rtol=1e-6)
    assert taken == [4, 4]


@quick.everything
def test_a_small_unit_beside_a_large_one_has_its_gradient():
    """Its norm is nothing beside the other's, its gradient (q = 1) is as large."""
    w = jnp.array([[3e15, 3e-15], [4e15, -4e-15]])
    size, gradient = one_norm(w, (2.0, 1.0), Axes((0,), (1,)))
    np.testing.assert_allclose(size.value(), 5e15, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.6, 0.6], [0.8, -0.8]], rtol=1e-6)


def test_ties_share_the_gradient_of_the_largest_entry():
    size, gradient = one_norm(
        jnp.array([[2.0, -2.0], [1, 0]]), (math.inf,) * 2, Axes((0,), (1,))
    )
    assert size.value() == 2
    np.testing.assert_array_equal(gradient, [[0.5, -0.5], [0, 0]])


@quick.everything
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_zeros_and_nothing(norm):
    for shape in ((2, 2), (0, 2), (2, 0), (1, 1)):
        size, gradient = one_norm(jnp.zeros(shape), norm, Axes((0,), (1,)))
        np.testing.assert_array_equal(size.value(), np.zeros((1, 1)))
        np.testing.assert_array_equal(gradient, np.zeros(shape))


@quick.everything
def test_power_iteration_finds_the_largest_singular_value():
    w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    vector = start_vector(w, AXES, jax.random.key(0))
    assert vector.shape == (2, 4)
    np.testing.assert_allclose(jnp.linalg.norm(vector, axis=1), 1, rtol=1e-6)
    exact, slope = one_norm(w, "spectral", AXES)
    rough, _, _ = power_iteration(w, vector, AXES, 1)
    assert jnp.all(rough.value() <= exact.value() * (1 + 1e-6))
    assert not jnp.allclose(rough.value(), exact.value(), rtol=1e-3)
    size, gradient, better = power_iteration(w * 1e-30, vector, AXES, 100)
    np.testing.assert_allclose(size.value(), exact.value() * 1e-30, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-3)
    again, _, same = power_iteration(w * 0, better, AXES, 3)
    np.testing.assert_array_equal(again.value(), 0)
    np.testing.assert_array_equal(same, better)  # or it could never leave zeros


@settings(deadline=None, max_examples=200)
@given(x=st.floats(width=32, allow_nan=False), power=st.integers(-400, 400))
def test_times_power_rounds_only_at_the_ends(x, power):
    got = float(times_power(jnp.float32(x), jnp.int32(power)))
    if 0 < abs(x) < 2.0**-126:
        return  # XLA takes subnormal operands for 0
    with np.errstate(over="ignore", under="ignore"):
        exact = float(np.float32(np.ldexp(np.float64(x), power)))
    subnormal = 0 < abs(exact) <= 2.0**-126
    assert got == exact or (subnormal and abs(got) <= 2.0**-126)


@settings(deadline=None, max_examples=200)
@given(x=st.floats(0, width=32, allow_infinity=False))
def test_scaled_is_exact_for_subnormal_numbers_too(x):
    for given_x in (np.float32(x), jnp.asarray(np.float32(x))):
        got = scaled(given_x, jnp.float32)
        assert float(got.fraction) * 2.0 ** int(got.exponent) == float(np.float32(x))
        assert x == 0 or 0.5 <= got.fraction < 1


def test_arithmetic_with_numbers_far_out_of_range():
    def number(fraction, exponent):
        return Scaled(jnp.float32(fraction), jnp.int32(exponent))

    def parts(x):
        return float(x.fraction), int(x.exponent)

    assert parts(number(0.5, 1000) - number(-0.5, 999)) == (0.75, 1000)
    # The exponent of a 0 has no say.
    assert parts(number(0.0, 5000) - number(-0.5, -3000)) == (0.5, -3000)
    assert parts(number(0.5, 1000) * number(3.0, 4000)) == (1.5, 5000)
    assert parts(number(0.5, 1000) * 3.0) == (1.5, 1000)
    assert parts(number(3.0, 1000) / number(2.0, 4000)) == (1.5, -3000)
    assert parts(number(3.0, 1000) / number(0.0, 7))[0] == 3.0
    assert parts(number(96.0, -900).normal()) == (0.75, -893)
    for fraction in (0.5, 0.7, 0.71, 0.99, 96.0):
        rest, whole = number(fraction, 3000).log2()
        assert abs(rest) <= 0.5 and int(whole) == 3000 + round(math.log2(fraction))
        exact = math.log2(np.float32(fraction)) - round(math.log2(fraction))
        np.testing.assert_allclose(rest, exact, rtol=1e-6)


def test_names_of_norms():
    assert parse_norm("norm", "frobenius") == (2, 2) and parse_norm("n", "l1") == (1, 1)
    assert parse_norm("norm", [1, math.inf]) == (1, math.inf)
    for wrong in ("l2", (1,), (0.5, 2), (1, math.nan), 2, None, ("a", 1)):
        with pytest.raises(ValueError, match="norm must be one of 'frobenius'"):
            parse_norm("norm", wrong)


@quick.everything
@pytest.mark.parametrize("value", [0.0, 1e-36, 1e-30, 3.0, 1e30, 1e36])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 2)])
def test_one_number_and_constants_have_norms(value, shape):
    """XLA multiplies the constants of a product of scalars, whose square is infinite.

    It takes constants for scalars too, and what it finds out to be one.
    """
    axes = Axes((0,), (1,))

    def both(w):
        sizes = measure(w, ((2.0, 2.0), (1.0, 1.0)), axes)
        return [(size.value(), gradient) for size, gradient in sizes]

    w = jnp.full(shape, value, jnp.float32)
    known = lambda x: both(jnp.nan_to_num(jnp.full_like(x, value)))  # noqa: E731
    count = math.prod(shape)
    # Large constants in place of weights are left to XLA.
    compiled = [jax.jit(both)(w)] + ([jax.jit(known)(w)] if value < 1e30 else [])
    for found in compiled:
        (size, slope), (l1, sign) = found
        np.testing.assert_allclose(size, value * math.sqrt(count), rtol=1e-6)
        np.testing.assert_allclose(l1, value * count, rtol=1e-6)
        alive = float(value > 0)
        np.testing.assert_allclose(slope, alive / math.sqrt(count), rtol=1e-6)
        np.testing.assert_array_equal(sign, alive)
