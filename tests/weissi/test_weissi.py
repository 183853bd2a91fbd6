"""WEISSI against its formula spelled out in NumPy, at float64."""

import functools
import itertools
import math

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything

NORMS = ["frobenius", "l1", "spectral", (1, 2), (2, 1), (3, 1.5), (2, math.inf)]
FORMS = [
    *({"norm": n} for n in NORMS),
    *({"complexity_norm": g} for g in NORMS[2:]),
    {"norm": (2, 1), "complexity_norm": (math.inf, 1)},
    {"log": True},
    {"log": True, "norm": "spectral"},
    {"exponents": wr.cnn_exponents},
    {"exponents": 1.5},
    {"log": True, "exponents": wr.cnn_exponents},
]


def show(form):
    return " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in form.items())


DIMS = {
    "dense": Dims(0, 1),
    "conv": Dims((0, 1, 2), 3),
    "heads": Dims(0, (1, 2)),
    "scanned": Dims(1, 2),
    "bias": None,
}


def tree(seed=0, scale=1.0):
    """A leaf of every kind: dense, convolution, attention, and three layers in one."""
    rng = np.random.default_rng(seed)
    shapes = {
        "dense": (4, 3),
        "conv": (2, 2, 2, 3),
        "heads": (4, 2, 3),
        "scanned": (3, 3, 2),
        "bias": (3,),
    }
    return {k: scale * rng.normal(size=s) for k, s in shapes.items()}


def matrices(params):
    """The kernel matrices (inputs, outputs) of `tree`, one a layer, with names."""
    yield "dense", params["dense"]
    if "conv" in params:
        yield "conv", params["conv"].reshape(-1, params["conv"].shape[-1])
    yield "heads", params["heads"].reshape(params["heads"].shape[0], -1)
    for slice_ in params["scanned"]:
        yield "scanned", slice_


def matrix_norm(w, norm):
    if norm == "spectral":
        return np.linalg.norm(w, 2)
    p, q = {"frobenius": (2, 2), "l1": (1, 1)}.get(norm, norm)
    return np.linalg.norm([np.linalg.norm(unit, p) for unit in w.T], q)


def reference(
    params,
    energy,
    complexity,
    log=False,
    norm="frobenius",
    complexity_norm="l1",
    exponents=2,
):
    """The paper's formula."""
    product, logs, layers = 1.0, 0.0, 0.0
    for name, w in matrices(params):
        power = exponents
        if exponents is wr.cnn_exponents:
            power = 2 if name == "conv" else 1
        eta = matrix_norm(w, norm)
        product *= eta**power
        logs += power * np.log(eta)
        layers += matrix_norm(w / eta, complexity_norm)
    return energy * (logs if log else product) + complexity * layers


def numerical_gradient(f, params, step=1e-6):
    grads = {k: np.zeros_like(v) for k, v in params.items()}
    for name, value in params.items():
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = {k: v.copy() for k, v in params.items()}
                moved[name][index] += sign * step
                sides.append(f(moved))
            grads[name][index] = (sides[0] - sides[1]) / (2 * step)
    return grads


def program(strengths, dims=DIMS, **form):
    """Compiled: value and gradient of the penalty, and updates of the link."""

    @quick.jit
    def run(params):
        link = wr.add_weissi(*strengths, dims=dims, iterations=None, **form)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = link.update(zeros, link.init(params), params)
        penalty = wr.weissi(*strengths, dims=dims, **form)
        return *jax.value_and_grad(penalty)(params), updates

    return run


def both_ways(params, strengths, dims=DIMS, **form):
    return program(strengths, dims, **form)(params)


