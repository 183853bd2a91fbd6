"""Packed networks as files, of which no damage goes unnoticed."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from weightreg._core._arguments import KeyPath, show_path
from weightreg._core._packed_weight import PackedWeight
from weightreg._core._weights import is_packed
from weightreg._quantization._pack import bits_shape, row_sizes, unpack
from weightreg._quantization._quantize import PLANES

FORMAT = "weightreg.packed"
VERSION = 2  # The first one had all bits of a layer in one row: see `_one_row`.
_UNSIGNED = "0" * 64  # stands for the checksum in what the checksum is taken of
_BOX = (GetAttrKey("value"),)  # the path of a parameter in the box that Flax puts it in


def save_packed(packed: Any, path: str | os.PathLike[str]) -> None:
    """Writes a packed network to a file.

    The file is one of `safetensors <https://huggingface.co/docs/safetensors>`_: the
    bits of packed weights, and all other leaves, each under its key path, which is the
    same in a box of Flax's (``nn.Partitioned``, ``nnx.Variable``) as without. Its
    metadata tell format and version, each leaf's shape, dtype, levels, scale and
    stacked axes, and a SHA-256 of the whole file.

    It is written beside its place, under a name of its own, and moved there in one
    piece. An interrupt leaves what was there, whoever reads finds a whole file, and of
    several who save to one path the last one prevails. A process that is killed
    (SIGKILL) leaves its ``weightreg-….part`` behind, which may be deleted.

    It needs the package safetensors: ``pip install 'weightreg[files]'``.

    Args:
      packed: What `pack` returns: a tree of arrays and `PackedWeight`.
      path: The path of the file. One that exists is replaced and keeps its
        permissions; of a symbolic link it is the file that it leads to.

    Raises:
      ValueError: The tree has no leaves, or two whose paths print alike; a scale is not
        finite, hence the weights it was made of were not; a `PackedWeight` is none that
        `pack` makes; or at ``path`` is a folder, a FIFO or a device.
      TypeError: A leaf is no array that a file can hold, or ``path`` no path.
      ImportError: There is no safetensors.

    Example:
      >>> import pathlib, tempfile
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"Dense_0": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> packed = wr.pack(params, 0.5, "binary")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "network.safetensors"
      ...     wr.save_packed(packed, file)
      ...     loaded = wr.load_packed(file)
      >>> jax.tree.map(jnp.shape, wr.unpack(loaded))
      {'Dense_0': {'bias': (4,), 'kernel': (8, 4)}}
    """
    path = _path(path)
    leaves = jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed)
    if not leaves:
        raise ValueError("packed has no leaves: there is nothing to save.")
    tensors, described = {}, {}
    for keys, leaf in leaves:
        name = _bare(show_path(keys))
        if name in described:
            raise ValueError(f"packed has two leaves whose path prints as {name}.")
        leaf = jax.tree.map(functools.partial(_array, name), leaf)
        if fault := _fault(leaf):
            raise ValueError(
                f"packed has {fault} at {name}, which pack never makes of finite "
                "weights."
            )
        described[name] = _describe(_names(keys), leaf)
        tensors[name] = leaf.bits if is_packed(leaf) else leaf
    about = {
        "version": VERSION,
        "checksum": _UNSIGNED,
        "dicts": _is_of_dicts(packed, leaves),
        "leaves": described,
    }
    try:
        data = _safetensors().numpy.save(tensors, {FORMAT: json.dumps(about)})
    except ImportError:
        raise
    except Exception as error:
        raise TypeError(f"packed has what safetensors cannot hold: {error}") from error
    before, after = _around(data, _UNSIGNED)
    _replace(path.resolve(), (before, _mark(_digest(before, after)), after))


def load_packed(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads what `save_packed` has written, or refuses it.

    Every byte of the file is under its checksum: one that has changed is an error, and
    never another network. (It is no signature: whoever means to can make another file.)

    Args:
      path: The path of the file.
      like: A tree that says what to expect: the network's parameters, packed or not,
        or their shapes, as ``jax.eval_shape`` gives them, in boxes or not. The result
        has its structure, with a `PackedWeight` where the file has one (in the place of
        its box, unless ``like`` is packed in one); paths, shapes and dtypes must agree,
        and levels where ``like`` is packed. Without it, the result is made of dicts,
        which is what Flax's linen wants.

    Returns:
      The packed tree, on JAX's default device.

    Raises:
      ValueError: The file is damaged, cut off, of another version, no packed network or
        no file; ``like`` differs from it; or it was a tree of something else than
        dicts, and ``like`` is not given; or it holds 64-bit numbers and JAX is not to.
      FileNotFoundError: There is no file.
      ImportError: There is no safetensors.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> packed = wr.pack({"kernel": jnp.ones((8, 4))}, 0.5, "binary")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     wr.save_packed(packed, f"{folder}/net.safetensors")
      ...     wr.load_packed(f"{folder}/net.safetensors", like=packed)["kernel"].shape
      (8, 4)
    """
    path = _path(path)
    about, tensors = _read(path)
    leaves = _leaves(path, about, tensors)
    nested = about["dicts"] and _dicts(path, about["leaves"], leaves)
    if like is not None:
        return _as(like, leaves, path)
    if not about["dicts"]:
        raise ValueError(
            f"{path} holds a tree of something else than dicts: pass like=, a tree of "
            f"the same structure. It has {', '.join(leaves)}."
        )
    return nested


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Packed networks are saved with the package safetensors: "
            "pip install 'weightreg[files]'."
        ) from error
    return safetensors


