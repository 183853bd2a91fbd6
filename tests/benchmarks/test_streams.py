"""Networks are trained on files as on arrays: on any devices, and after any end."""

import dataclasses
import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import quick

import weightreg as wr
from benchmarks import (
    checkpoints,
    data,
    folders,
    measure,
    models,
    part,
    runner,
    streams,
)
from benchmarks.cells import TUNING_SEED
from benchmarks.settings import Settings, split_of
from benchmarks.train import Arrays, Labels, example_loss

pytestmark = quick.everything

CLASSES = ("n01", "n02", "n10")
SIZE, BATCH = 4, 8


@pytest.fixture(scope="module", autouse=True)
def small():
    """ImageNet with fewer classes, of smaller images."""
    few = dataclasses.replace(
        data.DATASETS["imagenet"], classes=len(CLASSES), shape=(SIZE, SIZE, 3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "imagenet", few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images that their color, with noise, tells the class of."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for (label, name), i in itertools.product(enumerate(CLASSES), range(count)):
            pixels = rng.integers(0, 100, (6, 6, 3), dtype=np.uint8)
            pixels[..., label] += 150
            path = root / "imagenet" / split / name / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path, "PNG")
    return str(root)


def settings(**given):
    """For 16 examples to tune on, which are two batches, and 21 of which 16 are taken.

    A batch has an example for each of the tests' eight devices.
    """
    few = {"epochs": 2, "batch": BATCH, "trials": 1, "seeds": 1, "attacked": 0}
    few |= {"model": "mlp_norm", "methods": ("l2",), "optimizer": "momentum"}
    return Settings.of("imagenet", **(few | given))


class Ended(BaseException):
    """What ends a run."""


def content(file):
    """A file without what two runs may differ in."""
    result = json.loads(file.read_text())
    for cell in result["cells"]:
        del cell["seconds"]
    return result


def test_ended_after_any_epoch_it_gives_the_same_numbers(folder, tmp_path, monkeypatch):
    given = settings(noise=0.5, data_dir=folder)
    whole, ended, seen = tmp_path / "whole.json", tmp_path / "ended.json", []
    known = folders.training_batches

    def spied(files, *args):
        seen.append((files, *args))
        return known(files, *args)

    monkeypatch.setattr(folders, "training_batches", spied)
    result = runner.run(given, whole)
    assert result["complete"]
    assert [result["data"][k] for k in ("train", "validation", "test")] == [16, 5, 9]
    # What is trained on: four fifths of the files, with the run's own wrong labels.
    loaded = data.load("imagenet", folder)
    both, (train, _) = part.Part(given, loaded), split_of(loaded, given)
    assert [args[1:] for args in seen] == [
        (BATCH, SIZE, seed, epoch) for seed in (TUNING_SEED, 0) for epoch in (0, 1)
    ]
    for files, *_, seed, _ in seen:
        assert files.names == [loaded.x_train.names[i] for i in train]
        np.testing.assert_array_equal(files.labels, both.noisy(seed)[train])
    assert np.mean(seen[0][0].labels != loaded.y_train[train]) > 0.2

    save = checkpoints.save
    for left in (1, 2):  # checkpoints: after the first epoch of each run
        saved = []

        def end(*args, saved=saved, left=left):
            save(*args)
            saved.append(args)
            if len(saved) == left:
                raise Ended

        with monkeypatch.context() as patched, pytest.raises(Ended):
            patched.setattr(checkpoints, "save", end)
            runner.run(given, ended)
    assert runner.run(given, ended)["complete"]
    assert content(ended) == content(whole)
    assert len(seen) == 2 * 4  # no epoch was repeated


def population(folder, count, **given):
    """Runs on all training files, spread over some devices."""
    loaded = data.load("imagenet", folder)
    arrays = Arrays(loaded.x_train, loaded.x_test, None, loaded.x_test, loaded.y_test)
    training = settings().training("l2", loaded)
    training = dataclasses.replace(training, **given)
    devices = jax.devices()[:count]
    return streams.StreamedPopulation(training, arrays, SIZE, devices), loaded


def fitted(logits, x, y, key):
    """What takes less to compile than `benchmarks.train.sensitivity`."""
    del key
    return jnp.mean(jnp.argmax(logits(x), -1) == y), jnp.arange(3.0)


def test_on_any_devices_it_is_the_same_run_measured_on_all_files(folder, monkeypatch):
    """Statistics of batches are of whole ones."""
    monkeypatch.setattr(streams, "sensitivity", fitted)
    told = data.load("imagenet", folder).y_test.copy()
    told[:3] = (told[:3] + 1) % len(CLASSES)  # as if they were wrong
    hyper, found = {"learning_rate": 0.1, "strength": 1e-4}, []
    for count, given in ((2, {}), (1, {"epsilon": 0.1, "sensitivity": 4})):
        runs, loaded = population(folder, count, augment=("smooth",), **given)
        progress = runs.start([3], [hyper], Labels(loaded.y_train[None], told[None]))
        for _ in range(4):
            progress = runs.train(progress)
        measured = runs.measure(progress)
        kernel = progress.params["Dense_0"]["kernel"]
        assert len(kernel.sharding.device_set) == count
        (network,) = runs.networks(progress)
        found.append((network, measured.accuracy, runs.test(progress)))
    chex.assert_trees_all_close(*found, rtol=1e-3, atol=1e-4)

    x = folders.middles(loaded.x_test, SIZE)
    first = folders.middles(loaded.x_train[np.arange(4)], SIZE)

    @jax.jit
    def classes(network):
        model = settings().network(len(CLASSES))
        says = functools.partial(models.logits, model, network)
        moved = wr.fgsm(functools.partial(example_loss, says), x, told, 0.1)
        return [says(inputs).argmax(-1) for inputs in (x, moved, first)]

    clean, attacked, own = classes(network)
    assert np.mean(clean == loaded.y_test) > 0.8  # it has learnt
    for got, said, labels in (
        (found[0][2], clean, loaded.y_test),
        (measured.accuracy, clean, told),
        (measured.attacked, attacked, told),
        (measured.training_accuracy, own, loaded.y_train[:4]),
    ):
        np.testing.assert_allclose(got, [np.mean(said == labels)], rtol=1e-6)
    np.testing.assert_array_equal(measured.gbr, [[0, 1, 2]])
    energy = wr.log_weight_energy(network["params"])
    np.testing.assert_allclose(measured.log_energy, [energy], rtol=1e-5)


def test_attacks_are_on_images_that_are_decoded(folder):
    given = settings(attacked=5)
    x, y = measure.attacked_examples(data.load("imagenet", folder), given)
    assert x.shape == (5, SIZE, SIZE, 3) and x.dtype == np.float32
    # Colors tell classes.
    np.testing.assert_array_equal(x.mean((1, 2)).argmax(-1), y)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"methods": ("binary_paper",), "optimizer": "adam"},
            r"methods has binary_paper, .* Those of imagenet are files",
        ),
        ({"deploy": ("l2",)}, "deploy has l2, which needs inputs as arrays: leave it"),
        ({"mapping": "vmap"}, "mapping has vmap, which needs inputs as arrays"),
    ],
)
def test_what_needs_arrays_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        settings(**given)


def test_batches_that_cannot_be_spread_are_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"divisible by 5, .* 8: write --batch 5, or"):
        population(folder, 5)
    with pytest.raises(ValueError, match=r"batch must be at most 21, .* but is 24"):
        population(folder, 8, batch=24)
    with pytest.raises(ValueError, match=r"sensitivity must be at most 21, .* 22"):
        population(folder, 8, sensitivity=22)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"for one process .* there are 2"):
        population(folder, 8)
