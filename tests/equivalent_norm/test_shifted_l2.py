"""Epsilon-shifted L2 against its formula in NumPy, at float64."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything

FORMS = list(itertools.product(("unit", "layer"), (True, False)))
DIMS = {"conv": Dims((0, 1, 2), 3), "scanned": Dims(1, 2), "bias": None}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": 0.5 + rng.normal(size=(2, 2, 3, 4)),
        "scanned": rng.normal(size=(3, 5, 2)),
        "bias": rng.normal(size=(3,)),
    }


def groups(params, scope):
    """All weights that share a norm, as vectors."""
    conv = params["conv"].reshape(-1, 4)
    for matrix in (conv, *params["scanned"]):
        yield from matrix.T if scope == "unit" else [matrix.ravel()]


def formula(params, strength, epsilon, scope, center):
    total = 0.0
    for w in groups(params, scope):
        if center:
            total += len(w) * ((w.std() - epsilon) ** 2 + w.mean() ** 2)
        else:
            total += (np.linalg.norm(w) - epsilon) ** 2
    return strength / 2 * total


def as_jax(params, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


@pytest.mark.parametrize(("scope", "center"), FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_value_and_gradients_equal_the_formula(scope, center, dtype):
    with jax.enable_x64(True):
        numbers, form = (0.3, 0.7), {"scope": scope, "center": center, "dims": DIMS}
        params = as_jax(tree(), dtype)
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        eps = float(jnp.finfo(dtype).eps)
        penalty = wr.shifted_l2(*numbers, **form)
        value, grads = quick.jit(jax.value_and_grad(penalty))(params)
        want = formula(exact, *numbers, scope, center)
        assert value == pytest.approx(want, rel=1e-5 if dtype != "float64" else 1e-13)
        link = wr.add_shifted_l2(*numbers, **form)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = link.update(zeros, link.init(params), params)
        for name, leaf in exact.items():
            for index in np.ndindex(leaf.shape):
                sides = []
                for step in (1e-6, -1e-6):
                    moved = {k: v.copy() for k, v in exact.items()}
                    moved[name][index] += step
                    sides.append(formula(moved, *numbers, scope, center))
                slope = (sides[0] - sides[1]) / 2e-6
                for got in (grads, updates):
                    got = float(got[name][index])
                    assert got == pytest.approx(slope, abs=4 * eps + 1e-8)


@pytest.mark.parametrize(("scope", "center"), FORMS)
def test_epsilon_and_strength_have_derivatives(scope, center):
    exact, form = tree(), {"scope": scope, "center": center, "dims": DIMS}
    with jax.enable_x64(True):
        params = as_jax(exact, "float64")
        penalty = lambda s, e: wr.shifted_l2(s, e, **form)(params)  # noqa: E731
        got = quick.jit(jax.grad(penalty, (0, 1)))(0.3, 0.7)
    step = 1e-4
    value = lambda s, e: formula(exact, s, e, scope, center)  # noqa: E731
    slopes = (
        value(0.3 + step, 0.7) - value(0.3 - step, 0.7),
        value(0.3, 0.7 + step) - value(0.3, 0.7 - step),
    )
    np.testing.assert_allclose(got, np.array(slopes) / (2 * step), rtol=1e-7)


def test_the_authors_form_of_the_centred_gradient():
    """``lam ((1 - eps / std) (w - mean) + mean)``, as METHODS of the paper's code."""
    w = tree()["conv"].reshape(-1, 4)
    mean, std = w.mean(0), w.std(0)
    expected = 1e-4 * ((1 - 1e-3 / std) * (w - mean) + mean)
    link = wr.add_shifted_l2(1e-4, 1e-3)
    params = jnp.asarray(w, jnp.float32)
    updates, _ = link.update(0 * params, link.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(("scope", "center"), FORMS)
def test_without_a_shift_it_is_weight_decay(scope, center):
    params = as_jax(tree())
    form = {"scope": scope, "center": center, "dims": DIMS}
    penalty = wr.shifted_l2(0.1, 0.0, **form)
    weights = [params["conv"], params["scanned"]]
    want = 0.05 * optax.tree.norm(weights, squared=True)
    np.testing.assert_allclose(penalty(params), want, rtol=1e-5)
    decay = optax.add_decayed_weights(0.1, mask={k: k != "bias" for k in params})
    ours, theirs = (
        tx.update(params, tx.init(params), params)[0]
        for tx in (wr.add_shifted_l2(0.1, 0.0, **form), decay)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_norms_end_at_epsilon_and_directions_stay(center):
    """Gradient descent on the penalty alone, from far inside and far outside."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 4)) * [1e-6, 0.1, 1.0, 100.0], jnp.float32)
    tx = optax.chain(wr.add_shifted_l2(0.1, 0.5, center=center), optax.sgd(1.0))

    @quick.jit
    def train(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jnp.zeros_like(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, 400)[0][0]

    end = np.asarray(train(w), np.float64)
    size = end.std(0) if center else np.linalg.norm(end, axis=0)
    np.testing.assert_allclose(size, 0.5, rtol=1e-4)
    start = np.asarray(w, np.float64)
    start = start - start.mean(0) if center else start
    cosine = np.sum(start * end, 0)
    cosine /= np.linalg.norm(start, axis=0) * np.linalg.norm(end, axis=0)
    np.testing.assert_allclose(cosine, 1, rtol=1e-4)
    if center:
        np.testing.assert_allclose(end.mean(0), 0, atol=1e-5)


def test_dead_units_decay_plainly_and_extremes_are_finite():
    w = jnp.array([[0.0, 0.1, 1e-30, 1e30]] * 3).at[0, 2:].multiply(2)
    for center in (True, False):
        link = wr.add_shifted_l2(0.5, 1e-3, center=center)
        updates, _ = link.update(jnp.zeros_like(w), link.init(w), w)
        chex.assert_tree_all_finite(updates)
        np.testing.assert_array_equal(updates[:, 0], 0.0)
        if center:
            np.testing.assert_allclose(updates[:, 1], 0.05, rtol=1e-6)
        np.testing.assert_allclose(updates[:, 3], 0.5 * w[:, 3], rtol=1e-6)
        slope = jax.grad(wr.shifted_l2(0.5, 1e-3, center=center))
        np.testing.assert_allclose(slope(w), updates, rtol=1e-5, atol=1e-9)
        along = jnp.array([[1.0, 2.0, 0.0, 0.0], [-3.0, 5.0, 0.0, 0.0], [7.0] * 4])
        second = jax.jvp(slope, (w,), (along,))[1]
        dead = slice(2) if center else 0
        np.testing.assert_allclose(second[:, dead], 0.5 * along[:, dead], rtol=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_weights_without_elements_are_left_alone(center):
    empty = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((3, 0)), "c": jnp.zeros((0, 1))}
    assert wr.shifted_l2(0.1, 0.1, center=center)(empty) == 0
    link = wr.add_shifted_l2(0.1, 0.1, center=center)
    updates, _ = link.update(empty, link.init(empty), empty)
    chex.assert_trees_all_equal(updates, empty)


@quick.bits
def test_numbers_of_few_bits_are_not_rounded_further():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    epsilon = jnp.asarray(0.7, jnp.bfloat16)
    link = wr.add_shifted_l2(1.0, epsilon)
    updates, _ = link.update(0 * w, link.init(w), w)
    slope = jax.grad(wr.shifted_l2(1.0, float(epsilon)))(w)
    np.testing.assert_allclose(updates, slope, rtol=1e-5, atol=1e-6)


def test_schedules_wrappers_and_dtypes():
    params = as_jax(tree(), jnp.bfloat16)
    link = wr.add_shifted_l2(lambda count: 0.1 * (count + 1), 0.0, dims=DIMS)
    state = link.init(params)
    for factor in (0.1, 0.2):
        updates, state = link.update(params, state, params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        got = np.asarray(updates["conv"], np.float32)
        want = (1 + factor) * np.asarray(params["conv"], np.float32)
        np.testing.assert_allclose(got, want, rtol=0.01)
        np.testing.assert_array_equal(updates["bias"], params["bias"])
    injected = optax.inject_hyperparams(wr.add_shifted_l2)(0.1, 1e-3)
    update = quick.jit(injected.update)
    kernel = {"kernel": params["conv"]}
    updates, _ = update(kernel, quick.jit(injected.init)(kernel), kernel)
    assert updates["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [wr.shifted_l2, wr.add_shifted_l2])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((-1.0, 0.0), {}, ValueError, "strength must be"),
        ((1.0, math.nan), {}, ValueError, "epsilon must be"),
        (("1", 0.0), {}, TypeError, "strength must be a scalar"),
        ((1.0, jnp.ones(2)), {}, TypeError, "epsilon must be a scalar"),
        ((1.0, 0.0), {"scope": "row"}, ValueError, "scope must be one of"),
        ((1.0, 0.0), {"center": None}, TypeError, "center must be a boolean"),
    ],
)
def test_wrong_arguments_are_named(make, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(*args, **kwargs)


def test_what_does_not_fit_is_named():
    params = {"kernel": jnp.ones((2, 2))}
    link = wr.add_shifted_l2(1.0, 1.0)
    state = link.init(params)
    with pytest.raises(ValueError, match="params"):
        link.update(params, state)
    with pytest.raises(ValueError, match="updates must have the structure"):
        link.update({"other": jnp.ones((2, 2))}, state, params)
    with pytest.raises(ValueError, match=r"\['kernel'\].*one input a unit"):
        link.init({"kernel": jnp.ones((1, 2))})
    with pytest.raises(TypeError, match="strength must be a scalar"):
        wr.shifted_l2(lambda count: 1.0, 0.0)