def _path(path: Any) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a file, not {type(path).__name__}.")
    return pathlib.Path(path)


def _mode(path: pathlib.Path) -> int | None:
    """A file's permissions, if there is one; what else there may be is refused."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or a socket")
        raise ValueError(f"path must be that of a file, but {path} is {kind}.")
    return stat.S_IMODE(mode)


def _replace(path: pathlib.Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside its place and moves it there in one piece."""
    mode = _mode(path)
    # Not of the file's own name, which may be as long as the file system allows.
    part = path.with_name(f"weightreg-{secrets.token_hex(16)}.part")
    try:
        with part.open("xb") as file:
            if mode is not None:  # before there is anything to read
                part.chmod(mode)
            file.writelines(pieces)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _bare(path: str) -> str:
    """A path without the ``.value`` of boxes, which files of old have in names."""
    while path.endswith(".value"):
        path = path.removesuffix(".value")
    return path or show_path(())


def _names(path: KeyPath) -> list[str] | None:
    """The names of the dicts' entries on the way to a leaf, if it is all dicts."""
    while path[-1:] == _BOX:
        path = path[:-1]
    named = all(isinstance(key, DictKey) and isinstance(key.key, str) for key in path)
    return [str(key.key) for key in path] if named else None


def _array(name: str, leaf: Any) -> np.ndarray:
    array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not array or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"packed must hold arrays of numbers, but has {type(leaf).__name__} at "
            f"{name}."
        )
    return np.asarray(leaf, order="C")  # safetensors takes no notice of strides


def _describe(names: list[str] | None, leaf: Any) -> dict[str, Any]:
    """Makes a leaf's entry in the metadata."""
    entry = {"keys": names, "dtype": leaf.dtype.name, "shape": leaf.shape}
    if not is_packed(leaf):
        return entry | {"levels": None}
    return entry | {
        "levels": leaf.levels,
        "scale": leaf.scale.astype(np.float64).tolist(),
        "stack_axes": leaf.stack_axes,
        "input_axes": leaf.input_axes,
    }


