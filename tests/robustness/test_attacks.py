"""FGSM and PGD against a NumPy reference, and what they promise for any input."""

import functools
from fractions import Fraction

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from flax.errors import ModifyScopeVariableError, TraceContextError
from hypothesis import given, settings
from hypothesis import strategies as st

import weightreg as wr

NORMS = ("linf", "l2")
DTYPES = ("float32", "bfloat16", "float16", "float64")
EAGER_ATTACKS = (wr.fgsm, functools.partial(wr.pgd, steps=3))
fgsm = quick.jit(wr.fgsm, static_argnames=("loss", "norm"))
pgd = quick.jit(wr.pgd, static_argnames=("loss", "norm", "steps", "restarts"))
ATTACKS = (fgsm, functools.partial(pgd, steps=3))


# The reference: NumPy, float64, one example at a time, gradients by hand.


class Linear:
    """A network of one layer under softmax and cross-entropy."""

    def __init__(self, rng):
        self.w = rng.normal(size=(6, 4))

    def logits(self, x):
        return x @ self.w

    def value_and_gradient(self, x, y):
        logits = x @ self.w
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return -np.log(p[y]), self.w @ (p - np.eye(4)[y])


class TwoLayers:
    """A hidden layer of tanh units, softmax and cross-entropy."""

    def __init__(self, rng):
        self.v = rng.normal(size=(6, 5))
        self.w = 2 * rng.normal(size=(5, 4))

    def logits(self, x):
        return jnp.tanh(x @ self.v) @ self.w

    def value_and_gradient(self, x, y):
        hidden = np.tanh(x @ self.v)
        logits = hidden @ self.w
        p = np.exp(logits - logits.max())
        p /= p.sum()
        back = self.w @ (p - np.eye(4)[y])
        return -np.log(p[y]), self.v @ (back * (1 - hidden**2))


def loss_of(network):
    def loss(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(network.logits(x), y)

    return loss


def reference_direction(gradient, norm):
    if norm == "linf":
        return np.sign(gradient)
    return gradient / np.sqrt(np.dot(gradient, gradient))


def reference_fgsm(network, xs, ys, epsilon, low, high, norm):
    attacked = []
    for x, y in zip(xs, ys, strict=True):
        _, gradient = network.value_and_gradient(x, y)
        step = epsilon * reference_direction(gradient, norm)
        attacked.append(np.minimum(np.maximum(x + step, low), high))
    return np.stack(attacked)


def reference_pgd(network, xs, ys, starts, epsilon, step, steps, low, high, norm):
    attacked = []
    for x, y, start in zip(xs, ys, starts, strict=True):
        visited = [x, start]
        for _ in range(steps):
            point = visited[-1]
            _, gradient = network.value_and_gradient(point, y)
            point = point + step * reference_direction(gradient, norm)
            if norm == "linf":
                point = np.maximum(x - epsilon, np.minimum(point, x + epsilon))
            else:
                distance = np.linalg.norm(point - x)
                if distance > epsilon:
                    point = x + (point - x) / distance * epsilon
            visited.append(np.minimum(np.maximum(point, low), high))
        values = [network.value_and_gradient(point, y)[0] for point in visited]
        attacked.append(visited[int(np.argmax(values))])
    return np.stack(attacked)


def problem(kind, seed=0, batch=12):
    rng = np.random.default_rng(seed)
    network = kind(rng)
    return network, rng.uniform(size=(batch, 6)), rng.integers(4, size=batch)


def distance_loss(x, y):
    """Highest far from y: with ``steps=0`` PGD returns where it started."""
    return jnp.sum((x - y) ** 2, axis=tuple(range(1, x.ndim)))


def wavy_loss(x, y):
    """Many local maxima, so that a later point is often weaker than an earlier one."""
    return jnp.sum(jnp.sin(20 * x + y[:, None]), axis=-1)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", (Linear, TwoLayers))
@pytest.mark.parametrize("bounds", ((0, 1), (-9, 9)))
def test_fgsm_equals_the_reference(kind, norm, bounds):
    network, x, y = problem(kind)
    expected = reference_fgsm(network, x, y, 0.3, *bounds, norm)
    with jax.enable_x64(True):
        got = fgsm(loss_of(network), x, y, 0.3, bounds=bounds, norm=norm)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)
    got = fgsm(loss_of(network), x, y, 0.3, bounds=bounds, norm=norm)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", (Linear, TwoLayers))