def as_jax(params, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def assert_zero_layers_give_zero(run, strengths, form, dtype):
    """As Fixup has them: not NaN, in value nor gradient."""
    params = as_jax(tree(), dtype) | {"conv": jnp.zeros((2, 2, 2, 3), dtype)}
    value, grads, updates = run(params)
    rest = {k: np.asarray(v, float) for k, v in params.items() if k != "conv"}
    energy, complexity = strengths
    energy = energy if form.get("log") else 0.0
    others = lambda rest: reference(rest, energy, complexity, **form)  # noqa: E731
    np.testing.assert_allclose(value, others(rest), rtol=1e-5)
    slopes = numerical_gradient(others, rest)
    for got in (grads, updates):
        chex.assert_trees_all_equal(got["conv"], jnp.zeros_like(params["conv"]))
        del got["conv"]
        got = jax.tree.map(lambda g: np.asarray(g, float), got)
        tolerance = 1e-5 if dtype == "float32" else 0.02
        chex.assert_trees_all_close(got, slopes, rtol=tolerance, atol=0.1 * tolerance)


@pytest.mark.parametrize("form", FORMS, ids=show)
def test_value_and_gradient_equal_the_formula(form):
    """Also with a layer of zeros, in the same program."""
    strengths = 0.003, 0.7
    run = program(strengths, **form)
    for seed, scale in enumerate((1.0, 1.8)):
        params = tree(seed, scale)
        expected = reference(params, *strengths, **form)
        slope = numerical_gradient(lambda p: reference(p, *strengths, **form), params)
        value, grads, updates = run(as_jax(params))
        np.testing.assert_allclose(value, expected, rtol=3e-6)
        largest = max(np.abs(g).max() for g in slope.values())
        for name, gradient in slope.items():
            np.testing.assert_allclose(
                grads[name], gradient, rtol=1e-4, atol=2e-6 * largest
            )
        chex.assert_trees_all_close(updates, grads, rtol=1e-6, atol=1e-7 * largest)
    assert_zero_layers_give_zero(run, strengths, form, "float32")


@pytest.mark.parametrize("form", [{}, {"log": True}, {"norm": (3, 1.5)}], ids=str)
def test_closed_form_equals_automatic_differentiation(form):
    """Of the formula as one would write it, in float64."""
    p, q = form.get("norm", (2, 2))

    def naive(params):
        total, layers = (0.0, 0.0)
        for _, w in matrices(params):
            size = (jnp.abs(w) ** p).sum(0) ** (q / p)
            eta = size.sum() ** (1 / q)
            total += 2 * jnp.log(eta)
            layers += jnp.abs(w).sum() / eta
        energy = total if form.get("log") else jnp.exp(total)
        return 1e-4 * energy + 0.01 * layers

    with jax.enable_x64(True):
        params = as_jax(tree(), jnp.float64)
        expected = quick.jit(jax.grad(naive))(params)
        _, grads, got = both_ways(params, (1e-4, 0.01), **form)
        chex.assert_trees_all_close(got, expected, rtol=1e-11, atol=1e-14)
        chex.assert_trees_all_equal_dtypes(got, params)
        second = jax.grad(lambda p: optax.tree.norm(jax.grad(naive)(p), squared=True))
        ours = wr.weissi(1e-4, 0.01, dims=DIMS, **form)
        twice = jax.grad(lambda p: optax.tree.norm(jax.grad(ours)(p), squared=True))
        chex.assert_trees_all_close(
            quick.jit(twice)(params), quick.jit(second)(params), rtol=1e-9
        )
        forward = quick.jit(lambda p: jax.jvp(ours, (p,), (p,))[1])(params)
        backward = optax.tree.vdot(grads, params)
        np.testing.assert_allclose(forward, backward, rtol=1e-11)


def log_reference(weights, energy, power=2.0):
    """Logarithm of the energy, and sign and logarithm of its gradients."""
    norms = []
    for w in weights:
        top = np.abs(w).max()
        norms.append(np.log(top) + 0.5 * np.log(np.sum((w / top) ** 2)))
    total = np.log(energy) + power * sum(norms)
    with np.errstate(divide="ignore"):
        slopes = [
            (np.sign(w), np.log(power) + total + np.log(np.abs(w)) - 2 * size)
            for w, size in zip(weights, norms, strict=True)
        ]
    return total, slopes


def assert_equals_exp(got, sign, log, rtol):
    """``got`` is ``sign * exp(log)``, infinite or 0 where that is out of range."""
    got = np.asarray(got, np.float64)
    edges = np.log([2.0**-126, 2.0**127 * 1.9999])
    inside = (log > edges[0] + 0.1) & (log < edges[1] - 0.1)
    expected = sign * np.exp(np.where(inside, log, 0))
    np.testing.assert_allclose(got[inside], expected[inside], rtol=rtol)
    assert np.all(np.isinf(got[log > edges[1] + 0.1]))
    assert np.all(np.abs(got[log < edges[0] - 0.1]) <= 2.0**-125)


@jax.jit
def all_of(energy, exponent, params):
    """Value, gradients, and the two parts; compiled once for all examples."""
    penalty = wr.weissi(energy, 0.0, exponents=exponent)
    parts = (
        wr.log_weight_energy(params, exponents=exponent),
        wr.layer_complexity(params),
    )
    return *jax.value_and_grad(penalty)(params), *parts


@settings(deadline=None, max_examples=300)
@given(
    powers=st.lists(st.integers(-36, 36), min_size=4, max_size=4),
    energy=st.sampled_from([1e-38, 1e-31, 1e-6, 1.0]),
    exponent=st.sampled_from([1.0, 2.0, 0.5]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_extremes_are_right_wherever_they_are_in_range(
    powers, energy, exponent, dtype, seed
):
    rng = np.random.default_rng(seed)
    params = [
        jnp.asarray(rng.uniform(0.1, 1, (2, 3)) * 10.0**p * rng.choice([-1, 1]), dtype)
        for p in powers
    ]
    exact = [np.asarray(w, np.float64) for w in params]
    total, slopes = log_reference(exact, energy, exponent)
    value, grads, log_energy, complexity = all_of(energy, exponent, params)
    assert_equals_exp(value, 1.0, np.array(total), 1e-5)
    for gradient, (sign, log) in zip(grads, slopes, strict=True):
        assert_equals_exp(gradient, sign, log, 1e-5 if dtype == "float32" else 0.01)
    np.testing.assert_allclose(log_energy, total - np.log(energy), rtol=1e-6, atol=1e-5)
    units = [w / np.abs(w).max() for w in exact]
    expected = sum(np.abs(u).sum() / np.linalg.norm(u) for u in units)
    np.testing.assert_allclose(complexity, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("energy", [1e-38, 1e-19, 1.0])
def test_a_thousand_layers(energy, dtype):
    """Norms from 1e-30 to 1e30, whose product is such that the energy is about 1."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(1000, 4, 4))
    exact /= np.linalg.norm(exact, axis=(1, 2), keepdims=True)
    sizes = 10.0 ** rng.uniform(-30, 30, 1000)
    sizes *= np.exp((-0.5 * np.log(energy) - np.log(sizes).sum()) / 1000)
    stacked = jnp.asarray(exact * sizes[:, None, None], dtype)
    params = [stacked[i] for i in range(20)] + [stacked[20:]]
    dims = [Dims(0, 1)] * 20 + [Dims(1, 2)]
    weights = list(np.asarray(stacked, np.float64))
    total, slopes = log_reference(weights, energy)
    value, grads = jax.jit(jax.value_and_grad(wr.weissi(energy, 0.0, dims=dims)))(
        params
    )
    np.testing.assert_allclose(value, np.exp(total), rtol=3e-5)
    got = [*grads[:20], *grads[20]]
    for gradient, (sign, log) in zip(got, slopes, strict=True):
        assert_equals_exp(gradient, sign, log, 1e-5 if dtype == "float32" else 1e-2)


def test_bfloat16_accumulates_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    ones = jnp.ones((300, 300), jnp.bfloat16)
    assert wr.weight_energy(ones) == 90_000
    assert wr.layer_complexity(ones) == 300
    assert wr.weight_energy(ones, norm="l1", exponents=1) == 90_000
    np.testing.assert_allclose(wr.weight_energy(ones, norm="spectral"), 9e4, rtol=1e-5)
    assert wr.weight_energy(ones).dtype == jnp.float32
    grads = jax.grad(wr.weight_energy)(ones)
    assert grads.dtype == jnp.bfloat16 and jnp.all(grads == 2)


@functools.cache
def shift_invariant(form):
    return jax.jit(wr.weissi(0.01, 0.1, dims=DIMS, **dict(form)))


@pytest.mark.parametrize("form", [{}, {"norm": (2, 1)}, {"exponents": 1.5}], ids=show)
@settings(deadline=None, max_examples=40)
@given(
    shifts=st.lists(st.integers(-20, 20), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_shifting_scale_changes_nothing(form, shifts, seed):
    """Equal exponents: by powers of two not even a bit of the norms' ratios."""
    params = as_jax(tree(seed))
    shifts = [*shifts, -sum(shifts)]  # dense, conv, heads, and three scanned
    shifted = dict(params)
    for name, shift in zip(("dense", "conv", "heads"), shifts, strict=False):
        shifted[name] = params[name] * 2.0**shift
    stacked = 2.0 ** jnp.array(shifts[3:], jnp.float32)
    shifted["scanned"] = params["scanned"] * stacked[:, None, None]
    penalty = shift_invariant(tuple(form.items()))
    np.testing.assert_allclose(penalty(shifted), penalty(params), rtol=2e-5)


def test_the_cnn_form_is_invariant_between_convolutions_only():
    kernels = {"a": jnp.ones((3, 3, 1, 4)), "b": jnp.ones((2, 2, 4, 4))}
    kernels |= {"c": jnp.ones((4, 2)), "d": jnp.ones((2, 2))}
    energy = functools.partial(wr.weight_energy, exponents=wr.cnn_exponents)
    assert wr.cnn_exponents(kernels) == {"a": 2, "b": 2, "c": 1, "d": 1}
    scale = lambda **by: {k: w * by.get(k, 1.0) for k, w in kernels.items()}  # noqa: E731
    np.testing.assert_allclose(energy(scale(a=4.0, b=0.25)), energy(kernels), rtol=1e-5)
    np.testing.assert_allclose(energy(scale(c=4.0, d=0.25)), energy(kernels), rtol=1e-5)
    np.testing.assert_allclose(
        energy(scale(a=4.0, c=0.25)), 4 * energy(kernels), rtol=1e-5
    )


@pytest.mark.parametrize("form", [{}, {"log": True}], ids=show)
def test_zero_layers_of_16_bits_give_zero(form):
    strengths = 0.5, 0.25
    run = program(strengths, **form)
    assert_zero_layers_give_zero(run, strengths, form, "bfloat16")


def test_parts_of_a_tree_with_a_zero_layer():
    params = {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2))}
    assert wr.weight_energy(params) == 0
    assert wr.log_weight_energy(params) == -jnp.inf
    assert wr.layer_complexity(params) == 2
    grads = jax.grad(wr.log_weight_energy)(params)
    np.testing.assert_allclose(grads["a"], 0.5)
    np.testing.assert_array_equal(grads["b"], 0)
    free = wr.weight_energy(params, exponents={"a": 2, "b": 0})
    assert free == pytest.approx(4)  # x^0 is 1
    assert wr.log_weight_energy(params, exponents={"a": 2, "b": 0}) == pytest.approx(
        math.log(4)
    )


def test_a_zero_layer_learns_as_soon_as_it_is_not_zero():
    """Power iteration must not stick at vectors of zeros."""
    tx = wr.add_weissi(1.0, 0.0, norm="spectral", exponents=1)
    state = tx.init(jnp.zeros((3, 2)))
    zeros = jnp.zeros((3, 2))
    for w in (zeros, zeros, jnp.diag(jnp.ones(3))[:, :2] * jnp.array([3.0, 1.0])):
        updates, state = tx.update(zeros, state, w)
    for _ in range(20):
        updates, state = tx.update(zeros, state, w)
    np.testing.assert_allclose(updates, [[1, 0], [0, 0], [0, 0]], atol=1e-6)


def test_zeros_among_weights_and_dead_units():
    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]])
    for norm, g in itertools.pairwise([*NORMS, *NORMS[::2]]):
        penalty = wr.weissi(0.1, 0.2, norm=norm, complexity_norm=g)
        grads = quick.jit(jax.grad(penalty))(w)
        assert jnp.all(jnp.isfinite(grads))
        np.testing.assert_allclose(grads[:, 1], 0, atol=1e-6)


