"""Data sets as arrays, their splits, and label noise.

To add a data set, add an entry to `DATASETS`.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

PADDING = 0  # the number that is no word, after the last one of a short text


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
      name: What it is called on the command line.
      source: Where it came from, for the record.
      x_train: Inputs, of shape (examples, ...): images and tables in [0, 1], float32,
        or texts as numbers of words, int32.
      y_train: Labels, of shape (examples,), int32.
      x_test: Likewise.
      y_test: Likewise.
      classes: Number of classes.
      constants: What networks need beside inputs and never train, by its name in the
        variable collection ``"constants"``: vectors of words.
    """

    name: str
    source: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def test_inputs(self, positions: np.ndarray) -> np.ndarray:
        """Inputs to test with."""
        return self.x_test[positions]

    def digest(self) -> str:
        """What tells these examples from all others, in the order in which they are."""
        sha256 = hashlib.sha256()
        constants = [array for _, array in sorted(self.constants.items())]
        for array in (self.x_train, self.y_train, self.x_test, self.y_test, *constants):
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
class Images:
    """Images on the Hugging Face hub, or in Parquet files like its own.

    Attributes:
      hub: What the hub calls the data set.
      column: That of images. That of labels is ``"label"``.
    """

    hub: str
    column: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts on the Hugging Face hub, or in Parquet files like its own.

    Attributes:
      hub: What the hub calls the data set.
      folder: What its folder in the data folder is called.
      column: That of texts. That of labels is ``"label"``.
      vocabulary: How many different words are told apart at most.
    """

    hub: str
    folder: str
    column: str
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """Images as files in folders, for those who have them: see benchmarks/folders.py.

    Attributes:
      layout: How classes are told: ``"classes"``, each has a folder, or
        ``"annotations"``, as in Tiny ImageNet.
      streamed: Whether they are too many for arrays, and are read again and again.
    """

    layout: Literal["classes", "annotations"]
    streamed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is loaded.

    Attributes:
      title: Name in tables and plots.
      kind: What inputs are: ``"images"``, ``"table"`` or ``"text"``.
      source: Where examples are, or a function that loads what is on this machine.
      shape: Of an example; of a text, how many of its words are kept.
      classes: Number of classes.
      sizes: How many examples there are for training and for testing.
      model: The name of the network in ``benchmarks/models.py``, if none is given, as
        for all that follow.
      epochs: Of training.
      batch: Examples a step.
      tuning_seeds: Draws of the noise to tune on: held-out labels are noisy too.
      epsilon: Radius of the attacks, L-infinity; 0 where there is nothing to attack.
      attacked: How many test examples are attacked, likewise.
    """

    title: str
    kind: Literal["images", "table", "text"]
    source: Images | Texts | Folder | Callable[[], Dataset]
    shape: tuple[int, ...]
    classes: int
    sizes: tuple[int, int]
    model: str
    epochs: int
    batch: int
    tuning_seeds: int
    epsilon: float
    attacked: int = 1000

    @property
    def streamed(self) -> bool:
        """Whether inputs are files that are read as they are needed."""
        return isinstance(self.source, Folder) and self.source.streamed


IMDB = Texts(hub="stanfordnlp/imdb", folder="imdb", column="text", vocabulary=20_000)

