"""Functions of each number at a time: biases, scales, and what leaves are made into."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from weightreg._tracing._values import KINDS, Notes, Use, Value, shape_of
from weightreg._tracing._views import Shape, View, overlap

# Of one operand, and the leaf stays what it is.
_LINEAR = frozenset(("neg", "mul", "div", "real", "copy"))
_COMPARISONS = frozenset(("lt", "le", "gt", "ge"))
_ARITHMETIC: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.logical_and,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.logical_or,
    "rem": np.fmod,
    "select_n": lambda which, *cases: np.choose(np.asarray(which, int), cases),
    "sign": np.sign,
    "square": np.square,
    "sub": np.subtract,
}
_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz conj cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge
gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min
mul ne neg nextafter not or polygamma population_count pow real
regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square sub tan tanh xor bitcast_convert_type
"""
ELEMENTWISE = frozenset(_NAMES.split())


def elementwise(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A function of each number at a time."""
    shape = shape_of(eqn.outvars[0])
    if all(v.is_constant for v in values):
        return [_constant(eqn, values, shape)]
    values = [_lifted(v, shape) for v in values]
    _, *cases = values
    choice = eqn.primitive.name == "select_n" and all(v.is_parameter for v in cases)
    if choice and len({v.views for v in cases}) == 1:
        return cases[:1]  # One value in all cases, as where gradients are stopped.
    if all(v.node is None for v in values):
        return [_of_parameters(eqn, values, shape, notes)]
    values = [_on_zeros(v, notes) for v in values]
    return [_with_data(eqn, values, shape, notes)]


def _on_zeros(value: Value, notes: Notes) -> Value:
    """What a layer makes of zeros, on which recurrences call it first."""
    empty = [v.empty and not v.partner and not v.reduced for v in value.views]
    if value.node is not None or not empty or not all(empty):
        return value
    node = notes.graph.add("call", [])
    labels = tuple((_inner_use(view, notes, node), view) for view in value.views)
    return Value(value.shape, node, labels=labels, fresh=True)


def random_bits(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """Random numbers."""
    node, link = notes.combine(eqn, values)
    return [Value(shape_of(eqn.outvars[0]), node, link, random=node is not None)]


def _lifted(value: Value, shape: Shape) -> Value:
    """A value of the shape that a primitive broadcasts it to."""
    if value.shape == shape:
        return value
    axes = range(len(shape) - len(value.shape), len(shape))
    place = lambda view: view.broadcast(value.shape, shape, axes)  # noqa: E731
    views = tuple(map(place, value.views))
    labels = tuple((use, place(view)) for use, view in value.labels)
    return value.but(shape=shape, views=views, labels=labels)


def _constant(eqn: Any, values: Sequence[Value], shape: Shape) -> Value:
    """What constants give, with their numbers, if these are easy to tell."""
    of = _ARITHMETIC.get(eqn.primitive.name)
    if eqn.primitive.name == "div":
        of = _quotient_of(eqn.outvars[0].aval.dtype)
    numbers = [v.known if v.known is not None else v.numbers for v in values]
    loops = {v.loop for v in values if v.known is None}
    shapes = {v.shape for v in values if v.known is None}
    alike = len(loops) <= 1 and len(shapes) <= 1
    plain = alike and all(n is not None for n in numbers)
    if of is None or not plain:
        return Value(shape)
    with np.errstate(all="ignore"):
        found = np.asarray(of(*numbers), np.float64)
    if np.isnan(found).any():
        return Value(shape)
    most = float(np.max(np.abs(found)))
    if not found.ndim:
        return Value(shape, known=float(found), most=most)
    return Value(shape, numbers=found, loop=loops.pop(), most=most)


def _quotient_of(dtype: Any) -> Callable:
    """Division of integers is cut off, and that of other numbers is not."""
    if jnp.issubdtype(dtype, jnp.integer):
        return lambda a, b: np.trunc(np.divide(a, b))
    return np.divide


def _of_parameters(
    eqn: Any, values: Sequence[Value], shape: Shape, notes: Notes
) -> Value:
    """What parameters give among themselves, and with constants."""
    name = eqn.primitive.name
    called = _learnt(name, values, shape, notes)
    if called is not None:
        return called
    leaves = [v for v in values if v.is_parameter]
    linear = name in _LINEAR and (name != "div" or values[0].is_parameter)
    changed = len(leaves) > 1 or not linear
    factor = _factor(name, values)
    views = [x.times(factor) for v in leaves for x in v.views]
    views = [x.marked(name) for x in views] if changed else views
    return Value(shape, views=tuple(dict.fromkeys(views)))


def _factor(name: str, values: Sequence[Value]) -> float:
    """What numbers are at most multiplied by in a product with a constant."""
    constants = [v for v in values if v.is_constant]
    if name == "mul" and constants:
        return constants[0].most
    if name == "div" and constants:
        return 1 / abs(constants[0].known) if constants[0].known else math.inf
    return 1.0


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
    changing = name in (*KINDS, "select_n") or len(data) + len(uses) == 1
    views = [x for v in values for x in v.views] if changing else []
    sums = name in ("add", "sub", "add_any", "neg")
    if sums and len(data) == 2 and all(v.fresh for v in data):
        _note_slices(data[0], data[1], notes)
    scales = name in ("mul", "div") and len(data) == 1 and not uses
    scales = scales and (name != "div" or values[0].node is not None)
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
        random=all(v.random for v in data),
    )


def _note_slices(a: Value, b: Value, notes: Notes) -> None:
    """Notes down slices of one weight whose results are added up."""
    feeds = notes.graph.feeds
    for use, _ in a.labels:
        for other, _ in b.labels:
            own = tuple(k for k in use.unseen() if k in other.unseen())
            if use.leaf != other.leaf or not own or overlap(use.view, other.view, own):
                continue
            if not feeds(use.node, other.node) and not feeds(other.node, use.node):
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
            if _match(bias, view) and _is_plain(bias) and _of_one(bias, view, use)
            if view.region == use.view.region
        ]
        if len({id(bias) for _, bias in found}) < len(added.views):
            continue
        for use, bias in found:
            use.bias, use.biases = bias.leaf, use.biases + 1
        if any(use.biases > 1 for use, _ in found):
            continue
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
    parts = [part.axis for own in units.axes for part in own if part.size > 1]
    # An axis that was split may have been put together in another order.
    whole = len(parts) == len({*parts})
    return whole and bias.occupied() == units.occupied() and bias.span == units.span


def _is_plain(bias: View) -> bool:
    """Whether a leaf is there as it is."""
    return not (bias.reduced or bias.inner or bias.made)


def _of_one(bias: View, units: View, use: Use) -> bool:
    """Whether a leaf and units are those of the same one of several stacked layers."""
    same = bias.order() == units.order() and not bias.doubled
    rows = [{(own.loop, own.rows) for own in view.own} for view in (bias, units)]
    return same and rows[0] == rows[1] and bias.cut() == use.view.cut()


def _settle(value: Value, name: str, notes: Notes) -> list[Use]:
    """Notes down what the leaves of a value are, which a primitive uses as they are."""
    uses = []
    kind = KINDS.get(name, "other")
    for view in value.views:
        if view.partner or kind == "other":
            name = "dot_general" if view.partner else name
            uses.append(notes.use("other", name, view))
        else:
            # What is repeated along the others' axes was one of the two before.
            kinds = [KINDS[n] for n in view.made if n in KINDS]
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


RULES = {**dict.fromkeys(ELEMENTWISE, elementwise), "random_bits": random_bits}
