"""Folders of images, read a batch at a time by threads, for what no memory holds.

Threads do, since Pillow lets others run while it decodes. What comes out depends on the
seed, the epoch and the files alone: not on how many threads there are, nor on what was
read before, so that training can go on at any epoch.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import PIL.Image

from benchmarks.data import DATASETS, Dataset, Folder

SUFFIXES = (".jpeg", ".jpg", ".png")
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a training image's crop
WIDER = 256 / 224  # the shorter side of a test image, in sizes of its crop
AHEAD = 2  # batches that are read while one is used
STREAM = 2  # of random numbers: wrong labels are drawn by the same seeds in another

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of images and their labels.

    Attributes:
      root: The folder that they are in.
      names: Their names in it.
      labels: Of shape (examples,), int32, by the alphabetic order of classes.
    """

    root: pathlib.Path
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, positions: np.ndarray) -> "Files":
        """Some of them."""
        names = [self.names[i] for i in positions]
        return Files(self.root, names, self.labels[positions])

    def digest(self) -> str:
        """What tells these names and labels from all others; images are not read."""
        sha256 = hashlib.sha256(np.ascontiguousarray(self.labels).data)
        sha256.update("\0".join(self.names).encode())
        return sha256.hexdigest()


@dataclasses.dataclass(frozen=True)
class Streamed(Dataset):
    """A classification task whose inputs are too many for arrays.

    Attributes:
      x_train: Files in the place of inputs, whose own labels are not looked at.
      x_test: Likewise.
      size: Of the images that are made of them, in pixels.
    """

    x_train: Files  # pyright: ignore[reportIncompatibleVariableOverride]
    x_test: Files  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int = dataclasses.field(kw_only=True)

    def test_inputs(self, positions: np.ndarray) -> np.ndarray:
        """Images to test with, as `evaluation_batches` has them."""
        return middles(self.x_test[positions], self.size)

    def digest(self) -> str:
        """What tells names and labels from all others; images are not read."""
        both = self.x_train.digest() + self.x_test.digest()
        return hashlib.sha256(both.encode()).hexdigest()


def files(name: str, data_dir: str | None) -> tuple[Files, Files]:
    """The training and the test images of a data set.

    Args:
      name: One of ``DATASETS`` that is a folder.
      data_dir: Folder with a folder of that name. In it are ``train/CLASS/`` and
        ``val/CLASS/``; for Tiny ImageNet, what its archive has.

    Raises:
      ValueError: No folder is given, or what is there is not that data set.
      FileNotFoundError: A folder or file is not there.
    """
    source, classes = DATASETS[name].source, DATASETS[name].classes
    assert isinstance(source, Folder)
    if data_dir is None:
        raise ValueError(f"{name} has to be on this machine: pass --data-dir DIR.")
    train, test = LAYOUTS[source.layout](pathlib.Path(data_dir) / name, classes)
    return train, test


def _by_class(root: pathlib.Path, classes: int) -> tuple[Files, Files]:
    """Those of ``train/CLASS/`` and ``val/CLASS/``."""
    names = [entry.name for entry in _entries(root / "train") if entry.is_dir()]
    _expect_classes(names, classes, root / "train")
    if missing := [name for name in names if not (root / "val" / name).is_dir()]:
        raise FileNotFoundError(
            f"{root / 'val'} has no folder {missing[0]}, which train has; expected "
            "test images in folders by their class, as for training."
        )
    train, test = (
        _listed(root, {name: root / split / name for name in names})
        for split in ("train", "val")
    )
    return train, test