DATASETS: Mapping[str, DatasetInfo] = {
    "digits": DatasetInfo(
        title="Digits",
        kind="table",
        source=digits,
        shape=(64,),
        classes=10,
        sizes=(1347, 450),
        model="mlp",
        epochs=80,
        batch=32,  # since digits are few
        tuning_seeds=2,
        epsilon=0.1,
    ),
    "mnist": DatasetInfo(
        title="MNIST",
        kind="images",
        source=Images(hub="ylecun/mnist", column="image"),
        shape=(28, 28),
        classes=10,
        sizes=(60_000, 10_000),
        model="mlp",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=0.1,
    ),
    "cifar10": DatasetInfo(
        title="CIFAR-10",
        kind="images",
        source=Images(hub="uoft-cs/cifar10", column="img"),
        shape=(32, 32, 3),
        classes=10,
        sizes=(50_000, 10_000),
        model="cnn",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=8 / 255,  # the usual one
    ),
    "imdb": DatasetInfo(
        title="IMDB",
        kind="text",
        source=IMDB,
        shape=(200,),
        classes=2,
        sizes=(25_000, 25_000),
        model="lstm_attention",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=0.0,
        attacked=0,
    ),
    # The same with half of the words, which a CPU takes half of the time for.
    "imdb_short": DatasetInfo(
        title="IMDB, 100 words",
        kind="text",
        source=IMDB,
        shape=(100,),
        classes=2,
        sizes=(25_000, 25_000),
        model="lstm_attention",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=0.0,
        attacked=0,
    ),
    "imagenet": DatasetInfo(
        title="ImageNet",
        kind="images",
        source=Folder(layout="classes", streamed=True),
        shape=(224, 224, 3),
        classes=1000,
        sizes=(1_281_167, 50_000),
        model="resnet50_imagenet",
        epochs=90,
        batch=256,
        tuning_seeds=1,
        epsilon=4 / 255,
    ),
    "tiny_imagenet": DatasetInfo(
        title="Tiny ImageNet",
        kind="images",
        source=Folder(layout="annotations", streamed=False),
        shape=(64, 64, 3),
        classes=200,
        sizes=(100_000, 10_000),
        model="resnet18",
        epochs=20,
        batch=128,
        tuning_seeds=2,
        epsilon=8 / 255,
    ),
}


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set.

    Args:
      name: One of `DATASETS`. Digits come with scikit-learn.
      data_dir: Folder with ``<name>/train.parquet`` and ``<name>/test.parquet``, or
        with a folder of images, see ``benchmarks/folders.py``; without it the Hugging
        Face hub is asked. Vectors of words may be there, too: see
        ``benchmarks/glove.py``.

    Raises:
      ValueError: The name is unknown, what is read is not that data set, or it is read
        from no files and a folder is given.
      FileNotFoundError: The files are not there, or the hub is not to be reached.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}.")
    info = DATASETS[name]
    if isinstance(info.source, Images):
        return _images(name, info, info.source, data_dir)
    if isinstance(info.source, Texts):
        return _texts(name, info, info.source, data_dir)
    if isinstance(info.source, Folder):
        return _folder(name, info, info.source, data_dir)
    if data_dir is not None:
        raise ValueError(f"data_dir must not be given for {name}: it has no files.")
    return info.source()


def _images(
    name: str, info: DatasetInfo, source: Images, data_dir: str | None
) -> Dataset:
    from benchmarks import hub, images  # slow to import, and digits need them not

    tables, origin = hub.tables(source.hub, name, data_dir)
    train, test = (
        images.examples(table, where, source.column, info.shape, info.classes)
        for where, table in tables.items()
    )
    if "JPEG" in train.formats | test.formats:
        origin += ", encoded as JPEG"  # which costs detail: no figure may hide it
    arrays = train.images, train.labels, test.images, test.labels
    return Dataset(name, origin, *arrays, info.classes)


def _texts(
    name: str, info: DatasetInfo, source: Texts, data_dir: str | None
) -> Dataset:
    from benchmarks import glove, hub, text

    tables, origin = hub.tables(source.hub, source.folder, data_dir)
    (train, y_train), (test, y_test) = (
        text.examples(table, where, source.column, info.classes)
        for where, table in tables.items()
    )
    parted = [text.words(t) for t in train]
    counts = collections.Counter(itertools.chain.from_iterable(parted))
    vectors, maker = glove.load(counts, data_dir)
    numbers = text.vocabulary(counts, vectors, source.vocabulary)
    x_train = text.numbered(parted, numbers, *info.shape)
    x_test = text.numbered(map(text.words, test), numbers, *info.shape)
    return Dataset(
        name,
        f"{origin}, {maker}",
        x_train,
        y_train,
        x_test,
        y_test,
        info.classes,
        constants={"vectors": text.table(numbers, vectors)},
    )


def _folder(
    name: str, info: DatasetInfo, source: Folder, data_dir: str | None
) -> Dataset:
    from benchmarks import folders

    train, test = folders.files(name, data_dir)
    origin = f"files of {info.title}"
    if source.streamed:
        return folders.Streamed(
            name,
            origin,
            train,
            train.labels,
            test,
            test.labels,
            info.classes,
            size=info.shape[0],
        )
    arrays = *folders.arrays(train, info.shape), *folders.arrays(test, info.shape)
    return Dataset(name, origin, *arrays, info.classes)


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
