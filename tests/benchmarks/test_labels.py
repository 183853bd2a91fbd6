"""Labels that people gave are those of the training examples, or are refused."""

import re

import numpy as np
import pytest

from benchmarks import labels
from benchmarks.data import Dataset

CLEAN = np.array([2, 0, 1, 1, 0], np.int32)
NOISY = np.array([2, 1, 1, 0, 0], np.uint8)
EXAMPLES = Dataset("few", "here", np.ones((5, 1)), CLEAN, np.ones((1, 1)), CLEAN[:1], 3)
EXPECTED = "expected an integer from 0 to 2 for each of the 5 training examples of few"


@pytest.fixture
def write(tmp_path):
    """Writes a file of arrays, and gives its name."""

    def write(**arrays):
        np.savez(tmp_path / "a:b.npz", **arrays)  # a colon in it parts nothing
        return str(tmp_path / "a:b.npz")

    return write


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_labels_are_those_of_the_name(kind, write):
    file = write(clean_label=CLEAN.astype(kind), worse=NOISY.astype(kind), odd=CLEAN)
    got = labels.read(f"{file}:worse", EXAMPLES)
    np.testing.assert_array_equal(got, NOISY)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(labels.read(f"{file}:clean_label", EXAMPLES), CLEAN)


def test_labels_in_another_order_are_refused(write):
    file = write(clean_label=CLEAN[::-1], worse=NOISY)
    message = (
        "4 of 5 differ from the training labels of few, the first at position 0: 0, "
        "where the data set has 2"
    )
    with pytest.raises(ValueError, match=message):
        labels.read(f"{file}:worse", EXAMPLES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (NOISY[:4], f"uint8 of shape (4,); {EXPECTED}"),
        (NOISY[:, None], "uint8 of shape (5, 1)"),
        (NOISY.astype(np.float32), "float32 of shape (5,)"),
        (NOISY.astype(bool), "bool of shape (5,)"),
        (np.array([0, 1, 3, 2, 4]), f"position 2: label is 3; {EXPECTED}"),
        (np.array([0, 1, 2, 0, -1]), "position 4: label is -1"),
        (np.array([0, 1, 2, 0, 2**32], np.uint64), "position 4: label is 4294967296"),
    ],
)
@pytest.mark.parametrize("name", ["worse", "clean_label"])
def test_what_is_no_label_for_each_example_is_refused(name, array, message, write):
    file = write(**{"clean_label": CLEAN, "worse": NOISY, name: array})
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message)}"):
        labels.read(f"{file}:worse", EXAMPLES)


def test_names_that_are_not_there_are_refused(write):
    file = write(clean_label=CLEAN, worse=NOISY)
    with pytest.raises(ValueError, match="no array 'bad', but clean_label, worse"):
        labels.read(f"{file}:bad", EXAMPLES)
    file = write(worse=NOISY)
    with pytest.raises(ValueError, match="no array 'clean_label', but worse"):
        labels.read(f"{file}:worse", EXAMPLES)


@pytest.mark.parametrize("given", ["file.npz", ":worse", "file.npz:"])
def test_labels_are_a_file_and_a_name(given):
    with pytest.raises(ValueError, match=f"must be FILE:NAME, .* not '{given}'"):
        labels.read(given, EXAMPLES)


@pytest.mark.parametrize("content", [b"", b"no file of NumPy", b"PK\x03\x04 no zip"])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .*; expected an \.npz"):
        labels.read(f"{tmp_path / 'file'}:worse", EXAMPLES)


def test_arrays_of_objects_and_single_arrays_are_refused(write, tmp_path):
    objects = write(clean_label=CLEAN, worse=np.array([None] * 5))
    np.save(tmp_path / "one.npy", CLEAN)
    for file in (objects, tmp_path / "one.npy"):
        with pytest.raises(ValueError, match=r"cannot be read .*; expected an \.npz"):
            labels.read(f"{file}:worse", EXAMPLES)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels names .*none\.npz, which"):
        labels.read(f"{tmp_path / 'none.npz'}:worse", EXAMPLES)
