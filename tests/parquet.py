"""Random images as Parquet files like those of the Hugging Face hub."""

import io

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq


def encoded(image, kind="PNG"):
    """A cell of a column of images, from an array or from a Pillow image."""
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind)
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


def replace_column(path, column, values):
    """Writes a file again with other values in a column, or without it if None."""
    table = pq.read_table(path)
    place = table.column_names.index(column)
    table = table.remove_column(place)
    if values is not None:
        table = table.add_column(place, column, pa.array(values))
    pq.write_table(table.replace_schema_metadata(), path)


def replace_cell(path, column, row, value):
    """Writes a file again with another value in one row of a column."""
    values = pq.read_table(path)[column].to_pylist()
    values[row] = value
    replace_column(path, column, values)
