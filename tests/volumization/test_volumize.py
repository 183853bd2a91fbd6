"""Volumization against independent references, special cases and extreme values."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import quick

import weightreg as wr

LOW = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
DTYPES = [*LOW, np.dtype(np.float32), np.dtype(np.float64)]


def step(p, u, volume, alpha):
    """One update and its application, in two programs as a user may have them."""
    tx = wr.volumize(volume, alpha)
    updates, _ = jax.jit(tx.update)(u, tx.init(p), p)
    return optax.apply_updates(p, updates), updates


def vol(w, volume, alpha):
    """Algorithm 1 on float64 arrays, weight by weight."""
    out, left = w.copy(), np.zeros(w.shape, bool)
    for i in np.ndindex(w.shape):
        if abs(w[i]) > volume:
            sign = 1.0 if w[i] > 0 else -1.0
            out[i] = w[i] + (1 - alpha) * (volume * sign - w[i])
            left[i] = True
    return out, left


class NumpySGD:
    """Algorithm 2."""

    def __init__(self, w, mu=0.9):
        self.w, self.mu, self.m = w.copy(), mu, np.zeros_like(w)
        self.clipped = 0

    def step(self, g, lr, volume, alpha):
        self.m = self.mu * self.m + g
        self.w, left = vol(self.w - lr * self.m, volume, alpha)
        self.m[left] *= alpha
        self.clipped += left.sum()


class NumpyAdam:
    """Algorithm 3, with Adam's own update line."""

    def __init__(self, w, b1=0.9, b2=0.999, eps=1e-8):
        self.w, self.b1, self.b2, self.eps, self.t = w.copy(), b1, b2, eps, 0
        self.m, self.n = np.zeros_like(w), np.zeros_like(w)
        self.clipped = 0

    def step(self, g, lr, volume, alpha):
        self.t += 1
        self.n = self.b2 * self.n + (1 - self.b2) * g * g
        self.m = self.b1 * self.m + (1 - self.b1) * g
        c_m, c_n = 1 - self.b1**self.t, 1 - self.b2**self.t
        proposed = self.w - lr * (self.m / c_m) / (np.sqrt(self.n / c_n) + self.eps)
        self.w, left = vol(proposed, volume, alpha)
        self.m[left] *= alpha
        self.clipped += left.sum()


class NumpyLaProp(NumpyAdam):
    """Algorithm 4."""

    def __init__(self, w):
        super().__init__(w, eps=1e-15)

    def step(self, g, lr, volume, alpha):
        self.t += 1
        self.n = self.b2 * self.n + (1 - self.b2) * g * g
        c_m, c_n = 1 - self.b1**self.t, 1 - self.b2**self.t
        self.m = self.b1 * self.m + (1 - self.b1) * g / (
            np.sqrt(self.n / c_n) + self.eps
        )
        self.w, left = vol(self.w - lr * self.m / c_m, volume, alpha)
        self.m[left] *= alpha
        self.clipped += left.sum()


OPTIMIZERS = {
    "sgd": (wr.volumized_sgd, NumpySGD, 0.02),
    # optax.adam computes 1 - 0.999**t in float32 and is 3e-5 off in its first steps;
    # bare, it drifts from float64 by 6e-5 in 200 steps of 0.05. This rate is usual.
    "adam": (wr.volumized_adam, NumpyAdam, 0.003),
    "laprop": (wr.volumized_laprop, NumpyLaProp, 0.05),
}


BARE = [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.lion(0.1)]