@pytest.mark.parametrize("params", [{}, None, {"bias": jnp.ones(3)}, {"n": 1}])
def test_trees_without_weights(params):
    assert wr.weissi(0.5, 1.0)(params) == 0.5
    assert wr.weissi(0.5, 1.0, log=True)(params) == 0
    assert wr.weight_energy(params) == 1
    assert wr.log_weight_energy(params) == wr.layer_complexity(params) == 0


def test_layers_without_elements_are_zero_layers():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((0, 2))}
    for norm in NORMS:
        grad = jax.value_and_grad(wr.weissi(1.0, 1.0, norm=norm))
        value, grads = quick.jit(grad)(params)
        assert jnp.isfinite(value) and grads["b"].shape == (0, 2)
        assert jnp.all(jnp.isfinite(grads["a"]))
    assert wr.weight_energy(params) == 0


def test_one_element():
    for norm in NORMS:
        w = jnp.array([[-3.0]])
        value, grads = quick.jit(jax.value_and_grad(wr.weissi(2.0, 5.0, norm=norm)))(w)
        assert value == pytest.approx(2 * 9 + 5) and grads[0, 0] == pytest.approx(-12)


def test_not_a_number_is_passed_on():
    w = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), jnp.nan)}
    assert jnp.isnan(wr.weissi(1.0, 1.0)(w))
    assert jnp.all(jnp.isnan(jax.grad(wr.weissi(1.0, 1.0))(w)["b"]))
    assert jnp.isnan(wr.log_weight_energy(w))
    assert jnp.isnan(wr.weissi(1.0, 0.0)({**w, "zero": jnp.zeros((2, 2))}))
    inf = jnp.full((2, 2), jnp.inf)
    assert not jnp.isfinite(wr.weissi(1.0, 0.0)(inf))


