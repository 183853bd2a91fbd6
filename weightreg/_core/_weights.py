"""Which leaves of a parameter tree are weights, and what their axes mean.

Every method of this library asks here, and none looks at a leaf's name or rank by
itself.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

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
    refuse_step_count,
    show_path,
)
from weightreg._core._network import Network, WeightLayer
from weightreg._core._packed_weight import PackedWeight

Mask: TypeAlias = Any | Callable[[Any], Any] | None
Dims: TypeAlias = Any | Callable[[Any], Any] | None

# The dtypes that methods calculate in. Floats of 8 bits are weights as well, which may
# be listed, but JAX promotes them to nothing, and no method's result would fit them.
SUPPORTED = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)

# Flax gives these names to parameters that shift or scale units, and `ConvexSum` the
# last one. Their rank does not tell, since biases of attention are (heads, head_dim)
# and those of scanned layers have a leading axis of layers.
_NOT_WEIGHTS = frozenset({"bias", "scale", "convex_logits"})

# Where a weight is missing, only its name is left to tell it. These are the names that
# Flax, Haiku and Equinox give to weights.
_CALLED_WEIGHTS = frozenset(
    {
        *("kernel", "weight", "weights", "w", "weight_ih", "weight_hh"),
        *("embedding", "embeddings"),
    }
)

# Modules of Equinox without any weight, though their scale, which may be missing, is
# called one.
_NORMALIZATIONS = frozenset({"BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"})


def weight_mask(params: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    """Says which leaves are weights.

    A leaf is a weight if it is a floating-point array of two or more axes, unless it is
    called ``bias`` or ``scale``, which are Flax's names, or ``convex_logits``, which is
    that of ``ConvexSum``. (Rank alone would count the biases of attention heads and of
    scanned layers.) Integer and complex leaves, and leaves that are no arrays, are not
    weights.

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
      ValueError: ``mask`` or ``dims`` does not match the parameters, or weights are
        packed.
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
    refuse_step_count("mask", params)
    reasons = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flags = mask_leaves(params, mask, dims)
    for (path, leaf), flag in zip(leaves, flags, strict=True):
        if not flag and mask is not None:
            reasons[show_path(path)] = "mask is false"
        elif not flag and isinstance(dims, Network):
            reasons[show_path(path)] = f"traced as {_role(dims, path)}"
        elif not flag and dims is not None:
            reasons[show_path(path)] = "dims is None"
        elif not flag:
            reasons[show_path(path)] = str(_why_not(path, leaf))
    return reasons


def weight_layers(
    params: Any, *, mask: Mask = None, dims: Dims = None
) -> tuple[WeightLayer, ...]:
    """Lists the weights of a network, with their fans and the roles of their axes.

    Without ``dims``, kernels are Flax's: the last axis numbers the units and the rest
    are their inputs, of which all but the last are a convolution's window. Attention
    kernels ``(embed, heads, head_dim)``, scanned layers and Equinox's
    ``(out, in)`` weights need ``dims``:

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
      ValueError: ``mask`` or ``dims`` does not match the parameters; a leaf that
        ``mask`` calls a weight has fewer than two axes, hence no fans; ``dims`` names
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
    if isinstance(dims, Network):
        return _traced_layers(params, mask, dims)
    dims_of = dims_leaves(params, dims)
    paths = jax.tree_util.tree_leaves_with_path(params)
    flags = mask_leaves(params, mask, dims)
    layers = [
        (path, _layer(path, index, jnp.shape(leaf), d))
        for index, ((path, leaf), d, weight) in enumerate(
            zip(paths, dims_of, flags, strict=True)
        )
        if weight
    ]
    order = _natural_order([path for path, _ in paths])
    return tuple(layer for _, layer in sorted(layers, key=lambda pl: order(pl[0])))


def _traced_layers(params: Any, mask: Mask, net: Network) -> tuple[WeightLayer, ...]:
    """The weights of a traced network, in the order of their first calls."""
    flags = mask_leaves(params, mask, net)
    found = _layers_of(net, params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, _), flag, layer in zip(paths, flags, found, strict=True):
        if flag and layer is None:
            raise ValueError(
                f"mask calls {show_path(path)} a weight, but dims is a traced network "
                f"in which it is {_role(net, path)!r}, and its axes have no meaning: "
                "leave it out with mask=, or say what they mean with a tree of "
                "optax.contrib.MuonDimensionNumbers for dims=."
            )
    order = {layer.path: k for k, layer in enumerate(net.layers)}
    layers = [x for x, flag in zip(found, flags, strict=True) if x is not None and flag]
    return tuple(sorted(layers, key=lambda layer: order[layer.path]))


def _layers_of(net: Network, params: Any) -> list[WeightLayer | None]:
    """The layer that each leaf of some parameters is, or ``None`` for the others.

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


