"""Robustness: what attacks reach, and that masked gradients do not go unnoticed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import weightreg as wr
from benchmarks import robustness
from benchmarks.robustness import ATTACKS, Network, Settings, evaluate, masked_gradients

QUICK = Settings(steps=5, restarts=2)


def perceptron(weights, x):
    v, a, w, b = weights
    return jax.nn.relu(x @ v + a) @ w + b


@pytest.fixture(scope="module")
def fitted(digits):
    """Weights of a perceptron for a seed and a weight decay."""
    x, y = jnp.asarray(digits.x_train), jnp.asarray(digits.y_train)

    @jax.jit
    def run(seed, decay):
        keys = jax.random.split(jax.random.key(seed), 402)
        v = jax.random.normal(keys[0], (64, 256)) / 6
        w = jax.random.normal(keys[1], (256, 10)) / 16
        weights = v, jnp.zeros(256), w, jnp.zeros(10)
        tx = optax.adamw(3e-3, weight_decay=decay)

        def step(carry, key):
            weights, state = carry
            rows = jax.random.randint(key, (64,), 0, len(x))

            def loss(weights):
                ce = optax.softmax_cross_entropy_with_integer_labels
                return ce(perceptron(weights, x[rows]), y[rows]).mean()

            updates, state = tx.update(jax.grad(loss)(weights), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, tx.init(weights)), keys[2:])[0][0]

    return functools.cache(lambda seed, decay=0.0: run(seed, decay))


def mlp(params, x):
    """The perceptron, with inputs rounded to levels, if any, and logits scaled."""
    weights, levels, scale = params
    x = jnp.where(levels > 0, jnp.round(levels * x) / jnp.maximum(levels, 1), x)
    return scale * perceptron(weights, x)


def network_of(weights, levels=0, scale=1):
    """A network; all kinds share their programs."""
    return Network(mlp, (weights, np.float32(levels), np.float32(scale)))


def linear(params, x):
    return x @ params


def linear_problem(classes, seed=0, examples=300):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(examples, 12)).astype(np.float32)
    w = np.full((12, 4), -10, np.float32)  # of one shape: the rest is never chosen
    w[:, :classes] = rng.normal(size=(12, classes))
    y = np.argmax(x @ w, -1)
    y[::20] = (y[::20] + 1) % classes
    return w, x, y


def largest_margin(w, x, y, epsilon):
    """The exact one of a linear network, within ball and bounds, in float64."""
    w, x = w.astype(float), x.astype(float)
    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    d = w.T[None] - w.T[y][:, None]
    reached = np.sum(np.where(d > 0, d * high[:, None], d * low[:, None]), -1)
    reached[np.arange(len(y)), y] = -np.inf
    return reached.max(-1)


@quick.everything
@pytest.mark.parametrize("epsilon", (0.03, 0.1, 0.2))
def test_reaches_the_exact_accuracy_of_a_linear_network(epsilon):
    w, x, y = linear_problem(2)
    exact = largest_margin(w, x, y, epsilon)
    assert np.abs(exact).min() > 1e-5
    assert 0.1 < np.mean(exact < 0) < 0.95
    right = evaluate(Network(linear, w), x, y, epsilon, QUICK)
    for name in ("fgsm", "pgd", "restarts", "margin", "worst"):
        np.testing.assert_array_equal(right[name], exact < 0, err_msg=name)
    # Among several classes the search may follow the wrong one, but seldom
    w, x, y = linear_problem(4)
    exact = largest_margin(w, x, y, epsilon)
    assert np.abs(exact).min() > 1e-5
    right = evaluate(Network(linear, w), x, y, epsilon, Settings(steps=10))
    for name, found in right.items():
        if name != "clean":
            assert not np.any((exact < 0) & ~found), name
    assert np.sum(right["margin"] != (exact < 0)) <= 1
    assert np.sum(right["worst"] != (exact < 0)) <= 1


def test_breaks_from_the_exact_radius_on():
    """Which is the margin over the L1 distance of the weights, away from the bounds."""
    w, x, _ = linear_problem(2)
    x = 0.4 + 0.2 * x
    z = x.astype(float) @ w
    radii = np.abs(z[:, 0] - z[:, 1]) / np.abs(w[:, 0] - w[:, 1]).sum()
    for i in np.argsort(radii)[-100::20]:
        assert 0.01 < radii[i] < 0.4
        for factor, expected in ((1.001, False), (0.999, True)):
            right = evaluate(
                Network(linear, w), x, z.argmax(-1), factor * radii[i], QUICK
            )
            for name in ("fgsm", "pgd", "margin", "worst"):
                assert right[name][i] == expected, name


def test_nan_is_not_right():
    w, x, y = linear_problem(2)
    right = evaluate(Network(linear, w * np.nan), x, y, 0.1, QUICK)
    assert not any(np.any(found) for found in right.values())


def test_transferred_points_are_found_on_the_source_and_judged_on_the_network():
    w, x, y = linear_problem(2)
    other, _, _ = linear_problem(2, seed=1)
    right = evaluate(Network(linear, w), x, y, 0.1, QUICK, Network(linear, other))
    towards = np.sign((other[:, 1] - other[:, 0]) * np.where(y == 0, 1, -1)[:, None])
    points = np.clip(x + 0.1 * towards, 0, 1)
    expected = (np.argmax(points @ w, -1) == y) & right["clean"]
    np.testing.assert_array_equal(right["transfer"], expected)
    assert right["pgd"].sum() < expected.sum() < right["clean"].sum()


@quick.everything
@pytest.mark.parametrize("epsilon", (0.0, 0.1))
def test_the_worst_is_right_everywhere(digits, fitted, epsilon):
    network, source = network_of(fitted(0)), network_of(fitted(1))
    x, y = digits.x_test, digits.y_test
    right = evaluate(network, x, y, epsilon, QUICK, source)
    assert list(right) == ["clean", *ATTACKS, "worst"]
    assert all(r.shape == y.shape and r.dtype == bool for r in right.values())
    logits = perceptron(fitted(0), x)
    np.testing.assert_array_equal(right["clean"], logits.argmax(-1) == y)
    attacked = [right[name] for name in ATTACKS]
    np.testing.assert_array_equal(right["worst"], np.all(attacked, axis=0))
    assert not any(np.any(a & ~right["clean"]) for a in attacked)
    assert not np.any(right["restarts"] & ~right["pgd"])
    accuracy = robustness.accuracies(right)
    assert json.loads(json.dumps(accuracy)) == accuracy
    assert accuracy["worst"] == np.mean(right["worst"])
    if epsilon == 0:
        assert len(set(accuracy.values())) == 1
    else:
        assert accuracy["worst"] < accuracy["pgd"] < accuracy["fgsm"] < 0.7
    del attacked[-1], right["transfer"]
    alone = evaluate(network, x, y, epsilon, QUICK)
    assert list(alone) == list(right)
    np.testing.assert_array_equal(alone["worst"], np.all(attacked, axis=0))


def test_an_example_does_not_depend_on_its_batch(digits, fitted, monkeypatch):
    """Gradients vanish here, so that random starts alone tell examples apart."""
    network, source = network_of(fitted(0), scale=1e4), network_of(fitted(1))
    x, y = digits.x_test, digits.y_test
    program, sizes = robustness._right_under, set()

    def watched(*args):
        sizes.add(len(args[-1]))
        return program(*args)

    def run(**given):
        settings = Settings(steps=1, restarts=3, **given)
        return evaluate(network, x, y, 0.3, settings, source)

    monkeypatch.setattr(robustness, "_right_under", watched)
    whole = run()
    assert whole["worst"].sum() < whole["restarts"].sum() < whole["pgd"].sum()
    assert sizes == {len(x)}
    sizes.clear()
    parts = run(batch=37)
    assert sizes == {37}
    for name in ("clean", "fgsm", "pgd", "restarts"):
        np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)
    for name in ("margin", "transfer"):  # rounding turns signs
        assert np.sum(parts[name] != whole[name]) <= 2, name
    assert np.any(run(seed=1)["pgd"] != whole["pgd"])
    more = evaluate(network, x, y, 0.3, Settings(steps=1, restarts=9))
    assert more["restarts"].sum() < whole["restarts"].sum()
    # Each has a start of its own
    fragile = np.argmax(whole["pgd"] & ~whole["restarts"])
    same = np.repeat(x[fragile : fragile + 1], len(x), axis=0)
    right = evaluate(network, same, np.full_like(y, y[fragile]), 0.3, QUICK)
    assert 0 < np.mean(right["pgd"]) < 1


def test_networks_radii_and_settings_share_programs(digits, fitted):
    x, y, source = digits.x_test, digits.y_test, network_of(fitted(3))
    evaluate(network_of(fitted(0)), x, y, 0.1, QUICK, source)
    before = robustness._right_under._cache_size()
    for seed, epsilon in ((1, 0), (2, np.float64(0.2)), (3, np.float32(0.1))):
        settings = Settings(steps=2 + seed, restarts=2 + seed, seed=seed)
        evaluate(network_of(fitted(seed)), x, y, epsilon, settings, source)
    robustness.curve(network_of(fitted(4)), x, y, np.linspace(0, 0.2, 3), QUICK)
    assert robustness._right_under._cache_size() == before


def ball(params, x):
    """Wrong outside the ball around the centre, or outside of [0, 1]."""
    centre, radius = params
    outside = jnp.max(jnp.abs(x - 0.5), axis=-1) > 0.5
    margin = jnp.max(jnp.abs(x - centre), axis=-1) - radius - 1e-6 + outside
    return jnp.stack([jnp.zeros_like(margin), margin], axis=-1)


@quick.everything
@pytest.mark.parametrize("centre", (0.0, 0.01, 0.5, 0.98))
def test_attacks_go_to_the_edge_of_the_ball_and_not_beyond(centre):
    x, y = np.full((5, 7), centre, np.float32), np.zeros(5, int)
    inside = Network(ball, (np.float32(centre), np.float32(0.1)))
    right = evaluate(inside, x, y, 0.1, Settings(steps=5), inside)
    assert all(np.all(found) for found in right.values())
    # From a start on the nearer side of the bounds they end there
    short = Network(ball, (np.float32(centre), np.float32(0.099)))
    right = evaluate(short, x, y, 0.1, Settings(steps=5, restarts=9), short)
    for name in ("restarts", "margin", "worst"):
        assert not np.any(right[name]), name
    assert not np.all(right["pgd"]) and not np.all(right["transfer"])


def bump(params, x):
    """Wrong around 0.55, and right, but with higher cross-entropy, at 0.7."""
    del params
    t = x[:, 0] - 0.5
    z = jnp.zeros_like(t), 0.1 - jnp.maximum(-5.5 * t, 0.75 * t), 9.75 * t - 2
    return jnp.stack(z, axis=-1)


@quick.everything
def test_a_wrong_point_is_stronger_than_a_right_one_of_higher_loss():
    x, y = np.full((100, 1), 0.3, np.float32), np.zeros(100, int)

    @jax.jit
    def highest(x, y):
        ce = optax.softmax_cross_entropy_with_integer_labels
        return wr.pgd(lambda x, y: ce(bump(None, x), y), x, y, 0.4, steps=40)

    np.testing.assert_allclose(highest(x, y), 0.7, atol=1e-6)
    assert np.all(bump(None, highest(x, y)).argmax(-1) == 0)
    right = evaluate(Network(bump, None), x, y, 0.4, Settings(steps=40))
    assert np.mean(right["pgd"]) < 0.2  # a start beyond 0.63 does not come by
    assert not np.any(right["restarts"])


def test_the_cross_entropy_keeps_what_float32_softmax_rounds_away():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 10)) - np.linspace(-5, 80, 60)[:, None]
    y = rng.integers(10, size=60)
    rows = np.arange(60)
    z[rows, y] = 0
    z = z.astype(np.float32)
    e = np.exp(z.astype(float) - z.max(-1, keepdims=True))
    others = np.where(np.arange(10) == y[:, None], 0, e)
    expected = np.log1p(others.sum(-1) / e[rows, y])
    gradient = others / e.sum(-1, keepdims=True)
    gradient[rows, y] = -others.sum(-1) / e.sum(-1)

    @jax.jit
    def value_and_gradient(z):
        value, back = jax.vjp(lambda z: robustness._cross_entropy(z, y), z)
        return value, back(jnp.ones_like(value))[0]

    value, got = value_and_gradient(z)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(got, gradient, rtol=2e-5)


# The curve.


def test_the_curve_starts_clean_falls_and_is_what_evaluate_finds(digits, fitted):
    network, source = network_of(fitted(0)), network_of(fitted(1))
    x, y = digits.x_test, digits.y_test
    epsilons = (0, 0.05, 0.1, 0.2)
    found = robustness.curve(network, x, y, epsilons, QUICK, source)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["epsilon", "clean", *ATTACKS, "worst"]
    assert found.pop("epsilon") == list(epsilons)
    assert len(set(found.pop("clean"))) == 1
    for name, accuracy in found.items():
        assert accuracy[0] == found["worst"][0], name
        assert np.all(np.diff(accuracy) <= 0) and accuracy[-1] < 0.2, name
    # Alone, a radius may miss an example or two that smaller ones have broken
    for i, epsilon in enumerate(epsilons):
        right = robustness.accuracies(evaluate(network, x, y, epsilon, QUICK, source))
        for name, accuracy in found.items():
            assert right[name] - 0.02 <= accuracy[i] <= right[name], (name, epsilon)
    assert robustness.curve(network, x, y, (), QUICK) == {}


def wave(params, x):
    """Right where the wave is positive; one step may go past where it is not."""
    z = jnp.sin(10 * jnp.pi * (params + x[:, 0])) + 0.5
    return jnp.stack([z, jnp.zeros_like(z)], axis=-1)


def test_what_a_smaller_ball_breaks_stays_broken():
    x, y = np.full((3, 1), 0.5, np.float32), np.zeros(3, int)
    network = Network(wave, np.float32(0.1))
    radii = 0, 0.05, 0.1, 0.15
    alone = [evaluate(network, x, y, e, QUICK)["fgsm"].all() for e in radii]
    assert alone == [True, False, True, True]
    found = robustness.curve(network, x, y, radii, QUICK)
    assert found["fgsm"] == found["worst"] == [1, 0, 0, 0]


def test_what_is_wrong_without_an_attack_withstands_none():
    x, y = np.full((3, 1), 0.5, np.float32), np.zeros(3, int)
    network = Network(wave, np.float32(0.217))
    assert wave(network.params, x + 0.15).argmax(-1)[0] == 0  # where one step leads
    right = evaluate(network, x, y, 0.15, QUICK)
    assert not any(np.any(found) for found in right.values())


# Masked gradients.


@pytest.mark.parametrize("epsilon", (0.03, 0.1, 0.2))
@pytest.mark.parametrize("decay", (0.0, 1.0, 10.0))
def test_ordinary_networks_are_not_masked(digits, fitted, epsilon, decay):
    network, source = network_of(fitted(0, decay)), network_of(fitted(1))
    right = evaluate(
        network, digits.x_test, digits.y_test, epsilon, Settings(steps=10), source
    )
    assert np.sum(right["clean"] & ~right["transfer"]) > 5
    assert masked_gradients(right) is None


@pytest.mark.parametrize("epsilon", (0.1, 0.2))
def test_zero_gradients_are_noticed(digits, fitted, epsilon):
    network, source = network_of(fitted(0), levels=8), network_of(fitted(1))
    right = evaluate(network, digits.x_test, digits.y_test, epsilon, QUICK, source)
    accuracy = robustness.accuracies(right)
    assert accuracy["fgsm"] == accuracy["clean"] and accuracy["margin"] > 0.9
    assert accuracy["worst"] <= accuracy["transfer"] < 0.7
    assert "withstand all white-box attacks" in str(masked_gradients(right))


@pytest.mark.parametrize("epsilon", (0.1, 0.2))
def test_saturated_softmax_is_noticed_and_the_margin_sees_through_it(
    digits, fitted, epsilon
):
    x, y, source = digits.x_test, digits.y_test, network_of(fitted(1))
    right = evaluate(network_of(fitted(0), scale=1e4), x, y, epsilon, QUICK, source)
    plain = evaluate(network_of(fitted(0)), x, y, epsilon, QUICK, source)
    accuracy = robustness.accuracies(right)
    assert accuracy["fgsm"] == accuracy["clean"] and accuracy["restarts"] > 0.9
    assert abs(accuracy["worst"] - np.mean(plain["worst"])) < 0.02
    warning = str(masked_gradients(right))
    assert "withstand all cross-entropy attacks" in warning
    assert "'worst' alone are sound" in warning


def outcome(both, transfer_only, white_box_only, wrong=0, by=robustness.WHITE_BOX):
    """As from `evaluate`, with so many examples broken by whom."""
    counts = (both, transfer_only, white_box_only, wrong, 10)
    kind = np.repeat(np.arange(5), counts)
    white_box = {name: ~np.isin(kind, (0, 2, 3)) for name in by}
    right = dict.fromkeys(robustness.WHITE_BOX, kind < 3) | white_box
    return {"clean": kind != 3, **right, "transfer": ~np.isin(kind, (0, 1, 3))}


@pytest.mark.parametrize(
    ("both", "transfer_only", "masked"),
    (
        (0, 0, False),
        (0, 2, False),
        (0, 3, True),
        (87, 13, False),
        (86, 14, True),
        (927, 73, False),
        (926, 74, True),
    ),
)
def test_a_few_missed_examples_are_chance(both, transfer_only, masked):
    for others in (0, 500):
        for wrong in (0, 50):
            right = outcome(both, transfer_only, others, wrong)
            assert (masked_gradients(right) is not None) == masked
    if masked:
        warning = str(masked_gradients(outcome(both, transfer_only, 0)))
        assert f"of {both + transfer_only} examples" in warning
        assert f"{transfer_only} withstand all white-box" in warning


@pytest.mark.parametrize("name", robustness.WHITE_BOX)
def test_one_working_white_box_attack_is_enough(name):
    right = outcome(100, 0, 0, by=(name,))
    warning = masked_gradients(right)
    if name == "margin":
        assert "100 withstand all cross-entropy attacks" in str(warning)
    else:
        assert warning is None


# Errors.


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ({"x": np.full((3, 2), 1.1)}, r"x must be .* in \[0, 1\]"),
        ({"x": np.full((3, 2), np.nan)}, r"x must be .* in \[0, 1\]"),
        ({"x": np.float32(0.5)}, "x must be examples"),
        ({"x": np.ones((0, 2))}, "x must be examples"),
        ({"y": np.zeros(2, int)}, r"y must be .*\(3,\).*\(2,\)"),
        ({"epsilon": -0.1}, "epsilon must be at least 0.*-0.1"),
        ({"epsilon": float("nan")}, "epsilon must be .*nan"),
        ({"epsilon": float("inf")}, "epsilon must be .*inf"),
    ),
)
def test_wrong_arguments_are_named(wrong, message):
    right = {"x": np.full((3, 2), 0.5), "y": np.zeros(3, int), "epsilon": 0.1}
    with pytest.raises(ValueError, match=message):
        evaluate(Network(linear, np.ones((2, 2), np.float32)), **{**right, **wrong})


def test_radii_must_increase():
    network = Network(linear, np.ones((2, 2), np.float32))
    for epsilons in ((0.1, 0.1), (0.2, 0.1)):
        with pytest.raises(ValueError, match="epsilons must increase, but are"):
            robustness.curve(network, np.ones((3, 2)), np.zeros(3, int), epsilons)


def test_masking_needs_a_transferred_attack():
    right = outcome(1, 1, 1)
    del right["transfer"]
    with pytest.raises(ValueError, match="'transfer': evaluate with a source"):
        masked_gradients(right)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"steps": 0}, "steps must be at least 1, but is 0"),
        ({"restarts": 1}, "restarts must be at least 2, but is 1"),
        ({"batch": 0}, "batch must be at least 1, but is 0"),
    ),
)
def test_settings_that_cannot_be_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)
