"""Packed networks as files, of which no damage goes unnoticed."""

import hashlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from weightreg._core._arguments import KeyPath, show_path
from weightreg._core._packed_weight import PackedWeight
from weightreg._core._weights import is_packed
from weightreg._quantization._pack import unpack
from weightreg._quantization._quantize import PLANES, check_levels

FORMAT = "weightreg.packed"
VERSION = 1
_UNSIGNED = "0" * 64  # stands for the checksum in what the checksum is taken of


def save_packed(packed: Any, path: str | os.PathLike[str]) -> None:
    """Writes a packed network to a file.

    The file is one of `safetensors <https://huggingface.co/docs/safetensors>`_: the
    bits of packed weights, and all other leaves, each under its key path. Its metadata
    tell format and version, each leaf's shape, dtype, levels, scale and stacked axes,
    and a SHA-256 of the whole file. It is written beside its place and moved there in
    one piece, so that an interrupt leaves what was there.

    It needs the package safetensors: ``pip install 'weightreg[files]'``.

    Args:
      packed: What `pack` returns: a tree of arrays and `PackedWeight`.
      path: The path of the file, which is replaced if it exists.

    Raises:
      ValueError: The tree has no leaves, or two whose paths print alike; or a scale is
        not finite, hence the weights it was made of were not.
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
        name = show_path(keys)
        if name in described:
            raise ValueError(f"packed has two leaves whose path prints as {name}.")
        described[name] = _describe(name, keys, leaf)
        tensors[name] = _array(name, leaf.bits if is_packed(leaf) else leaf)
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
    unsigned = _mark(_UNSIGNED)
    place = data.index(unsigned)
    signed = _mark(hashlib.sha256(data).hexdigest())
    _replace(path.resolve(), data[:place] + signed + data[place + len(unsigned) :])


def load_packed(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads what `save_packed` has written, or refuses it.

    Every byte of the file is under its checksum: one that has changed is an error, and
    never another network. (It is no signature: whoever means to can make another file.)

    Args:
      path: The path of the file.
      like: A tree that says what to expect: the network's parameters, packed or not,
        or their shapes, as ``jax.eval_shape`` gives them. The result has its structure,
        with a `PackedWeight` where the file has one; paths, shapes and dtypes must
        agree, and levels where ``like`` is packed. Without it, the result is made of
        dicts, which is what Flax's linen wants.

    Returns:
      The packed tree, on JAX's default device.

    Raises:
      ValueError: The file is damaged, cut off, of another version or no packed network;
        ``like`` differs from it; or it was a tree of something else than dicts, and
        ``like`` is not given; or it holds 64-bit numbers and JAX is not to.
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
    path, library = _path(path), _safetensors()
    data = path.read_bytes()
    about = _about(path, data)
    try:
        leaves = _leaves(about["leaves"], dict(library.deserialize(data)))
        nested = about["dicts"] and _nested(
            {tuple(d["keys"]): leaves[name] for name, d in about["leaves"].items()}
        )
    except _Narrowed as error:
        raise ValueError(f"{path} has {error}") from None
    except Exception as error:  # the checksum is right, but no save_packed wrote it
        raise ValueError(f"{path} is no packed network: {error!r}.") from error
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


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file beside its place and moves it there in one piece."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _array(name: str, leaf: Any) -> np.ndarray:
    array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not array or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"packed must hold arrays of numbers, but has {type(leaf).__name__} at "
            f"{name}."
        )
    return np.asarray(leaf, order="C")  # safetensors takes no notice of strides


def _describe(name: str, keys: KeyPath, leaf: Any) -> dict[str, Any]:
    """Makes a leaf's entry in the metadata."""
    named = all(isinstance(key, DictKey) and isinstance(key.key, str) for key in keys)
    entry: dict[str, Any] = {"keys": [str(k.key) for k in keys] if named else None}
    if not is_packed(leaf):
        array = _array(name, leaf)
        return entry | {"dtype": array.dtype.name, "shape": array.shape, "levels": None}
    scale = _array(name, leaf.scale).astype(np.float64)
    if not np.all(np.isfinite(scale)):
        raise ValueError(
            f"packed has a scale that is not finite at {name}: its weights were not."
        )
    return entry | {
        "dtype": jnp.dtype(leaf.dtype).name,
        "shape": leaf.shape,
        "levels": leaf.levels,
        "scale": scale.tolist(),
        "stack_axes": leaf.stack_axes,
    }


