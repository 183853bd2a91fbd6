"""The comparison is fair."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from benchmarks import data, models, networks, part, train
from benchmarks.cells import TUNING_SEED, Run
from benchmarks.methods import METHODS
from benchmarks.part import Part
from benchmarks.settings import Settings


def made(digits, **given):
    return Part(Settings.of("digits", **given), digits)


@pytest.fixture
def started(monkeypatch):
    """What populations are given, in the place of populations."""
    given = {}

    class Population:
        def __init__(self, training, arrays, mapping):
            given.update(training=training, arrays=arrays, mapping=mapping)

        def start(self, seeds, hyper, labels):
            given.update(seeds=seeds, hyper=hyper, labels=labels)

    monkeypatch.setattr(part, "Population", Population)
    return given


def test_noise_does_not_know_the_split(digits):
    """A seed that serves both would put all wrong labels on one side."""
    noisy = made(digits, noise=0.4)
    for side in data.split(digits):
        for seed in [*range(20), TUNING_SEED, TUNING_SEED + 1]:
            wrong = noisy.noisy(seed)[side] != digits.y_train[side]
            rate = np.mean(wrong)
            assert abs(rate - 0.4) < 0.13, (seed, rate)  # 4 deviations of 270 labels


def test_trials_are_scored_on_held_out_labels_as_noisy_as_those_trained_on(
    digits, started
):
    own = made(digits, noise=0.4)
    hyper = {"learning_rate": 1e-3, "strength": 1e-2}
    runs = [Run("trial", "l2", hyper, TUNING_SEED + i, 0) for i in range(2)]
    own.start(runs)
    train_part, held_out = data.split(digits)
    arrays, labels = started["arrays"], started["labels"]
    np.testing.assert_array_equal(arrays.x_train, digits.x_train[train_part])
    np.testing.assert_array_equal(arrays.x_eval, digits.x_train[held_out])
    np.testing.assert_array_equal(arrays.x_test, digits.x_test)
    np.testing.assert_array_equal(arrays.y_test, digits.y_test)
    for row, run in enumerate(runs):
        np.testing.assert_array_equal(
            labels.train[row], own.noisy(run.seed)[train_part]
        )
        np.testing.assert_array_equal(labels.eval[row], own.noisy(run.seed)[held_out])
    assert started["hyper"] == [hyper] * 2


@pytest.mark.parametrize("whole", [False, True])
def test_final_runs_train_on_noisy_labels_and_are_tested_on_true_ones(
    whole, digits, started
):
    own = made(digits, noise=0.4, whole=whole)
    own.start([Run("final", "none", {"learning_rate": 1e-3}, s) for s in range(3)])
    train_part, held_out = data.split(digits)
    trained = np.concatenate([train_part, held_out]) if whole else train_part
    arrays, labels = started["arrays"], started["labels"]
    np.testing.assert_array_equal(arrays.x_train, digits.x_train[trained])
    np.testing.assert_array_equal(arrays.x_eval, digits.x_test)
    assert arrays.x_test is None
    for seed in range(3):
        np.testing.assert_array_equal(labels.train[seed], own.noisy(seed)[trained])
        np.testing.assert_array_equal(labels.eval[seed], digits.y_test)


def test_labels_that_people_gave_are_trained_on_and_held_out(digits, started, tmp_path):
    given = (digits.y_train + (np.arange(len(digits.y_train)) % 5 == 0)) % 10
    file = tmp_path / "people.npz"
    np.savez(file, clean_label=digits.y_train, worse_label=given)
    labelled = {"noise": 0.0, "labels": "worse_label", "labels_file": str(file)}
    own = made(digits, **labelled)
    own.start([Run("trial", "none", {"learning_rate": 1e-3}, TUNING_SEED, 0)])
    train_part, held_out = data.split(digits)
    np.testing.assert_array_equal(started["labels"].train[0], given[train_part])
    np.testing.assert_array_equal(started["labels"].eval[0], given[held_out])
    command = own.settings.command()
    assert "--labels LABELS:worse_label" in command and str(file) not in command
    with pytest.raises(ValueError, match="noise must be 0 where labels are given"):
        made(digits, **labelled | {"noise": 0.2})


def test_one_population_serves_all_runs_of_a_program(digits, started):
    own = made(digits)
    first, _ = own.start([Run("final", "none", {"learning_rate": 1e-3}, 0)])
    again, _ = own.start([Run("final", "none", {"learning_rate": 2e-3}, 1)])
    other, _ = own.start([Run("trial", "none", {"learning_rate": 2e-3}, 1, 0)])
    assert first is again and other is not first


@quick.everything
def test_ranges_of_energy_go_by_the_size_of_the_product(digits, monkeypatch):
    small = networks.ResNet(10, blocks=1)
    entry = dataclasses.replace(models.MODELS["resnet"], make=lambda classes: small)
    monkeypatch.setitem(models.MODELS, "resnet", entry)
    images = dataclasses.replace(
        digits,
        x_train=digits.x_train[:1].reshape(1, 8, 8),
        x_test=digits.x_test.reshape(-1, 8, 8),
    )
    variables, _ = train.initialize(small, 0, images.x_train)
    params = variables["params"]
    squares = [float(jnp.sum(p**2)) for p in jax.tree.leaves(params) if p.ndim > 1]
    assert 0 in squares  # Fixup begins with zeros, which must not count
    energy = math.prod(square for square in squares if square)
    energy = math.exp(round(math.log(energy), 1))  # so that machines agree
    spaces = made(images, model="resnet", methods=("none", "weissi")).spaces()
    want = np.array(METHODS["weissi"].space["energy"]) / energy
    np.testing.assert_allclose(spaces["weissi"]["energy"], want, rtol=1e-5)


def test_a_source_is_kept_as_it_was(digits, tmp_path):
    out, own = tmp_path / "a.json", made(digits)
    network = {"params": {"Dense_0": {"kernel": np.arange(4.0, dtype=np.float32)}}}
    part.keep_network(network, out, "source")
    kept = own.source(out).params["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kept, np.arange(4.0))
