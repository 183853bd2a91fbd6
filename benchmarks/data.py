"""Data sets as arrays, their splits, and label noise.

To add a data set, add an entry to `DATASETS`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping

import numpy as np


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
    classes: int
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """What tells these examples from all others, in the order in which they are."""
        sha256 = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            sha256.update(repr((array.shape, array.dtype.str)).encode())
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()


def digits() -> Dataset:
    """The digits that come with scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x / 16, np.float32), np.asarray(y, np.int32)
    train, test = train_test_split(np.arange(len(y)), stratify=y, random_state=0)
    arrays = x[train], y[train], x[test], y[test]
    return Dataset("digits", "scikit-learn", *arrays, classes=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """Where images are on the Hugging Face hub, or in Parquet files like its own.

    Attributes:
      name: What the hub calls the data set.
      image: The column of images. That of labels is ``"label"``.
    """

    name: str
    image: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is loaded.

    Attributes:
      title: Name in tables and plots.
      source: Where images are, or a function that loads what is on this machine.
      shape: Of an example.
      classes: Number of classes.
      model: The name of the network in ``benchmarks/models.py``, if none is given, as
        for all that follow.
      epochs: Of training.
      batch: Examples a step.
      tuning_seeds: Draws of the noise to tune on: held-out labels are noisy too.
      epsilon: Radius of the attacks, L-infinity.
    """

    title: str
    source: Hub | Callable[[], Dataset]
    shape: tuple[int, ...]
    classes: int
    model: str
    epochs: int
    batch: int
    tuning_seeds: int
    epsilon: float
    kind: str = "images"


DATASETS: Mapping[str, DatasetInfo] = {
    "digits": DatasetInfo(
        title="Digits",
        source=digits,
        shape=(64,),
        classes=10,
        model="mlp",
        epochs=80,
        batch=32,  # since digits are few
        tuning_seeds=2,
        epsilon=0.1,
    ),
    "mnist": DatasetInfo(
        title="MNIST",
        source=Hub(name="ylecun/mnist", image="image"),
        shape=(28, 28),
        classes=10,
        model="mlp",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=0.1,
    ),
    "cifar10": DatasetInfo(
        title="CIFAR-10",
        source=Hub(name="uoft-cs/cifar10", image="img"),
        shape=(32, 32, 3),
        classes=10,
        model="cnn",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=8 / 255,  # the usual one
    ),
}


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set.

    Args:
      name: One of `DATASETS`. Digits come with scikit-learn.
      data_dir: Folder with ``<name>/train.parquet`` and ``<name>/test.parquet``;
        without it the Hugging Face hub is asked.

    Raises:
      ValueError: The name is unknown, what is read is not that data set, or it is read
        from no files and a folder is given.
      FileNotFoundError: The files are not there, or the hub is not to be reached.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}.")
    info = DATASETS[name]
    if not isinstance(info.source, Hub):
        if data_dir is not None:
            raise ValueError(f"data_dir must not be given for {name}: it has no files.")
        return info.source()
    from benchmarks import images  # slow to import, and not needed for the default

    hub, column = info.source.name, info.source.image
    if data_dir is None:
        tables, source = images.from_hub(hub, name), f"Hugging Face hub, {hub}"
    else:
        folder = pathlib.Path(data_dir) / name
        tables, source = images.from_files(hub, folder), f"Parquet files of {hub}"
    train, test = (
        images.examples(table, where, column, info.shape, info.classes)
        for where, table in tables.items()
    )
    if "JPEG" in train.formats | test.formats:
        source += ", encoded as JPEG"  # which costs detail: no figure may hide it
    arrays = train.images, train.labels, test.images, test.labels
    return Dataset(name, source, *arrays, info.classes)


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
