"""Labelled images as arrays, from the Hugging Face hub or Parquet files like its own.

Every row is checked, since a wrong label or image would pass for a hard example.
"""

import io
import pathlib
import reprlib
from typing import NamedTuple

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "test")


class Examples(NamedTuple):
    """What is in a table.

    Attributes:
      images: In [0, 1], of shape (examples, height, width, ...), float32.
      labels: Of shape (examples,), int32.
      formats: Of the files that images are stored in, such as ``"PNG"``.
    """

    images: np.ndarray
    labels: np.ndarray
    formats: set[str]


def from_hub(hub: str, name: str) -> dict[str, pa.Table]:
    """The table of each split, by what errors call it.

    Args:
      hub: The data set's name on the hub.
      name: Its name here.

    Raises:
      FileNotFoundError: The hub is not to be reached.
    """
    try:
        sets = datasets.load_dataset(hub)
        tables = [sets[split].with_format("arrow")[:] for split in SPLITS]
    except Exception as error:  # the hub's errors have no common class
        raise FileNotFoundError(
            f"{hub} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}). Without a network, put train.parquet and "
            f"test.parquet of it into DIR/{name} and pass --data-dir DIR."
        ) from error
    names = [f"{hub} on the Hugging Face hub, split {split}" for split in SPLITS]
    return dict(zip(names, tables, strict=True))


def from_files(hub: str, folder: pathlib.Path) -> dict[str, pa.Table]:
    """The table of each split's file, by the file's name.

    Args:
      hub: The name on the hub of the data set that the files are of.
      folder: Where they are.

    Raises:
      ValueError: A file is no Parquet.
      FileNotFoundError: A file is not there.
    """
    files = [folder / f"{split}.parquet" for split in SPLITS]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"--data-dir has no {' and no '.join(missing)}; expected the Parquet "
            f"files of {hub} there."
        )
    return {str(path): _parquet(path, hub) for path in files}


def _parquet(path: pathlib.Path, hub: str) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as Parquet ({reason}); expected that of {hub}."
        ) from error


def examples(
    table: pa.Table, where: str, image: str, shape: tuple[int, ...], classes: int
) -> Examples:
    """The images and labels of a table.

    Args:
      table: One row an example, as the Hugging Face hub stores them.
      where: What errors call the table.
      image: The column of images; that of labels is ``"label"``.
      shape: Of an image, ``(height, width)`` if grey and ``(height, width, 3)`` if RGB.
      classes: Number of classes.

    Raises:
      ValueError: There are no rows, a column is missing, or a row is not an image of
        that shape with 8 bits a channel and a label of that many classes.
    """
    for name in (image, "label"):
        if table.column_names.count(name) != 1:
            raise ValueError(
                f"{where}: expected one column {name!r}, but the columns are "
                f"{', '.join(table.column_names) or 'none'}."
            )
    if not table.num_rows:
        raise ValueError(f"{where}: expected at least one row, but there is none.")
    labels = _labels(table["label"], classes, where)
    images, formats = _images(table[image], image, shape, where)
    scaled = (images / np.float32(255)).astype(np.float32)
    return Examples(scaled, labels, formats)


def _labels(column: pa.ChunkedArray, classes: int, where: str) -> np.ndarray:
    expected = f"expected an integer from 0 to {classes - 1}"
    labels = column.to_pylist()
    if not pa.types.is_integer(column.type):
        raise ValueError(
            f"{where}, row 0: label is {reprlib.repr(labels[0])}, since the column is "
            f"of type {column.type}; {expected}."
        )
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < classes:
            raise ValueError(f"{where}, row {row}: label is {label}; {expected}.")
    return np.array(labels, np.int32)


def _images(
    column: pa.ChunkedArray, name: str, shape: tuple[int, ...], where: str
) -> tuple[np.ndarray, set[str]]:
    """Pixels as they are stored, and the formats of the files."""
    if not _holds_files(column.type):
        raise ValueError(
            f"{where}, row 0: {name} is {reprlib.repr(column[0].as_py())}, since the "
            f"column is of type {column.type}; expected encoded images, of type "
            f"struct<bytes: binary, path: string>."
        )
    mode, size = "L" if len(shape) == 2 else "RGB", f"{shape[0]} by {shape[1]}"
    expected = f"expected an image of {size} pixels, mode {mode} (8 bits a channel)"
    images, formats = [], set()
    for row, cell in enumerate(column):
        encoded = cell["bytes"].as_py() if cell.is_valid else None
        if encoded is None:
            raise ValueError(f"{where}, row {row}: {name} is null; {expected}.")
        try:
            image = _decode(encoded)
        except Exception as error:  # Pillow's errors have no common class
            raise ValueError(
                f"{where}, row {row}: {name} is {len(encoded)} bytes, which begin with "
                f"{encoded[:8]!r} and which Pillow cannot decode "
                f"({type(error).__name__}); {expected}."
            ) from error
        if (image.height, image.width, image.mode) != (*shape[:2], mode):
            raise ValueError(
                f"{where}, row {row}: {name} has {image.height} by {image.width} "
                f"pixels, mode {image.mode}; {expected}."
            )
        images.append(np.asarray(image))
        formats.add(image.format)
    return np.stack(images), formats


def _holds_files(kind: pa.DataType) -> bool:
    """Whether a column's type is that of images on the hub."""
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    stored = kind.field("bytes").type
    return pa.types.is_binary(stored) or pa.types.is_large_binary(stored)


def _decode(encoded: bytes) -> PIL.Image.Image:
    """The image in a file, whose checksums must be right."""
    PIL.Image.open(io.BytesIO(encoded)).verify()  # after which it cannot be used
    image = PIL.Image.open(io.BytesIO(encoded))
    image.load()
    return image
