"""Slices of parameters that lists, loops or data choose: look-ups and experts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from weightreg._tracing._rearrange import put, sliced
from weightreg._tracing._values import Notes, Value, other, shape_of
from weightreg._tracing._views import Own, Shape, View


def gather(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Slices that are looked up."""
    value, indices = values
    shape = shape_of(eqn.outvars[0])
    if not value.views or any(view.looked for view in value.views):
        node, link = notes.combine(eqn, values)
        return [Value(shape, node, link)]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    chosen = [k for k in numbers.start_index_map if sizes[k] != value.shape[k]]
    if any(sizes[k] != 1 for k in chosen) or indices.is_parameter:
        return other(eqn, values, notes)
    rows = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    places = _gathered(numbers, len(sizes), rows)
    known = indices.is_constant and indices.loop is None
    if known and len(chosen) == 1 and indices.known is not None:
        place = lambda view: _row(view, chosen[0], indices, places, value, shape)  # noqa: E731
        return [put(value, place, shape, "gather", notes)]
    if known and len(chosen) == 1 and len(rows) == 1:
        # A list of rows that is known beforehand: some of the slices, in some order.
        count = shape[rows[0]]
        places[chosen[0]] = rows[0]
        order = _order_of(indices.numbers, value.shape[chosen[0]])
        rows_of = lambda view: view.picked(chosen[0], count, order)  # noqa: E731
        place = lambda view: _spread(rows_of(view), places, shape)  # noqa: E731
        return [put(value, place, shape, "gather", notes)]
    if known and rows and len(chosen) == 1:
        return [_listed(eqn, value, chosen[0], places, rows, notes)]
    if known and rows and chosen:
        return other(eqn, values, notes)
    for axis in chosen:
        places.pop(axis, None)
    return [_chosen(eqn, value, indices, chosen, places, notes)]


def _row(
    view: View,
    axis: int,
    indices: Value,
    places: Mapping[int, int],
    value: Value,
    shape: Shape,
) -> View | None:
    """The one row of a view that is looked up."""
    sizes = [1 if k == axis else size for k, size in enumerate(value.shape)]
    row = _box(view, [axis], [indices], sizes, value.shape)
    there = {k: place for k, place in places.items() if k != axis}
    return row and _spread(row, there, shape)


def _listed(
    eqn: Any,
    value: Value,
    chosen: int,
    places: Mapping[int, int],
    rows: Sequence[int],
    notes: Notes,
) -> Value:
    """Rows that a list of several axes picks, which is known beforehand."""
    shape = shape_of(eqn.outvars[0])
    sizes = [shape[k] for k in rows]

    def place(view: View) -> View:
        picked = view.picked(chosen, math.prod(sizes), 0)
        listed = (*value.shape[:chosen], *sizes, *value.shape[chosen + 1 :])
        old = (*value.shape[:chosen], math.prod(sizes), *value.shape[chosen + 1 :])
        there = {k + (k > chosen) * (len(rows) - 1): n for k, n in places.items()}
        there |= {chosen + i: row for i, row in enumerate(rows)}
        return _spread(picked.reshaped(old, listed), there, shape)

    return put(value, place, shape, "gather", notes)


def _gathered(numbers: Any, ndim: int, rows: Sequence[int]) -> dict[int, int]:
    """Where the axes of a value are in what is gathered from it."""
    batching = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    )
    gone = {*numbers.collapsed_slice_dims, *batching}
    kept = [k for k in range(ndim) if k not in gone]
    places = dict(zip(kept, map(int, numbers.offset_dims), strict=True))
    return places | {axis: rows[k] for axis, k in batching.items()}


def _spread(view: View, places: Mapping[int, int], shape: Shape) -> View:
    """A view with its axes in other places, without those that have none."""
    kept, there = sorted(places), [places[k] for k in sorted(places)]
    old = tuple(shape[k] for k in there)
    return view.permuted(kept).broadcast(old, shape, there)


