"""What users say of the axes of weights: a traced network, or Muon's numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from weightreg._core._arguments import (
    KeyPath,
    is_function,
    leaf_path,
    match,
)
from weightreg._core._names import Reading
from weightreg._core._network import Network, WeightLayer

Dims: TypeAlias = Any | Callable[[Any], Any] | None


def role(net: Network, path: KeyPath) -> str:
    """The role of a leaf in a traced network."""
    return net.roles.get(leaf_path(path), "no array")


def traced_layers(net: Network, params: Any) -> list[WeightLayer | None]:
    """The layer of a traced network that each leaf of some parameters is.

    Raises:
      ValueError: There is an array that was not traced, or not in this shape.
    """
    known = {layer.path: layer for layer in net.layers}
    found = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = leaf_path(path)
        if hasattr(leaf, "dtype"):
            _check_traced(net, name, jnp.shape(leaf))
        layer = known.get(name)
        found.append(layer and dataclasses.replace(layer, index=index))
    return found


def _check_traced(net: Network, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a leaf that is none of a traced network's."""
    if name not in net.shapes:
        raise ValueError(
            f"dims is a traced network without a parameter {name}: expected one traced "
            f"with these parameters. It has: {', '.join(net.shapes) or 'none'}."
        )
    if shape != net.shapes[name]:
        raise ValueError(
            f"dims is a traced network whose {name} has shape {net.shapes[name]}, but "
            f"here it has shape {shape}: trace it with these parameters."
        )


def numbers_of(params: Any, dims: Dims) -> list[MuonDimensionNumbers | None]:
    """One ``MuonDimensionNumbers`` for each leaf, or ``None`` where none was given.

    Raises:
      ValueError: ``dims`` does not match the parameters.
      TypeError: ``dims`` holds something else.
    """
    is_dims = lambda node: isinstance(node, MuonDimensionNumbers)  # noqa: E731
    tree: Any = dims(params) if callable(dims) and is_function(dims) else dims
    found = match("dims", tree, params, is_leaf=is_dims)
    for entry in found:
        if entry is not None and not is_dims(entry):
            raise TypeError(
                "dims must hold optax.contrib.MuonDimensionNumbers, and None for "
                f"leaves that are no weights, not {entry!r}."
            )
    return found


def reading_of(
    path: KeyPath, shape: tuple[int, ...], dims: MuonDimensionNumbers
) -> Reading:
    """The axes that Muon's numbers name.

    Raises:
      ValueError: They name an axis twice, or one that the leaf does not have.
    """
    inputs, outputs = _axes(path, len(shape), dims)
    # Two reduction axes are rather attention's (heads, head_dim) than the (window, in)
    # of a one-dimensional convolution, but may be one, for which reach is safe.
    convolves = len(outputs) == 1 and len(inputs) >= 3
    reach = max(math.prod(shape[a] for a in inputs[:-1]), 1)
    return Reading(inputs, outputs, convolves, reach)


def _axes(
    path: KeyPath, ndim: int, dims: MuonDimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output axes, counted from the front and checked."""
    both = [(int(a),) if isinstance(a, int | np.integer) else tuple(a) for a in dims]
    named = [a for axes in both for a in axes]
    normal = [a % ndim for a in named if -ndim <= a < ndim]
    if not all(both) or len(set(normal)) < len(named):
        raise ValueError(
            f"dims gives {dims} for {leaf_path(path)}, which has {ndim} axes: expected "
            "one or more axes of it on each side, none of them twice."
        )
    return tuple(normal[: len(both[0])]), tuple(normal[len(both[0]) :])