def _fault(leaf: Any) -> str | None:
    """Says what a leaf has that no `PackedWeight` has which `pack` makes."""
    if not is_packed(leaf):
        return None
    if not isinstance(leaf.levels, str) or leaf.levels not in PLANES:
        return f"the levels {leaf.levels!r}"
    bits, scale, shape, axes = leaf.bits, leaf.scale, leaf.shape, leaf.stack_axes
    if not jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype.itemsize < 2:
        return f"packed weights of dtype {scale.dtype}"
    if not np.all(np.isfinite(scale.astype(np.float64))):
        return "a scale that is not finite"
    # Dimensions that no array can have would show only when it is unpacked.
    if not _are_counts(shape) or math.prod(max(n, 1) for n in shape) >= 2**60:
        return f"the shape {shape}"
    rank = len(shape) + len(axes)
    if not _are_counts(axes) or list(axes) != sorted({a for a in axes if a < rank}):
        return f"stack_axes {axes}, for a weight of {rank} axes"
    inputs = leaf.input_axes
    if not _are_counts(inputs) or list(inputs) != sorted(
        {a for a in inputs if a < len(shape)}
    ):
        return f"input_axes {inputs}, for layers of {len(shape)} axes"
    expected = bits_shape(leaf)
    if bits.dtype != np.uint8 or bits.shape != expected:
        return f"bits {bits.dtype}{list(bits.shape)} instead of uint8{list(expected)}"
    if _has_spare_bits(bits, row_sizes(leaf)[1]):
        return "bits that are set and belong to no weight"
    return None


def _are_counts(numbers: Iterable[Any]) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _has_spare_bits(bits: np.ndarray, count: int) -> bool:
    """Whether bits are set past a row's end, or the signs of weights that are 0."""
    *nonzero, negative = np.moveaxis(bits, -3, 0)
    past = bool(count % 8) and np.any(bits[..., -1] & (0xFF >> count % 8))
    return bool(past or any(np.any(negative & ~plane) for plane in nonzero))


def _leaves(
    path: pathlib.Path, about: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any]:
    """The leaves that entries describe, which have to be what `_describe` makes."""
    described, old = about["leaves"], about["version"] == 1
    if not isinstance(described, dict) or not set(described) == set(tensors) != set():
        raise _forged(path, f"what it describes is not what it has: {list(tensors)}")
    leaves = {}
    for name, entry in described.items():
        try:
            if _bare(name) in leaves:
                raise ValueError("there are two of them")
            tensor = tensors.pop(name)  # its bytes go once they are read
            entry, tensor = _one_row(entry, tensor) if old else (entry, tensor)
            leaf = _leaf(tensor, entry)
            _check_entry(name, entry, leaf)
            leaf = _in_rows(leaf) if old else leaf
            leaves[_bare(name)] = jax.tree.map(_on_device, leaf)
        except _Narrowed as error:
            raise ValueError(f"{path} has {error}") from None
        except Exception as error:  # the checksum is right, but no save_packed wrote it
            raise _forged(path, f"it describes {name} wrongly: {error!r}") from error
    return leaves