def _order_of(numbers: np.ndarray | None, size: int) -> int:
    """Whether a list of rows rises, has different ones at least (-1), or may repeat."""
    if numbers is None or len(np.unique(_inside(numbers, size))) < len(numbers):
        return 0
    return 1 if np.all(np.diff(numbers) > 0) else -1


def _inside(numbers: np.ndarray, size: int) -> np.ndarray:
    """Rows that are there, which JAX takes for those that are not."""
    return np.clip(numbers, 0, size - 1)


def _looked(view: View, chosen: Sequence[int], indices: Value, shape: Shape) -> View:
    """A view of which slices were chosen along some axes, by data or by a loop.

    Slices that a loop has chosen are its rounds' own if they are all different.
    """
    axes = view.at(chosen)
    if indices.node is not None:
        return dataclasses.replace(view, looked=view.looked | frozenset(axes))
    if indices.loop is None or indices.numbers is None or len(chosen) != 1:
        return view
    rows = _inside(indices.numbers, shape[chosen[0]])
    if len(axes) != 1 or len(np.unique(rows)) < len(rows):
        return view
    first = view.region[axes[0]][0]
    own = Own(indices.loop, axes[0], tuple(int(row) + first for row in rows))
    return dataclasses.replace(view, own=view.own | {own})


def _chosen(
    eqn: Any,
    value: Value,
    indices: Value,
    axes: Sequence[int],
    places: Mapping[int, int],
    notes: Notes,
) -> Value:
    """Slices of parameters that data or a loop have chosen along some axes."""
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])

    def place(view: View) -> View:
        return _spread(_looked(view, axes, indices, value.shape), places, shape)

    if indices.node is None:
        return put(value, place, shape, name, notes)
    node = notes.join(name, [value, indices])
    views = tuple(map(place, value.views))
    for use in value.uses:  # Of what data have changed, as by dropout, rows are taken.
        use.gone = True
    uses = tuple(
        notes.use("embedding" if view.looked else "other", name, view) for view in views
    )
    return Value(shape, node, views=views, uses=uses)


def dynamic_slice(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A box of a value that begins where other values say."""
    value, *starts = values
    shape, sizes = shape_of(eqn.outvars[0]), eqn.params["slice_sizes"]
    axes = [k for k, size in enumerate(sizes) if size != value.shape[k]]
    ruling = [starts[k] for k in axes]
    if all(v.known is not None for v in ruling):
        place = lambda view: _box(view, axes, ruling, sizes, value.shape)  # noqa: E731
        return [put(value, place, shape, "dynamic_slice", notes)]
    if not value.is_parameter:
        node, link = notes.combine(eqn, [value, *ruling])
        return [Value(shape, node, link)]
    if any(sizes[k] != 1 for k in axes) or any(v.is_parameter for v in ruling):
        return other(eqn, values, notes)
    places = {k: k for k in range(len(sizes)) if k not in axes}
    unknown = [v for v in ruling if v.known is None]
    indices = max(unknown, key=lambda v: (v.node is not None, v.loop is not None))
    return [_chosen(eqn, value, indices, axes, places, notes)]


def _box(
    view: View,
    axes: Sequence[int],
    ruling: Sequence[Value],
    sizes: Sequence[int],
    shape: Shape,
) -> View | None:
    """A view in a box whose begin is known, and which is moved to lie inside."""
    starts = [0] * len(shape)
    for axis, value in zip(axes, ruling, strict=True):
        starts[axis] = min(max(int(value.known or 0), 0), shape[axis] - sizes[axis])
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    return sliced(view, starts, stops, (1,) * len(shape))


def scatter(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A value of which some numbers are replaced."""
    value, *rest = values
    if value.is_parameter and all(v.is_constant for v in rest):
        return [value.but(views=tuple(view.marked("scatter") for view in value.views))]
    return other(eqn, values, notes)


RULES = {"gather": gather, "dynamic_slice": dynamic_slice, "scatter": scatter}
