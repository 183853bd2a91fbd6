"""Reads what a network does with its parameters."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from optax.contrib import MuonDimensionNumbers

from weightreg._core._arguments import leaf_path
from weightreg._core._network import Network, WeightLayer
from weightreg._tracing._chains import Chains
from weightreg._tracing._follow import Follower
from weightreg._tracing._graph import Link
from weightreg._tracing._roles import Leaf, Roles
from weightreg._tracing._values import Notes, Value
from weightreg._tracing._views import View

Stack = int | Sequence[int] | Mapping[str, int | Sequence[int]] | None


def trace_network(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    stack: Stack = None,
    **static: Any,
) -> Network:
    r"""Reads what a network does with each of its parameters, from what it computes.

    Methods ask which arrays are weights, which of their axes a unit sums over, which
    number units and which stack layers. Names and ranks do not tell: an attention
    kernel ``(512, 8, 64)`` may be a convolution's. Here the call ``fn(params,
    *inputs)`` is traced to a jaxpr, code without effect is removed, and every leaf is
    followed through casts, transposes, reshapes, slices, joins, loops, branches and
    what else moves it, to what consumes it:

    - A leaf that is contracted with data is a **weight**. The axes that are summed over
      are its inputs, those that stay are its units, and those that the data have, too
      (``vmap``, experts), or that a loop goes through (``scan`` over depth), stack
      layers. A convolution's window belongs to the inputs and comes first.
    - What is added to data is a **bias**, what multiplies them a **scale**, and what is
      looked up in by them an **embedding**, or **embedding, weight** if it is tied.
    - What is first combined with other parameters is what it becomes, and
      `WeightLayer.combined` says so: weight normalization, ``W + A B``.
    - Everything else is ``"other (...)"``, with the primitive that it comes to, and
      what makes no difference to the results is ``"unused"``.

    A layer is called again only where its own result feeds the next call, as in a
    recurrence. To be mapped over data, or over slices of one kernel whose results are
    summed, is one call.

    Some things no computation tells: members of an ensemble that share an input are
    also one layer with more units. `Network.open` names these, and ``stack`` decides.

    Args:
      fn: The network, a function of parameters and inputs. What it returns may be any
        tree of arrays.
      params: Any tree of parameters, of which the arrays, or ``jax.ShapeDtypeStruct``,
        are traced. Leaves that are no arrays (functions, flags) are passed as they are.
      *inputs: Trees of arrays, ``jax.ShapeDtypeStruct`` or keys, of which only shapes
        and dtypes matter: data, states of other collections, keys for dropout. All else
        in them is passed as it is.
      stack: Axes that stack layers by your word: an axis or several of all parameters,
        or a mapping from paths (``"['ensemble']['kernel']"``, ``"ensemble/kernel"``) or
        modules (``"ensemble"``) to these.
      **static: Keyword arguments of ``fn``, passed as they are.

    Returns:
      A `Network`. ``print`` it for a table, and pass it for ``dims`` to any method.

    Raises:
      ValueError: There is no array among ``inputs``; ``stack`` names what is not there,
        an axis that a leaf does not have, or all inputs of a weight.
      TypeError: ``stack`` is of another type.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"in": jnp.ones((8, 2, 4)), "shift": jnp.ones((2, 4))}
      >>> fn = lambda p, x: jnp.einsum("bi,iho->bho", x, p["in"]) + p["shift"]
      >>> net = wr.trace_network(fn, params, jax.ShapeDtypeStruct((1, 8), jnp.float32))
      >>> print(net)
      path       shape  role    inputs  units  calls  bias
      ---------  -----  ------  ------  -----  -----  ---------
      ['in']     8x2x4  weight  0       1, 2   1      ['shift']
      ['shift']  2x4    bias
      >>> net.layers[0].fan_in
      8
    """
    leaves, structure = jax.tree.flatten(params)
    data, data_structure = jax.tree.flatten(inputs)
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    given = [i for i, leaf in enumerate(data) if is_array(leaf)]
    if not given:
        raise ValueError(
            "inputs must hold an array, a jax.ShapeDtypeStruct or a key at least, for "
            "else everything that the network computes is a constant. Pass what "
            "fn closes over as an argument: trace_network(lambda p, x: ..., params, x)."
        )

    def call(arrays: Sequence[Any], values: Sequence[Any]) -> Any:
        whole = structure.unflatten(_put(leaves, traced, arrays))
        return fn(whole, *data_structure.unflatten(_put(data, given, values)), **static)

    closed = jax.make_jaxpr(call)(
        [_abstract(leaves[i]) for i in traced], [_abstract(data[i]) for i in given]
    )
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return _read(closed, params, paths, traced, stack)


def _read(
    closed: ClosedJaxpr, params: Any, paths: list[str], traced: list[int], stack: Stack
) -> Network:
    """What a jaxpr of traced parameters and inputs says of them."""
    follower = Follower()
    notes, kept = follower.notes, [True] * len(closed.jaxpr.outvars)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, kept)
    values = [
        _value(position, variable.aval, position < len(traced), notes)
        for position, variable in enumerate(closed.jaxpr.invars)
    ]
    alive = [value for value, use in zip(values, used, strict=True) if use]
    outs = follower.run(ClosedJaxpr(jaxpr, closed.consts), alive)
    for out in outs:
        notes.end(out, "output", weak=True)
        notes.note_apart(out)
    sources = [(out.node, out.link) for out in outs if out.node is not None]
    output = notes.graph.add("output", sources)
    leaves = [
        Leaf(k, paths[i], tuple(v.aval.shape), v.aval.dtype, used[k])
        for k, (i, v) in enumerate(zip(traced, closed.jaxpr.invars, strict=False))
    ]
    roles = Roles(leaves, notes, _stacked(stack, leaves))
    _check_stacks(stack, roles.layers)
    nodes = {x.path: roles.nodes(leaves[x.index]) for x in roles.layers}
    chains = Chains(notes.graph, nodes, output)
    pairs = [(a.path, b.path) for a, b in itertools.pairwise(roles.layers)]
    between = {pair: chains.link(*pair) for pair in pairs}
    return Network(
        layers=tuple(replace(x, index=traced[x.index]) for x in roles.layers),
        between=tuple(link and link.primitives for link in between.values()),
        roles={leaf.path: roles.role(leaf) for leaf in leaves},
        dims=_muon_dims(params, traced, roles.layers),
        open=tuple(roles.open()),
        shapes={leaf.path: leaf.shape for leaf in leaves},
        links={pair: _unscalable(link) for pair, link in between.items() if link},
        fixed={x.path: _fixed(x, roles, chains) for x in roles.layers},
        unbounded=chains.unbounded(roles.layers) or _not_units(outs, roles.layers),
    )


def _value(position: int, aval: Any, parameter: bool, notes: Notes) -> Value:
    """A parameter or an input of the network, of which integers are not followed."""
    shape = tuple(aval.shape)
    if not parameter:
        return Value(shape, notes.graph.add("input"))
    followed = jnp.issubdtype(aval.dtype, jnp.inexact)
    return Value(shape, views=(View.whole(position, shape),) if followed else ())


def _muon_dims(params: Any, traced: list[int], layers: Sequence[WeightLayer]) -> Any:
    """The axes of the weights in a tree like the parameters."""
    structure = jax.tree.structure(params)
    dims: list[Any] = [None] * structure.num_leaves
    for layer in layers:
        if layer.output_axes:
            axes = layer.input_axes, layer.output_axes
            dims[traced[layer.index]] = MuonDimensionNumbers(*axes)
    return structure.unflatten(dims)


def _fixed(layer: WeightLayer, roles: Roles, chains: Chains) -> str:
    """Why a layer cannot be rescaled, or ``""``."""
    reason = roles.fixed(layer)
    if reason or not layer.stack_axes:
        return reason
    uses = roles.calls_of(roles.leaves[layer.index])
    link = chains.in_order(uses, layer.stack_axes)
    if link is None:
        return "its stacked layers are not called one on another's results"
    return _unscalable(link)


def _not_units(outs: Sequence[Value], layers: Sequence[WeightLayer]) -> str:
    """Why a network's results are not the units of its last layer, or ``""``."""
    for out in outs:
        for use, view in out.labels:
            last = layers and use.leaf == layers[-1].index
            axes = [a for a in use.outputs if view.shape[a] != 1]
            parts = [p for own in view.axes for p in own if p.size > 1]
            whole = [view.region[a] == (0, view.shape[a]) for a in axes]
            if last and [p.axis for p in parts] == axes and all(whole) and view.order():
                return ""
    return "the results are not the units of the last layer in their order"


