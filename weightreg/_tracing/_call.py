"""The call of a layer: what the leaves are that its weight is made of."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from weightreg._tracing._values import KINDS, Notes, Use, Value
from weightreg._tracing._views import Shape, View


def onto(
    view: View, places: Mapping[int, int], gone: Sequence[int], shape: Shape
) -> View:
    """A view without some axes, with those that are left in other places."""
    kept = [places[k] for k in sorted(places) if k not in gone]
    return view.broadcast(tuple(shape[k] for k in kept), shape, kept)


def call(
    eqn: Any,
    data: Value,
    weight: Value,
    gone: Sequence[int],
    places: Mapping[int, int],
    shape: Shape,
    notes: Notes,
    batch: Sequence[int] = (),
    **details: Any,
) -> Value:
    """A layer that is called on data.

    Args:
      eqn: The equation.
      data: What the layer is called on.
      weight: What its weight is.
      gone: The axes of ``weight`` that are contracted, in order.
      places: Where the other axes of it are in the result.
      shape: The shape of the result.
      notes: Where to note it down.
      batch: The axes of ``weight`` that are also the data's, in which layers differ.
      **details: What else is known of the use.
    """
    sources = [v for v in (data, weight) if v.node is not None]
    node = notes.graph.add("call", [(v.node, v.link) for v in sources])  # pyright: ignore
    for use in weight.uses:
        use.gone = True
    if weight.node is not None and _forget_statistics(weight, notes):
        names = dict.fromkeys(use.name for use in weight.uses)
        weight = weight.but(views=tuple(v.marked(*names) for v in weight.views))
    labels = []
    for view in weight.views:
        use = _weight_use(eqn, view, weight, gone, batch, notes)
        if use.kind == "weight":
            use.node, use.shape, use.outer = node, data.shape, data.outer
            for name, value in details.items():
                setattr(use, name, value)
            labels.append((use, onto(view.without(gone), places, gone, shape)))
    return Value(shape, node, labels=tuple(labels), fresh=True)


def _weight_use(
    eqn: Any,
    view: View,
    weight: Value,
    gone: Sequence[int],
    batch: Sequence[int],
    notes: Notes,
) -> Use:
    """What a leaf is in a value that is contracted with data along some axes."""
    name = eqn.primitive.name
    kept = [k for k in range(len(weight.shape)) if k not in (*gone, *batch)]
    inputs, outputs = view.at(gone), view.at(kept)
    whole = [v for v in weight.views if v is not view and _is_whole(v, gone, kept)]
    full = any(v.leaf != view.leaf for v in whole)
    if not _is_whole(view, gone, kept) and any(v.leaf == view.leaf for v in whole):
        # A part of the weight is a statistic of it, as a row that all are shifted by.
        return notes.use("other", name, view, weak=True)
    if view.reduced:
        return notes.use("other", name, view, weak=True)
    if view.inner:
        if view.partner and not full:
            return notes.use("other", name, view)
        if inputs and not outputs:
            outputs = tuple(sorted(view.inner))
        elif outputs and not inputs:
            inputs = tuple(sorted(view.inner))
        else:
            return notes.use("other", name, view)
    elif not inputs or (not outputs and full):
        kinds = [KINDS[n] for n in view.made if n in KINDS]
        return notes.use("scale" if full or not kinds else kinds[-1], name, view)
    apart = {own.axis for own in view.own} | view.looked
    if apart & {*inputs, *outputs}:  # Slices of an axis are layers, and rows in them.
        return notes.use("other", "reshape", view)
    # A row of numbers that is repeated for the units, as on a diagonal, is no weight.
    repeated = not outputs and any(weight.shape[k] > 1 for k in kept)
    if set(inputs) & set(outputs) or repeated:
        return notes.use("other", name, view)
    alone = all(k in view.occupied() for k in (*kept, *gone) if weight.shape[k] > 1)
    single = all(part.axis is not None for own in view.axes for part in own)
    once = not view.doubled & {*inputs, *outputs}
    factor = view.factor if alone and single and once else math.inf
    return notes.use(
        "weight", name, view, inputs=inputs, outputs=outputs, factor=factor
    )


def _is_whole(view: View, gone: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether a leaf itself has inputs and units."""
    plain = not view.reduced and not view.inner
    return plain and bool(view.at(gone)) and bool(view.at(kept))


def _forget_statistics(weight: Value, notes: Notes) -> bool:
    """Weakens uses of leaves that only make what they are changed by themselves.

    Spectral normalization multiplies a weight by vectors to find its norm.
    """
    leaves = {view.leaf for view in weight.views}
    before = notes.graph.before(weight.node)  # pyright: ignore
    found = [u for u in notes.uses if u.leaf in leaves and u.node in before]
    for use in found:
        use.weak = True
    return bool(found)