@quick.everything
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("alpha", [0.9, 0.0, -0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_equal_numpy(name, alpha, scheduled, dtype):
    """Algorithms 2 to 4 for 200 steps: a noisy quadratic pulled against the walls.

    The gradients are fixed beforehand, so that one weight on the other side of a
    wall by rounding shows as one weight and is not amplified; such ties do not occur.
    """
    factory, reference, lr = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    w = rng.normal(size=(7, 5)).astype(dtype)
    pull = rng.normal(size=w.shape)
    grads = (pull + rng.normal(size=(200, *w.shape))).astype(dtype)
    volume, alphas, lrs = 0.6, np.full(200, alpha), np.full(200, lr)
    volumes = np.full(200, volume)
    if scheduled:
        volumes = volume * (1 - np.arange(200) / 400)
        alphas = alpha * (1 - np.arange(200) / 500)
        lrs = lr / (1 + np.arange(200) / 100)

    expected = reference(w.astype(np.float64))
    trajectory = []
    for g, rate, v, a in zip(grads, lrs, volumes, alphas, strict=True):
        expected.step(g.astype(np.float64), rate, v, a)
        trajectory.append(expected.w.copy())

    with jax.enable_x64(dtype == np.float64):
        schedule = lambda values: lambda count: jnp.asarray(values)[count]  # noqa: E731
        tx = factory(
            schedule(lrs) if scheduled else lr,
            volume=schedule(volumes) if scheduled else volume,
            alpha=schedule(alphas) if scheduled else alpha,
        )
        params = jnp.asarray(w)

        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), got = jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g))(
            params, jnp.asarray(grads)
        )
        moment = "trace" if name == "sgd" else "mu"
        got_m = np.asarray(optax.tree.get(state, moment), np.float64)
        got = np.asarray(got, np.float64)

    assert expected.clipped > 100
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    scale = np.max(np.abs(trajectory), axis=(1, 2), keepdims=True)
    assert np.max(np.abs(got - trajectory) / scale) < tolerance
    np.testing.assert_allclose(got_m, expected.m, rtol=0, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("volume", "alpha"), [(0.3, 1.0), (np.inf, 0.5), (np.inf, 0.0)]
)
def test_no_regularization_is_the_bare_optimizer_bit_for_bit(dtype, volume, alpha):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"kernel": jnp.asarray(rng.normal(size=(9, 7)).astype(dtype))}
        grads = jnp.asarray(rng.normal(size=(20, 9, 7)).astype(dtype))
        for bare in BARE:
            ours = wr.volumized(bare, volume, alpha)
            p1, p2, s1, s2 = params, params, bare.init(params), ours.init(params)
            for g in grads:
                u1, s1 = jax.jit(bare.update)({"kernel": g}, s1, p1)
                u2, s2 = jax.jit(ours.update)({"kernel": g}, s2, p2)
                p1, p2 = optax.apply_updates(p1, u1), optax.apply_updates(p2, u2)
            bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]  # noqa: E731
            assert bits((p1, u1, s1)) == bits((p2, u2, s2.inner_state))


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0, -1.0])
def test_a_traced_infinite_volume_changes_nothing_even_of_infinite_weights(alpha):
    p = jnp.array([[jnp.inf, -jnp.inf, 3e38, 1.0]])
    u = jnp.array([[1.0, 2.0, 3e38, -jnp.inf]])
    for updates in (u, -u):
        got = jax.jit(lambda v, u: step(p, u, v, alpha)[1])(jnp.inf, updates)
        np.testing.assert_array_equal(got, updates)


