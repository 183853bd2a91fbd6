"""Primitives in which parameters meet data, or each other: sums, products, look-ups."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightreg._core._graph import Link
from weightreg._core._rearrange import put, shape_of, sliced
from weightreg._core._values import Notes, Use, Value
from weightreg._core._views import Part, Shape, View, overlap

_KINDS = {
    **dict.fromkeys(("add", "sub", "add_any"), "bias"),
    **dict.fromkeys(("mul", "div"), "scale"),
}
# Of one operand, and the leaf stays what it is.
_LINEAR = frozenset(("neg", "mul", "div", "real", "copy"))
_COMPARISONS = frozenset(("lt", "le", "gt", "ge"))
_ARITHMETIC: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": max,
    "min": min,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "select_n": lambda which, *cases: cases[int(which)],
}
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "cbrt ceil clamp clz conj cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 "
    "floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul ne neg nextafter not or polygamma population_count pow "
    "real regularized_incomplete_beta rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh "
    "xor bitcast_convert_type random_bits random_wrap random_unwrap".split()
)


def elementwise(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A function of each number at a time."""
    shape = shape_of(eqn.outvars[0])
    if all(v.is_constant for v in values):
        return [_constant(eqn, values, shape)]
    values = [_lifted(v, shape) for v in values]
    if all(v.node is None for v in values):
        return [_of_parameters(eqn, values, shape, notes)]
    return [_with_data(eqn, values, shape, notes)]


def _lifted(value: Value, shape: Shape) -> Value:
    """A value of the shape that a primitive broadcasts it to."""
    if value.shape == shape:
        return value
    axes = range(len(shape) - len(value.shape), len(shape))
    views = tuple(view.broadcast(shape, axes) for view in value.views)
    labels = tuple((use, view.broadcast(shape, axes)) for use, view in value.labels)
    return value.but(shape=shape, views=views, labels=labels)


def _constant(eqn: Any, values: Sequence[Value], shape: Shape) -> Value:
    """What constants give, with the number that it repeats, if that is easy to tell."""
    of = _ARITHMETIC.get(eqn.primitive.name)
    numbers = [v.known for v in values]
    loops = [v.distinct for v in values if v.distinct is not None]
    if of is None or None in numbers or any(math.isnan(n) for n in numbers):  # pyright: ignore
        return Value(shape, distinct=max(loops, default=None))
    return Value(shape, known=float(of(*numbers)))


def _of_parameters(
    eqn: Any, values: Sequence[Value], shape: Shape, notes: Notes
) -> Value:
    """What parameters give among themselves, and with constants."""
    name = eqn.primitive.name
    called = _learnt(name, values, shape, notes)
    if called is not None:
        return called
    leaves = [v for v in values if v.is_parameter]
    changed = len(leaves) > 1 or name not in _LINEAR
    views = [x.marked(name) if changed else x for v in leaves for x in v.views]
    return Value(shape, views=tuple(dict.fromkeys(views)))


def _learnt(
    name: str, values: Sequence[Value], shape: Shape, notes: Notes
) -> Value | None:
    """A layer that is called on parameters, which a bias added to its units shows."""
    if name not in ("add", "add_any") or len(values) != 2:
        return None
    for made, added in (values, values[::-1]):
        if len(added.views) != 1 or added.views[0].inner or added.views[0].made:
            continue
        bias = added.views[0]
        for view in made.views:
            if view.inner and _match(bias, view) and view.leaf != bias.leaf:
                rest = made.but(views=tuple(v for v in made.views if v is not view))
                _settle(rest, "dot_general", notes)
                node = notes.graph.add("call", [])
                use = _inner_use(view, notes, node)
                use.bias = bias.leaf
                notes.use("bias", name, bias)
                return Value(shape, node, labels=((use, view),))
    return None


