"""Sums of products: layers that are called on data.

A leaf that is contracted with data is a weight. The axes that are summed over are its
inputs, those that stay are its units, and those that the data have, too, stack layers.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from weightreg._tracing._call import call, onto
from weightreg._tracing._graph import Link
from weightreg._tracing._values import Notes, Value, other, shape_of
from weightreg._tracing._views import Shape, View

_REDUCTIONS = """
reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax
argmin
"""


def dot_general(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Sums of products along some axes."""
    contracted, batch = eqn.params["dimension_numbers"]
    return [_dot(eqn, values, contracted, batch, notes)]


def ragged_dot_general(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Sums of products with one matrix of a stack for each group of rows."""
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = ragged.dot_dimension_numbers
    left, right, sizes = values
    groups = ragged.rhs_group_dimensions
    own = tuple(contracted), tuple(batch)
    if not right.is_parameter or left.node is None or not groups:
        return other(eqn, values, notes)
    # Without their group axes, which data choose along, they are plain products.
    views = []
    for view in right.views:
        looked = view.looked | frozenset(view.at(groups))
        views.append(dataclasses.replace(view, looked=looked).without(groups))
    shift = lambda axes: [a - sum(g < a for g in groups) for a in axes]  # noqa: E731
    shape = tuple(n for k, n in enumerate(right.shape) if k not in groups)
    right = right.but(views=tuple(views), shape=shape)
    pairs = [(pair[0], shift(pair[1])) for pair in own]
    out = _dot(eqn, [left, right], pairs[0], pairs[1], notes)
    if sizes.node is not None and sizes.node != left.node:
        notes.graph.nodes[out.node].sources.append(  # pyright: ignore
            (sizes.node, sizes.link.then(Link(("ragged_dot_general",), None, math.inf)))
        )
    return [out]


def _dot(
    eqn: Any, values: Sequence[Value], contracted: Any, batch: Any, notes: Notes
) -> Value:
    """Sums of products along some axes, one for each index along others."""
    shape = shape_of(eqn.outvars[0])
    if all(v.is_constant for v in values):
        return Value(shape)
    gone = [tuple(c) for c in contracted]
    places = [_places(values, gone, batch, side) for side in (0, 1)]
    if all(v.node is None for v in values):
        partner = all(v.is_parameter for v in values)
        empty = any(v.known == 0 for v in values)
        views = [
            onto(
                view.contracted(gone[side], partner, empty, "dot_general"),
                places[side],
                gone[side],
                shape,
            )
            for side, v in enumerate(values)
            for view in v.views
        ]
        return Value(shape, views=tuple(views))
    side = _weight_side(values, gone, batch, notes)
    if side is None:
        return _of_data(eqn, values, gone, batch, places, shape, notes)
    weight, data = values[side], values[1 - side]
    _note_shared(data, batch[1 - side], weight, batch[side], notes)
    return call(eqn, data, weight, gone[side], places[side], shape, notes, batch[side])


def _places(
    values: Sequence[Value], gone: Sequence, batch: Sequence, side: int
) -> dict[int, int]:
    """Where the axes of an operand are in the product."""
    free = [
        [k for k in range(len(v.shape)) if k not in (*gone[s], *batch[s])]
        for s, v in enumerate(values)
    ]
    count = len(batch[0])
    first = count + (len(free[0]) if side else 0)
    return {k: i for i, k in enumerate(batch[side])} | {
        k: first + i for i, k in enumerate(free[side])
    }


def _weight_side(
    values: Sequence[Value], gone: Sequence, batch: Sequence, notes: Notes
) -> int | None:
    """Which operand of a product holds weights, if one does."""
    for side in (0, 1):
        if values[side].is_parameter:
            return side
    for side in (0, 1):
        value, data = values[side], values[1 - side]
        full = [v for v in value.views if _is_matrix(value, v, gone[side], batch[side])]
        if full and _is_weight(data, value, notes):
            return side
    return None


def _is_matrix(
    value: Value, view: View, gone: Sequence[int], batch: Sequence[int]
) -> bool:
    """Whether a leaf that data have changed is still a matrix of them."""
    free = [k for k in range(len(value.shape)) if k not in (*gone, *batch)]
    # Of experts there may be several for one row of the data.
    own = gone if view.looked else (*gone, *free)
    whole = all(k in view.occupied() for k in own if value.shape[k] != 1)
    return whole and not view.reduced and bool(view.at(gone)) and bool(view.at(free))


def _is_weight(data: Value, changed: Value, notes: Notes) -> bool:
    """Whether what data have changed is a weight that is called on other data.

    What was added to data is a weight with noise where they are random numbers. Else it
    might be an offset of the data as well, and is left open.
    """
    if data.node is None:
        return False
    added = [use for use in changed.uses if use.kind == "bias"]
    if added and not changed.random:
        notes.noisy += added
        return False
    return True


def _of_data(
    eqn: Any,
    values: Sequence[Value],
    gone: Sequence,
    batch: Sequence,
    places: Sequence[dict[int, int]],
    shape: Shape,
    notes: Notes,
) -> Value:
    """A product of data, or of data and constants."""
    for side, value in enumerate(values):
        if values[1 - side].node is not None and not values[1 - side].labels:
            _note_averaged(value, gone[side], notes)
    labels = [
        (use, onto(view.without(gone[side]), places[side], gone[side], shape))
        for side, value in enumerate(values)
        for use, view in value.labels
    ]
    node, link = notes.combine(eqn, values)
    free = [len(p) > len(batch[0]) for p in places]
    both = all(v.node is not None for v in values)
    outer = both and all(free) and not gone[0]
    return Value(shape, node, link, labels=tuple(labels), outer=outer)


def _note_averaged(value: Value, gone: Sequence[int], notes: Notes) -> None:
    """Notes down units that are summed and that others come after."""
    for use, view in value.labels:
        axes = tuple(a for a in view.at(gone) if a in use.outputs[:-1])
        if axes and not use.window:
            notes.shared.append((use, axes))


def _note_shared(
    data: Value, batch: Sequence[int], weight: Value, own: Sequence[int], notes: Notes
) -> None:
    """Notes down the units of layers that are a stack for the one that follows."""
    for use, view in data.labels:
        stacked = [
            k
            for k, j in zip(batch, own, strict=True)
            if any(v.at([j]) for v in weight.views)
        ]
        axes = tuple(a for a in view.at(stacked) if a in use.outputs)
        if axes:
            notes.shared.append((use, axes))


def convolution(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Sums of products along a window that moves."""
    data, kernel = values
    shape, params = shape_of(eqn.outvars[0]), eqn.params
    if params["batch_group_count"] != 1 or data.is_parameter:
        return other(eqn, values, notes)
    if not kernel.views:
        node, link = notes.combine(eqn, values)
        return [Value(shape, node, link)]
    out, channels, *window = params["dimension_numbers"].rhs_spec
    gone = (*window, channels)
    full = any(_is_matrix(kernel, view, gone, ()) for view in kernel.views)
    changed = kernel.node is not None
    if data.node is None or (
        changed and not (full and _is_weight(data, kernel, notes))
    ):
        return other(eqn, values, notes)
    stacked, groups = _stacked_kernels(kernel, out, params["feature_group_count"])
    places = {out: params["dimension_numbers"].out_spec[1]}
    details = {
        "window": len(window),
        "convolution": {
            "groups": groups,
            "strides": tuple(params["window_strides"]),
            "padding": tuple(tuple(p) for p in params["padding"]),
            "dilation": tuple(params["rhs_dilation"]),
            "input_dilation": tuple(params["lhs_dilation"]),
        },
    }
    result = call(eqn, data, kernel, gone, places, shape, notes, **details)
    for use, _ in result.labels:
        use.outputs = tuple(a for a in use.outputs if a not in stacked)
    return [result]


def _stacked_kernels(
    kernel: Value, out: int, groups: int
) -> tuple[tuple[int, ...], int]:
    """The axes of leaves that stack kernels, and the groups that each kernel has.

    `jax.vmap` merges the kernels that it maps over into groups of a convolution.
    """
    stacked: list[int] = []
    parts = [part for part in kernel.views[0].axes[out] if part.size > 1]
    own = [part.axis for part in parts if part.axis is not None]
    if not own:  # It is repeated for each of the units.
        return (), 1
    for part in parts[:-1] if len(kernel.views) == 1 else ():
        if part.axis == own[-1] or groups % part.size:
            break
        groups //= part.size
        # Where it is repeated, `vmap` has merged a batch of the data into groups.
        if part.axis is not None:
            stacked.append(part.axis)
    return tuple(stacked), groups


def reduction(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """What is left of some axes: a sum, a largest number, where it is."""
    (value,), name, axes = values[:1], eqn.primitive.name, eqn.params["axes"]
    shape = shape_of(eqn.outvars[0])
    if value.is_constant:
        return [Value(shape)]
    if value.node is None:
        views = [view.statistic(axes, name) for view in value.views]
        return [Value(shape, views=tuple(views))]
    kept = [k for k in range(len(value.shape)) if k not in axes]
    places = {k: i for i, k in enumerate(kept)}
    whole = any(
        not v.reduced and any(value.shape[k] > 1 and v.at([k]) for k in axes)
        for v in value.views
    )
    if name == "reduce_sum" and value.product is not None and whole:
        # The weight was multiplied by data that had been repeated along its units.
        weight = value.but(node=None)
        return [call(eqn, value.product, weight, axes, places, shape, notes)]
    _note_summed(value, axes, name, notes)
    _note_averaged(value, axes, notes)
    node, link = notes.combine(eqn, values)
    labels = tuple((use, view.without(axes)) for use, view in value.labels)
    # A sum over places is linear, and what is added to it is added to units.
    fresh = value.fresh and name == "reduce_sum"
    fresh = fresh and not any(view.at(axes) for _, view in value.labels)
    return [Value(shape, node, link, labels=labels, outer=value.outer, fresh=fresh)]


def _note_summed(value: Value, axes: Sequence[int], name: str, notes: Notes) -> None:
    """Notes down slices of weights whose results are summed."""
    for use, view in value.labels:
        there = view.at(axes)
        slices = tuple(a for a in there if a not in (*use.inputs, *use.outputs))
        if slices and value.fresh and name == "reduce_sum":
            notes.summed.append((use, slices))


RULES = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "conv_general_dilated": convolution,
    **dict.fromkeys(_REDUCTIONS.split(), reduction),
}
