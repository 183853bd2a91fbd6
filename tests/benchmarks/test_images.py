"""Images and labels are those of the data set, or are refused."""

import re
import sys

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from parquet import encoded, replace_cell, replace_column, write_parquet

from benchmarks import data

GREY, RGB = np.zeros((28, 28), np.uint8), np.zeros((28, 28, 3), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
MNIST = "expected an image of 28 by 28 pixels, mode L (8 bits a channel)"
LABEL = "expected an integer from 0 to 9"


@pytest.fixture
def mnist(tmp_path):
    """The folder of a few images like those of MNIST."""
    write_parquet(tmp_path / "mnist", "image", (28, 28), (5, 4))
    return tmp_path / "mnist"


def refused(folder, *words):
    """That what is in a folder is refused, in one line that has all the words."""
    with pytest.raises(ValueError) as info:
        data.load(folder.name, str(folder.parent))
    message = str(info.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("label", [78, 10, -1, None])
def test_labels_of_no_class_are_refused(label, part, mnist):
    file = mnist / f"{part}.parquet"
    replace_cell(file, "label", 2, label)
    replace_cell(file, "label", 3, 99)  # which is not the first
    refused(mnist, f"{file}, row 2: label is {label}; {LABEL}")


@pytest.mark.parametrize(
    ("labels", "first", "kind"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.5], "1.0", "double"),
        (["1", "2", "3", "4", "5"], "'1'", "string"),
        ([True, False, True, False, True], "True", "bool"),
        ([None] * 5, "None", "null"),
    ],
)
def test_labels_that_are_no_integers_are_refused(labels, first, kind, mnist):
    file = mnist / "train.parquet"
    replace_column(file, "label", labels)
    refused(mnist, f"{file}, row 0: label is {first}", f"of type {kind}; {LABEL}")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64])
def test_integers_may_be_of_any_width(kind, mnist):
    labels = np.arange(5, 10, dtype=kind)
    replace_column(mnist / "train.parquet", "label", labels)
    got = data.load("mnist", str(mnist.parent)).y_train
    np.testing.assert_array_equal(got, labels)
    assert got.dtype == np.int32


@pytest.mark.parametrize("column", ["label", "image"])
def test_missing_columns_are_refused(column, mnist):
    file, other = mnist / "test.parquet", {"label": "image", "image": "label"}[column]
    replace_column(file, column, None)
    refused(
        mnist, f"{file}: expected one column '{column}', but the columns are {other}"
    )


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("image", "found"),
    [
        (RGB, "28 by 28 pixels, mode RGB"),
        (GREY[1:], "27 by 28 pixels, mode L"),
        (GREY[:, 1:], "28 by 27 pixels, mode L"),
        (GREY.astype(np.uint16), "28 by 28 pixels, mode I;16"),
        (GREY.astype(bool), "28 by 28 pixels, mode 1"),
        (np.zeros((28, 28, 4), np.uint8), "28 by 28 pixels, mode RGBA"),
        (PIL.Image.new("P", (28, 28)), "28 by 28 pixels, mode P"),
        (PIL.Image.new("LA", (28, 28)), "28 by 28 pixels, mode LA"),
    ],
)
def test_images_of_another_form_are_refused(image, found, part, mnist):
    file = mnist / f"{part}.parquet"
    replace_cell(file, "image", 1, encoded(image))
    refused(mnist, f"{file}, row 1: image has {found}; {MNIST}")


def test_images_of_another_data_set_are_refused(tmp_path):
    """Their number of channels is wrong in every row, alike in both files."""
    write_parquet(tmp_path / "mnist", "image", (28, 28, 3), (2, 2))
    refused(tmp_path / "mnist", "train.parquet, row 0: image has", "mode RGB", MNIST)
    write_parquet(tmp_path / "cifar10", "img", (32, 32), (2, 2))
    refused(tmp_path / "cifar10", "train.parquet, row 0: img has", "mode L; expected")