def _by_annotations(root: pathlib.Path, classes: int) -> tuple[Files, Files]:
    """Those of Tiny ImageNet, whose test images are told by a file."""
    names = sorted(_read(root / "wnids.txt").split())
    _expect_classes(names, classes, root / "wnids.txt")
    train = _listed(root, {name: root / "train" / name / "images" for name in names})
    numbers = {name: number for number, name in enumerate(names)}
    notes, told = root / "val" / "val_annotations.txt", []
    for place, line in enumerate(_read(notes).splitlines(), 1):
        file, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if name not in numbers:
            raise ValueError(
                f"{notes}, line {place}: class is {name!r}; expected the name of a "
                "file and one of wnids.txt, parted by a tabulator."
            )
        told.append((file, numbers[name]))
    there = {_name(entry) for entry in _entries(root / "val" / "images")}
    if differ := there.symmetric_difference(file for file, _ in told):
        raise ValueError(
            f"{notes}: expected a line for each file of val/images and no other, but "
            f"{min(differ)} has only one of both."
        )
    labels = np.array([number for _, number in told], np.int32)
    return train, Files(root, [f"val/images/{file}" for file, _ in told], labels)


LAYOUTS: Mapping[str, Callable[[pathlib.Path, int], tuple[Files, Files]]] = {
    "classes": _by_class,
    "annotations": _by_annotations,
}


