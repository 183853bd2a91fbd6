"""A chain of layers: which weights, in what order, with which biases.

No tree says in which order a network calls its layers. Where that matters users name
the layers, or trace the network, and only this file reads the names.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import SequenceKey

from weightreg._core._arguments import (
    KeyPath,
    compute_dtype,
    leaf_path,
    own_path,
    show_path,
)
from weightreg._core._network import Network
from weightreg._core._norms import Axes, Norm, Scaled, concatenate, norm_of
from weightreg._core._weights import Beside, Dims, Mask, WeightLayer, layers_for

LayerOrder: TypeAlias = Sequence[WeightLayer | str] | Network | None
"""Layers in the order in which a network calls them, which `chain_of` reads."""

_Paths: TypeAlias = list[tuple[KeyPath, Any]]
_Layers: TypeAlias = tuple[WeightLayer, ...]


class Chain(NamedTuple):
    """Layers in the order in which a network calls them.

    Attributes:
      layers: The layers, of which one with stack axes counts as several in order.
        Stack axes are the leading ones.
      biases: The position of every layer's bias in ``jax.tree.leaves(params)``, or
        ``None`` for a layer without one.
      dtype: A dtype of at least 32 bits that holds weights and biases exactly.
      net: The traced network that they were taken from, if they were.
    """

    layers: _Layers
    biases: tuple[int | None, ...]
    dtype: jnp.dtype
    net: Network | None


def chain_of(
    params: Any, layers: LayerOrder, mask: Mask, dims: Dims, *, ordered: bool = False
) -> Chain:
    """Finds the layers that a user names, and the bias beside each.

    A name is the path of a weight (``"['Dense_0']['kernel']"`` or ``"Dense_0/kernel"``)
    or that of its module (``"Dense_0"``). ``None`` stands for all weights in the order
    of `weight_layers`. A `WeightLayer` brings its own axes where neither ``mask`` nor
    ``dims`` is given, and else has to agree with them. The order of the layers matters
    where there are biases, and, if ``ordered`` is true, always. A `Network` for
    ``layers`` or ``dims`` knows order and biases.

    Raises:
      ValueError: The layers are not weights of ``params``, each named once, or they,
        their stack axes or their biases do not make a chain.
      TypeError: ``layers`` is no sequence of layers and strings.
    """
    if isinstance(layers, Network):
        if dims is not None and dims is not layers:
            raise ValueError(
                "layers is a traced network, which says what the axes of the weights "
                f"mean: leave dims= out, which is {dims!r}."
            )
        layers, dims = None, layers
    net = dims if isinstance(dims, Network) else None
    paths = jax.tree_util.tree_leaves_with_path(params)
    weights = layers_for("a chain of layers", params, mask, dims)
    strict = mask is not None or dims is not None
    chosen = weights if layers is None else _choose(layers, weights, paths, strict)
    for layer in chosen:
        _check_stack(layer)
    if net is None:
        biases = _biases(chosen, weights, paths)
    else:
        biases = _traced_biases(chosen, paths)
    used = [layer.index for layer in chosen] + [i for i in biases if i is not None]
    if layers is None and net is None:
        if not ordered and any(i is not None for i in biases):
            _check_numbered(chosen, paths)
        if ordered or any(i is not None for i in biases):
            _check_order(chosen)
        _check_complete(paths, used)
    dtype = compute_dtype(*(jnp.result_type(paths[i][1]) for i in used))
    return Chain(chosen, biases, dtype, net)


def _traced_biases(layers: _Layers, paths: _Paths) -> tuple[int | None, ...]:
    """The position of the leaf that was seen to be added to each layer's units."""
    at = {leaf_path(path): index for index, (path, _) in enumerate(paths)}
    for layer in layers:
        if layer.bias is not None and layer.bias not in at:
            raise ValueError(
                f"params lack {layer.bias}, the bias of {layer.path}: expected the "
                "parameters of the whole traced network."
            )
    return tuple(None if x.bias is None else at[x.bias] for x in layers)


def stack_of(layer: WeightLayer) -> tuple[int, ...]:
    """The shape of the stack of layers that a leaf is, ``()`` for a single layer."""
    return tuple(layer.shape[a] for a in layer.stack_axes)