def _with_data(eqn: Any, values: Sequence[Value], shape: Shape, notes: Notes) -> Value:
    """What data give with each other, with parameters and with constants."""
    name = eqn.primitive.name
    bias = _bias(eqn, values, notes)
    if bias is not None:
        return bias
    data = [v for v in values if v.node is not None]
    uses: list[Use] = []
    for value in values:
        if value.is_parameter:
            uses += _settle(value, name, notes)
    node, link = notes.combine(eqn, values)
    changing = name in (*_KINDS, "select_n") or len(data) + len(uses) == 1
    views = [x for v in values for x in v.views] if changing else []
    sums = name in ("add", "sub", "add_any", "neg")
    if sums and len(data) == 2 and all(v.fresh for v in data):
        _note_slices(*data, notes)
    scales = name in ("mul", "div") and len(data) == 1 and not uses
    return Value(
        shape,
        node,
        link,
        views=tuple(views),
        uses=tuple(u for v in data if changing for u in v.uses) + tuple(uses),
        labels=tuple(dict.fromkeys(x for v in data for x in v.labels)),
        fresh=(sums or scales) and not uses and all(v.fresh for v in data),
        product=data[0] if name == "mul" and len(data) == 1 and uses else None,
        outer=any(v.outer for v in data) or (name == "mul" and _is_outer(data)),
        multiple=_multiple(name, values),
        sign=_sign(name, values),
        summands=_summands(values) if name in ("add", "add_any") else (),
    )


def _note_slices(a: Value, b: Value, notes: Notes) -> None:
    """Notes down slices of one weight whose results are added up."""
    for use, _ in a.labels:
        for other, _ in b.labels:
            own = tuple(k for k in use.unseen() if k in other.unseen())
            apart = not overlap(use.view, other.view, own)
            chained = notes.graph.feeds(use.node or 0, other.node)
            chained = chained or notes.graph.feeds(other.node or 0, use.node)
            if use.leaf == other.leaf and own and apart and not chained:
                notes.summed.append((use, own))


def _summands(values: Sequence[Value]) -> tuple[tuple[Use, int], ...]:
    """Layers whose units are added to a value as it is, with the node of that."""
    a, b = values
    return tuple(
        (use, plain.node)
        for fresh, plain in ((a, b), (b, a))
        if fresh.fresh and plain.node is not None and not plain.link.primitives
        for use, _ in fresh.labels
    )


def _multiple(name: str, values: Sequence[Value]) -> tuple[int, float] | None:
    """The value that a product with a constant is a multiple of."""
    if name == "neg":
        base, factor = values[0].base()
        return base, -factor
    if name != "mul" or sum(v.node is not None for v in values) != 1:
        return None
    data, other = sorted(values, key=lambda v: v.node is None)
    if other.known is None:
        return None
    base, factor = data.base()
    return base, factor * other.known


def _sign(name: str, values: Sequence[Value]) -> int | None:
    """The value whose sign a comparison with zero tells."""
    if name in _COMPARISONS and values[1].known == 0 and values[0].node is not None:
        return values[0].base()[0]
    return None


def _is_outer(data: Sequence[Value]) -> bool:
    """Whether factors have axes of their own, of which labels tell."""
    axes = [{k for _, x in v.labels for k in x.occupied()} for v in data]
    return len(axes) == 2 and bool(axes[0] - axes[1]) and bool(axes[1] - axes[0])


def _bias(eqn: Any, values: Sequence[Value], notes: Notes) -> Value | None:
    """The sum of a layer's units with its bias, if it is one."""
    name = eqn.primitive.name
    if name not in ("add", "sub", "add_any"):
        return None
    for units, added in (values, values[::-1]):
        looked = added.node is not None and all(v.looked for v in added.views)
        if not units.fresh or not added.views or not (added.node is None or looked):
            continue
        found = [
            (use, bias)
            for bias in added.views
            for use, view in units.labels
            if _match(bias, view) and not (bias.reduced or bias.inner or bias.made)
            if view.region == use.view.region
        ]
        if len({id(bias) for _, bias in found}) < len(added.views):
            continue
        for use, bias in found:
            use.bias = bias.leaf
        for use in added.uses:
            use.gone = True
        for bias in added.views:
            notes.use("bias", name, bias)
        if looked:
            node, link = notes.combine(eqn, values)
            return units.but(node=node, link=link)
        return units.but(shape=shape_of(eqn.outvars[0]))
    return None