@pytest.mark.parametrize(("random", "step"), ((False, 0.07), (True, None)))
def test_pgd_equals_the_reference(kind, norm, random, step):
    network, x, y = problem(kind)
    with jax.enable_x64(True):
        attack = functools.partial(
            pgd, epsilon=0.3, key=jax.random.key(1) if random else None, norm=norm
        )
        starts = np.asarray(attack(distance_loss, x, x, steps=0))
        got = attack(loss_of(network), x, y, steps=9, step_size=step)
        assert random == (not np.array_equal(starts, x))
        expected = reference_pgd(
            network, x, y, starts, 0.3, step or 2.5 * 0.3 / 9, 9, 0, 1, norm
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
def test_linear_loss_rises_by_epsilon_times_the_dual_norm(attack):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 2)).astype(np.float32)
    w = rng.normal(size=(5, 3, 2)).astype(np.float32)

    def loss(x, w):
        return jnp.sum(x * w, axis=(1, 2))

    for norm, dual in (("linf", 1), ("l2", 2)):
        got = attack(loss, x, w, 0.5, bounds=None, norm=norm)
        rise = np.sum((np.asarray(got) - x) * w, axis=(1, 2))
        best = 0.5 * np.linalg.norm(w.reshape(5, -1), dual, axis=1)
        np.testing.assert_allclose(rise, best, rtol=1e-5)
    # In the L-infinity norm also against bounds: each entry goes where it pays
    x = rng.uniform(size=(5, 3, 2)).astype(np.float32)
    got = attack(loss, x, w, 0.5)
    corner = np.where(w > 0, np.minimum(x + 0.5, 1), np.maximum(x - 0.5, 0))
    np.testing.assert_allclose(got, corner, rtol=1e-6)


# Budget and bounds, for any input.


def quadratic_loss(x, y):
    return jnp.sum(x * y + x * x, axis=tuple(range(1, x.ndim)))


jitted_quadratic_loss = quick.jit(quadratic_loss)


@functools.cache
def jitted_attack(name, norm):
    if name == "fgsm":
        attack = functools.partial(wr.fgsm, norm=norm)
    else:
        attack = functools.partial(
            wr.pgd, norm=norm, steps=3, restarts=2, key=jax.random.key(0)
        )
    return quick.jit(
        lambda x, y, epsilon, low, high: attack(
            quadratic_loss, x, y, epsilon, bounds=(low, high)
        )
    )


MAGNITUDES = st.sampled_from((0.0, 1e-30, 1e-7, 0.1, 1 / 3, 0.999, 1.0, 7.3, 3e4, 1e30))
EPSILONS = st.one_of(MAGNITUDES, st.floats(1e-6, 1.0, allow_subnormal=False))
ENTRIES = st.one_of(
    MAGNITUDES,
    MAGNITUDES.map(lambda v: -v),
    st.floats(1e-3, 2.0, allow_subnormal=False),
)


@st.composite
def attacked_inputs(draw):
    shape = draw(st.sampled_from(((1,), (2, 2, 3), (0, 2))))
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    largest = float(jnp.finfo(dtype).max)

    def array():
        size = int(np.prod(shape))
        values = draw(st.lists(ENTRIES, min_size=size, max_size=size))
        return np.clip(values, -largest, largest).reshape(shape).astype(dtype)

    bounds = draw(st.sampled_from(((0, 1), (-0.3, 0.7), (-np.inf, np.inf))))
    return array(), array(), draw(EPSILONS), bounds


def as_fractions(array):
    return [Fraction(float(entry)) for entry in np.asarray(array).ravel()]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(attacked_inputs(), st.sampled_from(("fgsm", "pgd")), st.sampled_from(NORMS))
def test_budget_and_bounds_hold_for_any_input(inputs, name, norm):
    x, y, epsilon, (low, high) = inputs
    with jax.enable_x64(x.dtype == np.float64):
        wide = np.promote_types(x.dtype, np.float32)
        with np.errstate(over="ignore"):
            epsilon = wide.type(epsilon)
            low, high = (np.asarray(b, np.float64).astype(x.dtype) for b in (low, high))
        got = np.asarray(jitted_attack(name, norm)(x, y, epsilon, low, high))
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        assert np.all(np.isfinite(got.astype(wide)))
        assert np.all((got >= low) & (got <= high))
        clean = np.clip(x, low, high)
        # Computed as a user would, without a tolerance
        inside = np.abs(got.astype(wide) - clean.astype(wide)) <= epsilon
        assert np.all(inside | (np.abs(got) <= jnp.finfo(x.dtype).tiny))
        # And in the real numbers, for which float32 may round the sum of two halves
        limit = Fraction(float(epsilon))
        if wide != x.dtype:
            limit *= 1 + Fraction(1, 2**24)
        half_of_the_least = Fraction(float(jnp.finfo(x.dtype).smallest_subnormal)) / 2
        for a, b in zip(as_fractions(got), as_fractions(clean), strict=True):
            subnormal = abs(a) <= Fraction(float(jnp.finfo(x.dtype).tiny))
            assert abs(a - b) <= limit + subnormal * half_of_the_least
        if name == "pgd":
            assert_never_weaker(got, clean, y)
        if norm == "l2":
            for a, b in zip(got, clean, strict=True):
                squares = [
                    (p - q) ** 2
                    for p, q in zip(as_fractions(a), as_fractions(b), strict=True)
                ]
                assert sum(squares) <= Fraction(float(epsilon)) ** 2 * Fraction(
                    1.000002
                )


