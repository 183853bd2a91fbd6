"""Matching the trees a user passes (masks, volumes, axes) to a tree of parameters.

Everything here works on key paths, never on containers, so that a plain dict can
describe an ``nnx.State``, and a tree given for all parameters still fits after
``optax.masked`` has cut holes (``optax.MaskedNode``) into them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

KeyPath = tuple[Any, ...]


def show_path(path: KeyPath) -> str:
    """A leaf's path as a user would write it, e.g. ``['Dense_0']['kernel']``."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def is_hole(node: Any) -> bool:
    """Whether a node stands for parameters that are not there."""
    return node is None or isinstance(node, optax.MaskedNode)


def is_function(x: Any) -> bool:
    """Whether an argument is a function, not a tree whose class can be called.

    Equinox modules can be called, and a mask or a tree of volumes made of one too.
    """
    leaves = jax.tree.leaves(x)
    all_callable = bool(leaves) and all(map(callable, leaves))
    return callable(x) and (isinstance(x, jax.tree_util.Partial) or all_callable)


def match(
    name: str,
    tree: Any,
    params: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """Finds the entry of ``tree`` for every leaf of ``params``.

    Args:
      name: What the tree is called in errors: the argument the user passed.
      tree: A tree with the structure of ``params``, or a prefix of it. ``None``
        entries are values like any other.
      params: The parameters.
      is_leaf: Further nodes of ``tree`` to be taken as entries.

    Returns:
      One entry a leaf, in the order in which JAX flattens ``params``.

    Raises:
      ValueError: A leaf has no entry, or an entry has no leaf.
    """

    def stop(node: Any) -> bool:
        return is_hole(node) or (is_leaf is not None and is_leaf(node))

    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:  # Optax's placeholder trees, and models without parameters
        return []
    entries = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop))
    unused = set(entries)
    found = []
    for path, _ in leaves:
        prefixes = (path[:n] for n in range(len(path), -1, -1))
        prefix = next((p for p in prefixes if p in entries), None)
        if prefix is None:
            raise ValueError(
                f"{name} must be one value, or a tree that matches the parameters or "
                f"a prefix of them, but has no entry for {show_path(path)}. It has: "
                f"{', '.join(map(show_path, entries)) or 'nothing'}."
            )
        unused.discard(prefix)
        found.append(entries[prefix])
    holes = [
        path
        for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hole)
        if is_hole(node)
    ]
    for path in unused:
        in_hole = any(h[: len(path)] == path[: len(h)] for h in holes)
        if not in_hole and not is_hole(entries[path]):
            raise ValueError(
                f"{name} has an entry at {show_path(path)}, where the parameters have "
                f"none. They have: {', '.join(show_path(p) for p, _ in leaves)}."
            )
    return found


def leaves_like(name: str, tree: Any, params: Any, wanted: list[int]) -> list[Any]:
    """What ``tree`` has for every leaf of ``params``.

    Args:
      name: What the tree is called in errors.
      tree: A tree with the structure of ``params``.
      params: The parameters.
      wanted: Positions of the leaves that must have the shape of the parameters'.

    Raises:
      ValueError: Structures or shapes differ.
    """
    paths = jax.tree_util.tree_leaves_with_path(params)
    try:
        flat = jax.tree.structure(params).flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure of params: {error}"
        ) from error
    for path, p, u in ((*paths[i], flat[i]) for i in wanted):
        if jnp.shape(p) != jnp.shape(u):
            raise ValueError(
                f"{name} has shape {jnp.shape(u)} at {show_path(path)}, where params "
                f"has {jnp.shape(p)}."
            )
    return flat