def _match(bias: View, units: View) -> bool:
    """Whether a leaf lies along just those axes of a value that number units."""
    places = units.occupied()
    return bias.occupied() == places and all(
        bias.span[k] == units.span[k] for k in places
    )


def _settle(value: Value, name: str, notes: Notes) -> list[Use]:
    """Notes down what the leaves of a value are, which a primitive uses as they are."""
    uses = []
    kind = _KINDS.get(name, "other")
    for view in value.views:
        if view.inner and not view.partner and not view.reduced:
            _inner_use(view, notes, notes.graph.add("call", []))
        elif view.partner or kind == "other":
            name = "dot_general" if view.partner else name
            uses.append(notes.use("other", name, view))
        else:
            # What is repeated along the others' axes was one of the two before.
            kinds = [_KINDS[n] for n in view.made if n in _KINDS]
            full = view.occupied() == _occupied(value) or not kinds
            uses.append(notes.use(kind if full else kinds[-1], name, view))
    return uses


def _occupied(value: Value) -> frozenset[int]:
    """The axes along which some leaf of a value is not repeated."""
    return frozenset(k for view in value.views for k in view.occupied())


def _inner_use(view: View, notes: Notes, node: int) -> Use:
    """The use of a weight that was contracted with constants or with parameters."""
    return notes.use(
        "weight",
        "dot_general",
        view,
        node=node,
        inputs=tuple(sorted(view.inner)),
        outputs=view.at(range(len(view.axes))),
    )


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
    shape = shape_of(eqn.outvars[0])
    if all(v.is_constant for v in values):
        return Value(shape)
    gone = [tuple(c) for c in contracted]
    places = [_places(values, gone, batch, side) for side in (0, 1)]
    if all(v.node is None for v in values):
        partner = all(v.is_parameter for v in values)
        views = [
            _onto(
                view.contracted(gone[side], partner, "dot_general"),
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


def _onto(
    view: View, places: Mapping[int, int], gone: Sequence[int], shape: Shape
) -> View:
    """A view without some axes, with those that are left in other places."""
    kept = [k for k in sorted(places) if k not in gone]
    return view.broadcast(shape, [places[k] for k in kept])


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
        if full and _feeds_more(data, value, notes):
            return side
    return None


def _is_matrix(
    value: Value, view: View, gone: Sequence[int], batch: Sequence[int]
) -> bool:
    """Whether a leaf that data have changed is still a matrix of them."""
    free = [k for k in range(len(value.shape)) if k not in (*gone, *batch)]
    whole = all(k in view.occupied() for k in (*gone, *free) if value.shape[k] != 1)
    return whole and not view.reduced and bool(view.at(gone)) and bool(view.at(free))


def _feeds_more(data: Value, changed: Value, notes: Notes) -> bool:
    """Whether data are others than those that have changed what may be a weight.

    What was added to data might be a weight with noise, or an offset of the data. Only
    noise depends on nothing but keys.
    """
    nodes = notes.graph.nodes
    if data.node is None:
        return False
    own = nodes[changed.node].inputs  # pyright: ignore
    added = any(use.kind == "bias" for use in changed.uses)
    noise = own <= notes.keys
    return (noise or not added) and not nodes[data.node].inputs <= own


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
        _note_averaged(value, gone[side], values[1 - side], gone[1 - side], notes)
    labels = [
        (use, _onto(view.without(gone[side]), places[side], gone[side], shape))
        for side, value in enumerate(values)
        for use, view in value.labels
    ]
    node, link = notes.combine(eqn, values)
    free = [len(p) > len(batch[0]) for p in places]
    both = all(v.node is not None for v in values)
    outer = both and all(free) and not gone[0]
    return Value(shape, node, link, labels=tuple(labels), outer=outer)


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
            labels.append((use, _onto(view.without(gone), places, gone, shape)))
    return Value(shape, node, labels=tuple(labels), fresh=True)


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
        kinds = [_KINDS[n] for n in view.made if n in _KINDS]
        return notes.use("scale" if full or not kinds else kinds[-1], name, view)
    if set(inputs) & set(outputs):
        return notes.use("other", name, view)
    return notes.use("weight", name, view, inputs=inputs, outputs=outputs)


def _is_whole(view: View, gone: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether a leaf itself has inputs and units."""
    plain = not view.reduced and not view.inner
    return plain and bool(view.at(gone)) and bool(view.at(kept))


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


def _note_averaged(
    value: Value,
    gone: Sequence[int],
    other: Value,
    gone_there: Sequence[int],
    notes: Notes,
) -> None:
    """Notes down units that are summed with what no layer's units are multiplied by."""
    theirs = {a for _, v in other.labels for a in v.at(gone_there)}
    for use, view in value.labels:
        axes = tuple(a for a in view.at(gone) if a in use.outputs)
        if axes and len(use.outputs) > 1 and not theirs and other.node is not None:
            notes.shared.append((use, axes))


def convolution(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Sums of products along a window that moves."""
    data, kernel = values
    shape, params = shape_of(eqn.outvars[0]), eqn.params
    if params["batch_group_count"] != 1 or data.is_parameter:
        return other(eqn, values, notes)
    if not kernel.views:
        return [_convolved(eqn, values, shape, notes)]
    out, channels, *window = params["dimension_numbers"].rhs_spec
    gone = (*window, channels)
    if data.node is None or (
        kernel.node is not None
        and not (
            any(_is_matrix(kernel, v, (*window, channels), ()) for v in kernel.views)
            and _feeds_more(data, kernel, notes)
        )
    ):
        return other(eqn, values, notes)
    groups, stacked = params["feature_group_count"], ()
    kernel, stacked, groups = _stacked_kernels(kernel, out, groups)
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
) -> tuple[Value, tuple[int, ...], int]:
    """The axes of leaves that stack kernels, which `jax.vmap` merges into groups."""
    stacked: list[int] = []
    if len(kernel.views) == 1:
        view = kernel.views[0]
        *outer, last = [p for p in view.axes[out] if p.size > 1] or [Part(None, 1)]
        for part in outer:
            own = part.axis not in (None, last.axis)
            if not own or part.axis is None or groups % part.size or groups == 1:
                break
            groups //= part.size
            stacked.append(part.axis)
    return kernel, tuple(stacked), groups


def _convolved(eqn: Any, values: Sequence[Value], shape: Shape, notes: Notes) -> Value:
    """Data that are convolved with data or with constants."""
    node, link = notes.combine(eqn, values)
    return Value(shape, node, link)


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
    node, link = notes.combine(eqn, values)
    labels = tuple((use, view.without(axes)) for use, view in value.labels)
    # A sum over places is linear, and what is added to it is added to units.
    fresh = value.fresh and name == "reduce_sum"
    fresh = fresh and not any(view.at(axes) for _, view in value.labels)
    return [Value(shape, node, link, labels=labels, outer=value.outer, fresh=fresh)]


def _note_summed(value: Value, axes: Sequence[int], name: str, notes: Notes) -> None:
    """Notes down slices of weights whose results are summed, and averaged members."""
    for use, view in value.labels:
        there = view.at(axes)
        slices = tuple(a for a in there if a not in (*use.inputs, *use.outputs))
        if slices and value.fresh and name == "reduce_sum":
            notes.summed.append((use, slices))
        first = tuple(a for a in there if a in use.outputs[:-1] and not use.window)
        if first:
            notes.shared.append((use, first))


def gather(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Slices that are looked up."""
    value, indices = values
    shape = shape_of(eqn.outvars[0])
    if not value.is_parameter:
        node, link = notes.combine(eqn, values)
        return [Value(shape, node, link)]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    chosen = [k for k in numbers.start_index_map if sizes[k] != value.shape[k]]
    if any(sizes[k] != 1 for k in chosen) or indices.is_parameter:
        return other(eqn, values, notes)
    rows = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    places = _gathered(numbers, len(sizes), rows)
    known = indices.is_constant and indices.distinct is None
    if known and len(chosen) == 1 and len(rows) == 1:
        # A list of rows that is known beforehand: some of the slices, in some order.
        count = shape[rows[0]]
        places[chosen[0]] = rows[0]
        place = lambda view: _spread(view.picked(chosen[0], count), places, shape)  # noqa: E731
        return [put(value, place, shape, "gather", notes)]
    if known and rows and chosen:
        return other(eqn, values, notes)
    for axis in chosen:
        places.pop(axis, None)
    place = lambda view: _spread(_looked(view, chosen, indices), places, shape)  # noqa: E731
    return [_chosen(eqn, value, indices, place, shape, notes)]


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
    kept = sorted(places)
    return view.permuted(kept).broadcast(shape, [places[k] for k in kept])


def parts(axes: Sequence[int], size: int) -> tuple[Part, ...]:
    """The parts of an axis that is one of the leaf's."""
    return tuple(Part(axis, size) for axis in axes)


def _looked(view: View, chosen: Sequence[int], indices: Value) -> View:
    """A view of which slices were chosen along some axes, by data or by a loop."""
    axes = view.at(chosen)
    if indices.node is None:
        own = {(indices.distinct, a) for a in axes if indices.distinct is not None}
        return dataclasses.replace(view, own=view.own | own)
    return dataclasses.replace(view, looked=view.looked | frozenset(axes))


def _chosen(
    eqn: Any,
    value: Value,
    indices: Value,
    place: Callable[[View], View],
    shape: Shape,
    notes: Notes,
) -> Value:
    """Slices of parameters that data or a loop have chosen."""
    name = eqn.primitive.name
    if indices.node is None:
        return put(value, place, shape, name, notes)
    node = notes.join(name, [indices])
    views = tuple(map(place, value.views))
    uses = tuple(notes.use("embedding", name, view) for view in views)
    return Value(shape, node, views=views, uses=uses)


def dynamic_slice(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A box of a value that begins where other values say."""
    value, *starts = values
    shape, sizes = shape_of(eqn.outvars[0]), eqn.params["slice_sizes"]
    axes = [
        k
        for k, (n, all_) in enumerate(zip(sizes, value.shape, strict=True))
        if n != all_
    ]
    ruling = [starts[k] for k in axes]
    if all(v.known is not None for v in ruling) and (value.views or value.labels):
        begin = [
            int(starts[k].known or 0) if k in axes else 0 for k in range(len(sizes))
        ]
        begin = [
            min(b, n - s) for b, n, s in zip(begin, value.shape, sizes, strict=True)
        ]
        ends = [b + n for b, n in zip(begin, sizes, strict=True)]
        strides = (1,) * len(sizes)
        return [
            put(
                value,
                lambda v: sliced(v, begin, ends, strides),
                shape,
                "dynamic_slice",
                notes,
            )
        ]
    if not value.is_parameter:
        node, link = notes.combine(eqn, [value, *ruling])
        if node is None:
            return [Value(shape)]
        return [Value(shape, node, link)]
    indices = next((v for v in ruling if v.node is not None), None)
    indices = indices or next((v for v in ruling if v.distinct is not None), Value(()))
    if any(sizes[k] != 1 for k in axes) or any(v.is_parameter for v in ruling):
        return other(eqn, values, notes)
    places = {k: k for k in range(len(sizes)) if k not in axes}
    place = lambda view: _spread(_looked(view, axes, indices), places, shape)  # noqa: E731
    return [_chosen(eqn, value, indices, place, shape, notes)]


def other(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A primitive that says nothing of what the axes of parameters mean."""
    name = eqn.primitive.name
    for value in values:
        notes.end(value, name)
    node, link = notes.combine(eqn, values)
    made = dict.fromkeys(
        (x.leaf, (*x.made, name)) for v in values for x in v.views if v.node is None
    )
    outs = []
    for variable in eqn.outvars:
        shape = shape_of(variable)
        views = [View.unplaced(leaf, shape, own) for leaf, own in made]
        outs.append(
            Value(shape, node, link, views=() if node is not None else tuple(views))
        )
    return outs


RULES: dict[str, Callable[[Any, Sequence[Value], Notes], list[Value]]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "conv_general_dilated": convolution,
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
        "argmax argmin".split(),
        reduction,
    ),
    "gather": gather,
    "dynamic_slice": dynamic_slice,
}