def assert_never_weaker(got, clean, y):
    before, after = (
        np.asarray(jitted_quadratic_loss(point, y), np.float64)
        for point in (clean, got)
    )
    # In and out of the attack the compiler may round the same sum differently
    a, b = (np.abs(np.asarray(array, np.float64)) for array in (got, y))
    # NumPy, not quadratic_loss: 1e60 is no float32
    terms = np.sum(a * b + a * a, axis=tuple(range(1, a.ndim)))
    slack = 8 * float(jnp.finfo(got.dtype).eps) * terms
    finite = np.isfinite(before) & np.isfinite(after)
    assert np.all(after[finite] >= (before - slack)[finite])
    assert np.all(after[before == np.inf] == np.inf)
    assert np.all(after[~np.isnan(before)] > -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_epsilon_zero_returns_the_input(attack, norm, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 3)), dtype)
        got = attack(wavy_loss, x, jnp.arange(4.0, dtype=dtype), 0.0, norm=norm)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_input_outside_its_bounds_is_clipped_first_under_jit(attack):
    x = jnp.array([[-0.5, 0.5, 1.5]])
    y = jnp.ones((1, 3))
    np.testing.assert_array_equal(
        attack(quadratic_loss, x, y, 0.0), jnp.array([[0.0, 0.5, 1.0]])
    )
    np.testing.assert_allclose(
        attack(quadratic_loss, x, y, 0.25), jnp.array([[0.25, 0.75, 1.0]]), rtol=1e-6
    )


STANDARD = ((0 - 0.4914) / 0.247, (1 - 0.4914) / 0.247)


@pytest.mark.parametrize("attack", EAGER_ATTACKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "bounds", "found"),
    [
        ([[0.0, 128.0], [1.0, 255.0]], (0, 1), "0 to 255"),
        ([[-2.0, 1.0]], (0, 1), "-2 to 1"),
        ([[0.0, np.nan, 2.0]], (0, 1), "0 to 2"),
        ([[0.0, np.inf]], (0, 255), "0 to inf"),
        ([[0.0, 2.5]], STANDARD, "0 to 2.5"),
        ([[0.0, 5.0]], (-np.inf, 4), "0 to 5"),
        # Of the second channel alone
        ([[0.0, 3.0], [4.0, 4.0]], (np.array([0, 0]), np.array([4, 2])), "0 to 4"),
    ],
)
def test_known_input_outside_its_bounds_is_refused(attack, dtype, x, bounds, found):
    with jax.enable_x64(dtype == "float64"):
        for array in (jnp.asarray(x, dtype), np.asarray(x, dtype)):
            with pytest.raises(ValueError, match="x must be within bounds=") as error:
                attack(wavy_loss, array, jnp.zeros(len(x)), 0.1, bounds=bounds)
    for part in (str(bounds), f"values from {found}.", "bounds=(0, 255)", "/ std,"):
        assert part in str(error.value)
    assert "bounds=None" in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_no_stricter_than_the_rounding_of_inputs(dtype):
    """Standardized on a device and in Python, numbers differ by some roundings."""
    with jax.enable_x64(dtype == "float64"):
        ends = jnp.array([[0.0, 1.0]], dtype)
        loss = lambda x, y: x.sum(-1)  # noqa: E731
        for mean, std in ((0.4914, 0.247), (0.1307, 0.3081), (0.9, 0.02)):
            x = (ends - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)
            bounds = ((0 - mean) / std, (1 - mean) / std)
            got = wr.fgsm(loss, x, None, 0.0, bounds=bounds)
            low, high = (np.float64(b).astype(ends.dtype) for b in bounds)
            np.testing.assert_array_equal(got, np.clip(x, low, high))


def test_inputs_at_their_bounds_of_no_number_or_of_no_example_are_none_outside():
    loss = lambda x, y: x.sum(-1)  # noqa: E731
    given = [[[0.0, 1.0]], [[np.nan, 1.0]], np.zeros((0, 2)), np.zeros((1, 0))]
    for x in given:
        x = np.asarray(x, np.float32)
        np.testing.assert_array_equal(wr.fgsm(loss, x, None, 0.0), x)
    x = jnp.array([[-1e30, np.inf]])
    assert wr.fgsm(loss, x, None, 0.0, bounds=None)[0, 0] == -1e30


def test_only_known_inputs_and_bounds_are_checked(monkeypatch):
    x = jnp.array([[0.5, 2.0]])
    loss = lambda x, y: x.sum(-1)  # noqa: E731
    run = functools.partial(wr.fgsm, loss, y=None, epsilon=0.0)
    clipped = [[0.5, 1.0]]
    np.testing.assert_array_equal(quick.jit(lambda x: run(x=x))(x), clipped)
    traced = quick.jit(lambda high: run(x=x, bounds=(0, high)))
    np.testing.assert_array_equal(traced(1.0), clipped)
    with pytest.raises(ValueError, match="x must be within bounds"):
        quick.jit(lambda: run(x=x))()  # a constant is known also here
    # As of an array that is spread over other processes' devices
    unseen = property(lambda self: False)
    monkeypatch.setattr(type(x), "is_fully_addressable", unseen)
    traced = quick.jit(lambda: run(x=x)).lower()
    monkeypatch.undo()
    np.testing.assert_array_equal(traced.compile()(), clipped)


