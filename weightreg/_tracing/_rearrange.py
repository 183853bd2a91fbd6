"""Primitives that only move numbers: transposes, reshapes, slices, joins."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from weightreg._tracing._graph import Link
from weightreg._tracing._values import Notes, Value, shape_of
from weightreg._tracing._views import LostError, Shape, View, rejoined

_Place = Callable[[View], View | None]

# What leaves every number where it is, and as it is.
_NAMES = """
copy copy_p stop_gradient reduce_precision device_put name
sharding_constraint reshard mesh_cast layout_constraint pvary pcast
optimization_barrier
"""
SAME = frozenset(_NAMES.split())


def same(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """The values as they are."""
    del eqn, notes
    return list(values)


def converted(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """The value in another dtype, which integers round."""
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    rounds = jnp.issubdtype(old, jnp.inexact) and not jnp.issubdtype(new, jnp.inexact)
    if not rounds or values[0].is_constant:
        return list(values)
    name = eqn.primitive.name
    views = tuple(view.marked(name) for view in values[0].views)
    link = values[0].link.then(Link((name,), None, math.inf))
    return [values[0].but(views=views, link=link, fresh=False, known=None)]


def reversed_(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """The value in reverse along some axes."""
    axes, shape = eqn.params["dimensions"], values[0].shape
    out = put(values[0], lambda view: view.reversed(axes), shape, "rev", notes)
    if out.numbers is not None and out.loop is None:
        out = out.but(numbers=out.numbers[::-1])
    return [out]


def moved(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """What a primitive with one operand moves."""
    place, slope = _PLACES[eqn.primitive.name](eqn.params, values[0].shape)
    shape = shape_of(eqn.outvars[0])
    return [put(values[0], place, shape, eqn.primitive.name, notes, slope)]


def put(
    value: Value,
    place: _Place,
    shape: Shape,
    name: str,
    notes: Notes,
    slope: float = 1.0,
) -> Value:
    """A value of another shape, with all its views in their new places.

    A leaf that cannot be followed is noted down as used by the primitive.
    """
    views = []
    for view in value.views:
        try:
            views.append(place(view))
        except LostError:
            if value.node is None:
                notes.use("other", name, view)
    labels = []
    for use, view in value.labels:
        try:
            labels.append((use, place(view)))
        except LostError:
            continue
    link = value.link
    if value.node is not None:
        link = link.then(Link((name,), slope=slope))
    return value.but(
        shape=shape,
        link=link,
        views=tuple(v for v in views if v is not None),
        labels=tuple((use, view) for use, view in labels if view is not None),
        multiple=None,
        sign=None,
        numbers=value.numbers if math.prod(shape) == math.prod(value.shape) else None,
    )


def _transpose(params: dict, shape: Shape) -> tuple[_Place, float]:
    return lambda view: view.permuted(params["permutation"]), 1.0


def _reshape(params: dict, shape: Shape) -> tuple[_Place, float]:
    new, order = params["new_sizes"], params["dimensions"]
    if order is None:
        return lambda view: view.reshaped(shape, new), 1.0
    old = tuple(shape[k] for k in order)
    return lambda view: view.permuted(order).reshaped(old, new), 1.0


def _broadcast(params: dict, shape: Shape) -> tuple[_Place, float]:
    new, dimensions = params["shape"], params["broadcast_dimensions"]
    repeats = math.prod(new) / max(math.prod(shape), 1)
    return lambda view: view.broadcast(shape, new, dimensions), math.sqrt(repeats)


def _squeeze(params: dict, shape: Shape) -> tuple[_Place, float]:
    return lambda view: view.without(params["dimensions"]), 1.0


def _expand(params: dict, shape: Shape) -> tuple[_Place, float]:
    gone = params["dimensions"]
    new = list(shape)
    for k in sorted(gone):
        new.insert(k, 1)
    kept = [k for k in range(len(new)) if k not in gone]
    return lambda view: view.broadcast(shape, tuple(new), kept), 1.0


def _slice(params: dict, shape: Shape) -> tuple[_Place, float]:
    starts, stops = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(shape)
    return lambda view: sliced(view, starts, stops, strides), 1.0


def _tile(params: dict, shape: Shape) -> tuple[_Place, float]:
    reps = params["reps"]

    def place(view: View) -> View:
        for axis, count in enumerate(reps):
            view = view.tiled(axis, count) if count != 1 else view
        return view

    return place, math.sqrt(math.prod(reps))


def sliced(
    view: View, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int]
) -> View | None:
    """A view in a box of the value, ``None`` where nothing of it is there."""
    cut: View | None = view
    for axis, box in enumerate(zip(starts, stops, strides, strict=True)):
        cut = cut and cut.sliced(axis, *box)
    return cut


def split(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """The stretches that an axis is split into."""
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    ends = list(itertools.accumulate(map(int, sizes), initial=0))
    return [
        put(
            values[0],
            lambda view, box=(start, stop, 1): view.sliced(axis, *box),
            shape_of(out),
            eqn.primitive.name,
            notes,
        )
        for start, stop, out in zip(ends, ends[1:], eqn.outvars, strict=False)
    ]


def concatenate(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Values one after another along an axis."""
    axis = eqn.params["dimension"]
    starts = itertools.accumulate((v.shape[axis] for v in values), initial=0)
    places = [lambda view, start=start: view.moved(axis, start) for start in starts]
    return [_joined(eqn, values, places[: len(values)], axis, notes)]