def chain_norms(params: Any, layers: Sequence[WeightLayer], norm: Norm) -> Scaled:
    """The norms of one or more layers as one vector, with stacked ones in a row."""
    w = jax.tree.leaves(params)
    return _join([norm_of(jnp.asarray(w[x.index]), norm, Axes.of(x)) for x in layers])


@jax.jit
def _join(norms: list[Scaled]) -> Scaled:
    """One vector of all the norms of some leaves."""
    # Without the barrier XLA computes all norms anew wherever their product is needed.
    return lax.optimization_barrier(concatenate(norms))


def _choose(layers: Any, weights: _Layers, paths: _Paths, strict: bool) -> _Layers:
    """The layers that a user names, in the user's order."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(
            "layers must be a sequence of WeightLayer objects and strings, or None, "
            f"not {layers!r}."
        )
    by_name = _by_name(weights, paths)
    chosen: dict[int, WeightLayer] = {}
    for position, entry in enumerate(layers):
        where = f"layers[{position}]"
        if isinstance(entry, str):
            layer = _named(where, entry, by_name, weights)
        elif isinstance(entry, WeightLayer):
            layer = entry
            _check_belongs(where, layer, weights, paths, strict)
        else:
            raise TypeError(
                f"{where} must be a WeightLayer or a string, not {entry!r}."
            )
        if layer.index in chosen:
            raise ValueError(f"{where} repeats {layer.path}: name every layer once.")
        chosen[layer.index] = layer
    return tuple(chosen.values())


def _by_name(weights: _Layers, paths: _Paths) -> dict[str, list[WeightLayer]]:
    """The weights that each name stands for."""
    found: dict[str, list[WeightLayer]] = {}
    for layer in weights:
        path = own_path(paths[layer.index][0])
        shown = show_path(paths[layer.index][0])
        names = {layer.path, shown, _slashed(path), _slashed(path[:-1])}
        for name in names - {""}:
            found.setdefault(name, []).append(layer)
    return found


def _named(
    where: str, name: str, by_name: dict[str, list[WeightLayer]], weights: _Layers
) -> WeightLayer:
    """The one weight that a name stands for."""
    found = by_name.get(name, [])
    if len(found) == 1:
        return found[0]
    which = ", ".join(layer.path for layer in found)
    known = ", ".join(layer.path for layer in weights)
    raise ValueError(
        f"{where} is {name!r}, which must be the path of one weight or of its module, "
        + (f"but stands for {which}." if found else f"but is none of: {known}.")
    )


def _check_belongs(
    where: str, layer: WeightLayer, weights: _Layers, paths: _Paths, strict: bool
) -> None:
    """Refuses a layer of other parameters, or with other axes than ``dims`` gives."""
    if layer in weights:
        return
    there = [
        (leaf_path(path), jnp.shape(leaf))
        for path, leaf in paths[layer.index :][:1]
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if strict or there != [(layer.path, layer.shape)]:
        raise ValueError(
            f"{where} is not a weight of these parameters"
            f"{' with this mask and dims' if strict else ''}: {layer}."
        )


def _check_numbered(layers: _Layers, paths: _Paths) -> None:
    """Refuses names without numbers, whose order need not be that of the calls."""
    for layer, following in itertools.pairwise(layers):
        both = own_path(paths[layer.index][0]), own_path(paths[following.index][0])
        one, other = next((a, b) for a, b in zip(*both, strict=False) if a != b)
        if _without_numbers(one) != _without_numbers(other) and not isinstance(
            one, SequenceKey
        ):
            raise ValueError(
                f"layers must say in which order the network calls {layer.path} and "
                f"{following.path}, which have no numbers: name them in order, as "
                "layers=['first', 'second'], or trace the network, "
                "layers=weightreg.trace_network(fn, params, x)."
            )


def _without_numbers(key: Any) -> str:
    """A key whose numbers, and letters that stand alone, are all the same."""
    return re.sub(r"\d+|(?<![^\W_])[A-Za-z](?![^\W_])", "0", str(key))


def _check_order(layers: _Layers) -> None:
    """Refuses an order in which the units of a layer are not the inputs of the next."""
    for layer, following in itertools.pairwise(layers):
        units = math.prod(layer.shape[a] for a in layer.output_axes)
        inputs = following.fan_in // following.window
        # There are more inputs than units for a flattened image, and fewer for groups
        # of a convolution.
        if units and inputs and inputs % units and units % inputs:
            raise ValueError(
                "layers must say in which order the network calls its layers: by "
                f"their names {following.path}, of shape {following.shape}, would "
                f"follow {layer.path}, of shape {layer.shape}, which does not fit."
            )


def _check_stack(layer: WeightLayer) -> None:
    """Refuses stack axes that are not the leading ones."""
    if layer.stack_axes != tuple(range(len(layer.stack_axes))):
        raise ValueError(
            f"{layer.path} of shape {layer.shape} stacks layers along its axes "
            f"{layer.stack_axes}: expected its leading ones. (dims names all other "
            "axes.)"
        )


def _biases(layers: _Layers, weights: _Layers, paths: _Paths) -> tuple[int | None, ...]:
    """Checks every layer's bias, and gives its position among the leaves."""
    beside = Beside([path for path, _ in paths])
    parent = lambda index: own_path(paths[index][0])[:-1]  # noqa: E731
    floating = {i for i, (_, leaf) in enumerate(paths) if _is_inexact(leaf)}
    known = {layer.index for layer in (*layers, *weights)}
    free = floating - known
    chosen = {layer.index for layer in layers}
    owners: dict[int, list[int]] = {}
    for weight in known:
        for index in beside.biases(weight):
            owners.setdefault(index, []).append(weight)
    found: list[int | None] = []
    for layer in layers:
        biases = [i for i in beside.biases(layer.index) if i in free]
        if len(biases) > 1 or any(len(owners[index]) > 1 for index in biases):
            raise ValueError(
                f"{leaf_path(paths[biases[0]][0])} might be the bias of several "
                f"weights beside it, or {layer.path} has several biases: expected one "
                "weight for a bias."
            )
        for index in biases:
            _check_bias(layer, leaf_path(paths[index][0]), jnp.shape(paths[index][1]))
        found.append(biases[0] if biases else None)
        others = set(beside.others(layer.index)) & known
        for index in beside.all(layer.index):
            # Weights of the same name beside it are layers that were not named.
            other = index in known and parent(index) == parent(layer.index)
            understood = index in chosen or index in owners or other
            if index in others or (index in floating and not understood):
                raise ValueError(
                    f"{leaf_path(paths[index][0])} is beside {layer.path} and not "
                    "its bias, called bias or b: what it does to the network's "
                    "function is not known. Trace the network: "
                    "layers=weightreg.trace_network(fn, params, x)."
                )
    return tuple(found)