@pytest.mark.parametrize("attack", EAGER_ATTACKS)
def test_a_loss_that_changes_state_gets_a_note(attack):
    x = jnp.full((2, 3), 0.5)
    rngs = nnx.Rngs(0)
    for layer in (nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)):
        loss = lambda x, y: layer(x).sum(-1)  # noqa: B023, E731
        with pytest.raises(TraceContextError) as error:
            attack(loss, x, None, 0.1)
        assert "model.eval()" in "".join(error.value.__notes__)
        layer.eval()
        np.testing.assert_allclose(attack(loss, x, None, 0.1), 0.6, rtol=1e-6)
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ModifyScopeVariableError) as error:
        attack(lambda x, y: layer.apply(variables, x)[:, 0], x, None, 0.1)
    assert "use_running_average=True" in "".join(error.value.__notes__)
    with pytest.raises(ZeroDivisionError) as error:
        attack(lambda x, y: x.sum(-1) / (1 // 0), x, None, 0.1)
    assert "An attack" not in "".join(getattr(error.value, "__notes__", ()))


def test_bounds_may_differ_between_channels():
    x = jnp.zeros((2, 3))
    low, high = jnp.array([-1.0, -2.0, -3.0]), jnp.array([1.0, 2.0, 3.0])
    y = jnp.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    got = fgsm(quadratic_loss, x, y, 2.5, bounds=(low, high))
    np.testing.assert_allclose(got, y * jnp.array([1.0, 2.0, 2.5]), rtol=1e-6)


def test_no_bounds_and_infinite_epsilon_stay_finite():
    x = jnp.array([[1.0, -3e38, 0.0]])
    y = jnp.array([[1.0, -1.0, 0.0]])
    for norm in NORMS:
        got = fgsm(distance_loss, x, x - y, np.inf, bounds=None, norm=norm)
        assert np.all(np.isfinite(got))
        assert got[0, 0] > 1e38
        assert got[0, 2] == 0


def test_half_precision_adds_up_steps_too_small_to_be_seen_one_by_one():
    x = jnp.full((1, 1), 0.75, jnp.bfloat16)  # the next number is 1/256 away

    def loss(x, y):
        # The value in float32, or many a small step would look like none
        return jnp.sum(x.astype(jnp.float32), axis=1)

    got = pgd(loss, x, None, 1 / 32, steps=64, step_size=1 / 1024)
    assert got[0, 0] == 0.75 + 1 / 32


def test_l2_norm_of_many_half_precision_entries_does_not_overflow():
    x = jnp.full((2, 300, 300), 0.5, jnp.float16)
    got = fgsm(quadratic_loss, x, jnp.ones_like(x), 30.0, norm="l2")
    norms = np.linalg.norm((np.asarray(got, np.float64) - 0.5).reshape(2, -1), axis=1)
    np.testing.assert_allclose(norms, 30, rtol=1e-2)
    assert np.all(norms <= 30 * (1 + 1e-6))


def test_l2_gradients_of_any_magnitude_give_a_whole_step():
    x = jnp.full((4, 2), 0.5)
    y = jnp.array([1e-30, 1e-10, 1e10, 1e30])
    got = fgsm(lambda x, y: y * (3 * x[:, 0] + 4 * x[:, 1]), x, y, 0.25, norm="l2")
    np.testing.assert_allclose(got, jnp.full((4, 2), 0.5) + jnp.array([0.15, 0.2]))


# The random start.


def test_random_start_is_uniform_in_the_ball():
    center = jnp.full((4000, 3), 0.5)
    for norm in NORMS:
        start = pgd(
            distance_loss,
            center,
            center,
            0.25,
            steps=0,
            key=jax.random.key(0),
            norm=norm,
        )
        delta = np.asarray(start - center) / 0.25
        if norm == "linf":
            uniform = (delta.ravel() + 1) / 2
        else:
            # The volume within a radius r is r^3, which is uniform then
            uniform = np.linalg.norm(delta, axis=1) ** 3
            np.testing.assert_allclose(delta.mean(axis=0), 0, atol=0.04)
            np.testing.assert_allclose(np.cov(delta.T), np.eye(3) / 5, atol=0.02)
        uniform = np.sort(uniform)
        gap = np.abs(uniform - np.linspace(0, 1, uniform.size)).max()
        assert gap < 2 / np.sqrt(uniform.size)  # Kolmogorov and Smirnov, 0.07 %


def test_random_start_depends_on_the_key_alone():
    x = jnp.full((3, 4), 0.5)
    attack = functools.partial(pgd, distance_loss, x, x, 0.25, steps=0)
    first = attack(key=jax.random.key(0))
    np.testing.assert_array_equal(first, attack(key=jax.random.key(0)))
    assert np.all(first != attack(key=jax.random.key(1)))
    np.testing.assert_array_equal(attack(key=None), x)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_restarts_never_weaken(norm):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(16, 5)), jnp.float32)
    y = jnp.asarray(rng.uniform(size=16), jnp.float32)

    @quick.jit
    def strength(steps, restarts):
        got = wr.pgd(
            wavy_loss,
            x,
            y,
            0.4,
            steps=steps,
            step_size=0.1,
            restarts=restarts,
            key=jax.random.key(0),
            norm=norm,
        )
        return wavy_loss(got, y)

    by_steps = np.stack([wavy_loss(x, y)] + [strength(n, 1) for n in range(7)])
    by_restarts = np.stack([strength(3, n) for n in range(1, 7)])
    assert np.all(np.diff(by_steps, axis=0) >= -1e-5)
    assert np.all(np.diff(by_restarts, axis=0) >= -1e-5)
    # Or there would be nothing to keep
    assert by_steps[-1].sum() > by_steps[0].sum() + 1
    assert by_restarts[-1].sum() > by_restarts[0].sum() + 1