def flipped(content):
    """With one bit changed in the pixels, which the checksum of a PNG tells."""
    place = content.index(b"IDAT") + 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"no image",
        encoded(NOISE)["bytes"][:400],
        encoded(NOISE)["bytes"][:-20],
        flipped(encoded(NOISE)["bytes"]),
        encoded(NOISE, "JPEG")["bytes"][:400],
    ],
    ids=["empty", "text", "half a PNG", "no end of a PNG", "a bit", "half a JPEG"],
)
def test_damaged_images_are_refused(damaged, mnist):
    file = mnist / "train.parquet"
    replace_cell(file, "image", 4, {"bytes": damaged, "path": None})
    bytes_ = f"{len(damaged)} bytes, which begin with {damaged[:8]!r} and which"
    refused(mnist, f"{file}, row 4: image is {bytes_} Pillow cannot decode", MNIST)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "3.png"}])
def test_missing_images_are_refused(cell, mnist):
    """A path is not followed: what is there is not in the file."""
    file = mnist / "test.parquet"
    replace_cell(file, "image", 3, cell)
    refused(mnist, f"{file}, row 3: image is null; {MNIST}")


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        ([[[0, 1], [2]]] * 5, "list<"),  # ragged
        ([b"\x00" * 784] * 5, "binary"),
        ([{"path": "3.png"}] * 5, "struct<path: string>"),
    ],
)
def test_images_that_are_no_files_are_refused(images, kind, mnist):
    file = mnist / "train.parquet"
    replace_column(file, "image", images)
    refused(mnist, f"{file}, row 0: image is", kind, "expected encoded images")


def test_an_empty_table_is_refused(mnist):
    file = mnist / "test.parquet"
    pq.write_table(pq.read_table(file)[:0], file)
    refused(mnist, f"{file}: expected at least one row, but there is none")


@pytest.mark.parametrize("kept", [slice(0), slice(100), slice(100, None)])
def test_files_that_are_no_parquet_are_refused(kept, mnist):
    file = mnist / "train.parquet"
    file.write_bytes(file.read_bytes()[kept])
    refused(mnist, f"{file} cannot be read as Parquet", "expected that of ylecun/mnist")


def test_all_missing_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cifar10.train\.parquet and no .*test"
    ):
        data.load("cifar10", str(tmp_path))


@pytest.fixture
def hub(mnist, monkeypatch):
    """A hub that has what is in the folder."""

    def load_dataset(name):
        assert name == "ylecun/mnist"
        files = {s: str(mnist / f"{s}.parquet") for s in ("train", "test")}
        return datasets.DatasetDict(
            {s: datasets.Dataset(pq.read_table(file)) for s, file in files.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return mnist


def test_the_hub_and_its_files_are_read_alike(hub):
    got, files = data.load("mnist"), data.load("mnist", str(hub.parent))
    assert got.source == "Hugging Face hub, ylecun/mnist"
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(got, name), getattr(files, name))


def test_files_are_read_where_the_hubs_client_is_not_there(mnist, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("hub", "images"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}")
        monkeypatch.delattr(f"benchmarks.{name}")
    assert len(data.load("mnist", str(mnist.parent)).y_train) == 5
    with pytest.raises(FileNotFoundError, match=r"\(ModuleNotFoundError\)\. Without"):
        data.load("mnist")


def test_errors_name_the_split_of_the_hub(hub):
    replace_cell(hub / "test.parquet", "label", 1, 78)
    where = "ylecun/mnist on the Hugging Face hub, split test, row 1: label is 78"
    with pytest.raises(ValueError, match=re.escape(where)):
        data.load("mnist")


@pytest.mark.parametrize("kinds", [("JPEG", "PNG"), ("PNG", "JPEG")])
def test_that_any_image_is_a_jpeg_is_told(kinds, mnist):
    for part, kind in zip(("train", "test"), kinds, strict=True):
        replace_cell(mnist / f"{part}.parquet", "image", 2, encoded(GREY, kind))
    assert data.load("mnist", str(mnist.parent)).source.endswith("encoded as JPEG")