def _role(net: Network, path: KeyPath) -> str:
    """The role of a leaf in a traced network."""
    return net.roles.get(leaf_path(path), "no array")


def layers_for(
    caller: str, params: Any, mask: Mask, dims: Dims
) -> tuple[WeightLayer, ...]:
    """The layers that a method works on, of which `weight_layers` tells more.

    Raises:
      TypeError: A weight is of a dtype that no method can handle.
    """
    layers = weight_layers(params, mask=mask, dims=dims)
    check_dtypes(caller, params, (layer.index for layer in layers))
    return layers


def mask_leaves(params: Any, mask: Mask, dims: Dims) -> list[bool]:
    """Says of each leaf whether it is a weight, in the order of ``jax.tree.leaves``."""
    _refuse_packed(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if mask is None and dims is None:
        return [_why_not(path, leaf) is None for path, leaf in leaves]
    if mask is None and isinstance(dims, Network):
        flags = [layer is not None for layer in _layers_of(dims, params)]
    elif mask is None:
        flags = [d is not None for d in dims_leaves(params, dims)]
    else:
        flags = match("mask", mask(params) if is_function(mask) else mask, params)
    for (path, leaf), flag in zip(leaves, flags, strict=True):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"mask must hold booleans, but is {flag!r} at {show_path(path)}."
            )
        if flag and not _is_floating(leaf):
            raise TypeError(
                f"mask (or dims) calls {show_path(path)} a weight, which must be a "
                f"real floating-point array; it is {_describe(leaf)}."
            )
    return [bool(flag) for flag in flags]


def dims_leaves(params: Any, dims: Dims) -> list[MuonDimensionNumbers | None]:
    """One ``MuonDimensionNumbers`` for each leaf, or ``None`` where none was given."""
    if dims is None:
        return [None] * len(jax.tree.leaves(params))
    is_dims = lambda node: isinstance(node, MuonDimensionNumbers)  # noqa: E731
    tree = dims(params) if is_function(dims) else dims
    found = match("dims", tree, params, is_leaf=is_dims)
    for entry in found:
        if entry is not None and not is_dims(entry):
            raise TypeError(
                "dims must hold optax.contrib.MuonDimensionNumbers, and None for "
                f"leaves that are no weights, not {entry!r}."
            )
    return found


def stack_axes(params: Any, dims: Dims) -> list[tuple[int, ...]]:
    """The axes of each leaf that stack layers, which ``dims`` leaves unnamed."""
    if isinstance(dims, Network):
        return [layer.stack_axes if layer else () for layer in _layers_of(dims, params)]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stacked = []
    for (path, leaf), entry in zip(leaves, dims_leaves(params, dims), strict=True):
        every = range(jnp.ndim(leaf))
        named = every if entry is None else sum(_axes(path, len(every), entry), ())
        stacked.append(tuple(a for a in every if a not in named))
    return stacked


def filter_axes(params: Any, dims: Dims) -> list[tuple[int, ...]]:
    """The axes of each leaf that number filters of grouped convolutions, if traced."""
    if not isinstance(dims, Network):
        return [()] * len(jax.tree.leaves(params))
    layers = _layers_of(dims, params)
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
    for path, hole in jax.tree_util.tree_leaves_with_path(params, is_leaf=stop):
        if is_hole(hole) and _may_be_weight(path, hole, *said):
            raise ValueError(
                f"{caller} needs all layers, but params has a hole at "
                f"{show_path(path)}, where a weight may be ({type(hole).__name__}, as "
                f"optax.masked, optax.partition or eqx.partition cut it). {around} If "
                "the hole is no weight, or the other layers alone are meant, say so "
                "with mask=, a tree of booleans (or a function that makes one) that is "
                "False at the hole."
            )