def test_strengths_and_exponents_have_derivatives():
    params = as_jax(tree())

    def value(energy, complexity, power):
        return wr.weissi(energy, complexity, exponents=power, dims=DIMS)(params)

    grads = quick.jit(jax.grad(value, argnums=(0, 1, 2)))(0.5, 0.25, 2.0)
    product = wr.weight_energy(params, dims=DIMS)
    np.testing.assert_allclose(grads[0], product, rtol=1e-5)
    np.testing.assert_allclose(
        grads[1], wr.layer_complexity(params, dims=DIMS), rtol=1e-5
    )
    log = wr.log_weight_energy(params, exponents=1, dims=DIMS)
    np.testing.assert_allclose(grads[2], 0.5 * product * log, rtol=1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.0])
def test_second_derivatives_by_all_that_may_be_traced(energy):
    """Also at 0, where a product of norms by way of logarithms would have none."""
    with jax.enable_x64(True):
        params = as_jax(tree(), jnp.float64)
        given = {"energy": energy, "complexity": 0.2, "power": 1.7}
        point, back = jax.flatten_util.ravel_pytree((given, params))

        def penalty(flat):
            h, params = back(flat)
            form = {"exponents": h["power"], "dims": DIMS}
            return wr.weissi(h["energy"], h["complexity"], **form)(params)

        def naive(flat):
            h, params = back(flat)
            product, layers = 1.0, 0.0
            for _, w in matrices(params):
                eta = jnp.sqrt(jnp.sum(w**2))
                product *= eta ** h["power"]
                layers += jnp.abs(w).sum() / eta
            return h["energy"] * product + h["complexity"] * layers

        ours, expected = (quick.jit(jax.hessian(f))(point) for f in (penalty, naive))
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@quick.bits
def test_strengths_out_of_the_range_of_float32():
    small, large = jnp.full((2, 2), 1e-30), jnp.full((2, 2), 1e30)
    for energy, weight in ((1e-60, large), (1e60, small)):
        np.testing.assert_allclose(wr.weissi(energy, 0.0)(weight), 4.0, rtol=1e-6)
        slope = jax.grad(wr.weissi(energy, 0.0))(weight)
        np.testing.assert_allclose(slope, 2 / weight, rtol=1e-6)
        tx = wr.add_weissi(energy, 0.0)
        updates, _ = tx.update(0 * weight, tx.init(weight), weight)
        np.testing.assert_array_equal(updates, slope)
    with jax.enable_x64(True):
        huge = jnp.full((2, 2), 1e160)
        np.testing.assert_allclose(wr.weissi(1e-320, 0.0)(huge), 4.0, rtol=1e-3)


