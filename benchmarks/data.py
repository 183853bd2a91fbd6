"""Data sets as arrays, their splits, and label noise."""

import dataclasses
import pathlib

import numpy as np

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
NAMES = ("digits", *HUB)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
      name: What it is called on the command line.
      source: Where it came from, for the record.
      x_train: Inputs in [0, 1], of shape (examples, ...), float32.
      y_train: Labels, of shape (examples,), int32.
      x_test: Likewise.
      y_test: Likewise.
      classes: Number of classes.
    """

    name: str
    source: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int = 10


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set.

    Args:
      name: One of `NAMES`. Digits come with scikit-learn.
      data_dir: Folder with ``<name>/train.parquet`` and ``<name>/test.parquet``;
        without it the Hugging Face hub is asked.

    Raises:
      ValueError: The name is unknown.
      FileNotFoundError: The files are not there, or the hub is not to be reached.
    """
    if name == "digits":
        return _digits()
    if name not in HUB:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)}, not {name!r}.")
    import datasets  # slow to import, and not needed for the default

    if data_dir is None:
        try:
            sets = datasets.load_dataset(HUB[name])
        except Exception as error:  # the hub's errors have no common class
            raise FileNotFoundError(
                f"{HUB[name]} could not be loaded from the Hugging Face hub "
                f"({type(error).__name__}). Without a network, put train.parquet and "
                f"test.parquet of it into DIR/{name} and pass --data-dir DIR."
            ) from error
        source = f"Hugging Face hub, {HUB[name]}"
    else:
        folder = pathlib.Path(data_dir) / name
        files = {split: folder / f"{split}.parquet" for split in ("train", "test")}
        if missing := [str(f) for f in files.values() if not f.is_file()]:
            raise FileNotFoundError(
                f"--data-dir has no {' and no '.join(missing)}; expected the Parquet "
                f"files of {HUB[name]} there."
            )
        sets = datasets.load_dataset(
            "parquet", data_files={k: str(f) for k, f in files.items()}
        )
        source = f"Parquet files of {HUB[name]}"
    (x_train, y_train), (x_test, y_test) = (_images(sets[s]) for s in ("train", "test"))
    if "JPEG" in (_column(sets[s])[0].format for s in ("train", "test")):
        source += ", encoded as JPEG"  # which costs detail: no figure may hide it
    return Dataset(name, source, x_train, y_train, x_test, y_test)


def corrupt(
    labels: np.ndarray, noise: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Symmetric label noise: ``round(noise * n)`` labels become another class.

    Every corrupted label is wrong: it is drawn uniformly from the other classes.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be in [0, 1], but is {noise}.")
    chosen = rng.permutation(len(labels))[: round(noise * len(labels))]
    shift = rng.integers(1, classes, len(chosen))
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def split(data: Dataset, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and the validation examples, 80 % and 20 %."""
    order = np.random.default_rng(seed).permutation(len(data.y_train))
    cut = len(order) * 4 // 5
    return order[:cut], order[cut:]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x / 16, np.float32), np.asarray(y, np.int32)
    train, test = train_test_split(np.arange(len(y)), stratify=y, random_state=0)
    return Dataset("digits", "scikit-learn", x[train], y[train], x[test], y[test])


def _column(rows):
    return rows["img" if "img" in rows.column_names else "image"]


def _images(rows) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([np.asarray(image) for image in _column(rows)])
    labels = np.asarray(rows["label"], np.int32)
    return (images / np.float32(255)).astype(np.float32), labels
