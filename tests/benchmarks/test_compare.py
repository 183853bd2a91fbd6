"""The comparison is fair."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from benchmarks import compare, data, models, networks, train
from benchmarks.methods import METHODS
from benchmarks.settings import Settings


def test_noise_does_not_know_the_split(digits):
    """A seed that serves both would put all wrong labels on one side."""
    config = Settings.of("digits", noise=0.4)
    for part in data.split(digits):
        for seed in [*range(20), compare.TUNING_SEED, compare.TUNING_SEED + 1]:
            noisy = compare._noisy(digits, config, seed)
            rate = np.mean(noisy[part] != digits.y_train[part])
            assert abs(rate - 0.4) < 0.13, (seed, rate)  # 4 deviations of 270 labels


def test_the_test_set_has_no_part_in_tuning(digits):
    config = Settings.of("digits", epochs=1, trials=2, tuning_seeds=1)
    before = compare.tune("none", digits, config, lambda _: None)
    blind = dataclasses.replace(digits, x_test=None, y_test=None)
    assert compare.tune("none", blind, config, lambda _: None) == before


@pytest.mark.parametrize(
    ("tune_for", "measured"), [("accuracy", "accuracy"), ("fgsm", "attacked")]
)
def test_each_trial_is_scored_on_its_own_noisy_labels(
    tune_for, measured, digits, monkeypatch
):
    config = Settings.of(
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
    config = Settings.of("digits", epochs=1, seeds=3)
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


def test_ranges_of_energy_go_by_the_size_of_the_product(digits, monkeypatch):
    small = networks.ResNet(10, blocks=1)
    entry = dataclasses.replace(models.MODELS["resnet"], make=lambda classes: small)
    monkeypatch.setitem(models.MODELS, "resnet", entry)
    images = dataclasses.replace(digits, x_train=digits.x_train[:1].reshape(1, 8, 8))
    config = Settings.of("digits", model="resnet")
    variables, _ = train.initialize(small, compare.TUNING_SEED, images.x_train)
    params = variables["params"]
    squares = [float(jnp.sum(p**2)) for p in jax.tree.leaves(params) if p.ndim > 1]
    assert 0 in squares  # Fixup begins with zeros, which must not count
    energy = math.prod(square for square in squares if square)
    got = compare._space(METHODS["weissi"], images, config)
    want = np.array(METHODS["weissi"].space["energy"]) / energy
    np.testing.assert_allclose(got["energy"], want, rtol=1e-4)


def test_walls_in_plots_are_those_of_the_convolutional_network():
    config = Settings.of("cifar10")
    model = models.make(config.model, 10)
    init = quick.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    layers = compare.weights("volumization", {"v": 0.7}, params).values()
    fans = np.array([9 * 32, 9 * 64, 9 * 64, 10])  # He's fan-out, window included
    walls = [layer["wall"] for layer in layers]
    np.testing.assert_allclose(walls, 0.7 * np.sqrt(6 / fans), rtol=1e-5)