def _one_row(
    entry: dict[str, Any], tensor: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What version 2 says of bits of version 1: all of a layer are one unit's row."""
    if entry["levels"] is None:
        return entry, tensor
    if "input_axes" in entry:
        raise ValueError("it has input_axes, of which version 1 knows nothing")
    *lead, size = tensor["shape"]
    entry = entry | {"input_axes": [*range(len(entry["shape"]))]}
    return entry, tensor | {"shape": [*lead, 1, size]}


def _in_rows(leaf: Any) -> Any:
    """Lays the bits of version 1 out in rows that the last axis numbers."""
    if not is_packed(leaf) or len(leaf.shape) < 2:
        return leaf
    *lead, _, _ = leaf.bits.shape
    *inputs, units = leaf.shape
    count = math.prod(inputs)
    bits = np.unpackbits(leaf.bits, axis=-1, count=count * units)
    rows = np.swapaxes(bits.reshape(*lead, count, units), -1, -2)
    axes = tuple(range(len(inputs)))
    return dataclasses.replace(leaf, bits=np.packbits(rows, -1), input_axes=axes)


def _forged(path: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{path} is no packed network: {why}.")


def _leaf(tensor: dict[str, Any], entry: dict[str, Any]) -> Any:
    """Makes a leaf of its entry in the metadata and of the tensor's own bytes."""
    dtype = jnp.dtype(entry["dtype"])
    if entry["levels"] is None:
        return _numbers(tensor, dtype)
    bits = _numbers(tensor, np.dtype(np.uint8))
    scale: Any = np.asarray(entry["scale"], np.float64).astype(dtype)
    return PackedWeight(
        bits=bits,
        scale=scale.reshape(bits.shape[:-3]),
        shape=tuple(entry["shape"]),
        levels=entry["levels"],
        stack_axes=tuple(entry["stack_axes"]),
        input_axes=tuple(entry["input_axes"]),
    )


def _numbers(tensor: dict[str, Any], dtype: np.dtype) -> Any:
    if tensor["dtype"] != _code(dtype):
        raise ValueError(f"its dtype is {dtype}, but the tensor's {tensor['dtype']}")
    numbers = np.frombuffer(tensor["data"], np.uint8)
    if dtype.kind == "b" and numbers.max(initial=0) > 1:
        raise ValueError("it has booleans that are neither 0 nor 1")
    return numbers.view(dtype).reshape(tensor["shape"])


@functools.cache
def _code(dtype: np.dtype) -> str:
    """What safetensors calls a dtype, read off a file that it makes."""
    data = _safetensors().numpy.save({"": np.empty(0, dtype)})
    return json.loads(data[8:])[""]["dtype"]


def _check_entry(name: str, entry: dict[str, Any], leaf: Any) -> None:
    """Refuses an entry that differs from that which `save_packed` would write."""
    if fault := _fault(leaf):
        raise ValueError(f"it has {fault}")
    names = None if entry["keys"] is None else [str(key) for key in entry["keys"]]
    if names is not None and show_path(tuple(map(DictKey, names))) != name:
        raise ValueError(f"its keys are {names}")
    # As text, since Python takes 6.0 for 6 and True for 1.
    expected, found = (
        {field: json.dumps(value) for field, value in fields.items()}
        for fields in (_describe(names, leaf), entry)
    )
    for field in {**expected, **found}:
        want, have = expected.get(field), found.get(field)
        if want != have:
            raise ValueError(f"its {field} is {have}, where {want} was expected")


class _Narrowed(ValueError):
    """Says that JAX would store numbers with fewer bits than they have."""


def _on_device(array: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise _Narrowed(
            f"numbers of dtype {array.dtype}, which JAX stores as such only after "
            'jax.config.update("jax_enable_x64", True).'
        )
    return jax.device_put(array)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of itself, and its tensors, of which no other copy is left."""
    _mode(path)
    library = _safetensors()
    # It is not mapped, since it must not change between the checksum and its use.
    data = path.read_bytes()
    about = _about(path, data)
    try:
        return about, dict(library.deserialize(data))
    except Exception as error:
        raise _forged(path, str(error)) from error


def _about(path: pathlib.Path, data: bytes) -> dict[str, Any]:
    """Reads what a file says of itself, once it is known to be whole."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header["__metadata__"][FORMAT])
        version, found = about["version"], about["checksum"]
        before, after = _around(data, found)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is no packed network, or is damaged: it does not begin with the "
            "header that save_packed writes."
        ) from None
    if version not in (1, VERSION) or type(version) is not int:
        raise ValueError(
            f"{path} is of version {version!r}, where this weightreg reads 1 and "
            f"{VERSION}."
        )
    digest = _digest(before, after)
    if found != digest:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {digest}, and it says {found}. A byte "
            "has changed, or some are missing."
        )
    if set(about) != {"version", "checksum", "dicts", "leaves"}:
        raise _forged(path, f"it says {', '.join(about)}")
    if not isinstance(about["dicts"], bool):
        raise _forged(path, f"dicts is {about['dicts']!r}, and no boolean")
    return about


def _around(data: bytes, checksum: Any) -> tuple[memoryview, memoryview]:
    """What stands before the checksum and after it, without a copy."""
    size, mark = int.from_bytes(data[:8], "little"), _mark(checksum)
    place = data.index(mark, 8, 8 + size)
    return memoryview(data)[:place], memoryview(data)[place + len(mark) :]


def _digest(before: memoryview, after: memoryview) -> str:
    digest = hashlib.sha256(before)
    digest.update(_mark(_UNSIGNED))
    digest.update(after)
    return digest.hexdigest()


def _mark(checksum: str) -> bytes:
    """Writes the checksum as it stands in the header: JSON in a string of JSON."""
    return json.dumps(json.dumps({"checksum": checksum}))[2:-2].encode()


def _is_of_dicts(packed: Any, leaves: list[tuple[KeyPath, Any]]) -> bool:
    """Whether the dicts of dicts that the paths describe are the tree."""
    named = [(tuple(_names(path) or ()), leaf) for path, leaf in leaves]
    paths = [names for names, _ in named]
    if not all(paths) or _above_another(paths):
        return False
    rebuilt = jax.tree.structure(_nested(dict(named)), is_leaf=is_packed)
    return rebuilt == jax.tree.structure(packed, is_leaf=_is_place)


def _dicts(
    path: pathlib.Path, described: dict[str, Any], leaves: dict[str, Any]
) -> dict[str, Any]:
    """The dicts that entries describe, in which every leaf has a place."""
    for name, entry in described.items():
        if not entry["keys"]:
            raise _forged(path, f"{name} is in no dict, and all is said to be")
    named = {tuple(entry["keys"]): leaves[name] for name, entry in described.items()}
    if above := _above_another(list(named)):
        place = show_path(tuple(map(DictKey, above)))
        raise _forged(path, f"it has a leaf at {place} and another one below")
    return _nested(named)


def _above_another(paths: list[tuple[str, ...]]) -> tuple[str, ...] | None:
    """A path with which another one begins: a dict cannot be where a leaf is."""
    pairs = itertools.pairwise(sorted(paths))  # where it comes right before the other
    return next((a for a, b in pairs if b[: len(a)] == a), None)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _is_box(node: Any) -> bool:
    """Whether a node is one of Flax's boxes, with one leaf, which may be packed."""
    if not hasattr(type(node), "add_axis"):  # Other wrappers have to stay as they are.
        return False
    leaves = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_packed)
    return [path for path, _ in leaves] == [_BOX]


