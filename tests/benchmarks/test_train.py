"""Populations are what a user would write by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import quick

import weightreg as wr
from benchmarks import models, networks, train
from benchmarks.methods import METHODS
from benchmarks.settings import Settings

# Bits are compared, so all is computed where the runs are.
pytestmark = pytest.mark.usefixtures("cpu_mesh")
OUTPUT = "Dense_1/kernel"  # of the small networks here


def population(mapping, seeds, hyper, data, method=METHODS["volumization"], **kwargs):
    """Parameters and curves of a few runs on 100 digits."""
    runs, progress = started(mapping, seeds, hyper, data, method, **kwargs)
    rows = []
    for _ in range(3):
        progress, measured = runs.epoch(progress)
        rows.append(measured)
    stacked = jax.tree.map(lambda *epochs: np.stack(epochs, 1), *rows)
    return [n["params"] for n in runs.networks(progress)], stacked


def started(mapping, seeds, hyper, data, method=METHODS["volumization"], **kwargs):
    """A population on 100 digits, and where it starts."""
    arrays = train.Arrays(jnp.asarray(data.x_train[:100]), jnp.asarray(data.x_test))
    labels = train.Labels(
        jnp.tile(data.y_train[:100], (len(seeds), 1)),
        jnp.tile(data.y_test, (len(seeds), 1)),
    )
    build = functools.partial(method.build, base="adam", output=OUTPUT)
    given = {"model": networks.MLP((16,), 10), "classes": 10, "optimizer": build}
    given |= {"batch": 20} | kwargs
    devices = meshes.cpu_devices()
    runs = train.Population(train.Training(**given), arrays, mapping, devices)
    return runs, runs.start(seeds, hyper, labels)


HYPER = [
    {"learning_rate": 1e-3, "v": 0.3, "one_minus_alpha": 0.1},
    {"learning_rate": 3e-3, "v": 0.1, "one_minus_alpha": 1.0},
    {"learning_rate": 2e-3, "v": 1.0, "one_minus_alpha": 1e-3},
]


@pytest.mark.parametrize("mapping", ["devices", "vmap"])
def test_a_run_does_not_depend_on_the_others(mapping, digits):
    together, curves = population(mapping, [3, 4, 5], HYPER, digits)
    for i, seed in enumerate([3, 4, 5]):
        (alone,), curve = population(mapping, [seed], [HYPER[i]], digits)
        if mapping == "devices":
            chex.assert_trees_all_equal(together[i], alone)
            chex.assert_trees_all_equal(
                jax.tree.map(lambda x, i=i: x[i], curves),
                jax.tree.map(lambda x: x[0], curve),
            )
        else:  # batched matrix products sum in another order
            chex.assert_trees_all_close(together[i], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mapping", train.MAPPINGS)
def test_runs_are_spread_over_all_devices(mapping, digits, cpu_mesh):
    """Nine runs on eight devices, which are filled up to two runs each."""
    seeds, hyper = list(range(9)), [HYPER[i % 3] for i in range(9)]
    runs, progress = started(mapping, seeds, hyper, digits)
    after, measured = runs.epoch(progress)
    mesh = cpu_mesh((8,), ("runs",))
    for leaf in jax.tree.leaves(after):
        assert leaf.sharding.device_set == set(mesh.devices)
        assert [len(shard.data) for shard in leaf.addressable_shards] == [2] * 8
    together = runs.networks(after)
    assert len(together) == len(measured.accuracy) == 9
    for i in (0, 8):
        alone, progress = started(mapping, seeds[i : i + 1], hyper[i : i + 1], digits)
        progress, measured_alone = alone.epoch(progress)
        (network,) = alone.networks(progress)
        chex.assert_trees_all_close(together[i], network, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            measured.accuracy[i], measured_alone.accuracy[0], atol=0.01
        )


def test_what_is_kept_from_a_step_in_bfloat16_is_float32(digits):
    """All at once too."""
    model = networks.NormMLP((16,), 10, dtype=jnp.bfloat16)
    build = functools.partial(METHODS["none"].build, base="adam", output=OUTPUT)
    training = train.Training(model=model, classes=10, optimizer=build, batch=20)
    x, y, key = digits.x_train[:20], digits.y_train[:20], jax.random.key(0)
    step, *start = train.make_step(training, {"learning_rate": 1e-3}, jnp.asarray(x))
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
    many = jax.vmap(step, in_axes=(0, 0, 0, None, None, None))
    for run, begun in ((step, start), (many, rows)):
        after = jax.eval_shape(run, *begun, x, y, key)
        assert after == jax.eval_shape(lambda *trees: trees, *begun)
        assert jnp.bfloat16 not in {leaf.dtype for leaf in jax.tree.leaves(after)}


def test_mappings_are_known_by_name(digits):
    message = "mapping must be among devices, vmap, not 'pmap'"
    with pytest.raises(ValueError, match=message):
        population("pmap", [0], HYPER[:1], digits)


def test_a_run_equals_a_plain_loop(digits):
    """The population is what a user would write by hand, with fixed numbers."""
    (got,), _ = population("devices", [7], [HYPER[0]], digits)
    model, x, y = networks.MLP((16,), 10), digits.x_train[:100], digits.y_train[:100]
    init_key, key = jax.random.split(jax.random.key(7))
    params = model.init(init_key, x[:1])["params"]
    tx = wr.volumized(optax.adam(1e-3), wr.he_volume(0.3), 0.9)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = model.apply({"params": params}, x)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y, 1))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        shuffle, key = jax.random.split(key)
        for batch in jax.random.permutation(shuffle, 100).reshape(5, 20):
            params, state = step(params, state, x[batch], y[batch][:, None])
    chex.assert_trees_all_close(got, params, rtol=1e-4, atol=1e-6)


def test_all_runs_of_a_method_are_one_program(digits):
    traced = []
    plain = METHODS["volumization"].optimizer
    spy = dataclasses.replace(
        METHODS["volumization"],
        optimizer=lambda *given: (traced.append(1), plain(*given))[1],
    )
    population("devices", [3, 4, 5], HYPER, digits, spy)
    assert len(traced) == 2  # one to start, one for an epoch; three of those ran


def test_adversarial_training_is_ordinary_training_on_attacked_examples(digits):
    """The step of a population against the same written by hand."""
    model, build = (
        networks.MLP((16,), 10),
        functools.partial(METHODS["l2"].build, base="momentum", output=OUTPUT),
    )
    hyper = {"learning_rate": 0.1, "strength": 1e-3}
    x, y = jnp.asarray(digits.x_train[:20]), jnp.asarray(digits.y_train[:20])
    params = train.initialize(model, 0, x[:1])[0]["params"]
    tx, key = build(hyper), jax.random.key(3)
    given = {"model": model, "classes": 10, "optimizer": build, "batch": 20}
    training = train.Training(**given, adversary=0.05)
    state = tx.init(params)
    got, _, _ = train.train_step(training, tx, hyper, params, {}, state, x, y, key)

    def loss(p, x, y):
        return train.example_loss(
            lambda x: models.logits(model, {"params": p}, x), x, y
        )

    fixed = functools.partial(loss, params)
    moved = wr.pgd(fixed, x, y, 0.05, steps=train.ADVERSARY_STEPS, key=key)
    assert jnp.max(jnp.abs(moved - x)) == pytest.approx(0.05)
    grads = jax.grad(lambda p: loss(p, moved, y).mean())(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


ENC = {"learning_rate": 0.1, "strength": 1e-2, "epsilon": 0.1}


def mapped(name, **kwargs):
    """How a network is trained whose weights are mapped."""
    method = METHODS[name]
    build = functools.partial(method.build, base="momentum", output=OUTPUT)
    given = {"model": networks.NormMLP((16,), 10), "classes": 10, "batch": 20}
    return train.Training(**given, optimizer=build, norm=method.norm, **kwargs)


def test_a_step_through_a_map_is_the_one_written_by_hand(digits):
    x, y = jnp.asarray(digits.x_train[:20]), jnp.asarray(digits.y_train[:20])
    training = mapped("enc_learnt")
    step, params, stats, state = train.make_step(training, ENC, x)
    start = jax.tree.map(jnp.copy, (params, stats))
    got = step(params, stats, state, x, y, jax.random.key(0))

    def loss(params, log_alpha):
        kernels = wr.equivalent_norm(alpha=jnp.exp(log_alpha))(params)
        variables = {"params": kernels, **start[1]}
        logits, after = training.model.apply(
            variables, x, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), after

    trained = tuple(start[0])
    grads, after = quick.jit(jax.grad(lambda t: loss(*t), has_aux=True))(trained)
    decay = quick.jit(jax.grad(wr.shifted_l2(ENC["strength"], ENC["epsilon"])))(
        trained[0]
    )
    grads = jax.tree.map(jnp.add, grads[0], decay), grads[1]
    want = jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads)
    chex.assert_trees_all_close(tuple(got[0]), want, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(got[1], after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mapping", ["devices", "vmap"])
def test_networks_are_folded_and_their_sensitivity_measured(mapping, digits):
    arrays = train.Arrays(jnp.asarray(digits.x_train[:60]), jnp.asarray(digits.x_test))
    y = digits.y_train[:60]
    labels = train.Labels(jnp.tile(y, (2, 1)), jnp.tile(digits.y_test, (2, 1)))
    training = mapped("enc_eq22", sensitivity=40)
    runs = train.Population(training, arrays, mapping, meshes.cpu_devices())
    progress, measured = runs.epoch(runs.start([0, 1], [ENC, ENC], labels))
    for i, network in enumerate(runs.networks(progress)):
        for layer in ("Dense_0", "Dense_1"):
            kernel = network["params"][layer]["kernel"]
            np.testing.assert_allclose(np.sum(kernel**2), 1.0, rtol=1e-5)
        f = lambda x, n=network: models.logits(training.model, n, x[None])[0]  # noqa: E731
        x = arrays.x_train[:40]
        label = functools.partial(wr.gbr, wr.label_probability(f))
        own = quick.jit(label)(x, jnp.asarray(y[:40]))
        np.testing.assert_allclose(measured.gbr[i, 2], own, rtol=1e-3)
        more = {"probes": train.PROBES, "key": jax.random.key(1)}
        for found, g in zip(measured.gbr[i], (f, wr.probabilities(f)), strict=False):
            exact = quick.jit(functools.partial(wr.gbr, g))(x)
            drawn = quick.jit(functools.partial(wr.gbr, g, **more))(x)
            assert abs(found - exact) < 5 * drawn.standard_error
        hits = np.argmax(quick.jit(jax.vmap(f))(x), -1) == y[:40]
        np.testing.assert_allclose(measured.training_accuracy[i], hits.mean())
    stored = jax.tree.leaves(progress.params)[0]
    assert not np.allclose(np.sum(np.square(stored[0])), 1.0, rtol=0.01)


def test_behind_normalization_scale_changes_neither_function_nor_gradient(digits):
    """Hence eqs. 20 and 21, weight normalization and no map train alike, but for L2."""
    x, y = jnp.asarray(digits.x_train[:50]), jnp.asarray(digits.y_train[:50])
    model = networks.NormMLP((16,), 10)
    variables, _ = train.initialize(model, 0, x[:1])

    def loss(params, norm):
        network = {"params": norm(params), "batch_stats": variables["batch_stats"]}
        logits, _ = models.training_logits(model, network, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    slope, slopes = quick.jit(jax.grad(loss), static_argnums=1), {}
    for name in ("enc_eq20", "enc_eq21", "wn", "enc_eq22", "ws"):
        slopes[name] = slope(variables["params"], METHODS[name].norm({}))
    slopes["none"] = slope(variables["params"], lambda p: p)
    # Batch normalization adds 1e-5 to the variance, and mapped weights are small.
    kwargs = {"rtol": 0.05, "atol": 1e-4}
    for name in ("enc_eq20", "enc_eq21", "wn"):
        chex.assert_trees_all_close(slopes[name], slopes["none"], **kwargs)
    chex.assert_trees_all_close(slopes["ws"], slopes["enc_eq22"], **kwargs)
    differs = (
        slopes["enc_eq22"]["Dense_0"]["kernel"] - slopes["none"]["Dense_0"]["kernel"]
    )
    assert jnp.max(jnp.abs(differs)) > 1e-3


def test_adversarial_runs_withstand_more(digits):
    hyper = [{"learning_rate": 5e-3}]
    plain = {"method": METHODS["none"], "epsilon": 0.1}
    _, ordinary = population("devices", [0], hyper, digits, **plain)
    _, hardened = population("devices", [0], hyper, digits, **plain, adversary=0.1)
    assert hardened.attacked[0, -1] > ordinary.attacked[0, -1]
    assert np.all(ordinary.attacked <= ordinary.accuracy)


def test_what_is_measured_is_that_of_the_parameters(digits):
    params, measured = population("devices", [3, 4, 5], HYPER, digits)
    for i, own in enumerate(params):
        energy = sum(2 * np.log(np.linalg.norm(own[k]["kernel"])) for k in own)
        np.testing.assert_allclose(measured.log_energy[i, -1], energy, rtol=1e-5)
        np.testing.assert_allclose(
            measured.complexity[i, -1], wr.layer_complexity(own), rtol=1e-5
        )
    assert np.all(np.isnan(measured.attacked))


@pytest.mark.parametrize("name", ["binary", "ternary_ste"])
def test_quantized_networks_are_what_is_measured(name, digits):
    """After an odd epoch, too, when what is trained is not at its levels."""
    arrays = train.Arrays(jnp.asarray(digits.x_train[:96]), jnp.asarray(digits.x_test))
    y = digits.y_train[:96]
    labels = train.Labels(jnp.tile(y, (2, 1)), jnp.tile(digits.y_test, (2, 1)))
    chosen = Settings.of("digits", examples=96, methods=(name,))
    training = chosen.training(name, digits)
    hyper = {"learning_rate": 2e-3, "v": 0.3, "one_minus_alpha": 0.05}
    runs = train.Population(training, arrays, "devices", meshes.cpu_devices())
    progress = runs.start([0, 1], [hyper, hyper], labels)
    distances = []
    for _ in range(4):
        progress, measured = runs.epoch(progress)
        distances.append(measured.distance)
    method = METHODS[name]
    for i, network in enumerate(runs.networks(progress)):
        logits = models.logits(training.model, network, arrays.x_eval)
        hits = np.mean(np.argmax(logits, -1) == digits.y_test)
        np.testing.assert_allclose(measured.accuracy[i], hits, rtol=1e-5)
        far = wr.level_distances(network["params"], method.walls(hyper), method.levels)
        assert max(far.values()) < 1e-6
        count = {len(np.unique(network["params"][d]["kernel"])) for d in ("Dense_0",)}
        assert count == {2 if "binary" in name else 3}
    assert np.all(np.array(distances[::2]) > 1e-3)
    at_levels = np.array(distances[1::2]) < 1e-6
    assert np.all(at_levels) if method.on_the_way else not np.any(at_levels)


def test_statistics_of_batches_follow_quantized_weights(digits):
    chosen = Settings.of("digits", model="mlp_norm", methods=("binary",))
    training = chosen.training("binary", digits)
    x = jnp.asarray(digits.x_train)
    variables, _ = train.initialize(training.model, 0, x[:1])
    stats = {"batch_stats": variables["batch_stats"]}
    hyper = {"v": 0.5, "one_minus_alpha": 0.1}
    arrays = train.Arrays(x, x)
    finished = quick.jit(training.finished)(hyper, variables["params"], stats, arrays)
    kernel = METHODS["binary"].finish(hyper, variables["params"])["Dense_0"]["kernel"]
    chex.assert_trees_all_equal(finished["params"]["Dense_0"]["kernel"], kernel)
    means = x @ finished["params"]["Dense_0"]["kernel"]
    got = finished["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(got["mean"], means.mean(0), atol=0.3 * means.std())
    old = 0.9 ** (len(x) // training.batch)  # of a variance of 1
    assert abs(np.mean((got["var"] - old) / means.var(0)) - 1) < 0.1