def _listed(root: pathlib.Path, folders: Mapping[str, pathlib.Path]) -> Files:
    """All files of folders, one a class."""
    names, labels = [], []
    for label, folder in enumerate(folders.values()):
        found = sorted(_name(entry) for entry in _entries(folder))
        if not found:
            raise ValueError(f"{folder}: expected at least one image, but is empty.")
        within = folder.relative_to(root).as_posix()
        names += [f"{within}/{name}" for name in found]
        labels.append(np.full(len(found), label, np.int32))
    return Files(root, names, np.concatenate(labels))


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """What is in a folder, but for hidden files, in alphabetic order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; expected a folder of images.")
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: entry.name)


def _name(entry: os.DirEntry[str]) -> str:
    if not entry.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{entry.path}: expected images alone, whose names end with "
            f"{', '.join(SUFFIXES)}."
        )
    return entry.name


def _read(path: pathlib.Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, which Tiny ImageNet has.")
    return path.read_text()


def _expect_classes(names: list[str], classes: int, where: pathlib.Path) -> None:
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"{where}: expected {classes} classes, but there are {len(set(names))}."
        )


def training_batches(
    files: Files, batch: int, size: int, seed: int, epoch: int, workers: int = 0
) -> Generator[Batch]:
    """One epoch of training images in random order, cropped and mirrored by chance.

    A crop has 8 to 100 % of an image's area and sides of 3:4 to 4:3, and is scaled to
    ``(size, size)``; half of all are mirrored (Szegedy et al., 2015). Files that are
    too few for a batch are left out, others in every epoch.

    Args:
      files: What is read.
      batch: Examples in each batch.
      size: Of the images, in pixels.
      seed: Of the order and of the crops.
      epoch: Likewise: which pass over the files it is.
      workers: Threads; 0 for as many as there are cores.

    Yields:
      Images in [0, 1], of shape (batch, size, size, 3), float32, and labels, int32.

    Raises:
      ValueError: There are fewer files than a batch has, or one is no image.
    """
    if len(files.names) < batch:
        raise ValueError(
            f"batch must be at most {len(files.names)}, the number of training "
            f"examples, but is {batch}."
        )
    order = np.random.default_rng([STREAM, seed, epoch]).permutation(len(files.names))
    chunks = order[: len(order) // batch * batch].reshape(-1, batch)

    def crop(image: PIL.Image.Image, example: int) -> PIL.Image.Image:
        rng = np.random.default_rng([STREAM, seed, epoch, 1 + example])
        return random_crop(image, size, rng)

    return _batches(files, chunks, size, crop, workers)


def evaluation_batches(
    files: Files, batch: int, size: int, workers: int = 0
) -> Generator[Batch]:
    """All images in the order of files, each its middle; the last batch may be smaller.

    The shorter side is scaled to 256 pixels where ``size`` is 224, and as much more for
    other sizes (He et al., 2016).

    Args:
      files: What is read.
      batch: Examples in each batch.
      size: Of the images, in pixels.
      workers: Threads; 0 for as many as there are cores.

    Yields:
      Images in [0, 1], of shape (batch, size, size, 3), float32, and labels, int32.

    Raises:
      ValueError: A file is no image.
    """
    order = np.arange(len(files.names))
    chunks = np.split(order, order[batch::batch])
    return _batches(files, chunks, size, lambda x, _: middle(x, size), workers)


def middles(files: Files, size: int) -> np.ndarray:
    """All images at once, as `evaluation_batches` has them."""
    ((x, _),) = evaluation_batches(files, len(files), size)
    return x


def arrays(files: Files, shape: tuple[int, ...]) -> Batch:
    """All images in [0, 1], float32, and labels; grey images become RGB.

    Raises:
      ValueError: A file is no image of that shape.
    """

    def checked(image: PIL.Image.Image, example: int) -> PIL.Image.Image:
        if (image.height, image.width, 3) != shape:
            raise ValueError(
                f"{files.root / files.names[example]} has {image.height} by "
                f"{image.width} pixels; expected {shape[0]} by {shape[1]}."
            )
        return image

    ((x, y),) = _batches(files, [np.arange(len(files.names))], shape[0], checked, 0)
    return x, y


def _batches(
    files: Files,
    chunks: Iterable[np.ndarray],
    size: int,
    crop: Callable[[PIL.Image.Image, int], PIL.Image.Image],
    workers: int,
) -> Generator[Batch]:
    """Batches of examples, of which a few are read ahead."""
    pool = ThreadPoolExecutor(workers or os.cpu_count())

    def fill(pixels: np.ndarray, example: int) -> None:
        image = crop(_decoded(files.root / files.names[example]), int(example))
        np.divide(np.asarray(image), np.float32(255), out=pixels)

    def begin(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Future[None]]]:
        x = np.empty((len(chunk), size, size, 3), np.float32)
        jobs = [pool.submit(fill, *job) for job in zip(x, chunk, strict=True)]
        return x, chunk, jobs

    begun = map(begin, chunks)
    waiting = collections.deque(itertools.islice(begun, AHEAD))
    try:
        while waiting:
            waiting.extend(itertools.islice(begun, 1))
            x, chunk, jobs = waiting.popleft()
            for job in jobs:
                job.result()
            yield x, files.labels[chunk]
    finally:  # also where nobody asks for more
        pool.shutdown(cancel_futures=True)


def _decoded(path: pathlib.Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")  # some of ImageNet's are grey or CMYK
    except Exception as error:  # Pillow's errors have no common class
        raise ValueError(
            f"{path} is no image that Pillow can decode ({type(error).__name__})."
        ) from error


def random_crop(
    image: PIL.Image.Image, size: int, rng: np.random.Generator
) -> PIL.Image.Image:
    """A part of random area, shape and place, or the middle if ten are too large."""
    width, height = image.size
    box = None
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = rng.integers(0, width - w, endpoint=True)
            top = rng.integers(0, height - h, endpoint=True)
            box = left, top, left + w, top + h
            break
    part = image.crop(box) if box else _middle(image, *_within(width, height))
    part = part.resize((size, size), PIL.Image.Resampling.BILINEAR)
    flip = PIL.Image.Transpose.FLIP_LEFT_RIGHT
    return part.transpose(flip) if rng.random() < 0.5 else part


def _within(width: int, height: int) -> tuple[int, int]:
    """The largest sides that fit, no longer than `RATIO` has them."""
    least, most = RATIO
    return min(width, round(height * most)), min(height, round(width / least))


def middle(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The middle of an image whose shorter side is scaled to a little more."""
    wider = round(size * WIDER)
    shorter = min(image.size)
    sides = [wider * side // shorter for side in image.size]
    scaled = image.resize((sides[0], sides[1]), PIL.Image.Resampling.BILINEAR)
    return _middle(scaled, size, size)


def _middle(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