def test_keeps_the_strongest_point_of_all_visited():
    # One step of this size lands beyond the maximum, lower than where it started
    x = jnp.array([[0.5], [0.5]])
    y = jnp.array([0.5625, 2.0])
    got = pgd(lambda x, y: -((x[:, 0] - y) ** 2), x, y, 0.25, steps=1, step_size=0.25)
    np.testing.assert_array_equal(got, jnp.array([[0.5], [0.75]]))
    # While FGSM goes there
    got = fgsm(lambda x, y: -((x[:, 0] - y) ** 2), x, y, 0.25)
    np.testing.assert_array_equal(got, jnp.array([[0.75], [0.75]]))


# Zero gradients, NaN, infinities.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_zero_gradients_give_no_step(attack, norm):
    x = jnp.array([[0.25, 0.5], [0.25, 0.5]])
    w = jnp.array([[0.0, 0.0], [0.0, 1.0]])
    got = attack(lambda x, w: jnp.sum(x * w, axis=1), x, w, 0.25, norm=norm)
    np.testing.assert_allclose(got, jnp.array([[0.25, 0.5], [0.25, 0.75]]), rtol=1e-6)
    constant = attack(lambda x, w: jnp.zeros(2), x, w, np.inf, norm=norm)
    np.testing.assert_array_equal(constant, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nan_gradients_of_one_example_leave_it_and_the_others(attack, norm):
    x = jnp.array([[0.25, 0.5], [0.25, 0.5]])
    scale = jnp.array([jnp.nan, 1.0])
    got = attack(lambda x, s: s * x[:, 1], x, scale, 0.25, norm=norm)
    np.testing.assert_allclose(got, jnp.array([[0.25, 0.5], [0.25, 0.75]]), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_infinite_gradients_do_not_make_nan(norm):
    x = jnp.array([[0.25, 0.5]])
    got = fgsm(lambda x, y: jnp.sqrt(x[:, 1] - y), x, 0.5, 0.25, norm=norm)
    np.testing.assert_allclose(got, jnp.array([[0.25, 0.75]]), rtol=1e-6)


def test_nan_loss_is_never_stronger():
    def loss(x, edge):
        return jnp.where(x[:, 0] > edge, jnp.nan, x[:, 0])

    x = jnp.array([[0.25], [0.25], [0.25]])
    edge = jnp.array([2.0, 0.4, 0.0])
    got = pgd(loss, x, edge, 0.5, steps=5, step_size=0.125)
    # All the way; the last step before the NaN; NaN from the start on
    np.testing.assert_array_equal(got, jnp.array([[0.75], [0.375], [0.25]]))


def test_a_number_is_stronger_than_a_nan_at_the_clean_input():
    def loss(x, y):
        return jnp.where(jnp.sum(x, axis=1) == 1.0, jnp.nan, -1e30)

    x = jnp.full((2, 2), 0.5)
    got = pgd(loss, x, None, 0.25, steps=0, key=jax.random.key(0))
    assert np.all(got != x)


def test_infinite_loss_is_stronger_than_any_number():
    def loss(x, y):
        return jnp.where(x[:, 0] > 0.5, jnp.inf, x[:, 0])

    got = pgd(loss, jnp.array([[0.25]]), None, 0.5, steps=4, step_size=0.125)
    assert got[0, 0] == 0.625


# Under JAX's transformations.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [wr.fgsm, functools.partial(wr.pgd, steps=3)])
def test_epsilon_may_be_mapped_or_one_per_example(attack, norm):
    network, x, y = problem(TwoLayers)
    x = jnp.asarray(x, jnp.float32)
    epsilons = np.linspace(0, 0.5, 12).astype(np.float32)
    run = functools.partial(attack, loss_of(network), x, y, norm=norm)
    jitted = quick.jit(run)
    one_by_one = np.stack([jitted(epsilon) for epsilon in epsilons])
    mapped = quick.jit(jax.vmap(run))(epsilons)
    np.testing.assert_allclose(mapped, one_by_one, rtol=0, atol=1e-6)
    each = jitted(epsilons)
    np.testing.assert_allclose(each, one_by_one[range(12), range(12)], atol=1e-6)
    assert np.abs(one_by_one[1:] - one_by_one[:-1]).max() > 0.01


def test_step_size_may_be_one_per_example():
    x = jnp.full((3, 1), 0.25)
    sizes = jnp.array([0.0, 0.125, 0.25])
    got = wr.pgd(lambda x, _: x[:, 0], x, None, 0.5, steps=1, step_size=sizes)
    np.testing.assert_array_equal(got[:, 0], 0.25 + sizes)


def test_compiles_once_for_all_epsilons_steps_and_keys():
    traces = []

    def loss(x, y):
        traces.append(1)
        return wavy_loss(x, y)

    @quick.jit
    def attack(x, y, epsilon, step, steps, key, high):
        one = wr.fgsm(loss, x, y, epsilon, bounds=(0, high))
        settings = {"step_size": step, "steps": steps, "key": key, "restarts": 2}
        return one, wr.pgd(loss, x, y, epsilon, bounds=(0, high), **settings)

    x, y = jnp.full((4, 3), 0.5), jnp.arange(4.0)
    results = []
    for index in range(4):
        size = 0.1 * (index + 1)
        key = jax.random.key(index)
        results.append(attack(x, y, size, size / 2, index + 1, key, 1.0 - size / 4))
        if index == 0:
            first = len(traces)
    assert len(traces) == first
    assert attack._cache_size() == 1
    assert np.ptp([float(jnp.abs(r[1] - x).max()) for r in results]) > 0.1


def test_steps_and_restarts_are_loops():
    x, y = jnp.full((4, 3), 0.5), jnp.arange(4.0)

    def program(steps, restarts):
        return quick.jit(
            lambda x: wr.pgd(
                wavy_loss,
                x,
                y,
                0.1,
                steps=steps,
                restarts=restarts,
                key=jax.random.key(0),
            )
        ).lower(x)

    def length(lowered):
        return len(lowered.as_text().splitlines())

    assert length(program(50, 20)) == length(program(2, 2))


def test_traced_steps_equal_static_ones():
    network, x, y = problem(TwoLayers)
    arguments = (loss_of(network), jnp.asarray(x), y, 0.2)
    key = jax.random.key(0)
    traced = quick.jit(
        lambda n, r: wr.pgd(*arguments, steps=n, restarts=r, key=key, step_size=0.1)
    )
    for steps in (0, 3):
        static = pgd(*arguments, steps=steps, restarts=2, key=key, step_size=0.1)
        np.testing.assert_allclose(traced(steps, 2), static, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", EAGER_ATTACKS)
def test_no_gradient_flows_through_the_attack(attack, norm):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(6, 5)), jnp.float32)
    y = rng.integers(3, size=6)
    w = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)

    def losses(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)

    def robust(w, x, epsilon):
        attacked = attack(lambda x, y: losses(w, x, y), x, y, epsilon, norm=norm)
        return losses(w, attacked, y).sum()

    def attack_alone(w):
        return attack(lambda x, y: losses(w, x, y), x, y, 0.1, norm=norm)

    def train(w, x):
        return losses(w, x, y).sum()

    expected = quick.jit(lambda w: jax.grad(train)(w, attack_alone(w)))(w)
    in_w, in_x, in_epsilon = quick.jit(jax.grad(robust, argnums=(0, 1, 2)))(w, x, 0.1)
    np.testing.assert_allclose(in_w, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(in_x)
    assert in_epsilon == 0

    # Nor is anything spent on one: as many products as the attack has by itself
    def products(function):
        return quick.jit(function).lower(w, x).as_text().count("dot_general")

    both = products(lambda w, x: jax.grad(robust)(w, x, 0.1))
    alone = products(lambda w, x: attack_alone(w))
    assert both == alone + products(jax.grad(train))


def test_adversarial_training_in_a_scanned_jitted_step():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(64, 4)), jnp.float32)
    y = (x[:, 0] > 0.5).astype(jnp.int32)
    params = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    tx = optax.sgd(0.5, momentum=0.9)

    def losses(params, x, y):
        logits = x @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def robust(params, key):
        attacked = wr.pgd(
            lambda x, y: losses(params, x, y), x, y, 0.1, steps=3, key=key
        )
        return losses(params, attacked, y).mean()

    def step(carry, key):
        params, state = carry
        value, gradients = jax.value_and_grad(robust)(params, key)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 30)
    start = (params, tx.init(params))
    scanned, values = quick.jit(lambda c: jax.lax.scan(step, c, keys))(start)
    carry = start
    jitted = quick.jit(step)
    for key in keys:
        carry, _ = jitted(carry, key)
    chex.assert_trees_all_close(scanned[0], carry[0], rtol=1e-4, atol=1e-5)
    assert values[-1] < 0.7 * values[0]


