"""Data sets, their splits and label noise."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parquet import write_parquet

from benchmarks import data


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


def test_split_is_a_partition_of_the_training_set(digits):
    train_part, held_out = data.split(digits)
    both = np.concatenate([train_part, held_out])
    np.testing.assert_array_equal(np.sort(both), np.arange(len(digits.y_train)))
    assert len(train_part) == len(both) * 4 // 5


def test_digits_are_what_the_entry_says(digits):
    info = data.DATASETS["digits"]
    for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test)):
        assert x.shape[1:] == info.shape and len(x) == len(y)
        assert x.min() == 0 and x.max() == 1
        assert set(y) == set(range(info.classes))
    assert digits.classes == info.classes
    assert (len(digits.y_train), len(digits.y_test)) == info.sizes
    assert not digits.constants


@pytest.mark.parametrize("name", data.DATASETS)
def test_an_entry_is_of_one_kind(name):
    """Texts and tables are rows, images are not, and nothing moves a word a little."""
    info = data.DATASETS[name]
    assert len(info.shape) in {"table": (1,), "text": (1,), "images": (2, 3)}[info.kind]
    assert (info.epsilon == 0) == (info.kind == "text")
    train, test = info.sizes
    assert train >= test > info.classes


def test_data_sets_are_known_by_name():
    message = "dataset must be one of digits, mnist, cifar10, .*, not 'svhn'"
    with pytest.raises(ValueError, match=message):
        data.load("svhn")


@pytest.mark.parametrize(
    ("name", "column", "shape"),
    [("mnist", "image", (28, 28)), ("cifar10", "img", (32, 32, 3))],
)
def test_parquet_files_are_read(name, column, shape, tmp_path):
    assert data.DATASETS[name].shape == shape
    written = write_parquet(tmp_path / name, column, shape, (7, 3))
    got = data.load(name, str(tmp_path))
    assert "JPEG" not in got.source
    read = (got.x_train, got.y_train), (got.x_test, got.y_test)
    for (x, y), (images, labels) in zip(written, read, strict=True):
        np.testing.assert_allclose(images, x / 255, rtol=1e-6)
        np.testing.assert_array_equal(labels, y)
        assert images.dtype == np.float32 and labels.dtype == np.int32


def test_a_folder_for_data_that_has_no_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_dir must not be given for digits"):
        data.load("digits", str(tmp_path))


def test_other_examples_have_another_digest(digits):
    other = digits.x_train.copy()
    other[0, 0] += 0.5
    assert digits.digest() == data.load("digits").digest()
    assert digits.digest() != dataclasses.replace(digits, x_train=other).digest()
    swapped = dataclasses.replace(digits, y_train=digits.y_train[::-1])
    assert digits.digest() != swapped.digest()