def _is_place(node: Any) -> bool:
    """Whether a node is where a leaf of a file belongs, and has one path."""
    return is_packed(node) or _is_box(node)


def _put(leaf: Any, node: Any) -> Any:
    """Puts a leaf in the place of a node, into the box that it may be."""
    if not _is_box(node):
        return leaf
    content, box = jax.tree.flatten(node, is_leaf=is_packed)
    # Bits have other axes than the weight, which the names on its box would not fit.
    alone = is_packed(leaf) and not is_packed(content[0])
    return leaf if alone else box.unflatten([leaf])


def _as(like: Any, leaves: dict[str, Any], path: pathlib.Path) -> Any:
    """Puts the leaves of a file into the structure of ``like``, which they must fit."""
    expected = jax.tree_util.tree_leaves_with_path(like, is_leaf=is_packed)
    nodes, structure = jax.tree.flatten(like, is_leaf=_is_place)
    names = [_bare(show_path(keys)) for keys, _ in expected]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"like has two leaves whose path prints as {repeated.pop()}.")
    for one, other, what in (
        (names, leaves, "lacks"),
        (leaves, names, "has, and like has not,"),
    ):
        if missing := [name for name in one if name not in other]:
            raise ValueError(
                f"{path} is of another network than like: it {what} "
                f"{', '.join(missing)}."
            )
    for name, (_, node) in zip(names, expected, strict=True):
        want, have = _kind(node), _kind(leaves[name], is_packed(node))
        if want != have:
            raise ValueError(
                f"{path} is of another network than like: at {name} it has {have}, "
                f"where like has {want}."
            )
    found = [leaves[name] for name in names]
    return structure.unflatten(map(_put, found, nodes))


def _kind(leaf: Any, in_bits: bool = True) -> str:
    """Names dtype and shape of a leaf, unpacked, and how it is packed."""
    if not hasattr(leaf, "dtype"):
        return f"no array ({type(leaf).__name__})"
    array = jax.eval_shape(unpack, leaf) if is_packed(leaf) else leaf
    kind = f"{array.dtype}{list(array.shape)}"
    if not (is_packed(leaf) and in_bits):
        return kind
    stack = f", stacked along {leaf.stack_axes}" * bool(leaf.stack_axes)
    return f"{leaf.levels} {kind}{stack}"