def _unscalable(link: Link) -> str:
    """Why scale cannot be moved through what lies between layers, or ``""``."""
    if link.degree == 1:
        return ""
    between = ", ".join(link.primitives) or "nothing"
    return f"what lies between ({between}) is not known to be positively homogeneous"


def _stacked(stack: Stack, leaves: Sequence[Leaf]) -> dict[int, tuple[int, ...]]:
    """The axes that a user calls stacks, by the positions of leaves."""
    if stack is None:
        return {}
    if not isinstance(stack, Mapping):
        return _stacked_alike(_axes("stack", stack), stack, leaves)
    found = {}
    for name, axes in stack.items():
        own = [leaf for leaf in leaves if _is_named(name, leaf.path)]
        if not own:
            raise ValueError(
                f"stack has an entry {name!r}, which is the path of no parameter or "
                f"module. There are: {', '.join(leaf.path for leaf in leaves)}."
            )
        where = f"stack[{name!r}]"
        for leaf in own:
            ndim = len(leaf.shape)
            if any(not -ndim <= a < ndim for a in _axes(where, axes)):
                raise ValueError(
                    f"{where} is {axes}, but {leaf.path} of shape {leaf.shape} has "
                    f"{ndim} axes."
                )
            found[leaf.index] = tuple(a % ndim for a in _axes(where, axes))
    return found


