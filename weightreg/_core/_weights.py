"""Which leaves of a parameter tree are weights, and what their axes mean.

Every method of this library asks here, and none looks at a leaf's name or rank by
itself.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey
from optax.contrib import MuonDimensionNumbers

from weightreg._core._arguments import (
    KeyPath,
    is_function,
    is_hole,
    leaf_path,
    match,
    own_path,
    refuse_step_count,
    show_path,
)
from weightreg._core._dims import Dims, numbers_of, reading_of, role, traced_layers
from weightreg._core._names import (
    BIASES,
    MODULES,
    READINGS,
    REVERSED,
    SHIFT_LIKE,
    SHIFTS,
    TRANSPOSED_MODULES,
    UNITS_FIRST,
    UNKNOWN,
    UNKNOWN_MODULES,
    WEIGHT_LIKE,
    WEIGHTS,
    Kind,
    Order,
    Reading,
)
from weightreg._core._network import Network, WeightLayer
from weightreg._core._packed_weight import PackedWeight

Mask: TypeAlias = Any | Callable[[Any], Any] | None
Need: TypeAlias = Callable[[WeightLayer], Hashable]
"""What a method uses of a layer: readings that agree in it need not be told apart."""

# The dtypes that methods calculate in. Floats of 8 bits are weights as well, which may
# be listed, but JAX promotes them to nothing, and no method's result would fit them.
SUPPORTED = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)

# Modules of Equinox without any weight, though their scale, which may be missing, is
# called one.
_NORMALIZATIONS = frozenset({"BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"})


def weight_mask(params: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    """Says which leaves are weights.

    A leaf is a weight if it is a floating-point array of two or more axes, unless its
    name is one that Flax, Haiku, Equinox or Keras give to what shifts or scales units,
    such as ``bias``, ``scale`` and ``offset``. (Rank alone would count the biases of
    attention heads and of scanned layers.) A ``weight`` of the shape of the ``bias``
    beside it is a scale. Integer and complex leaves, and leaves that are no arrays, are
    not weights. The page "What is a weight?" has the whole table.

    Args:
      params: Any tree of parameters: a linen dict, an ``nnx.State``, an Equinox module.
        ``None`` and ``optax.MaskedNode`` are holes in it.
      mask: Takes the place of this rule. It is a tree of booleans, or a prefix of one,
        or a function of the parameters that makes one.
      dims: Takes the place of this rule: the `Network` that `trace_network` has read,
        or, as in Optax's Muon, a tree in which a leaf with
        ``optax.contrib.MuonDimensionNumbers`` is a weight and a leaf with ``None`` is
        not, or a function of the parameters that makes one.

    Returns:
      A tree of booleans with the structure of ``params``, fit for the ``mask`` of
      any Optax transformation.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters, weights are
        packed, or a leaf may be a weight or not: a leaf of three axes and an unknown
        name whose first axis has size 1, or stacked scales that are called ``weight``.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array; or ``params`` is an integer, which is what
        ``optax.inject_hyperparams`` passes to functions that it takes for schedules.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.weight_mask({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      {'bias': False, 'kernel': True}
    """
    refuse_step_count("mask", params)
    return jax.tree.unflatten(
        jax.tree.structure(params), mask_leaves(params, mask, dims)
    )


def left_out(params: Any, *, mask: Mask = None, dims: Dims = None) -> dict[str, str]:
    """Says which leaves are no weights, and why: no method here touches them.

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`.

    Returns:
      The reason for each leaf that is left out, by its path, in the tree's order.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters, or weights are
        packed.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.left_out({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      {"['bias']": "called 'bias'"}
      >>> wr.left_out({"kernel": jnp.ones((3, 4))}, mask=False)
      {"['kernel']": 'mask is false'}
    """
    return _reasons(params, mask, dims, weights=False)


def taken(params: Any, *, mask: Mask = None, dims: Dims = None) -> dict[str, str]:
    """Says which leaves are weights, and why: the mirror of `left_out`.

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`.

    Returns:
      For each weight, by its path, in the tree's order, what its axes are taken for, or
      may be where the tree does not tell, and how that is known.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters, weights are
        packed, or a leaf may be a weight or not.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.taken({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      {"['kernel']": "inputs 0, units 1, by its name and the shape of ['bias']"}
      >>> wr.taken({"kernel": jnp.ones((3, 4, 5))})["['kernel']"][:42]
      'one of several: inputs 0, 1, units 2, of w'
    """
    return _reasons(params, mask, dims, weights=True)


def weight_layers(
    params: Any, *, mask: Mask = None, dims: Dims = None
) -> tuple[WeightLayer, ...]:
    """Lists the weights of a network, with their fans and the roles of their axes.

    Without ``dims``, names, numbers of axes and the biases beside weights tell what
    axes mean, as far as they do. An anonymous matrix is ``(inputs, units)``. A bias
    ``(heads, head_dim)`` makes a kernel ``(embed, heads, head_dim)`` attention, one
    ``(layers, units)`` makes ``(layers, inputs, units)`` a stack. Where several
    readings are left this function raises an error, and so do methods to which it
    matters. Then ``dims`` is needed:

        >>> from optax.contrib import MuonDimensionNumbers as Dims
        >>> query = Dims(reduction_axis=0, output_axis=(1, 2))
        >>> scanned = Dims(reduction_axis=1, output_axis=2)  # axis 0: layers
        >>> equinox = Dims(reduction_axis=1, output_axis=0)

    Axes that ``dims`` does not name stack several layers. Where ``dims`` gives three
    or more reduction axes and one output axis, the leaf is taken for a convolution,
    and all but the last reduction axis for its window.

    The order is that of the tree, except that keys of mappings are sorted as people
    number layers: ``Dense_2`` before ``Dense_10``. No tree says in which order a
    network calls its layers. Where that matters, methods take it as an argument.

    A traced network (`trace_network`) knows all this, for any architecture:

        >>> import weightreg as wr
        >>> params = {"out": jnp.ones((3, 2)), "in": jnp.ones((4, 3))}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
        >>> net = wr.trace_network(fn, params, jnp.ones((1, 4)))
        >>> [layer.path for layer in wr.weight_layers(params, dims=net)]
        ["['in']", "['out']"]

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: the `Network` that `trace_network` has
        read, or a tree of ``optax.contrib.MuonDimensionNumbers``, with ``None`` for
        leaves that are no weights, or a function of the parameters that makes one.

    Returns:
      One `WeightLayer` for every weight, with a `Network` in the order of their first
      calls.

    Raises:
      ValueError: The tree leaves open what the axes of a weight mean; ``mask`` or
        ``dims`` does not match the parameters; a leaf that ``mask`` calls a weight has
        fewer than two axes, hence no fans; ``dims`` names
        an axis twice or one that the leaf does not have; or weights are packed.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> layer, = wr.weight_layers({"kernel": jnp.ones((3, 3, 8, 16))})
      >>> layer.fan_in, layer.fan_out, layer.window
      (72, 144, 9)
    """
    return layers_of("weight_layers", params, mask, dims, _everything)


def layers_for(
    caller: str, params: Any, mask: Mask, dims: Dims, need: Need | None = None
) -> tuple[WeightLayer, ...]:
    """The layers that a method works on, of which `weight_layers` tells more.

    Raises:
      ValueError: The tree leaves open what a leaf's axes are, and ``need``, which is
        what the method makes of a layer, depends on it.
      TypeError: A weight is of a dtype that no method can handle.
    """
    layers = layers_of(caller, params, mask, dims, need or _everything)
    check_dtypes(caller, params, (layer.index for layer in layers))
    return layers


def _everything(layer: WeightLayer) -> Hashable:
    """The need of a method that goes by all that is known of a layer."""
    return layer


def layers_of(
    caller: str, params: Any, mask: Mask, dims: Dims, need: Need
) -> tuple[WeightLayer, ...]:
    """The layers of the parameters, of which all readings agree in ``need``."""
    layers = [
        _agreed(caller, options, need)
        for options in _options(params, mask, dims)
        if options is not None
    ]
    if isinstance(dims, Network):
        order = {layer.path: k for k, layer in enumerate(dims.layers)}
        return tuple(sorted(layers, key=lambda layer: order[layer.path]))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    key = _natural_order(paths)
    return tuple(sorted(layers, key=lambda layer: key(paths[layer.index])))


class _Options(NamedTuple):
    """The layers that a leaf may be, of which one is it.

    Attributes:
      path: Path of the leaf.
      shape: Shape of the leaf.
      layers: One or more layers; none where no reading of its axes fits.
      source: How they are known.
    """

    path: str
    shape: tuple[int, ...]
    layers: tuple[WeightLayer, ...]
    source: str


def _options(params: Any, mask: Mask, dims: Dims) -> list[_Options | None]:
    """The layers that each leaf may be, and ``None`` for those that are no weights."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flags = mask_leaves(params, mask, dims)
    if isinstance(dims, Network):
        return _traced_options(params, flags, dims)
    numbers = [None] * len(leaves) if dims is None else numbers_of(params, dims)
    tree = _Tree(leaves, (i for i, flag in enumerate(flags) if flag))
    found: list[_Options | None] = []
    for index, ((path, leaf), flag, entry) in enumerate(
        zip(leaves, flags, numbers, strict=True)
    ):
        if not flag:
            found.append(None)
            continue
        shape = jnp.shape(leaf)
        if entry is None:
            readings, source = tree.readings(index)
        else:
            readings, source = (reading_of(path, shape, entry),), "dims"
        layers = tuple(_layer(path, index, shape, reading) for reading in readings)
        found.append(_Options(leaf_path(path), shape, layers, source))
    return found


def _traced_options(
    params: Any, flags: list[bool], net: Network
) -> list[_Options | None]:
    """The layers of a traced network, one for each leaf that is a weight."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found: list[_Options | None] = []
    layers = traced_layers(net, params)
    for (path, leaf), flag, layer in zip(leaves, flags, layers, strict=True):
        if flag and layer is None:
            raise ValueError(
                f"mask calls {leaf_path(path)} a weight, but dims is a traced network "
                f"in which it is {role(net, path)!r}, and its axes have no meaning: "
                "leave it out with mask=, or say what they mean with a tree of "
                "optax.contrib.MuonDimensionNumbers for dims=."
            )
        options = layer and _Options(layer.path, jnp.shape(leaf), (layer,), "the trace")
        found.append(options if flag else None)
    return found


def _agreed(caller: str, options: _Options, need: Need) -> WeightLayer:
    """The layer that a leaf is, as far as a method needs to know it."""
    path, shape, layers, source = options
    if len(set(map(need, layers))) == 1:
        return layers[0]
    if len(shape) < 2:
        raise ValueError(
            f"{path} has shape {shape}: a weight has two or more axes, for inputs and "
            "units. Leave the leaf out with mask=. (volumize does with any leaf whose "
            "volume is a number.)"
        )
    readings = "; or ".join(map(_axes_of, layers))
    known = (
        f"They may be: {readings}" if layers else f"None of those known fits {source}"
    )
    raise ValueError(
        f"{caller} has to know what the axes of {path}, of shape {shape}, mean, which "
        f"the tree does not tell. {known}. Pass dims=weightreg.trace_network(fn, "
        "params, x), which reads it from the network, or, unless it is a convolution, "
        "a tree with optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, "
        "output_axis=units) there and None for leaves that are no weights; or leave "
        "it out with mask=."
    )


def _axes_of(layer: WeightLayer) -> str:
    """The axes of a layer in words."""
    listed = lambda axes: ", ".join(map(str, axes))  # noqa: E731
    words = f"inputs {listed(layer.input_axes)}, units {listed(layer.output_axes)}"
    if layer.stack_axes:
        words = f"layers {listed(layer.stack_axes)}, {words}"
    if layer.convolves:
        words += f", of which {listed(layer.input_axes[:-1])} are a window"
    return words


def _reasons(params: Any, mask: Mask, dims: Dims, *, weights: bool) -> dict[str, str]:
    """Says of each leaf that is a weight why it is one, or of each other why not."""
    refuse_step_count("mask", params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tree = _Tree(leaves, norms=_norms(params))
    reasons = {}
    options = _options(params, mask, dims)
    for index, ((path, _), own) in enumerate(zip(leaves, options, strict=True)):
        if (own is not None) != weights:
            continue
        if own is not None:
            reason = _why(own) + ", mask is true" * (mask is not None)
        elif mask is not None:
            reason = "mask is false"
        elif isinstance(dims, Network):
            reason = f"traced as {role(dims, path)}"
        elif dims is not None:
            reason = "dims is None"
        else:
            reason = str(tree.why_not(index))
        reasons[leaf_path(path)] = reason
    return reasons


def _why(options: _Options) -> str:
    """Says what a weight's axes are taken for, and by what."""
    readings = " or ".join(map(_axes_of, options.layers))
    if len(options.layers) == 1:
        return f"{readings}, by {options.source}"
    if not options.layers:
        return f"axes unknown: none of those known fits {options.source}"
    return f"one of several: {readings}"


def mask_leaves(params: Any, mask: Mask, dims: Dims) -> list[bool]:
    """Says of each leaf whether it is a weight, in the order of ``jax.tree.leaves``."""
    _refuse_packed(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if mask is None and dims is None:
        tree = _Tree(leaves, norms=_norms(params))
        return [tree.is_weight(index) for index in range(len(leaves))]
    if mask is None and isinstance(dims, Network):
        flags = [layer is not None for layer in traced_layers(dims, params)]
    elif mask is None:
        flags = [entry is not None for entry in numbers_of(params, dims)]
    else:
        flags = match("mask", mask(params) if is_function(mask) else mask, params)
    for (path, leaf), flag in zip(leaves, flags, strict=True):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"mask must hold booleans, but is {flag!r} at {leaf_path(path)}."
            )
        if flag and not _is_floating(leaf):
            raise TypeError(
                f"mask (or dims) calls {leaf_path(path)} a weight, which must be a "
                f"real floating-point array; it is {_describe(leaf)}."
            )
    return [bool(flag) for flag in flags]


def stack_axes(
    caller: str, params: Any, mask: Mask, dims: Dims, *, known: bool
) -> list[tuple[int, ...]]:
    """The axes of each leaf that stack layers.

    Raises:
      ValueError: They have to be ``known``, and the tree leaves open which they are.
    """
    need = operator.attrgetter("stack_axes")
    found = []
    for own in _options(params, mask, dims):
        if own is not None and (known or len(own.layers) == 1):
            found.append(_agreed(caller, own, need).stack_axes)
        else:
            found.append(())
    return found


def likely_input_axes(params: Any, mask: Mask, dims: Dims) -> list[tuple[int, ...]]:
    """The axes that a unit of each leaf sums over, for what no result depends on.

    Of several readings it is the first one, and without any the last axis numbers
    units.
    """
    found = []
    shapes = map(jnp.shape, jax.tree.leaves(params))
    for own, shape in zip(_options(params, mask, dims), shapes, strict=True):
        usual = tuple(range(len(shape)))[: max(len(shape) - 1, 1)]
        layers = own.layers if own is not None else ()
        found.append(layers[0].input_axes if layers else usual)
    return found


def filter_axes(params: Any, dims: Dims) -> list[tuple[int, ...]]:
    """The axes of each leaf that number filters of grouped convolutions, if traced."""
    if not isinstance(dims, Network):
        return [()] * len(jax.tree.leaves(params))
    layers = traced_layers(dims, params)
    return [x.output_axes if x is not None and x.groups > 1 else () for x in layers]


def check_dtypes(caller: str, params: Any, wanted: Iterable[int]) -> None:
    """Refuses weights in other dtypes than the ones that methods calculate in.

    Raises:
      TypeError: A leaf at one of the positions ``wanted`` is in none of `SUPPORTED`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    supported = [jnp.dtype(dtype) for dtype in SUPPORTED]
    for path, leaf in (leaves[index] for index in wanted):
        if (dtype := jnp.result_type(leaf)) not in supported:
            raise TypeError(
                f"{caller} cannot handle {show_path(path)} of dtype {dtype}, only "
                f"{', '.join(d.name for d in supported)}. Leave it out with mask=, or "
                "keep it in one of these, as by leaf.astype(jnp.bfloat16)."
            )


def check_whole(caller: str, params: Any, mask: Mask, dims: Dims, around: str) -> None:
    """Refuses a tree in which weights are missing, where all layers are needed.

    A hole of ``optax.masked`` may be anything, hence counts as a weight if neither
    ``mask`` nor ``dims`` nor its name says that it is none. A hole ``None`` may be a
    function of an Equinox module, or a bias that a layer does not have, and counts only
    if one of them says that it is a weight.

    Args:
      caller: Name of the function that needs all layers, for the error.
      params: The parameters, with their holes.
      mask: Which leaves are weights.
      dims: What their axes mean.
      around: What a user writes to give it all parameters, for the error.

    Raises:
      ValueError: There is a hole where a weight is, or may be.
    """

    def stop(node: Any) -> bool:
        return is_hole(node) or type(node).__name__ in _NORMALIZATIONS

    rules: tuple[Any, Any] = mask, dims
    said = [rule(params) if is_function(rule) else rule for rule in rules]
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=stop)
    if isinstance(dims, Network) and mask is None:
        _check_all_there(caller, nodes, dims, around)
    tree = _Tree(nodes)
    for index, (path, hole) in enumerate(nodes):
        called = tree.called(index)
        if is_hole(hole) and _may_be_weight(path, hole, called, *said):
            raise ValueError(
                f"{caller} needs all layers, but params has a hole at "
                f"{show_path(path)}, where a weight may be ({type(hole).__name__}, as "
                f"optax.masked, optax.partition or eqx.partition cut it). {around} If "
                "the hole is no weight, or the other layers alone are meant, say so "
                "with mask=, a tree of booleans (or a function that makes one) that is "
                "False at the hole."
            )


def _check_all_there(
    caller: str, nodes: list[tuple[KeyPath, Any]], net: Network, around: str
) -> None:
    """Refuses a tree that lacks some of a traced network's weights, holes or not."""
    there = {leaf_path(path) for path, _ in nodes}
    holes = [leaf_path(path) for path, node in nodes if is_hole(node)]
    for layer in net.layers:
        if layer.path not in there and not layer.path.startswith(tuple(holes)):
            raise ValueError(
                f"{caller} needs all layers, but params lack {layer.path}, a weight of "
                f"the traced network. {around} If the other layers alone are meant, "
                "say so with mask=, as mask=weightreg.weight_mask(params)."
            )


def _may_be_weight(
    path: KeyPath, hole: Any, called: str | None, mask: Any, dims: Any
) -> bool:
    """Whether a hole has to be taken for a weight."""
    flags = [x for x in _entries(mask, path) if isinstance(x, bool | np.bool_)]
    if flags:
        return any(flags)
    if isinstance(dims, Network):
        where = leaf_path(path)
        inside = [x.path for x in dims.layers if x.path.startswith(where)]
        return any(name[len(where) :][:1] in ("", "[", ".") for name in inside)
    entries = [] if dims is None else _entries(dims, path)
    if any(isinstance(entry, MuonDimensionNumbers) for entry in entries):
        return True
    if hole is None:  # A tree of dims that is made from this one has None here as well.
        return called == "weight"
    return None not in entries and called != "shift"


def _entries(tree: Any, path: KeyPath) -> list[Any]:
    """What a tree, or a prefix of one, says of the node at a path, or of its leaves."""
    is_entry = lambda x: is_hole(x) or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_entry)
    meets = lambda a, b: a[: len(b)] == b[: len(a)]  # noqa: E731
    return [entry for where, entry in entries if meets(where, path)]


def _is_named_shift(name: str) -> bool:
    """Whether a leaf of this name shifts or scales units, whatever is beside it."""
    return name in SHIFTS or SHIFT_LIKE.fullmatch(name) is not None


def _is_named_weight(name: str) -> bool:
    """Whether a leaf of this name, which is no shift, is a weight at any rank."""
    return name in WEIGHTS or WEIGHT_LIKE.fullmatch(name) is not None


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is a `PackedWeight`."""
    return isinstance(node, PackedWeight)


def _refuse_packed(params: Any) -> None:
    """Refuses packed weights where numbers are needed."""
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
        if is_packed(node):
            raise ValueError(
                f"params are packed at {show_path(path)}: unpack them first."
            )


def _is_floating(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else _is_float(dtype)


def _is_float(dtype: Any) -> bool:
    """Whether a dtype, which NumPy may have for strings, is one of real floats."""
    return jnp.issubdtype(dtype, jnp.floating)


def _describe(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"of type {type(leaf).__name__}" if dtype is None else f"of dtype {dtype}"


class _Leaf(NamedTuple):
    """A leaf, and what its key path says of it.

    Attributes:
      path: Its path as users see it.
      value: The leaf.
      module: The names above it.
      name: Its own name, in lower case, without a number at its end.
      number: That number, as text.
      attribute: Whether it is the attribute of a module.
    """

    path: str
    value: Any
    module: tuple[str, ...]
    name: str
    number: str
    attribute: bool

    @classmethod
    def of(cls, path: KeyPath, value: Any) -> "_Leaf":
        """Takes a key path apart."""
        *module, last = _words(path) or ("",)
        name, number = _stem(last)
        attribute = any(isinstance(key, GetAttrKey) for key in own_path(path)[-1:])
        return cls(leaf_path(path), value, tuple(module), name, number, attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        return getattr(self.value, "shape", ())


class Beside:
    """The leaves that are in one module with a weight."""

    def __init__(self, paths: Sequence[KeyPath]):
        self._leaves = [_Leaf.of(path, None) for path in paths]
        self._modules: dict[tuple[str, ...], list[int]] = {}
        self._below: dict[tuple[str, ...], list[int]] = {}
        self._called: dict[tuple[str, ...], list[int]] = {}
        for index, leaf in enumerate(self._leaves):
            self._modules.setdefault(leaf.module, []).append(index)
            self._called.setdefault(leaf.module[-2:], []).append(index)
            for depth in range(1, len(leaf.module)):
                self._below.setdefault(leaf.module[:depth], []).append(index)

    def all(self, weight: int) -> list[int]:
        """The positions of all leaves that may belong to a weight, which is one, too.

        They are those in its module and below, and what weight normalization keeps: a
        ``g`` above, or a scale that is called after the weight's path.
        """
        own = self._leaves[weight]
        found = list(self._modules[own.module])
        if own.module:
            above = self._modules.get(own.module[:-1], [])
            found += self._below.get(own.module, [])
            found += [i for i in above if self._leaves[i].name == "g"]
            found += self._called.get((own.module[-1], own.name), [])
        return found

    def others(self, weight: int) -> list[int]:
        """The positions of leaves of another name in the module of a weight.

        There are none for an anonymous weight, beside which layers may have any names.
        """
        own = self._leaves[weight]
        if not _is_named_weight(own.name):
            return []
        names = BIASES | {own.name}  # A mask may call a bias a weight.
        beside = self._modules[own.module]
        return [i for i in beside if self._leaves[i].name not in names]

    def biases(self, weight: int) -> list[int]:
        """The positions of those that are called a bias, with the weight's number."""
        own = self._leaves[weight]
        beside = ((i, self._leaves[i]) for i in self._modules[own.module])
        return [i for i, x in beside if x.name in BIASES and x.number == own.number]


def _norms(params: Any) -> list[KeyPath]:
    """The paths of Equinox's normalizations, as far as the tree has their classes."""
    is_norm = lambda node: type(node).__name__ in _NORMALIZATIONS  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_norm)
    return [path for path, node in nodes if is_norm(node)]


class _Tree:
    """What names and ranks tell of the leaves of a tree, which are few of all cases."""

    def __init__(
        self,
        leaves: Iterable[tuple[KeyPath, Any]],
        weights: Iterable[int] = (),
        norms: Iterable[KeyPath] = (),
    ):
        """Takes leaves with paths apart.

        Some are known to be ``weights``, and the modules at ``norms`` have none.
        """
        self._norms = {tuple(_words(path)) for path in norms}
        self._leaves = [_Leaf.of(path, leaf) for path, leaf in leaves]
        self._weights = {self._leaves[index].path for index in weights}
        self._beside: dict[Any, list[_Leaf]] = {}
        self._modules: dict[Any, set[str]] = {}
        for leaf in self._leaves:
            self._beside.setdefault(leaf.module, []).append(leaf)
            if leaf.module:
                *above, own = leaf.module
                self._modules.setdefault(tuple(above), set()).add(own)

    def is_weight(self, index: int) -> bool:
        """Whether a leaf is a weight.

        Raises:
          ValueError: It may be one or not.
        """
        if self.why_not(index) is not None:
            return False
        leaf = self._leaves[index]
        named = _is_named_weight(leaf.name)
        first = not named and len(leaf.shape) > 2 and leaf.shape[0] == 1
        if first or self._may_be_scale(leaf):
            what = "its first axis has size 1" if first else "it may be a stack of them"
            raise ValueError(
                f"{leaf.path}, of shape {leaf.shape}, may be a weight, or something "
                f"that shifts or scales units ({what}). Pass "
                "dims=weightreg.trace_network(fn, params, x), which reads it from the "
                "network, or say it with mask=."
            )
        return True

    def called(self, index: int) -> str | None:
        """What a leaf is by its name alone, which may not be there: or ``None``."""
        leaf = self._leaves[index]
        if self._is_shift(leaf):
            return "shift"
        return "weight" if _is_named_weight(leaf.name) else None

    def why_not(self, index: int) -> str | None:
        """The reason why a leaf is no weight, or ``None`` if it may be one."""
        leaf = self._leaves[index]
        if not _is_floating(leaf.value):
            return f"not real and floating, but {_describe(leaf.value)}"
        if self._is_shift(leaf):
            return f"called {leaf.name + leaf.number!r}"
        if len(leaf.shape) < 2:
            return f"of shape {leaf.shape}, where a weight has two or more axes"
        if leaf.module in self._norms:
            return "in a normalization, hence a scale"
        bias = self._bias_of(leaf)
        if bias is not None and bias.shape == leaf.shape and _is_units_first(leaf):
            return f"of the shape of {bias.path}, hence a scale"
        return None

    def readings(self, index: int) -> tuple[tuple[Reading, ...], str]:
        """What the axes of a weight may be, and how that is known."""
        leaf = self._leaves[index]
        bias = self._bias_of(leaf)
        if bias is not None and (fitting := self._fitting(leaf, bias)):
            return fitting, f"its name and the shape of {bias.path}"
        usual = self._usual(leaf)
        reverse = self._usual(leaf, reverse=True)
        if not usual:
            return (), "its name"
        kind = self._kind(leaf)
        window = {n for a, n in enumerate(leaf.shape) if a in usual[0].inputs[:-1]}
        plain = kind == "convolution" or (kind == "any" and len(window) == 1)
        plain &= len(leaf.shape) > 3 and bias is None
        if plain and not self._may_be_stacked(leaf):
            usual, reverse = usual[:1], reverse[:1]
        either = _is_units_first(leaf) and len(leaf.shape) == 2
        if either or self._may_be_turned(leaf):
            usual += reverse
        return usual, "its name"

    def _is_shift(self, leaf: _Leaf) -> bool:
        """Whether a leaf is known by its name to shift or scale units."""
        if leaf.path in self._weights:
            return False
        beside = self._beside[leaf.module]
        if leaf.name == "b":  # Haiku's name, and one that anything may have
            named = any(_is_named_weight(x.name) for x in beside)
            if any(x.name == "a" and x.number == leaf.number for x in beside):
                return False  # but a factor of a product of two
            return named or _module(leaf) == "bias"
        if leaf.name == "g":  # Equinox's weight normalization
            return sum(n != 1 for n in leaf.shape) <= 1
        return _is_named_shift(leaf.name)

    def _bias_of(self, leaf: _Leaf) -> _Leaf | None:
        """The bias beside a weight, unless there are several of either."""
        beside = [x for x in self._beside[leaf.module] if x.number == leaf.number]
        biases = [x for x in beside if x.name in BIASES and self._is_shift(x)]
        others = [x for x in beside if not self._is_shift(x) and len(x.shape) > 1]
        return biases[0] if len(biases) == 1 and others == [leaf] else None

    def _kind(self, leaf: _Leaf) -> Kind:
        """What the name of a leaf's module says of it."""
        if MODULES["convolution"].fullmatch(leaf.name):
            return "convolution"
        if not leaf.module:
            return "any"
        beside = self._modules[leaf.module[:-1]]
        name = _module(leaf)
        for kind, names in MODULES.items():
            alone = kind in ("convolution", "general")
            if names.fullmatch(name) and (alone or beside >= {"query", "key", "value"}):
                return kind
        return "any"

    def _usual(self, leaf: _Leaf, *, reverse: bool = False) -> tuple[Reading, ...]:
        """The readings for a leaf's name and rank, or for its axes turned round."""
        if UNKNOWN.fullmatch(leaf.name) or UNKNOWN_MODULES.fullmatch(_module(leaf)):
            return ()
        order: Order = "units first" if _is_units_first(leaf) else "units last"
        order = REVERSED[order] if reverse else order
        return READINGS.get((len(leaf.shape), order, self._kind(leaf)), ())

    def _fitting(self, leaf: _Leaf, bias: _Leaf) -> tuple[Reading, ...]:
        """The readings that the bias beside a weight allows."""
        usual, reverse = self._both_ways(leaf, bias)
        if usual and not self._may_be_turned(leaf):
            single = len(usual[0].inputs + usual[0].outputs) == len(leaf.shape)
            attends = single and self._kind(leaf) in ("attention", "merging")
            return usual[:1] if attends else usual
        return usual + reverse

    def _both_ways(self, leaf: _Leaf, bias: _Leaf):
        """The readings that fit, of the usual and of the reversed order of axes."""
        usual, reverse = self._usual(leaf), self._usual(leaf, reverse=True)
        for single in (r for r in usual[:1] + reverse[:1] if r.convolves):
            if bias.shape == _bias_shapes(single, leaf)[1]:
                return (single,), ()
        return [
            tuple(r for r in readings if bias.shape in _bias_shapes(r, leaf))
            for readings in (usual, reverse)
        ]

    def _may_be_turned(self, leaf: _Leaf) -> bool:
        """Whether the axes of a weight may be in the reversed order as well."""
        turned = (leaf.name, len(leaf.shape)) in self._turned
        return turned or TRANSPOSED_MODULES.fullmatch(_module(leaf)) is not None

    @functools.cached_property
    def _turned(self) -> set[tuple[str, int]]:
        """Names and ranks of weights whose axes some bias shows to be turned round."""
        turned = set()
        for index, leaf in enumerate(self._leaves):
            bias = self._bias_of(leaf) if self.why_not(index) is None else None
            if bias is not None:
                usual, reverse = self._both_ways(leaf, bias)
                if reverse and not usual:
                    turned.add((leaf.name, len(leaf.shape)))
        return turned

    def _may_be_stacked(self, leaf: _Leaf) -> bool:
        """Whether some shift or scale has an axis of layers that a leaf has, too."""
        shifts = [x.shape for x in self._leaves if self._is_shift(x)]
        wide = [shape for shape in shifts if sum(n != 1 for n in shape) > 1]
        return any(shape[a] == leaf.shape[a] for shape in wide for a in (0, 1))

    def _may_be_scale(self, leaf: _Leaf) -> bool:
        """Whether a matrix may be the scales of stacked layers.

        Equinox calls scales ``weight``, too, of which its classes tell only where the
        tree is one of modules. A stack of them goes with one of weights.
        """
        alone = _is_units_first(leaf) and self._bias_of(leaf) is None
        if not alone or len(leaf.shape) != 2 or leaf.attribute:
            return False
        stacks = [x for x in self._leaves if x.name == leaf.name and len(x.shape) > 2]
        return self._may_be_stacked(leaf) or any(
            x.shape[0] == leaf.shape[0] for x in stacks
        )


def _is_units_first(leaf: _Leaf) -> bool:
    """Whether a leaf has a name of libraries that store (units, inputs)."""
    return UNITS_FIRST.fullmatch(leaf.name) is not None


def _module(leaf: _Leaf) -> str:
    """The name of the module that a leaf is in, without a number at its end."""
    return _stem(leaf.module[-1])[0] if leaf.module else ""


def _bias_shapes(reading: Reading, leaf: _Leaf) -> list[tuple[int, ...]]:
    """The shapes that the bias of a leaf may have by a reading.

    Equinox keeps that of a convolution as (units, 1, 1), and so does Haiku for some.
    """
    plain = tuple(leaf.shape[a] for a in reading.bias)
    return [plain, plain + (1,) * (reading.convolves * (len(reading.inputs) - 1))]


def _words(path: KeyPath) -> list[str]:
    """The names along a path, of which one key may hold several."""
    names: list[Any] = []
    for key in own_path(path):
        name = next((getattr(key, a) for a in _KEYS if hasattr(key, a)), key)
        names += name if isinstance(name, tuple) else [name]
    return [word for name in names for word in re.split(r"[/.|]", str(name))]


_KEYS = ("key", "name", "idx")


def _stem(word: str) -> tuple[str, str]:
    """A name in lower case, and the number at its end."""
    found = re.fullmatch(r"(.*?)_?(\d*)", word.lower(), re.DOTALL)
    return (found[1], found[2]) if found else (word, "")


def _layer(
    path: KeyPath, index: int, shape: tuple[int, ...], reading: Reading
) -> WeightLayer:
    """The layer that a reading makes of a leaf."""
    inputs, outputs, convolves, reach, _ = reading
    size = lambda axes: math.prod(shape[a] for a in axes)  # noqa: E731
    window = size(inputs[:-1]) if convolves else 1
    return WeightLayer(
        path=leaf_path(path),
        index=index,
        shape=shape,
        input_axes=inputs,
        output_axes=outputs,
        stack_axes=tuple(a for a in range(len(shape)) if a not in inputs + outputs),
        convolves=convolves,
        window=window,
        fan_in=size(inputs),
        fan_out=size(outputs) * window,
        reach=max(window, reach, 1),
    )


def _natural_order(paths: list[KeyPath]) -> Callable[[KeyPath], list[Any]]:
    """A sort key for the tree's order, in which digits in keys count as numbers."""
    first: dict[KeyPath, int] = {}
    for position, path in enumerate(paths):
        for n in range(len(path)):
            first.setdefault(path[: n + 1], position)

    def natural(text: str) -> list[Any]:
        parts = re.split(r"(\d+)", text)  # text and digits take turns
        return [int(p) if i % 2 else p for i, p in enumerate(parts)]

    def key(path: KeyPath) -> list[Any]:
        return [
            (
                natural(str(k.key)) if isinstance(k, DictKey) else [],
                first[path[: n + 1]],
            )
            for n, k in enumerate(path)
        ]

    return key
