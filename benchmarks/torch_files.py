"""PyTorch's files of parameters, read without PyTorch.

These are the files that ``torch.save`` wrote before its version 1.6: some pickles, the
last but one of which has the tensors without their numbers, and the numbers after that.
"""

import collections
import os
import pickle
import struct
from typing import IO, Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by their names.

    Raises:
      ValueError: It is another file, or has more in it than named tensors.
    """
    with open(path, "rb") as file:
        try:
            if _Unpickler(file).load() != MAGIC:
                raise pickle.UnpicklingError("its first number is another one")
            for _ in range(2):  # versions of the format and of the machine
                _Unpickler(file).load()
            tensors = _Unpickler(file)
            found = tensors.load()
            for key in _Unpickler(file).load():
                _fill(tensors.storages[key], file)
        except (pickle.UnpicklingError, EOFError, KeyError, struct.error) as error:
            raise ValueError(
                f"path must be a file of named tensors as torch.save wrote them before "
                f"PyTorch 1.6, which {path} is not: {error}. Newer ones are saved so "
                "with _use_new_zipfile_serialization=False."
            ) from error
    return dict(found)


def _fill(storage: np.ndarray, file: IO[bytes]) -> None:
    """Reads numbers, before which the file says how many there are."""
    (count,) = struct.unpack("<q", file.read(8))
    if count != storage.size or file.readinto(storage) != storage.nbytes:  # pyright: ignore
        raise EOFError("numbers are missing")


def _tensor(storage, offset, shape, strides, *_) -> np.ndarray:
    """A view of numbers that need not be there yet."""
    size = storage.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [size * stride for stride in strides]
    )


class _Unpickler(pickle.Unpickler):
    """Makes arrays where PyTorch makes tensors, and runs no other code."""

    KNOWN = {  # noqa: RUF012
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "LongStorage"): np.dtype("<i8"),
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    }

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for by name."""
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Room for the numbers that tensors share."""
        _, dtype, key, _, count, _ = pid
        return self.storages.setdefault(key, np.empty(count, dtype))