def _stacked_alike(
    axes: tuple[int, ...], stack: Any, leaves: Sequence[Leaf]
) -> dict[int, tuple[int, ...]]:
    """The same axes of all leaves that have them."""
    found = {
        leaf.index: tuple(a % len(leaf.shape) for a in axes)
        for leaf in leaves
        if all(-len(leaf.shape) <= a < len(leaf.shape) for a in axes)
    }
    if not found:
        raise ValueError(
            f"stack is {stack!r}, an axis that no parameter has. Their shapes: "
            f"{', '.join(str(leaf.shape) for leaf in leaves) or 'none'}."
        )
    return found


def _is_named(name: Any, path: str) -> bool:
    """Whether a name is that of a leaf or of a module that it is in."""
    if not isinstance(name, str):
        raise TypeError(f"stack must have paths for keys, not {name!r}.")
    keys = re.findall(r"[^\[\]'\".]+", path)
    own = re.findall(r"[^\[\]'\"./]+", name)
    return bool(own) and keys[: len(own)] == own


def _axes(where: str, axes: Any) -> tuple[int, ...]:
    """The axes that a user names, which have to be integers."""
    both = axes if isinstance(axes, Sequence) else (axes,)
    integers = [isinstance(a, int | np.integer) for a in both]
    if not all(integers) or any(isinstance(a, bool) for a in both):
        raise TypeError(f"{where} must be an axis or several, not {axes!r}.")
    return tuple(int(a) for a in both)


def _check_stacks(stack: Stack, layers: Sequence[WeightLayer]) -> None:
    """Refuses stacks that leave a weight without inputs."""
    for layer in layers if stack is not None else ():
        if not layer.input_axes:
            raise ValueError(
                f"stack is {stack!r}, which leaves {layer.path} of shape {layer.shape} "
                "without inputs: expected axes that number layers."
            )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced, and not passed as it is."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    placed = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=placed)


def _put(leaves: Sequence[Any], where: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The leaves with new ones at some positions."""
    whole = list(leaves)
    for position, value in zip(where, new, strict=True):
        whole[position] = value
    return whole