@pytest.mark.parametrize(("volume", "alpha"), [(0.3, 1.0), (np.inf, 0.5)])
@pytest.mark.parametrize("bare", BARE)
def test_no_regularization_changes_nothing_in_a_fused_step_either(bare, volume, alpha):
    """XLA contracts the sum with the parameters as it does without us."""
    rng = np.random.default_rng(0)
    params, *grads = jnp.asarray(rng.normal(size=(3, 64, 64)), jnp.float32)

    def fused(tx):
        @jax.jit
        def run(params, grads):  # as arguments, or XLA would compute it all in advance
            state = tx.init(params)
            for g in grads:
                updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), updates

        return run(params, grads)

    for rule in (volume, wr.he_volume(volume)):
        ours = fused(wr.volumized(bare, rule, alpha))
        for got, expected in zip(ours, fused(bare), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_volume_zero_is_decoupled_weight_decay(dtype):
    """``w <- alpha (w + u)``: optax's decay, but after the step and not times lr."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        alpha = 0.99
        params = jnp.asarray(rng.normal(size=(50, 40)).astype(dtype))
        u = jnp.asarray(0.01 * rng.normal(size=(50, 40)).astype(dtype))
        w, _ = step(params, u, 0.0, alpha)
        stepped = optax.apply_updates(params, u)
        decay = optax.add_decayed_weights(-(1 - alpha))
        decayed, _ = decay.update(jnp.zeros_like(u), decay.init(params), stepped)
        expected = np.asarray(optax.apply_updates(stepped, decayed), np.float64)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(w, expected, rtol=2 * eps, atol=2 * eps * 0.01)
        # and, wherever an increment of the usual size lets it be, exactly alpha w^
        exact = np.asarray(stepped) * dtype(alpha)
        assert np.mean(np.asarray(w) == exact) > 0.99


def test_alpha_zero_is_the_projection_onto_the_box():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.uniform(-0.5, 0.5, (100, 100)), jnp.float32)
    u = jnp.asarray(rng.normal(size=(100, 100)), jnp.float32)
    w, _ = step(p, u, 0.5, 0.0)
    box = optax.projections.projection_box(optax.apply_updates(p, u), -0.5, 0.5)
    crossed = np.sign(p) != np.sign(w)  # from the other side not all can be reached
    np.testing.assert_array_equal(np.asarray(w)[~crossed], np.asarray(box)[~crossed])
    np.testing.assert_allclose(w, box, atol=1e-7)


def test_elastic_wall_reflects_and_flips_signs_without_a_box():
    p, u = jnp.array([[0.5, -0.5, 0.1]]), jnp.array([[0.75, -1.0, 0.1]])
    np.testing.assert_allclose(step(p, u, 1.0, -1.0)[0], [[0.75, -0.5, 0.2]])
    flipped, _ = step(p, jnp.zeros_like(p), 0.0, -1.0)
    np.testing.assert_array_equal(flipped, -p)
    # Beyond V (1 + 2 / |alpha|) the reflection leaves the box and is not clamped.
    np.testing.assert_allclose(
        step(jnp.array([[0.0]]), jnp.array([[5.0]]), 1.0, -0.5)[0], -1
    )
    np.testing.assert_allclose(
        step(jnp.array([[0.0]]), jnp.array([[9.0]]), 1.0, -0.5)[0], -3
    )


@pytest.mark.parametrize("alpha", [0.5, 0.0, -1.0])
def test_nan_and_infinity_stay_where_they_are(alpha):
    p = jnp.full((2, 3), 0.25)
    g = jnp.array([[jnp.nan, 1.0, jnp.inf], [-jnp.inf, -1.0, 0.0]])
    tx = wr.volumized(optax.sgd(1.0, momentum=0.9), 0.5, alpha)
    state = tx.init(p)
    for _ in range(3):
        updates, state = tx.update(g, state, p)
        p = optax.apply_updates(p, updates)
        g = jnp.zeros_like(g)
    trace = optax.tree.get(state, "trace")
    finite = np.array([[False, True, False], [False, True, True]])
    assert np.all(np.isfinite(p), where=finite)
    assert np.all(np.isfinite(trace), where=finite)
    assert np.isnan(p[0, 0])
    if alpha == 0:  # a projection of infinity is the wall, and its momentum is gone
        np.testing.assert_array_equal(p[:, [2, 0]][[0, 1], [0, 1]], [-0.5, 0.5])
        np.testing.assert_array_equal(trace[[0, 1], [2, 0]], 0.0)


def test_only_weights_move_and_only_their_momentum_is_damped():
    params = {
        "kernel": jnp.full((2, 2), 2.0),
        "bias": jnp.full(2, 2.0),
        "n": jnp.int32(3),
    }
    grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "n": jnp.int32(0)}
    tx = wr.volumized(optax.trace(0.9), 1.0, 0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], 2.0)  # 1 + 0.5 (3 - 1)
    np.testing.assert_allclose(new["bias"], 3.0)
    assert new["n"] == 3
    np.testing.assert_allclose(state.inner_state.trace["kernel"], 0.5)
    np.testing.assert_allclose(state.inner_state.trace["bias"], 1.0)


def test_a_thousand_layers():
    layer = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    params = {f"Dense_{i}": layer for i in range(1000)}
    numbers = [int(re.findall(r"\d+", x.path)[0]) for x in wr.weight_layers(params)]
    assert numbers == list(range(1000))
    volume = wr.lipschitz_volume(0.5)
    np.testing.assert_allclose(volume(params)["Dense_7"]["kernel"], 0.5**0.001 / 3)
    tx = wr.volumized(optax.sgd(0.1, momentum=0.9), volume, 0.0)
    updates, state = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for name, trace in optax.tree.get(state, "trace").items():
        np.testing.assert_allclose(new[name]["kernel"], 0.5**0.001 / 3, rtol=1e-6)
        np.testing.assert_allclose(new[name]["bias"], 1.8, rtol=1e-6)
        np.testing.assert_array_equal(trace["kernel"], 0.0)
        np.testing.assert_array_equal(trace["bias"], 2.0)


def test_mask_chooses_the_leaves():
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = wr.volumize(1.0, 0.0, mask={"kernel": False, "bias": True})
    updates, _ = tx.update(zeros, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["kernel"], 2.0)
    np.testing.assert_array_equal(new["bias"], 1.0)


def test_each_layer_has_its_own_wall_and_arrays_broadcast():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3, 3)), "c": jnp.ones((6, 6))}
    volume = {
        "a": 0.5,
        "b": jnp.array([0.25, 0.75])[:, None, None],  # two stacked layers
        "c": lambda count: 0.1 * (count + 1),
    }
    tx = wr.volumize(volume, 0.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    first = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(first["a"], 0.5)
    np.testing.assert_array_equal(first["b"][:, 0, 0], [0.25, 0.75])
    np.testing.assert_allclose(first["c"], 0.1, rtol=1e-6)
    updates, _ = tx.update(zeros, state, params)
    np.testing.assert_allclose(params["c"] + updates["c"], 0.2, rtol=1e-6)


def test_derivatives_are_those_of_the_rule():
    p = jnp.array([[0.2, 0.9, -0.9, 0.3]])
    u = jnp.array([[0.1, 0.4, -0.6, 0.5]])

    def weights(p, u, volume, alpha):
        tx = wr.volumize(volume, alpha)
        return optax.apply_updates(p, tx.update(u, tx.init(p), p)[0]).sum()

    grads = jax.grad(weights, argnums=(0, 1, 2, 3))(p, u, 0.5, 0.7)
    np.testing.assert_allclose(grads[0], [[1.0, 0.7, 0.7, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(grads[1], [[1.0, 0.7, 0.7, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(grads[2], 0.3 * (1 - 1 + 1), rtol=1e-5)
    np.testing.assert_allclose(grads[3], 0.8 - 1.0 + 0.3, rtol=1e-5)


@quick.everything
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_the_derivative_by_alpha_goes_on_at_one(differentiate):
    """Or else a search that starts from no regularization never leaves it."""
    p, u = jnp.array([[2.0, 0.1, -0.25]]), jnp.array([[0.0, 0.1, -0.5]])
    by_alpha = differentiate(
        lambda alpha: step(p, u, 0.5, alpha)[0][0] @ jnp.arange(3.0)
    )
    np.testing.assert_allclose(by_alpha(1.0), -0.25 * 2, rtol=1e-5)
    first = differentiate(lambda alpha: step(p, u, 0.5, alpha)[0][0, 0])
    np.testing.assert_allclose(first(1.0), 1.5, rtol=1e-6)


def test_ranks_need_not_be_promoted():
    params = jnp.ones((2, 3))
    with jax.numpy_rank_promotion("raise"):
        tx = wr.volumized(optax.sgd(0.1, momentum=0.9), jnp.array([0.1, 0.2, 2.0]), 0.0)
        updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose((params + updates)[0], [0.1, 0.2, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(1.5, ValueError), (-1.01, ValueError), (np.nan, ValueError), ("x", TypeError),
     (jnp.float32(2.0), ValueError), (jnp.ones(2), TypeError), (None, TypeError)],
)  # fmt: skip
def test_alpha_is_checked_on_construction(alpha, error):
    with pytest.raises(error, match="alpha"):
        wr.volumize(0.5, alpha)
    with pytest.raises(error, match="alpha"):
        wr.volumized_adam(1e-3, volume=0.5, alpha=alpha)


@pytest.mark.parametrize(
    ("volume", "error"),
    [(-0.5, ValueError), (np.nan, ValueError), ("x", TypeError), (1j, TypeError),
     (jnp.float32(-1.0), ValueError), (True, TypeError), (None, TypeError)],
)  # fmt: skip
def test_volume_is_checked_on_construction(volume, error):
    with pytest.raises(error, match="volume"):
        wr.volumize(volume, 0.5)


@pytest.mark.parametrize("alpha", [jnp.zeros((2, 2, 2)), jnp.zeros(2), 1j, True])
def test_traced_alpha_is_checked_for_what_is_known(alpha):
    with pytest.raises(TypeError, match="alpha must be a scalar"):
        jax.jit(lambda alpha: step(P, U, 0.5, alpha))(alpha)


@pytest.mark.parametrize(
    ("volume", "error", "match"),
    [
        (jnp.zeros((2, 2, 2)), ValueError, r"volume.*\(2, 2, 2\)"),
        (jnp.zeros(3), ValueError, r"volume.*\(3,\)"),
        (1j, TypeError, "volume must be a number"),
        (True, TypeError, "volume must be a number"),
    ],
)
def test_traced_volumes_are_checked_for_what_is_known(volume, error, match):
    with pytest.raises(error, match=match):
        jax.jit(lambda volume: step(P, U, volume, 0.5))(volume)


@pytest.mark.parametrize(
    ("volume", "alpha", "error", "match"),
    [
        (0.5, lambda count: jnp.zeros(2), ValueError, "alpha must be a scalar, but"),
        (0.5, lambda count: "x", TypeError, "alpha must be a schedule"),
        ([lambda count: jnp.zeros(3)], 0.5, ValueError, r"volume at \[0\].*\(3,\)"),
        ([lambda count: None], 0.5, TypeError, r"volume at \[0\] must be a schedule"),
    ],
)
def test_what_schedules_give_is_checked(volume, alpha, error, match):
    tx = wr.volumize(volume, alpha)
    with pytest.raises(error, match=match):
        tx.update([U], tx.init([P]), [P])


def test_swapped_arguments_and_functions_that_fail_are_explained():
    with pytest.raises(TypeError, match=r"alpha must be a scalar.*HeVolume"):
        wr.volumize(0.99, wr.he_volume(0.5))
    tx = wr.volumize(lambda count: count * jnp.ones(2), 0.5)
    with pytest.raises(TypeError) as caught:
        tx.init({"kernel": P})
    assert "taken for a function of the parameters" in caught.value.__notes__[0]


def test_mask_functions_are_not_taken_for_schedules():
    inject = optax.inject_hyperparams
    tx = inject(wr.volumized_adam)(0.1, volume=0.5, alpha=0.0, mask=wr.weight_mask)
    with pytest.raises(TypeError, match="static_args='mask'"):
        tx.init({"kernel": P})
    tx = inject(wr.volumized_adam, static_args=("mask", "volume"))(
        0.1, volume=wr.he_volume(0.1), alpha=0.0, mask=wr.weight_mask
    )
    updates, _ = tx.update({"kernel": U}, tx.init({"kernel": P}), {"kernel": P})
    wall = wr.he_volume(0.1)({"kernel": P})["kernel"]
    assert jnp.all(jnp.abs(P + updates["kernel"]) <= jnp.float32(wall))


P, U = jnp.ones((2, 2)), jnp.full((2, 2), 0.5)


def test_errors_of_the_first_call_name_the_leaf():
    params = {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    everything = lambda p: jax.tree.map(lambda _: True, p)  # noqa: E731
    cases = {
        "missing": (wr.volumize({"Dense_0": {"bias": 1.0}}, 0.5), ValueError, "kernel"),
        "extra": (
            wr.volumize({"Dense_0": 1.0, "Dense_1": 1.0}, 0.5),
            ValueError,
            "Dense_1",
        ),
        "negative": (wr.volumize({"Dense_0": -1.0}, 0.5), ValueError, "kernel.*-1.0"),
        "shape": (
            wr.volumize({"Dense_0": jnp.ones(3)}, 0.5),
            ValueError,
            r"kernel.*\(3,\)",
        ),
        "fans": (
            wr.volumize(wr.he_volume(1.0), 0.5, mask=everything),
            ValueError,
            "bias",
        ),
        "momentum": (
            wr.volumized(optax.sgd(0.1), 1.0, 0.5),
            ValueError,
            "kernel.*require",
        ),
    }
    for tx, error, match in cases.values():
        with pytest.raises(error, match=f"(?s){match}"):
            tx.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    for tx in (wr.volumize(1.0, 0.5), wr.volumized_adam(0.1, volume=1.0, alpha=0.5)):
        with pytest.raises(ValueError, match="not passing `params`"):
            tx.update(grads, tx.init(params))
    with pytest.raises(ValueError, match="structure"):
        wr.volumize(1.0, 0.5).update(
            {"x": 0.0}, wr.volumize(1.0, 0.5).init(params), params
        )
    small = {"kernel": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    with pytest.raises(TypeError, match=r"kernel.*float8"):
        wr.volumize(1.0, 0.5).init(small)


def test_plain_sgd_is_volumized_when_that_is_meant():
    params = jnp.full((2, 2), 2.0)
    tx = wr.volumized(optax.sgd(0.1), 1.0, 0.0, require_momentum=False)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(params + updates, 1.0)