def _leaves(described: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The leaves that entries describe, which have to be what `_describe` makes."""
    if set(described) != set(tensors):
        raise ValueError(f"it has {', '.join(tensors)}, described {list(described)}")
    leaves = {}
    for name, entry in described.items():
        leaves[name] = leaf = _leaf(tensors[name], entry)
        keys = (None,) if entry["keys"] is None else tuple(map(DictKey, entry["keys"]))
        again = json.loads(json.dumps(_describe(name, keys, leaf)))
        if again != entry:
            raise ValueError(f"{name} is described as {entry}")
    return leaves


def _leaf(tensor: dict[str, Any], entry: dict[str, Any]) -> Any:
    """Makes a leaf of its entry in the metadata and of the tensor's own bytes."""
    levels, shape = entry["levels"], tuple(entry["shape"])
    dtype, stored = jnp.dtype(entry["dtype"]), tuple(tensor["shape"])
    if levels is None:
        if stored != shape:
            raise ValueError(f"a tensor of shape {stored}, where {shape} was expected")
        return _on_device(np.frombuffer(tensor["data"], dtype).reshape(shape))
    check_levels(levels)
    scale = np.asarray(entry["scale"], np.float64).astype(dtype)
    if stored != (*scale.shape, PLANES[levels], -(-math.prod(shape) // 8)):
        raise ValueError(f"bits of shape {stored} for {levels} weights {shape}")
    return PackedWeight(
        bits=_on_device(np.frombuffer(tensor["data"], np.uint8).reshape(stored)),
        scale=_on_device(scale),
        shape=shape,
        levels=levels,
        stack_axes=tuple(entry["stack_axes"]),
    )


class _Narrowed(ValueError):
    """Says that JAX would store numbers with fewer bits than they have."""


def _on_device(array: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise _Narrowed(
            f"numbers of dtype {array.dtype}, which JAX stores as such only after "
            'jax.config.update("jax_enable_x64", True).'
        )
    return jnp.asarray(array)


def _about(path: pathlib.Path, data: bytes) -> dict[str, Any]:
    """Reads what a file says of itself, once it is known to be whole."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header["__metadata__"][FORMAT])
        version, found = about["version"], about["checksum"]
        place = data.index(_mark(found), 8, 8 + size)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is no packed network, or is damaged: it does not begin with the "
            "header that save_packed writes."
        ) from None
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"{path} is of version {version!r}, where this weightreg reads {VERSION}."
        )
    end = place + len(_mark(found))
    digest = hashlib.sha256(data[:place] + _mark(_UNSIGNED) + data[end:]).hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {digest}, and it says {found}. A byte "
            "has changed, or some are missing."
        )
    return about


def _mark(checksum: str) -> bytes:
    """Writes the checksum as it stands in the header: JSON in a string of JSON."""
    return json.dumps(json.dumps({"checksum": checksum}))[2:-2].encode()


def _is_of_dicts(packed: Any, leaves: list[tuple[KeyPath, Any]]) -> bool:
    """Whether the dicts of dicts that the paths describe are the tree."""
    keys: list[Any] = [tuple(getattr(k, "key", 0) for k in path) for path, _ in leaves]
    if not all(path and all(isinstance(k, str) for k in path) for path in keys):
        return False
    rebuilt = _nested(dict(zip(keys, (leaf for _, leaf in leaves), strict=True)))
    return jax.tree.structure(rebuilt) == jax.tree.structure(packed)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _as(like: Any, leaves: dict[str, Any], path: pathlib.Path) -> Any:
    """Puts the leaves of a file into the structure of ``like``, which they must fit."""
    expected = jax.tree_util.tree_leaves_with_path(like, is_leaf=is_packed)
    structure = jax.tree.structure(like, is_leaf=is_packed)
    names = [show_path(keys) for keys, _ in expected]
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
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


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
