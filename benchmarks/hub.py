"""Labelled examples as tables, from the Hugging Face hub or Parquet files like its own.

Every row is checked, since a wrong label would pass for a hard example.
"""

import pathlib
import reprlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "test")


def tables(
    hub: str, name: str, data_dir: str | None
) -> tuple[dict[str, pa.Table], str]:
    """The table of each split by what errors call it, and where they came from.

    Args:
      hub: The data set's name on the hub.
      name: Its name here.
      data_dir: Folder with a folder of that name, or None for the hub.

    Raises:
      ValueError: A file is no Parquet.
      FileNotFoundError: A file is not there, or the hub is not to be reached.
    """
    if data_dir is None:
        return from_hub(hub, name), f"Hugging Face hub, {hub}"
    return from_files(hub, pathlib.Path(data_dir) / name), f"Parquet files of {hub}"


def from_hub(hub: str, name: str) -> dict[str, pa.Table]:
    """The table of each split, by what errors call it.

    Args:
      hub: The data set's name on the hub.
      name: Its name here.

    Raises:
      FileNotFoundError: The hub is not to be reached, or its client is not there.
    """
    try:
        import datasets  # which files need not, and some machines do not have

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


def columns(
    table: pa.Table, where: str, name: str, classes: int
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The column of inputs as it is, and the labels, of shape (examples,), int32.

    Args:
      table: One row an example, as the hub stores them.
      where: What errors call the table.
      name: The column of inputs; that of labels is ``"label"``.
      classes: Number of classes.

    Raises:
      ValueError: There are no rows, a column is missing, or a row's label is not one of
        that many classes.
    """
    for column in (name, "label"):
        if table.column_names.count(column) != 1:
            raise ValueError(
                f"{where}: expected one column {column!r}, but the columns are "
                f"{', '.join(table.column_names) or 'none'}."
            )
    if not table.num_rows:
        raise ValueError(f"{where}: expected at least one row, but there is none.")
    return table[name], _labels(table["label"], classes, where)


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