def _check_bias(layer: WeightLayer, path: str, shape: tuple[int, ...]) -> None:
    """Refuses a bias of other units, a sign of stacked layers that are not declared."""
    stack = stack_of(layer)
    units = tuple(layer.shape[a] for a in layer.output_axes)
    # Equinox keeps a convolution's bias as (units, 1, 1).
    same_size = math.prod(shape) == math.prod(stack + units)
    if not same_size or shape[: len(stack)] != stack:
        raise ValueError(
            f"{path} has shape {shape}, but {layer.path} of shape {layer.shape} has "
            f"units {units} and a stack of layers {stack}: expected {stack + units}. "
            "Say with dims= what the weight's axes mean; stacked layers (nn.scan) and "
            "weights (out, in) need it."
        )


def _check_complete(paths: _Paths, used: list[int]) -> None:
    """Refuses floating leaves that are neither weights nor biases of the chain."""
    for index, (path, leaf) in enumerate(paths):
        if _is_inexact(leaf) and index not in used:
            raise ValueError(
                f"{leaf_path(path)} is neither a weight nor a leaf called bias (or b) "
                "beside one, so that these parameters may not be a chain of layers. "
                "If those that matter are one, name them in layers=."
            )


def _slashed(path: KeyPath) -> str:
    """A path with slashes between its keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating-point or complex number or array."""
    is_number = isinstance(leaf, float | complex) or hasattr(leaf, "dtype")
    return is_number and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
