"""The comparison: that it is fair, that it can be repeated, and that it reports."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import re

import chex
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import quick
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.__main__ as cli
import weightreg as wr
from benchmarks import compare, data, models, record, report, train
from benchmarks.experiments import EXPERIMENTS
from benchmarks.methods import BASES, METHODS, at_edge, trials

tree_leaves = jax.tree_util.tree_leaves_with_path
ROOT = pathlib.Path(__file__).parents[2]
PLOTS = ("accuracy", "energy", "gradients", "strength", "weights")
COMPARED = ["none", "volumization", "weissi"]
NETWORK = {
    "Dense_0": {"kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.ones(2)},
    "Dense_1": {"kernel": jnp.array([[2.0, 1], [-1, 3]]), "bias": jnp.ones(2)},
}
SMALL = ["--epochs", "2", "--trials", "2", "--seeds", "2", "--tuning-seeds", "1"]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@settings(deadline=None)
@given(
    n=st.integers(1, 300),
    noise=st.floats(0, 1),
    classes=st.integers(2, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_makes_the_asked_fraction_of_labels_wrong(n, noise, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    kept = labels.copy()
    noisy = data.corrupt(labels, noise, classes, rng)
    assert np.sum(noisy != labels) == round(noise * n)
    assert noisy.min() >= 0 and noisy.max() < classes
    np.testing.assert_array_equal(labels, kept)


def test_noise_is_uniform_over_the_other_classes():
    noisy = data.corrupt(np.zeros(90_000, int), 1.0, 10, np.random.default_rng(0))
    counts = np.bincount(noisy, minlength=10)
    assert counts[0] == 0
    assert np.all(np.abs(counts[1:] - 10_000) < 500)


def test_noise_does_not_know_the_split(digits):
    """A seed that serves both would put all wrong labels on one side."""
    config = compare.Settings.of("digits", noise=0.4)
    for part in data.split(digits):
        for seed in [*range(20), compare.TUNING_SEED, compare.TUNING_SEED + 1]:
            noisy = compare._noisy(digits, config, seed)
            rate = np.mean(noisy[part] != digits.y_train[part])
            assert abs(rate - 0.4) < 0.13, (seed, rate)  # 4 deviations of 270 labels


def test_split_is_a_partition_of_the_training_set(digits):
    train_part, held_out = data.split(digits)
    both = np.concatenate([train_part, held_out])
    np.testing.assert_array_equal(np.sort(both), np.arange(len(digits.y_train)))
    assert len(train_part) == len(both) * 4 // 5


def test_the_test_set_has_no_part_in_tuning(digits):
    config = compare.Settings.of("digits", epochs=1, trials=2, tuning_seeds=1)
    before = compare.tune("none", digits, config, lambda _: None)
    blind = dataclasses.replace(digits, x_test=None, y_test=None)
    assert compare.tune("none", blind, config, lambda _: None) == before


@pytest.mark.parametrize(
    ("tune_for", "measured"), [("accuracy", "accuracy"), ("fgsm", "attacked")]
)
def test_each_trial_is_scored_on_its_own_noisy_labels(
    tune_for, measured, digits, monkeypatch
):
    config = compare.Settings.of(
        "digits", epochs=3, trials=4, tuning_seeds=2, tune_for=tune_for
    )
    train_part, held_out = data.split(digits)

    def train_nothing(training, arrays, labels, seeds, hyper, settings, tick):
        np.testing.assert_array_equal(arrays.x_train, digits.x_train[train_part])
        np.testing.assert_array_equal(arrays.x_eval, digits.x_train[held_out])
        for row, seed in enumerate(seeds):
            noisy = compare._noisy(digits, config, int(seed))
            np.testing.assert_array_equal(labels.train[row], noisy[train_part])
            np.testing.assert_array_equal(labels.eval[row], noisy[held_out])
        # A run's accuracy tells its rate and its seed.
        rates = [
            h["learning_rate"] + (s - compare.TUNING_SEED)
            for h, s in zip(hyper, seeds, strict=True)
        ]
        scores = np.array(rates)[:, None] * [0, 0, 1]  # only the last one counts
        nothing = np.full_like(scores, np.nan)
        known = dict.fromkeys(train.Measured._fields, nothing) | {measured: scores}
        return train.Measured(**known), None

    monkeypatch.setattr(compare, "_train", train_nothing)
    tuned = compare.tune("l2", digits, config, lambda _: None)
    for trial in tuned["trials"]:
        rate = trial["hyperparameters"]["learning_rate"]
        assert trial["score"] == pytest.approx(rate + 0.5, abs=1e-4)
    best = max(tuned["trials"], key=lambda t: t["hyperparameters"]["learning_rate"])
    assert tuned["chosen"] == best["hyperparameters"]


def test_final_runs_train_on_noisy_labels_and_are_tested_on_true_ones(
    digits, monkeypatch
):
    config = compare.Settings.of("digits", epochs=1, seeds=3)
    train_part, _ = data.split(digits)

    def train_nothing(training, arrays, labels, seeds, hyper, settings, tick):
        np.testing.assert_array_equal(arrays.x_eval, digits.x_test)
        for row, seed in enumerate(seeds):
            noisy = compare._noisy(digits, config, seed)[train_part]
            np.testing.assert_array_equal(labels.train[row], noisy)
            np.testing.assert_array_equal(labels.eval[row], digits.y_test)
        model, x = training.model, arrays.x_train[:1]
        fresh = [train.initialize(model, seed, x)[0] for seed in seeds]
        curves = np.array([[0.1], [0.2], [0.6]])[: len(seeds)]
        known = dict.fromkeys(train.Measured._fields, curves)
        return train.Measured(**known), fresh

    monkeypatch.setattr(compare, "_train", train_nothing)
    hyper = {"learning_rate": 1e-3}
    source = compare._source(digits, config, lambda _: None)
    got, networks = compare.final("none", hyper, digits, config, source, lambda _: None)
    assert got["metrics"]["last"]["seeds"] == [0.1, 0.2, 0.6]
    assert got["metrics"]["last"]["mean"] == pytest.approx(0.3)
    assert len(networks) == 3


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if "box" not in name])
def test_every_hyperparameter_acts_and_only_weights_are_regularized(name, base):
    space = METHODS[name].whole_space(base, NETWORK)
    if fixed := METHODS[name].fixed:
        space = {k: (value, 100 * value or 0.1) for k, value in fixed.items()}
    if "one_minus_alpha" in space:
        space["one_minus_alpha"] = (1e-4, 1.0)
    params = NETWORK
    grads = [jax.tree.map(lambda p, c=c: c * p, params) for c in (1.0, -0.5)]

    def trained(hyper):
        tx, new = METHODS[name].build(hyper, base, epoch=2), params  # not quantized yet
        state = tx.init(new)
        for g in grads:
            updates, state = tx.update(g, state, new)
            new = optax.apply_updates(new, updates)
        return new

    middle = {k: float(np.sqrt(low * high)) for k, (low, high) in space.items()}
    for parameter, (_, high) in space.items():
        one, other = trained(middle), trained(middle | {parameter: high})
        one, other = one["Dense_0"], other["Dense_0"]
        assert jnp.any(one["kernel"] != other["kernel"])
        unchanged = bool(jnp.all(one["bias"] == other["bias"]))
        assert unchanged == (parameter != "learning_rate")


@pytest.mark.parametrize("name", METHODS)
def test_trials_fill_the_space_of_every_method_alike(name):
    space = METHODS[name].whole_space("adam", NETWORK)
    tried = trials(space, 64)
    assert len(tried) == 64 and tried == trials(space, 64)
    for parameter, (low, high) in space.items():
        places = [np.log(t[parameter] / low) / np.log(high / low) for t in tried]
        assert np.all(np.histogram(places, 4, (0, 1))[0] >= 14)


def test_the_edge_of_a_range_is_told():
    space = {"learning_rate": (1e-4, 1e-2), "strength": (1e-2, 1e2)}
    middle = {"learning_rate": 1e-3, "strength": 1.0}
    assert at_edge(space, middle) == []
    assert at_edge(space, middle | {"strength": 1.01e-2}) == ["strength"]


def test_ranges_of_energy_go_by_the_size_of_the_product(digits, monkeypatch):
    small = models.ResNet(10, blocks=1)
    monkeypatch.setitem(models.MODELS, "resnet", lambda classes: small)
    images = dataclasses.replace(digits, x_train=digits.x_train[:1].reshape(1, 8, 8))
    config = compare.Settings.of("digits", model="resnet")
    variables, _ = train.initialize(small, compare.TUNING_SEED, images.x_train)
    params = variables["params"]
    squares = [float(jnp.sum(p**2)) for p in jax.tree.leaves(params) if p.ndim > 1]
    assert 0 in squares  # Fixup begins with zeros, which must not count
    energy = math.prod(square for square in squares if square)
    got = compare._space(METHODS["weissi"], images, config)
    want = np.array(METHODS["weissi"].space["energy"]) / energy
    np.testing.assert_allclose(got["energy"], want, rtol=1e-4)


def test_an_energy_that_no_strength_outweighs_is_refused():
    deep = {f"Dense_{i}": jnp.full((4, 4), 1e3) for i in range(100)}
    with pytest.raises(ValueError, match="compare weissi_log"):
        METHODS["weissi"].whole_space("adam", deep)


def test_the_cnn_form_and_the_output_layer_of_parseval(digits):
    """What the papers do otherwise in convolutions and in the last layer."""
    model = models.make("cnn8", 10)
    init = quick.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    hyper = {"learning_rate": 1.0, "energy": 1e-3, "complexity": 0.0, "beta": 0.1}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def change(name):
        tx = METHODS[name].build(hyper, "momentum")
        return quick.jit(tx.update)(zeros, tx.init(params), params)[0]

    penalty = wr.weissi(1e-3, 0.0, exponents=wr.cnn_exponents)
    expected = jax.tree.map(jnp.negative, quick.jit(jax.grad(penalty))(params))
    chex.assert_trees_all_close(change("weissi_cnn"), expected, rtol=1e-6)
    *convolutions, last = (layer.path for layer in wr.weight_layers(params))
    step = {jax.tree_util.keystr(k): v for k, v in tree_leaves(change("parseval"))}
    own = {jax.tree_util.keystr(k): v for k, v in tree_leaves(params)}
    np.testing.assert_allclose(step[last], -2e-4 * own[last], rtol=1e-6)
    assert "Dense" in last and len(convolutions) == 2
    for path in convolutions:
        w = np.asarray(own[path], np.float64).reshape(-1, own[path].shape[-1])
        want = 0.1 * (w - w @ w.T @ w)
        np.testing.assert_allclose(step[path].reshape(w.shape), want, atol=1e-5)


def test_what_has_diverged_is_recorded(tmp_path):
    counts, edges = compare._histogram([1.0, np.nan, 2.0, np.inf])
    assert sum(counts) == 2 and edges[0] == 1 and edges[-1] == 2
    counts, _ = compare._histogram([np.nan])
    assert sum(counts) == 0
    curves = compare._rounded(np.array([[1.0, np.nan], [-np.inf, 2.0]]))
    assert curves == [[1.0, None], [None, 2.0]]
    record.save({"curves": curves}, tmp_path / "out.json")
    with pytest.raises(ValueError):
        record.save({"curves": [np.nan]}, tmp_path / "out.json")


def population(mapping, seeds, hyper, data, method="volumization", **kwargs):
    """Parameters and curves of a few runs on 100 digits."""
    arrays = train.Arrays(jnp.asarray(data.x_train[:100]), jnp.asarray(data.x_test))
    labels = train.Labels(
        jnp.tile(data.y_train[:100], (len(seeds), 1)),
        jnp.tile(data.y_test, (len(seeds), 1)),
    )
    build = functools.partial(METHODS[method].build, base="adam")
    given = {"model": models.MLP((16,), 10), "classes": 10, "optimizer": build}
    given |= {"batch": 20} | kwargs
    runs = train.Population(train.Training(**given), arrays, mapping)
    progress = runs.start(seeds, hyper, labels)
    rows = []
    for _ in range(3):
        progress, measured = runs.epoch(progress)
        rows.append(measured)
    stacked = jax.tree.map(lambda *epochs: np.stack(epochs, 1), *rows)
    return [n["params"] for n in runs.networks(progress)], stacked


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


def test_a_run_equals_a_plain_loop(digits):
    """The population is what a user would write by hand, with fixed numbers."""
    (got,), _ = population("devices", [7], [HYPER[0]], digits)
    model, x, y = models.MLP((16,), 10), digits.x_train[:100], digits.y_train[:100]
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


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 5, 7, 2), (3, 1, 2, 1)])
def test_the_convolution_is_flaxs(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain = nn.Conv(4, (3, 3), strides=2, bias_init=nn.initializers.normal())
    variables = quick.jit(plain.init)(jax.random.key(0), x)
    ours = models.Convolution(4)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    made = jax.eval_shape(ours.init, jax.random.key(0), x)
    assert shapes(made) == shapes(variables)
    got, expected = ours.apply(variables, x), plain.apply(variables, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_all_runs_of_a_method_are_one_program(digits, monkeypatch):
    traced = []
    plain = METHODS["volumization"].optimizer
    spy = dataclasses.replace(
        METHODS["volumization"],
        optimizer=lambda *given: (traced.append(1), plain(*given))[1],
    )
    monkeypatch.setitem(METHODS, "volumization", spy)
    population("devices", [3, 4, 5], HYPER, digits)
    assert len(traced) == 2  # one to start, one for an epoch; three of those ran


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "imagenet"}, "dataset must be among digits"),
        ({"noise": 1.5}, "noise must be in"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"methods": ("none", "magic")}, "methods must be among"),
        ({"methods": ()}, "one or more"),
        ({"methods": ("none", "none")}, "named once each"),
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"adversarial": -1.0}, "adversarial must be"),
        ({"model": "vgg"}, "model must be among mlp"),
        ({"optimizer": "lion"}, "optimizer must be among adam"),
        ({"schedule": "cosine"}, "schedule must be among constant, steps"),
        ({"augment": ("cutout", "zoom")}, "augment must be among .*, not zoom"),
        ({"sensitivity": -1}, "sensitivity must be at least 0"),
        ({"methods": ("enc",)}, "enc, which needs a normalization .*not mlp"),
        ({"methods": ("l2_paper",)}, "l2_paper, whose settings are for momentum"),
        ({"tune_for": "luck"}, "tune_for must be among accuracy"),
        ({"methods": ("binary_paper",), "optimizer": "momentum"}, "are for adam"),
        ({"deploy": ("binary",)}, "deploy must be among methods, but binary is not"),
        ({"methods": ("binary",), "deploy": ("binary",)}, "begin with .* float32"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"restarts": 1}, "restarts must be at least 2"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        compare.Settings.of(**({"dataset": "digits"} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "5000"], "batch must be at most 1077"),
        (["--sensitivity", "5000"], "sensitivity must be at most 1077"),
        (["--augment", "cutout"], r"augment takes images .*, not examples of \(64,\)"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(given, message, tmp_path, capsys):
    assert cli.main(["compare", *given, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison by the command line, and what it printed."""
    out = tmp_path_factory.mktemp("compare")
    command = ["compare", *SMALL, "--methods", ",".join(COMPARED), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    return out, printed.getvalue()


def test_compare_from_end_to_end(finished):
    out, printed = finished
    stem = "digits-noise40"
    files = [f"{stem}.json", *(f"{stem}-{plot}.png" for plot in PLOTS)]
    assert {f.name for f in out.iterdir()} == set(files)
    result = json.loads((out / f"{stem}.json").read_text())
    assert result["complete"]
    assert list(result["results"]) == COMPARED
    assert not set(result["fixed"]["tuning_seeds"]) & set(result["fixed"]["seeds"])
    for name, entry in result["results"].items():
        assert len(entry["tuning"]["trials"]) == 2
        best = max(entry["tuning"]["trials"], key=lambda t: t["score"])
        assert best["hyperparameters"] == entry["tuning"]["chosen"]
        curves = np.array(entry["test_accuracy"])
        assert curves.shape == (2, 2)
        metrics = {k: m["seeds"] for k, m in entry["metrics"].items()}
        np.testing.assert_array_equal(metrics["best"], curves.max(1))
        np.testing.assert_allclose(metrics["last"], curves[:, -1:].mean(1))
        for metric, values in metrics.items():
            summary = entry["metrics"][metric]
            assert summary["mean"] == pytest.approx(np.mean(values), abs=1e-5)
            assert summary["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        assert np.all(np.array(metrics["pgd"]) <= np.array(metrics["fgsm"]) + 0.01)
        assert np.all(np.array(metrics["fgsm"]) < curves[:, -1])
        for attack in ("fgsm", "pgd", "restarts", "margin", "transfer"):
            assert np.all(np.array(metrics["worst"]) <= np.array(metrics[attack]))
        assert np.shape(entry["log_energy"]) == np.shape(entry["complexity"]) == (2, 2)
        assert sum(entry["gradients"]["counts"]) == 2 * 450
        at = entry["strength"]["epsilon"].index(0.1)
        assert entry["strength"]["worst"][at] <= metrics["worst"][0] + 0.01
        assert entry["strength"]["worst"] == sorted(entry["strength"]["worst"])[::-1]
        assert entry["label"].split()[0] in printed
        for layer in entry["weights"].values():
            assert (layer["wall"] is not None) == (name == "volumization")
            assert sum(layer["counts"]) in (64 * 256, 256 * 10)
    assert result["relative_step_time"]["none"] == 1.0
    assert "Generalizes best" in printed and "Resists attack best" in printed


def test_table_and_plots_come_from_the_json_alone(finished, tmp_path, capsys):
    out, printed = finished
    stem = "digits-noise40"
    assert cli.main(["report", str(out / f"{stem}.json"), "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert again.split("wrote")[0] == printed.split("wrote")[0]
    for plot in (f"{stem}-{plot}.png" for plot in PLOTS):
        assert (tmp_path / plot).read_bytes() == (out / plot).read_bytes()


def test_the_recorded_command_repeats_the_result(finished, tmp_path):
    out, _ = finished
    first = json.loads((out / "digits-noise40.json").read_text())
    words = first["command"].split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    assert cli.main([*words[3:], "--out", str(tmp_path)]) == 0
    second = json.loads((tmp_path / "digits-noise40.json").read_text())
    del first["relative_step_time"], second["relative_step_time"]
    assert first == second


def test_an_interrupt_leaves_what_is_finished(tmp_path, monkeypatch, capsys):
    whole = compare.final

    def interrupted(name, *args):
        if name == "weight_decay":
            raise KeyboardInterrupt
        return whole(name, *args)

    monkeypatch.setattr(compare, "final", interrupted)
    assert cli.main(["compare", *SMALL, "--out", str(tmp_path)]) == 130
    result = json.loads((tmp_path / "digits-noise40.json").read_text())
    assert list(result["results"]) == ["none"] and not result["complete"]
    assert "Interrupted" in capsys.readouterr().out
    assert (tmp_path / "digits-noise40-accuracy.png").is_file()
    assert not list(tmp_path.glob("*.part"))


def encoded(image, kind):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(folder, column, shape, sizes, kind="PNG"):
    """Random images as Parquet files like the hub's, and what is in them."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    folder.mkdir()
    written = []
    for split, n in zip(("train", "test"), sizes, strict=True):
        x = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        y = rng.integers(0, 10, n)
        rows = {column: [encoded(i, kind) for i in x], "label": y.tolist()}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}.parquet")
        written.append((x, y))
    return written


@pytest.mark.parametrize(
    ("name", "column", "shape"),
    [("mnist", "image", (28, 28)), ("cifar10", "img", (32, 32, 3))],
)
def test_parquet_files_are_read(name, column, shape, tmp_path):
    written = write_parquet(tmp_path / name, column, shape, (7, 3))
    got = data.load(name, str(tmp_path))
    assert "JPEG" not in got.source
    read = (got.x_train, got.y_train), (got.x_test, got.y_test)
    for (x, y), (images, labels) in zip(written, read, strict=True):
        np.testing.assert_allclose(images, x / 255, rtol=1e-6)
        np.testing.assert_array_equal(labels, y)
        assert images.dtype == np.float32 and labels.dtype == np.int32


def test_walls_in_plots_are_those_of_the_convolutional_network():
    config = compare.Settings.of("cifar10")
    model = models.make(config.model, 10)
    init = quick.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    layers = compare.weights("volumization", {"v": 0.7}, params).values()
    fans = np.array([9 * 32, 9 * 64, 9 * 64, 10])  # He's fan-out, window included
    walls = [layer["wall"] for layer in layers]
    np.testing.assert_allclose(walls, 0.7 * np.sqrt(6 / fans), rtol=1e-5)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch, capsys):
    command = ["compare", "--dataset", "cifar10", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--data-dir", str(tmp_path)]) == 2
    assert "train.parquet" in capsys.readouterr().err

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert cli.main(command) == 2
    assert "--data-dir DIR" in capsys.readouterr().err


def test_the_readme_shows_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["readme", "--check"]) == 0
    blocks, stale = tuple(report.BLOCKS), tmp_path / "README.md"
    pair = "<!-- {0}:begin -->\nSTALE\n<!-- {0}:end -->\nb\n".format
    stale.write_text(f"a\n{''.join(map(pair, blocks))}c\n")
    assert not report.update_readme(stale, check=True)
    assert not report.update_readme(stale)
    assert report.update_readme(stale, check=True)
    text = stale.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\nc\n")
    assert text.count("\nb\n") == len(blocks)
    assert "STALE" not in text


COMMITTED = [f for f in sorted(report.RESULTS.glob("*.json")) if "cost" not in f.name]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.stem)
def test_committed_results_are_whole_and_have_their_plots(file):
    result = json.loads(file.read_text())
    mark = result.get("experiment") or {"name": None}
    assert result["complete"]
    fewer = {"enc-tables": 3, "quantization": 3}
    one = mark.get("part") == "distributions"  # of weights, one network each
    assert result["settings"]["seeds"] >= (1 if one else fewer.get(mark["name"], 5))
    assert "/" not in result["command"].replace("//", "")
    shown = [*PLOTS, *["sensitivity"] * bool(result["settings"].get("sensitivity"))]
    quantized = any("level_distance" in e for e in result["results"].values())
    shown += ["levels"] * quantized
    for plot in shown:
        assert file.with_name(f"{file.stem}-{plot}.png").is_file()
    if mark["name"]:
        given = EXPERIMENTS[mark["name"]].settings(mark["part"], mark["scale"])
        kept = {name: result["settings"][name] for name in given}
        assert kept == json.loads(json.dumps(given))


def test_the_verdict_is_honest_about_ties_and_edges():
    def entry(label, last, std, edge=()):
        metric = {"mean": last, "std": std}
        return {
            "label": label,
            "warnings": [],
            "metrics": {"last": metric, "worst": metric},
            "tuning": {"at_edge": list(edge)},
        }

    result = {
        "complete": True,
        "results": {"a": entry("A", 0.8, 0.02), "b": entry("B", 0.81, 0.01, ["v"])},
    }
    lines = report.verdict(result)
    assert lines[0].startswith("Generalizes best: B (81.0 %), then A (80.0 %)")
    assert "within one standard deviation" in lines[0]
    assert "edge of its range in v" in lines[2]
    result["results"]["b"]["metrics"]["last"]["mean"] = 0.9
    assert "5.0 standard deviations" in report.verdict(result)[0]
    result["results"]["a"]["warnings"] = ["Seed 0: Gradients are masked."]
    assert "Warning: A: Seed 0: Gradients are masked." in report.verdict(result)


def test_adversarial_training_is_ordinary_training_on_attacked_examples(digits):
    """The step of a population against the same written by hand."""
    model, build = (
        models.MLP((16,), 10),
        functools.partial(METHODS["l2"].build, base="momentum"),
    )
    hyper = {"learning_rate": 0.1, "strength": 1e-3}
    x, y = jnp.asarray(digits.x_train[:20]), jnp.asarray(digits.y_train[:20])
    params = train.initialize(model, 0, x[:1])[0]["params"]
    tx, key = build(hyper), jax.random.key(3)
    given = {"model": model, "classes": 10, "optimizer": build, "batch": 20}
    training = train.Training(**given, adversary=0.05)
    state = tx.init(params)
    got, _, _ = train.train_step(training, tx, hyper, params, {}, state, x, y, key)

    loss = lambda p, x, y: train.example_loss(model, {"params": p}, x, y)  # noqa: E731
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
    build = functools.partial(method.build, base="momentum")
    given = {"model": models.NormMLP((16,), 10), "classes": 10, "batch": 20}
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
    runs = train.Population(training, arrays, mapping)
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
    model = models.NormMLP((16,), 10)
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


def test_baselines_give_units_their_own_norm():
    params = {
        "a": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))}
    }
    kernel = METHODS["wn"].norm({})(params)["a"]["kernel"]
    np.testing.assert_allclose(jnp.sum(kernel**2, 0), 1.0, rtol=1e-5)
    kernel = METHODS["ws"].norm({})(params)["a"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel, 0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(kernel, 0), 0.0, atol=1e-6)


def test_the_learning_rate_is_lowered_three_times(digits):
    config = compare.Settings.of("digits", schedule="steps", epochs=10, batch=100)
    steps = 10 * (len(data.split(digits)[0]) // 100)
    tx = config.training("none", digits).optimizer({"learning_rate": 1.0})
    params, rates = jnp.zeros(()), []
    state = tx.init(params)
    for _ in range(steps):
        update, state = tx.update(jnp.ones(()), state, params)
        rates.append(float(-update))
    shares = [round(s * steps) for s in (0.3, 0.6, 0.9)]
    for i, (low, high) in enumerate(zip([0, *shares], [*shares, steps], strict=True)):
        np.testing.assert_allclose(rates[low:high], 0.1**i, rtol=1e-3)


def test_adversarial_runs_withstand_more(digits):
    hyper = [{"learning_rate": 5e-3}]
    plain = {"method": "none", "epsilon": 0.1}
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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_can_be_run_and_have_the_papers_numbers(name):
    experiment = EXPERIMENTS[name]
    assert set(experiment.paper) == set(experiment.parts)
    for scale in experiment.scales:
        for part in experiment.parts:
            settings = compare.Settings.of(**experiment.settings(part, scale))
            assert f"--dataset {settings.dataset}" in settings.command()
            assert ("--augment flip_crop" in settings.command()) == (
                name == "enc-tables"
            )
    for row in (r for rows in experiment.paper.values() for r in rows.values()):
        assert set(row) <= set(report.COLUMNS) and all(
            9 < v < 100 for v in row.values()
        )


def untimed(monkeypatch):
    """Without the times of steps, for which all is compiled once more."""
    monkeypatch.setattr(compare, "step_times", lambda *args: dict.fromkeys(args[2], 1))


def test_an_experiment_from_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = {"dataset": "digits", "epochs": 1, "trials": 1, "seeds": 2, "model": "mlp"}
    tiny |= {"examples": 200, "attacked": 20, "restarts": 2, "attack_steps": 2}
    tiny |= {"methods": ("weissi_paper",)}
    untimed(monkeypatch)
    experiment = EXPERIMENTS["weissi-table1"]
    small = dataclasses.replace(experiment, scales={"cpu": tiny}, resized={})
    monkeypatch.setitem(EXPERIMENTS, "weissi-table1", small)
    command = ["experiment", "weissi-table1", "--parts", "mlp-adversarial"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    files = sorted(f.name for f in tmp_path.glob("*.json"))
    stem = "weissi-table1-cpu-mlp"
    assert files == [f"{stem}-adversarial.json"]
    result = json.loads((tmp_path / f"{stem}-adversarial.json").read_text())
    assert result["settings"]["adversarial"] == 0.01
    fixed = result["results"]["weissi_paper"]["tuning"]
    assert fixed["trials"] == [] and fixed["chosen"]["energy"] == 1e-6
    table = report.markdown(result)
    assert "| *paper: WEISSI* | |  | *98.1* | *95.3* | *95.2* |  | |" in table
    assert "The paper trains for 60 epochs" in table
    assert cli.main(["experiment", "weissi-table1", "--parts", "x"]) == 2
    assert "parts must be among mlp" in capsys.readouterr().err


def test_a_table_of_sensitivity_from_end_to_end(tmp_path, monkeypatch):
    """On images as JPEG, which no title may hide."""
    write_parquet(tmp_path / "cifar10", "img", (32, 32, 3), (100, 30), "JPEG")
    tiny = models.NormMLP((8,), 10)
    monkeypatch.setitem(models.MODELS, "tiny", lambda classes: tiny)
    small = {"model": "tiny", "epochs": 2, "seeds": 2, "batch": 20, "attacked": 10}
    small |= {"restarts": 2, "attack_steps": 2, "sensitivity": 20, "examples": 60}
    small |= {"methods": ("enc_learnt",)}
    untimed(monkeypatch)
    experiment = EXPERIMENTS["enc-tables"]
    changed = dataclasses.replace(experiment, scales={"cpu": small})
    monkeypatch.setitem(EXPERIMENTS, "enc-tables", changed)
    command = ["experiment", "enc-tables", "--parts", "tables", "--out", str(tmp_path)]
    assert cli.main([*command, "--data-dir", str(tmp_path)]) == 0
    stem = "enc-tables-cpu-tables"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["data"]["source"].endswith("encoded as JPEG")
    assert (tmp_path / f"{stem}-sensitivity.png").is_file()
    for entry in result["results"].values():
        assert np.shape(entry["training_accuracy"]) == (2, 2)
        for f in train.SENSITIVE:
            curves = np.array(entry[f"gbr of {f}"])
            last = entry["metrics"][f"gbr of {f}"]["seeds"]
            np.testing.assert_array_equal(curves[:, -1], last)
            assert np.all(curves > 0)
    text = report.markdown(result)
    assert "**CIFAR-10 (as JPEG), tiny, flip_crop, 2 seeds" in text
    assert "| all attacks | GBR (logits) | GBR (probabilities) |" in text
    assert "| *paper: ImageNet, eq. 22* | |  | *77.4* |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("name", ["binary", "ternary_ste"])
def test_quantized_networks_are_what_is_measured(name, digits):
    """After an odd epoch, too, when what is trained is not at its levels."""
    arrays = train.Arrays(jnp.asarray(digits.x_train[:96]), jnp.asarray(digits.x_test))
    y = digits.y_train[:96]
    labels = train.Labels(jnp.tile(y, (2, 1)), jnp.tile(digits.y_test, (2, 1)))
    chosen = compare.Settings.of("digits", examples=96, methods=(name,))
    training = chosen.training(name, digits)
    hyper = {"learning_rate": 2e-3, "v": 0.3, "one_minus_alpha": 0.05}
    runs = train.Population(training, arrays, "devices")
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


def test_straight_through_is_the_gradient_of_the_quantized_network():
    """With respect to its weights, in the place of that by the stored ones."""
    hyper, method = {"v": 0.3}, METHODS["ternary_ste"]
    quantize = method.norm(hyper)
    loss = lambda p: jnp.sum(jnp.sin(p["Dense_0"]["kernel"]) ** 2)  # noqa: E731
    got = jax.grad(lambda p: loss(quantize(p)))(NETWORK)
    expected = jax.grad(loss)(wr.ternarize(NETWORK, method.walls(hyper)))
    chex.assert_trees_all_close(got, expected)
    assert jnp.any(
        got["Dense_0"]["kernel"] != jax.grad(loss)(NETWORK)["Dense_0"]["kernel"]
    )


def test_networks_are_stored_and_run_in_every_form(digits, monkeypatch):
    once = lambda steps, *_: {n: len(s(None)) / 100 for n, s in steps.items()}  # noqa: E731
    monkeypatch.setattr(compare.deploy_module, "relative_times", once)
    settings = compare.Settings.of("digits")
    fresh, _ = train.initialize(models.make("mlp", 10), 0, jnp.ones((1, 64)))
    kept = {}
    for name in ("volumization_paper", "ternary_paper"):
        method = METHODS[name]
        params = method.finish(method.fixed, fresh["params"])
        kept[name] = method.fixed, [jax.device_get({"params": params})]
    forms = compare.deploy(kept, digits, settings)
    assert [form["form"] for form in forms.values()] == [
        "float32",
        "bfloat16",
        "ternary bits",
        "ternary bits, by layers",
    ]
    for form, bits in zip(forms.values(), (32, 16, 2, 2), strict=True):
        assert 8 * form["kernel_bytes"] == bits * (64 * 256 + 256 * 10)
        others = 266 * (2 if bits == 16 else 4) + (8 if bits == 2 else 0)
        assert form["device_bytes"] == form["kernel_bytes"] + others
        assert 0 < form["file_bytes"] - form["device_bytes"] < 3000
        assert form["peak_bytes_1"] > form["device_bytes"]
        assert (form["relative_time_1"], form["relative_time_100"]) == (0.01, 1.0)
        assert form.get("same_logits") == (True if bits == 2 else None)
        if bits != 16:
            _, (network,) = kept["ternary_paper" if bits == 2 else "volumization_paper"]
            logits = models.logits(models.make("mlp", 10), network, digits.x_test)
            hits = np.mean(logits.argmax(-1) == digits.y_test)
            np.testing.assert_allclose(form["accuracy"], [hits], atol=1e-5)
    result = {"deployed": forms}
    head, rows, sentence = report.deployed(result)
    assert head[4] == "times fewer" and [row[4] for row in rows] == [
        "1",
        "2",
        "16",
        "16",
    ]
    assert "Networks run from bits give the logits of the same" in sentence
    assert report.deployed_table(result).row_count == 4
    next(f for f in forms.values() if "bits" in f["form"])["same_logits"] = False
    assert "Warning: from bits, other logits" in report.deployed(result)[2]
    floats = {"deployed": {k: f for k, f in forms.items() if "bits" not in f["form"]}}
    assert "bits" not in report.deployed(floats)[2]


def test_statistics_of_batches_follow_quantized_weights(digits):
    chosen = compare.Settings.of("digits", model="mlp_norm", methods=("binary",))
    training = chosen.training("binary", digits)
    x = jnp.asarray(digits.x_train)
    variables, _ = train.initialize(training.model, 0, x[:1])
    stats = {"batch_stats": variables["batch_stats"]}
    hyper = {"v": 0.5, "one_minus_alpha": 0.1}
    finished = quick.jit(training.finished)(hyper, variables["params"], stats, x)
    kernel = METHODS["binary"].finish(hyper, variables["params"])["Dense_0"]["kernel"]
    chex.assert_trees_all_equal(finished["params"]["Dense_0"]["kernel"], kernel)
    means = x @ finished["params"]["Dense_0"]["kernel"]
    got = finished["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(got["mean"], means.mean(0), atol=0.3 * means.std())
    old = 0.9 ** (len(x) // training.batch)  # of a variance of 1
    assert abs(np.mean((got["var"] - old) / means.var(0)) - 1) < 0.1