@pytest.mark.parametrize("power", [2, 1, 1.3, 0.7])
def test_the_product_of_a_thousand_norms_keeps_its_digits(power):
    rng = np.random.default_rng(0)
    sizes = np.tile([2.0**90, 2.0**-90], 500)
    exact = rng.normal(size=(1000, 4, 4)) / 4 * sizes[:, None, None]
    stacked = jnp.asarray(exact, jnp.float32)
    norms = np.linalg.norm(np.asarray(stacked, np.float64), axis=(1, 2))
    energy = np.exp(-np.float64(np.float32(power)) * np.log(norms).sum())
    penalty = wr.weissi(energy, 0.0, exponents=power, dims=Dims(1, 2))
    np.testing.assert_allclose(penalty(stacked), 1.0, rtol=5e-6)


def test_a_grid_of_strengths_is_one_program():
    params, traces = as_jax(tree()), []

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def both(energy, complexity, params):
        traces.append(1)
        penalty = wr.weissi(energy, complexity, dims=DIMS)
        tx = wr.add_weissi(energy, complexity, dims=DIMS)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        return *jax.value_and_grad(penalty)(params), updates

    energies, complexities = jnp.array([0.0, 1e-38, 2.0]), jnp.array([1.0, 0.0, 0.5])
    values, grads, updates = both(energies, complexities, params)
    both(energies[::-1], complexities[::-1], params)
    assert len(traces) == 1
    chex.assert_trees_all_close(grads, updates, rtol=1e-6)
    for i, pair in enumerate(zip(energies, complexities, strict=True)):
        value, gradient, _ = both_ways(params, pair)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        chex.assert_trees_all_close(one, gradient, rtol=1e-5, atol=1e-7)


