"""Labelled images as arrays, from tables like those of the Hugging Face hub.

Every row is checked, since a wrong image would pass for a hard example.
"""

import io
import reprlib
from typing import NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa

from benchmarks import hub


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
    column, labels = hub.columns(table, where, image, classes)
    images, formats = _images(column, image, shape, where)
    scaled = (images / np.float32(255)).astype(np.float32)
    return Examples(scaled, labels, formats)


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