def _may_be_weight(path: KeyPath, hole: Any, mask: Any, dims: Any) -> bool:
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
        return _name(path) in _CALLED_WEIGHTS
    return None not in entries and not _is_called_no_weight(path)


def _entries(tree: Any, path: KeyPath) -> list[Any]:
    """What a tree, or a prefix of one, says of the node at a path, or of its leaves."""
    is_entry = lambda x: is_hole(x) or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_entry)
    meets = lambda a, b: a[: len(b)] == b[: len(a)]  # noqa: E731
    return [entry for where, entry in entries if meets(where, path)]


def _is_called_no_weight(path: KeyPath) -> bool:
    """Whether the name of a leaf, which may not be there, says that it is no weight."""
    return _name(path) in _NOT_WEIGHTS


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
    is_number = isinstance(leaf, float) or hasattr(leaf, "dtype")
    return is_number and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _why_not(path: KeyPath, leaf: Any) -> str | None:
    """The reason why a leaf is no weight by default, or ``None`` if it is one."""
    if not _is_floating(leaf):
        return f"not real and floating, but {_describe(leaf)}"
    if (name := _name(path)) in _NOT_WEIGHTS:
        return f"called {name!r}"
    if jnp.ndim(leaf) < 2:
        return f"of shape {jnp.shape(leaf)}, where a weight has two or more axes"
    return None


def _describe(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"of type {type(leaf).__name__}" if dtype is None else f"of dtype {dtype}"


def _key_name(key: Any) -> Any:
    return next(
        (getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), key
    )


def _name(path: KeyPath) -> Any:
    """The parameter's own name, past the ``.value`` that an ``nnx.State`` appends."""
    names = [_key_name(k) for k in path if k != GetAttrKey("value")]
    return names[-1] if names else None


def _axes(
    path: KeyPath, ndim: int, dims: MuonDimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output axes, counted from the front and checked."""
    both = [(int(a),) if isinstance(a, int | np.integer) else tuple(a) for a in dims]
    named = [a for axes in both for a in axes]
    normal = [a % ndim for a in named if -ndim <= a < ndim]
    if not all(both) or len(set(normal)) < len(named):
        raise ValueError(
            f"dims gives {dims} for {show_path(path)}, which has {ndim} axes: expected "
            "one or more axes of it on each side, none of them twice."
        )
    return tuple(normal[: len(both[0])]), tuple(normal[len(both[0]) :])


def _layer(
    path: KeyPath,
    index: int,
    shape: tuple[int, ...],
    dims: MuonDimensionNumbers | None,
) -> WeightLayer:
    if dims is None and len(shape) < 2:
        raise ValueError(
            f"{show_path(path)} has shape {shape}: a weight has two or more axes, for "
            "inputs and units. Leave the leaf out with mask=. (volumize does with any "
            "leaf whose volume is a number.)"
        )
    if dims is None:
        inputs, outputs = tuple(range(len(shape) - 1)), (len(shape) - 1,)
    else:
        inputs, outputs = _axes(path, len(shape), dims)
    size = lambda axes: math.prod(shape[a] for a in axes)  # noqa: E731
    # With dims, two reduction axes are rather attention's (heads, head_dim) than the
    # (window, in) of a one-dimensional convolution.
    convolves = len(outputs) == 1 and len(inputs) >= (2 if dims is None else 3)
    window = size(inputs[:-1]) if convolves else 1
    return WeightLayer(
        path=show_path(path),
        index=index,
        shape=shape,
        input_axes=inputs,
        output_axes=outputs,
        stack_axes=tuple(a for a in range(len(shape)) if a not in inputs + outputs),
        convolves=convolves,
        window=window,
        fan_in=size(inputs),
        fan_out=size(outputs) * window,
        reach=max(size(inputs[:-1]), 1),
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