def test_schedules_count_steps():
    params = as_jax(tree())
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = wr.add_weissi(lambda n: 0.1 * n, optax.constant_schedule(0.5), dims=DIMS)
    state = tx.init(params)
    step = quick.jit(tx.update)
    for n in range(3):
        updates, state = step(zeros, state, params)
        _, gradient, _ = both_ways(params, (0.1 * n, 0.5))
        chex.assert_trees_all_close(updates, gradient, rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="energy must be a scalar: a penalty has no"):
        wr.weissi(lambda n: n, 0.0)


def test_coupled_and_decoupled_places_in_a_chain():
    params = {"kernel": jnp.array([[3.0, 4.0]])}
    grads = {"kernel": jnp.array([[1.0, -1.0]])}
    slope = jax.grad(wr.weissi(0.1, 0.2))(params)["kernel"]

    def first_step(tx):
        return tx.update(grads, tx.init(params), params)[0]["kernel"]

    link = wr.add_weissi(0.1, 0.2)
    adam, rate = optax.scale_by_adam(eps=0), optax.scale_by_learning_rate(0.5)
    coupled = first_step(optax.chain(link, adam, rate))
    np.testing.assert_allclose(
        coupled, -0.5 * jnp.sign(grads["kernel"] + slope), rtol=1e-4
    )
    decoupled = first_step(optax.chain(adam, link, rate))
    expected = -0.5 * (jnp.sign(grads["kernel"]) + slope)
    np.testing.assert_allclose(decoupled, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "form", [{"norm": "spectral"}, {"complexity_norm": "spectral"}]
)
def test_power_iteration_follows_the_exact_norm(form):
    params = as_jax(tree())
    carried = wr.add_weissi(0.01, 0.5, dims=DIMS, **form)
    exact = wr.add_weissi(0.01, 0.5, dims=DIMS, iterations=None, **form)
    zeros = jax.tree.map(jnp.zeros_like, params)
    start = quick.jit(carried.init)(params)
    expected, empty = quick.jit(exact.update)(zeros, exact.init(params), params)
    step = quick.jit(carried.update)
    first, state = step(zeros, start, params)
    chex.assert_trees_all_close(first, expected, rtol=0.05, atol=0.05)
    for _ in range(300):
        got, state = step(zeros, state, params)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    assert empty.vectors == ()
    shapes = {"dense": (3,), "conv": (3,), "heads": (2, 3), "scanned": (3, 2)}
    assert jax.tree.map(jnp.shape, state.vectors) == shapes | {
        "bias": optax.MaskedNode()
    }
    # Several iterations in one step find it from vectors that are not warmed up.
    cold = start._replace(vectors=jax.tree.map(jnp.ones_like, start.vectors))
    several = wr.add_weissi(0.01, 0.5, dims=DIMS, iterations=16, **form)
    got, _ = quick.jit(several.update)(zeros, cold, params)
    chex.assert_trees_all_close(got, expected, rtol=1e-2, atol=1e-3)