def test_attacks_an_nnx_model_inside_its_training_step():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    )
    x, y = jnp.full((6, 4), 0.5), jnp.arange(6) % 3

    def losses(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y)

    @nnx.jit
    def step(model, x, y):
        def robust(model):
            attacked = wr.pgd(lambda x, y: losses(model, x, y), x, y, 0.25, steps=4)
            return losses(model, attacked, y).mean(), losses(model, x, y).mean()

        return nnx.value_and_grad(robust, has_aux=True)(model)

    (attacked, clean), gradients = step(model, x, y)
    assert attacked > clean
    assert all(np.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("key", (None, 0))
def test_runs_sharded_over_devices(key, cpu_mesh):
    x, y = jnp.full((16, 3), 0.5), jnp.arange(16.0)

    def attack(x, y):
        drawn = None if key is None else jax.random.key(key)
        return wr.pgd(wavy_loss, x, y, 0.1, steps=3, key=drawn, norm="l2")

    expected = quick.jit(attack)(x, y)
    spec = jax.sharding.PartitionSpec("data")
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    for kind in kinds:
        mesh = cpu_mesh((8,), ("data",), kind)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            got = quick.jit(attack)(*jax.device_put((x, y), sharding))
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    mesh = cpu_mesh((8,), ("data",))
    mapped = jax.shard_map(attack, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    got = quick.jit(mapped)(x, y)
    if key is None:
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("varies", ["weights", "epsilon", "step_size", "bound", "key"])
def test_inputs_that_all_devices_share(varies, norm, cpu_mesh):
    """As where a population of networks is attacked on one batch."""
    count = 2
    keys = jax.random.split(jax.random.key(0), count)
    given = {"weights": 1.0, "epsilon": 0.2, "step_size": 0.06, "bound": 0.55}
    given = {name: jnp.array([value]) for name, value in given.items()}
    given["key"] = keys[:1]
    other = keys if varies == "key" else given[varies] * jnp.array([0.8, 1.4])
    x, y = jnp.full((3, 4), 0.5), jnp.arange(3.0)

    def attack(arguments):
        a = {name: value[0] for name, value in arguments.items()}
        w, bounds = a.pop("weights"), (0, a.pop("bound"))
        loss = lambda x, y: jnp.cos(30 * w * x - y[:, None] * jnp.arange(4)).sum(1)  # noqa: E731
        return wr.pgd(loss, x, y, **a, steps=3, bounds=bounds, norm=norm)[None]

    spec = jax.sharding.PartitionSpec
    mesh = cpu_mesh((count,), ("d",))
    specs = {name: spec("d") if name == varies else spec() for name in given}
    mapped = jax.shard_map(attack, mesh=mesh, in_specs=(specs,), out_specs=spec("d"))
    got = quick.jit(mapped)({**given, varies: other})
    for i in range(count):
        alone = quick.jit(attack)({**given, varies: other[i : i + 1]})
        np.testing.assert_allclose(got[i], alone[0], atol=1e-6)
    assert not np.array_equal(got[0], got[1])


@pytest.mark.parametrize("key", [0, 1.5, jnp.zeros(3), "key"])
def test_key_is_checked(key):
    with pytest.raises(TypeError, match=r"key must be one key of jax\.random, not"):
        wr.pgd(wavy_loss, jnp.ones((2, 3)), None, 0.1, steps=1, key=key)
    with pytest.raises(TypeError, match=r"key must be one key of jax\.random, not"):
        keys = jax.random.split(jax.random.key(0), 2)
        wr.pgd(wavy_loss, jnp.ones((2, 3)), None, 0.1, steps=1, key=keys)


def test_bounds_of_channels_need_no_promotion_of_ranks():
    x = jnp.full((2, 3, 4), 0.5)
    loss = lambda x, y: x.sum((1, 2))  # noqa: E731
    bounds = (jnp.zeros(4), jnp.full(4, 0.55))
    with jax.numpy_rank_promotion("raise"):
        for attacked in (
            wr.fgsm(loss, x, None, 0.1, bounds=bounds),
            wr.pgd(loss, x, None, 0.1, steps=2, bounds=bounds),
        ):
            np.testing.assert_allclose(attacked, 0.55)


def test_y_is_handed_on_unchanged():
    seen = []

    def loss(x, y):
        seen.append(y)
        return x[:, 0]

    y = {"labels": [1, 2], "name": "anything"}
    for attack in EAGER_ATTACKS:
        attack(loss, jnp.zeros((2, 1)), y, 0.1)
    assert all(found is y for found in seen)
    assert len(seen) >= 2


def test_takes_numpy_and_weakly_typed_values():
    x = np.full((2, 3), 0.5, np.float32)

    def weak(x, y):
        return jnp.full(2, 1.0) * 2.0

    def constant(x, y):
        return np.ones(2)

    for attack in EAGER_ATTACKS:
        for loss in (weak, constant):
            np.testing.assert_array_equal(attack(loss, x, None, np.float64(0.1)), x)
        got = attack(quadratic_loss, x, np.ones_like(x), 1)
        np.testing.assert_array_equal(got, np.ones_like(x))


# Errors.


def errors_of_both():
    nan = float("nan")
    x = jnp.full((2, 3), 0.5)
    yield (
        {"x": jnp.ones((2, 3), jnp.int32)},
        TypeError,
        "x must be of a floating dtype, not int32",
    )
    for narrow in ("float8_e4m3fn", "float8_e5m2"):
        yield (
            {"x": jnp.full((2, 3), 0.5, narrow)},
            TypeError,
            rf"x must be in floats of 16 bits or more, not {narrow}.*astype",
        )
    yield {"x": jnp.ones((2, 3), bool)}, TypeError, "x must be real numbers, not bool"
    yield (
        {"x": jnp.ones((2, 3), complex)},
        TypeError,
        "x must be real numbers, not complex64",
    )
    yield {"x": None}, TypeError, "x must be real numbers, not NoneType"
    yield {"x": 0.5}, ValueError, r"x must have .*\(batch, ...\).*scalar"
    yield {"epsilon": -0.1}, ValueError, "epsilon must be 0 or more, but is -0.1"
    yield {"epsilon": nan}, ValueError, "epsilon must be 0 or more, but is nan"
    yield (
        {"epsilon": jnp.array([0.1, -0.2])},
        ValueError,
        "epsilon must be 0 or more.*-0.2",
    )
    yield {"epsilon": jnp.ones(3)}, ValueError, r"epsilon must .*\(2,\).*\(3,\)"
    yield {"epsilon": jnp.ones((2, 1))}, ValueError, r"epsilon must .*\(2,\).*\(2, 1\)"
    yield {"epsilon": "big"}, TypeError, "epsilon must be real numbers, not <U3"
    yield {"epsilon": None}, TypeError, "epsilon must be real numbers, not NoneType"
    yield {"bounds": (1, 0)}, ValueError, r"bounds must be .*low <= high.*\(1, 0\)"
    yield {"bounds": (0, nan)}, ValueError, "bounds must be in order.*nan"
    yield {"bounds": (jnp.zeros(3), -1)}, ValueError, "bounds must be .*low <= high"
    yield (
        {"bounds": (0, 1, 2)},
        ValueError,
        r"bounds must be \(low, high\).*\(0, 1, 2\)",
    )
    yield {"bounds": 1}, ValueError, r"bounds must be \(low, high\).*not 1"
    yield {"bounds": (0, None)}, TypeError, "bounds must be real numbers, not NoneType"
    yield {"bounds": (0, jnp.ones(4))}, ValueError, r"bounds must .*\(2, 3\).*\(4,\)"
    yield {"bounds": (0, jnp.ones((1, 2, 3)))}, ValueError, r"bounds must .*\(1, 2, 3\)"
    yield {"norm": "l1"}, ValueError, r"norm must be one of \('linf', 'l2'\), not 'l1'"
    yield {"loss": lambda x, y: jnp.sum(x)}, ValueError, r"loss must .*\(2,\).*\(\)"
    yield {"loss": lambda x, y: x}, ValueError, r"loss must .*\(2,\).*\(2, 3\)"
    yield (
        {"loss": lambda x, y: (x, x)},
        TypeError,
        "loss must return .*floats, not tuple",
    )
    yield (
        {"loss": lambda x, y: None},
        TypeError,
        "loss must return .*floats, not NoneType",
    )
    yield (
        {"loss": lambda x, y: jnp.ones(2, int)},
        TypeError,
        "loss must return .*floats, not int32",
    )
    # Shapes and dtypes of traced values are known, unlike the values
    yield {"epsilon": (jnp.ones(3),)}, ValueError, r"epsilon must .*\(2,\).*\(3,\)"
    del x


@pytest.mark.parametrize(("wrong", "error", "message"), list(errors_of_both()))
@pytest.mark.parametrize("attack", EAGER_ATTACKS)
def test_wrong_arguments_are_named(attack, wrong, error, message):
    right = {
        "loss": quadratic_loss,
        "x": jnp.full((2, 3), 0.5),
        "y": jnp.ones((2, 3)),
        "epsilon": 0.1,
    }
    arguments = {**right, **wrong}
    if isinstance(arguments["epsilon"], tuple):
        (traced,) = arguments.pop("epsilon")

        def run():
            return quick.jit(lambda e: attack(epsilon=e, **arguments))(traced)

    else:
        run = functools.partial(attack, **arguments)
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be 0 or more.*-1"),
        ({"steps": 2.0}, TypeError, "steps must be an integer.*2.0"),
        ({"steps": True}, TypeError, "steps must be an integer.*True"),
        ({"steps": None}, TypeError, "steps must be an integer.*None"),
        ({"restarts": 0}, ValueError, "restarts must be 1 or more.*0"),
        ({"restarts": 1.5}, TypeError, "restarts must be an integer.*1.5"),
        ({"restarts": 2, "key": None}, ValueError, "restarts must be 1 .*key.* is 2"),
        ({"step_size": -1.0}, ValueError, "step_size must be 0 or more.*-1.0"),
        ({"step_size": float("nan")}, ValueError, "step_size must be 0 or more.*nan"),
        ({"step_size": jnp.ones(3)}, ValueError, r"step_size must .*\(2,\).*\(3,\)"),
        ({"step_size": "big"}, TypeError, "step_size must be real numbers"),
    ],
)
def test_wrong_arguments_of_pgd_are_named(wrong, error, message):
    right = {"steps": 2, "restarts": 1, "key": jax.random.key(0)}
    with pytest.raises(error, match=message):
        wr.pgd(
            quadratic_loss,
            jnp.full((2, 3), 0.5),
            jnp.ones((2, 3)),
            0.1,
            **{**right, **wrong},
        )


def test_traced_counts_must_be_integers():
    def attack(steps, restarts, key):
        x = jnp.full((2, 3), 0.5)
        return wr.pgd(
            quadratic_loss, x, x, 0.1, steps=steps, restarts=restarts, key=key
        )

    with pytest.raises(TypeError, match=r"steps must be an integer.*float32"):
        quick.jit(attack)(2.0, 1, jax.random.key(0))
    with pytest.raises(TypeError, match=r"restarts must be an integer.*float32"):
        quick.jit(attack)(2, jnp.ones(2), jax.random.key(0))
    with pytest.raises(ValueError, match=r"restarts must be 1 .*key"):
        quick.jit(lambda r: attack(2, r, None))(1)


def test_traced_values_are_not_checked():
    x = jnp.full((2, 3), 0.5)

    def attack(epsilon, low):
        return wr.fgsm(quadratic_loss, x, x, epsilon, bounds=(low, 1))

    quick.jit(attack)(-1.0, 2.0)
    with pytest.raises(ValueError, match="epsilon"):
        attack(-1.0, 0.0)
