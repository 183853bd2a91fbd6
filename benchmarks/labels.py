"""Labels that people gave, wrong ones among them, in place of a data set's own.

They are in a file of NumPy, ``.npz``, with an array for each set of labels, in the
order of the training examples. One is ``clean_label``, the data set's own, which shows
that the order is the same. CIFAR-10N (Wei et al., 2022) is such a file.
"""

import pathlib
import zipfile

import numpy as np

from benchmarks.data import Dataset

CLEAN = "clean_label"


def read(labels: str, data: Dataset) -> np.ndarray:
    """The labels of a file for the training examples, of shape (examples,), int32.

    Args:
      labels: ``"FILE:NAME"``: the file, and the array in it.
      data: The data set that they are for.

    Raises:
      ValueError: There is no name, or no array of that name; the file is none of NumPy;
        an array does not have an integer for each example, from 0 to the number of
        classes; or the file's ``clean_label`` is not what the data set says.
      FileNotFoundError: The file is not there.
    """
    file, _, name = labels.rpartition(":")
    if not (file and name):
        raise ValueError(
            f"labels must be FILE:NAME, such as cifar10n_labels.npz:worse_label, not "
            f"{labels!r}."
        )
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"labels names {file}, which is no file.")
    arrays = _arrays(file)
    for wanted in (name, CLEAN):
        if wanted not in arrays:
            raise ValueError(
                f"{file} has no array {wanted!r}, but {', '.join(arrays) or 'none'}."
            )
    clean, given = (_checked(arrays[k], f"{file}, {k}", data) for k in (CLEAN, name))
    if (wrong := np.flatnonzero(clean != data.y_train)).size:
        first = wrong[0]
        raise ValueError(
            f"{file}, {CLEAN}: {wrong.size} of {len(clean)} differ from the training "
            f"labels of {data.name}, the first at position {first}: {clean[first]}, "
            f"where the data set has {data.y_train[first]}. Expected labels in the "
            "order of its training examples."
        )
    return given


def _arrays(file: str) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as stream, np.load(stream) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} cannot be read as arrays of NumPy ({reason}); expected an .npz."
        ) from error


def _checked(labels: np.ndarray, where: str, data: Dataset) -> np.ndarray:
    expected = (
        f"expected an integer from 0 to {data.classes - 1} for each of the "
        f"{len(data.y_train)} training examples of {data.name}"
    )
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers or labels.shape != data.y_train.shape:
        raise ValueError(
            f"{where}: the array is {labels.dtype} of shape {labels.shape}; {expected}."
        )
    if (bad := np.flatnonzero((labels < 0) | (labels >= data.classes))).size:
        raise ValueError(
            f"{where}, position {bad[0]}: label is {labels[bad[0]]}; {expected}."
        )
    return labels.astype(np.int32)