def test_equal_singular_values_have_a_gradient():
    grads = jax.grad(wr.weissi(1.0, 0.0, norm="spectral"))(jnp.eye(3))
    assert jnp.all(jnp.isfinite(grads))
    np.testing.assert_allclose(jnp.linalg.norm(grads), 2, rtol=1e-6)


def test_mask_and_other_leaves():
    params = {"a": jnp.full((2, 2), 2.0), "b": jnp.ones((2, 2)), "n": jnp.arange(3)}
    masked = wr.weight_energy(params, mask={"a": True, "b": False, "n": False})
    assert masked == 16
    link = wr.add_weissi(1.0, 1.0, mask={"a": True, "b": False, "n": False})
    updates, _ = link.update(params, link.init(params), params)
    chex.assert_trees_all_equal(updates["b"], params["b"])
    chex.assert_trees_all_equal(updates["n"], params["n"])
    assert not jnp.allclose(updates["a"], params["a"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_singular_values_of_sharded_weights_are_of_the_whole(axis_type, cpu_mesh):
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    place = NamedSharding(mesh, PartitionSpec("x", "y"))
    penalty = jax.jit(jax.value_and_grad(wr.weissi(0.5, 0.5, norm="spectral")))
    expected = penalty(w)
    with jax.set_mesh(mesh):
        value, gradient = penalty(jax.device_put(w, place))
    assert gradient.sharding.is_equivalent_to(place, 2)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wr.weissi(-1.0, 0.0), ValueError, "energy must be at least 0"),
        (lambda: wr.weissi(0.0, math.nan), ValueError, "complexity must be at least 0"),
        (lambda: wr.weissi(math.inf, 0.0), ValueError, "energy must be at least 0 and"),
        (lambda: wr.weissi("1", 0.0), TypeError, "energy must be a scalar"),
        (lambda: wr.weissi(jnp.ones(2), 0.0), TypeError, "energy must be a scalar"),
        (lambda: wr.weissi(0, 0, norm="l2"), ValueError, "norm must be one of 'frob"),
        (lambda: wr.weissi(0, 0, norm=(0.5, 1)), ValueError, "from 1 to infinity"),
        (lambda: wr.weissi(0, 0, norm=(1, math.nan)), ValueError, "norm must be"),
        (
            lambda: wr.weissi(0, 0, complexity_norm=3),
            ValueError,
            "complexity_norm must be",
        ),
        (lambda: wr.add_weissi(0, 0, iterations=0), ValueError, "iterations must be"),
        (lambda: wr.weissi(0, 0, log="no"), TypeError, "log must be a boolean"),
        (lambda: wr.weissi(0, 0, norm=(True, 2)), ValueError, "norm must be one of"),
        (lambda: wr.add_weissi(0, 0, iterations=True), TypeError, "iterations must be"),
        (lambda: wr.add_weissi(0, -1), ValueError, "complexity must be at least 0"),
        (
            lambda: wr.weight_energy(jnp.ones((2, 2)), exponents=-1),
            ValueError,
            "must be at least 0 and finite, but is -1",
        ),
        (
            lambda: wr.weight_energy({"a": jnp.ones((2, 2))}, exponents={"a": None}),
            TypeError,
            r"exponents at \['a'\] must be a number: the leaf is to be penalized",
        ),
        (
            lambda: wr.weight_energy({"a": jnp.ones((2, 2))}, exponents={"b": 1}),
            ValueError,
            "exponents must be one value, or a tree that matches",
        ),
        (lambda: wr.cnn_exponents(jnp.int32(3)), TypeError, "static_args='exponents'"),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_updates_that_do_not_fit_are_refused():
    tx = wr.add_weissi(1.0, 1.0)
    params = {"a": jnp.ones((2, 2))}
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="updates must have the structure"):
        tx.update({"b": jnp.ones((2, 2))}, state, params)
    with pytest.raises(ValueError, match=r"updates has shape \(2, 1\) at \['a'\]"):
        tx.update({"a": jnp.ones((2, 1))}, state, params)


