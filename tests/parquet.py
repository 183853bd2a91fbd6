"""Random images as Parquet files like those of the Hugging Face hub."""

import io

import datasets
import numpy as np
import PIL.Image


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
