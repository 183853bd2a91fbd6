"""PyTorch's old files are read without it."""

import collections
import pickle
import struct
import sys
import types

import numpy as np
import pytest

from benchmarks import torch_files

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
COUNT = np.array(7, np.int64)


class Tensor:
    """What is pickled as a tensor of PyTorch is, with a storage and where in it."""

    def __init__(self, storage, *where):
        self.where = storage, *where, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.where


class Storage:
    def __init__(self, kind, key, numbers):
        self.kind, self.key, self.numbers = kind, key, numbers


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = getattr(sys.modules["torch"], obj.kind)
            return "storage", kind, obj.key, "cpu", obj.numbers.size, None


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes as ``torch.save`` did before PyTorch 1.6."""

    def module(name, **names):
        for key, value in names.items():
            value.__module__, value.__qualname__ = name, key
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(names)

    def _rebuild_tensor_v2():
        raise NotImplementedError

    module(
        "torch", FloatStorage=type("FloatStorage", (), {}), LongStorage=type("", (), {})
    )
    module("torch._utils", _rebuild_tensor_v2=_rebuild_tensor_v2)

    def write(tensors, storages, magic=torch_files.MAGIC):
        file = tmp_path / "weights.pth"
        with open(file, "wb") as out:
            for part in (magic, 1001, {"little_endian": True}):
                pickle.dump(part, out, protocol=2)
            Pickler(out, protocol=2).dump(tensors)
            pickle.dump([storage.key for storage in storages], out, protocol=2)
            for storage in storages:
                out.write(struct.pack("<q", storage.numbers.size))
                out.write(storage.numbers.tobytes())
        return file

    return write


def test_tensors_are_read_by_name(saved):
    numbers = Storage("FloatStorage", "0", np.append(9, MATRIX).astype(np.float32))
    count = Storage("LongStorage", "1", COUNT)
    named = {
        "plain": Tensor(numbers, 1, (2, 3), (3, 1)),
        "turned": Tensor(numbers, 1, (3, 2), (1, 3)),
        "count": Tensor(count, 0, (), ()),
    }
    found = torch_files.read(saved(collections.OrderedDict(named), [numbers, count]))
    assert found["plain"].dtype == np.float32 and found["count"].dtype == np.int64
    np.testing.assert_array_equal(found.pop("plain"), MATRIX)
    np.testing.assert_array_equal(found.pop("turned"), MATRIX.T)
    assert found == {"count": 7}


def test_nothing_else_is_run_or_read(saved, tmp_path):
    numbers = Storage("FloatStorage", "0", MATRIX)
    tensors = {"w": Tensor(numbers, 0, (2, 3), (3, 1))}
    with pytest.raises(ValueError, match=r"path must be .* its first number"):
        torch_files.read(saved(tensors, [numbers], magic=1))
    with pytest.raises(ValueError, match=r"asks for .*print"):
        torch_files.read(saved({**tensors, "f": print}, [numbers]))
    file = saved(tensors, [numbers])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"numbers are missing"):
        torch_files.read(file)
    file.write_bytes(b"PK\x03\x04, as newer ones begin")
    with pytest.raises(ValueError, match=r"weights\.pth is not: .* Newer ones"):
        torch_files.read(file)