def test_inject_hyperparams_needs_static_args_for_exponents():
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(wr.add_weissi)(
            1e-3, 1e-3, exponents=wr.cnn_exponents
        ).init(params)
    static = ("exponents", "norm", "complexity_norm", "log", "iterations")
    tx = optax.inject_hyperparams(wr.add_weissi, static_args=static)(
        1e-3, 1e-3, exponents=wr.cnn_exponents
    )
    updates, _ = tx.update(params, tx.init(params), params)
    slope = jax.grad(wr.weissi(1e-3, 1e-3, exponents=wr.cnn_exponents))(params)
    np.testing.assert_allclose(updates["kernel"], 1 + slope["kernel"], rtol=1e-6)


def test_inject_hyperparams_traces_numbers():
    params = {"kernel": jnp.ones((2, 2))}
    tx = optax.inject_hyperparams(wr.add_weissi)(1e-3, 1e-3)
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    slope = jax.grad(wr.weissi(1e-3, 1e-3))(params)
    np.testing.assert_allclose(updates["kernel"], 1 + slope["kernel"], rtol=1e-6)
    spectral = optax.inject_hyperparams(wr.add_weissi, static_args=("norm",))
    with pytest.raises(TypeError, match="static_args='iterations'"):
        jax.jit(spectral(1e-3, 1e-3, norm="spectral").init)(params)


def test_init_needs_shapes_alone():
    params = {"kernel": jnp.ones((2, 2))}
    tx = wr.add_weissi(1e-3, 1e-3)
    chex.assert_trees_all_equal(
        tx.init(jax.eval_shape(lambda: params)), tx.init(params)
    )


@pytest.mark.parametrize("form", [{}, {"log": True}, {"norm": "spectral"}], ids=show)
def test_stacks_that_a_mesh_splits_beside_other_weights(form, cpu_mesh):
    """Norms of a split stack are joined with those of weights that are split apart."""
    mesh = cpu_mesh((4, 2), ("x", "y"), AxisType.Explicit)
    rng = np.random.default_rng(0)
    shapes = {"stack": (4, 6, 8), "dense": (8, 6)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    specs = {"stack": PartitionSpec("x", None, "y"), "dense": PartitionSpec("x", "y")}
    form = form | {"dims": {"stack": Dims(1, 2), "dense": Dims(0, 1)}}
    tx = wr.add_weissi(0.5, 0.25, iterations=None, **form)

    @quick.jit
    def run(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return *jax.value_and_grad(wr.weissi(0.5, 0.25, **form))(params), updates

    expected = run(params)
    with jax.set_mesh(mesh):
        placed = {
            k: jax.device_put(w, NamedSharding(mesh, specs[k]))
            for k, w in params.items()
        }
        got = run(placed)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, leaf in placed.items():
        assert got[2][name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@quick.bits
@pytest.mark.parametrize("count", [20, 1000])
def test_digits_of_large_and_of_many_layers(count):
    """What is promised: 1e-6 at 20 layers, 1e-4 at a thousand, in float32."""
    side = 512 if count == 20 else 8
    rng = np.random.default_rng(0)
    w = rng.normal(size=(count, side, side)) / side
    params = jnp.asarray(w * np.exp(rng.normal(size=(count, 1, 1))), jnp.float32)
    exact = np.asarray(params, np.float64)
    sizes = np.sqrt(np.sum(exact**2, (1, 2)))
    energy = np.exp(-2 * np.log(sizes).sum())
    penalty = wr.weissi(energy, 0.0, dims=Dims(1, 2))
    value, grads = jax.jit(jax.value_and_grad(penalty))(params)
    tolerance = 1e-6 if count == 20 else 1e-4
    np.testing.assert_allclose(value, 1.0, rtol=tolerance)
    slope = 2 * exact / sizes[:, None, None] ** 2
    np.testing.assert_allclose(grads, slope, rtol=tolerance)
    ratios = np.abs(exact).sum((1, 2)) / sizes
    complexity = wr.layer_complexity(params, dims=Dims(1, 2))
    np.testing.assert_allclose(complexity, ratios.sum(), rtol=1e-6)


def test_weights_of_eight_bits_are_refused_by_name():
    params = {"k": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    for method in (wr.weissi(1.0, 1.0), wr.weight_energy, wr.log_weight_energy):
        with pytest.raises(TypeError, match=r"cannot handle \['k'\] of dtype float8"):
            method(params)
    with pytest.raises(TypeError, match=r"cannot handle \['k'\] of dtype float8"):
        wr.add_weissi(1.0, 1.0).init(params)