def stack(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Values one after another along a new axis."""
    axis, shape = eqn.params["axis"], shape_of(eqn.outvars[0])
    own, old = (*shape[:axis], 1, *shape[axis + 1 :]), values[0].shape
    kept = [k for k in range(len(shape)) if k != axis]
    places = [
        lambda view, start=start: view.broadcast(old, own, kept).moved(axis, start)
        for start in range(len(values))
    ]
    return [_joined(eqn, values, places, axis, notes)]


def pad(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A value with others around it and between its numbers."""
    config, shape = eqn.params["padding_config"], shape_of(eqn.outvars[0])

    def place(view: View) -> View:
        for axis, (low, high, between) in enumerate(config):
            if min(low, high) < 0 or between:
                raise LostError
            if axis in view.occupied():
                view = view.moved(axis, low)
            else:  # As far as is known, it is repeated in what is put around it, too.
                view = view.repeated(axis, shape[axis])
        return view

    return [_joined(eqn, values, [place, lambda view: None], 0, notes)]


def _joined(
    eqn: Any,
    values: Sequence[Value],
    places: Iterable[_Place],
    axis: int,
    notes: Notes,
) -> Value:
    """Several values in one, where parameters among data are used as they are."""
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    node, link = notes.combine(eqn, values)
    data = node is not None
    if data:
        for value in values:
            notes.end(value, name)
    placed = [
        put(value, place, shape, name, notes)
        for value, place in zip(values, places, strict=True)
        if not (data and value.is_parameter)
    ]
    fresh = data and all(v.fresh or v.is_constant for v in values)
    return Value(
        shape,
        node,
        link,
        views=()
        if data
        else tuple(rejoined([x for v in placed for x in v.views], axis)),
        labels=tuple(x for v in placed for x in v.labels),
        fresh=fresh,
    )


_PLACES: dict[str, Callable[[dict, Shape], tuple[_Place, float]]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "slice": _slice,
    "tile": _tile,
}

RULES: dict[str, Callable[[Any, Sequence[Value], Notes], list[Value]]] = {
    **dict.fromkeys(SAME, same),
    "convert_element_type": converted,
    "rev": reversed_,
    **dict.fromkeys(_PLACES, moved),
    "split": split,
    "concatenate": concatenate,
    "stack": stack,
    "pad": pad,
}
