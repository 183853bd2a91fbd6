"""What a network does with its parameters, read from its jaxpr.

`Follower` goes through the equations in order and keeps for each value which parameters
lie in it (`View`) and which node of the `Graph` it was computed from. Loops are gone
through once, and branches one after another.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from weightreg._tracing import _contract, _elementwise, _lookup, _rearrange
from weightreg._tracing._graph import SAME, Link, Loop
from weightreg._tracing._values import (
    MOST,
    Notes,
    Use,
    Value,
    constant,
    other,
    shape_of,
)
from weightreg._tracing._views import Own, Part, Shape, View

_RULES = {
    **_rearrange.RULES,
    **_elementwise.RULES,
    **_contract.RULES,
    **_lookup.RULES,
}
# Primitives that call a jaxpr on their operands.
_NAMES = """
jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
custom_vmap_call remat remat2 checkpoint
"""
_CALLS = frozenset(_NAMES.split())
# What is computed from a value: from nothing, from parameters, or from data.
_NOTHING, _PARAMETERS, _DATA = range(3)


class Follower:
    """Follows parameters and data through a jaxpr, and notes down what it sees."""

    def __init__(self) -> None:
        self.notes = Notes()

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        """The values that a jaxpr returns."""
        jaxpr: Jaxpr = closed.jaxpr
        read = lambda atom: (  # noqa: E731
            constant(atom.val) if isinstance(atom, Literal) else env[atom]
        )
        env = dict(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
        env |= dict(zip(jaxpr.invars, arguments, strict=True))
        readers = _readers(jaxpr)
        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            for variable, value in zip(eqn.outvars, outs, strict=True):
                if value.product is not None and readers[variable] != 1:
                    value = value.but(product=None)
                env[variable] = value
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, values)
        if name == "while":
            return self._while(eqn, values)
        if name == "cond":
            return self._cond(eqn, values)
        if name in _RULES:
            return _RULES[name](eqn, values, self.notes)
        body = _body(eqn)
        if body is not None:
            return self.run(body, values)
        if all(v.is_constant for v in values):
            if name == "iota":
                return [_iota(shape_of(eqn.outvars[0]))]
            return [Value(shape_of(v)) for v in eqn.outvars]
        return other(eqn, values, self.notes)

    def _cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Branches, of which any may be taken."""
        which, *operands = values
        results = [self.run(branch, operands) for branch in eqn.params["branches"]]
        return [
            self._either(eqn, which, cases, shape_of(variable))
            for variable, *cases in zip(eqn.outvars, *results, strict=True)
        ]

    def _either(
        self, eqn: Any, which: Value, cases: list[Value], shape: tuple[int, ...]
    ) -> Value:
        """One of several values, which another one chooses."""
        views = tuple(dict.fromkeys(x for v in cases for x in v.views))
        if which.node is None and all(v.node is None for v in cases):
            known = {v.known for v in cases}
            return Value(
                shape, views=views, known=known.pop() if len(known) == 1 else None
            )
        if which.node is not None and len(views) and all(v.node is None for v in cases):
            node = self.notes.join("cond", [which])
            uses = tuple(self.notes.use("other", "cond", view) for view in views)
            return Value(shape, node, views=views, uses=uses)
        for value in cases:
            self.notes.end(value, "cond")
        node, link = self.notes.combine(eqn, [which, *cases])
        labels = dict.fromkeys(x for v in cases for x in v.labels)
        return Value(shape, node, link, labels=tuple(labels))

    def _scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        """A loop of a known number of rounds."""
        p, body = eqn.params, eqn.params["jaxpr"]
        consts, carry = _scan_counts(p)
        graph = self.notes.graph
        loop = graph.enter(p["length"])
        slices = [
            self._slice_of(v, loop, p["reverse"]) for v in values[consts + carry :]
        ]
        begin = values[consts : consts + carry]
        carried = self._carried(
            body, values[:consts], begin, slices, loop, body.jaxpr.outvars[:carry]
        )
        outs = self.run(body, [*values[:consts], *carried, *slices])
        self._close(loop, carried, outs[:carry])
        ends = self._ends(begin, carried, outs[:carry])
        stacked = [self._stack_of(v, loop, p["length"]) for v in outs[carry:]]
        return [*ends, *stacked]

    def _while(self, eqn: Any, values: list[Value]) -> list[Value]:
        """A loop of as many rounds as it takes."""
        p = eqn.params
        count, own = p["cond_nconsts"], p["body_nconsts"]
        test, consts, begin = (
            values[:count],
            values[count : count + own],
            values[count + own :],
        )
        loop = self.notes.graph.enter(math.inf)
        body = p["body_jaxpr"]
        carried = self._carried(body, consts, begin, [], loop, body.jaxpr.outvars)
        (goes_on,) = self.run(p["cond_jaxpr"], [*test, *carried])
        outs = self.run(body, [*consts, *carried])
        self._close(loop, carried, outs)
        return self._ends(begin, carried, outs, goes_on)

    def _carried(
        self,
        body: ClosedJaxpr,
        consts: Sequence[Value],
        begin: Sequence[Value],
        slices: Sequence[Value],
        loop: Loop,
        outs: Sequence[Any],
    ) -> list[Value]:
        """What a loop carries, as it is in any of its rounds."""
        kinds = [_kind(v) for v in begin]
        while True:
            inside = [*map(_kind, consts), *kinds, *map(_kind, slices)]
            after = _kinds(body, inside)[: len(begin)]
            new = [max(pair) for pair in zip(kinds, after, strict=True)]
            if new == kinds:
                break
            kinds = new
        first = len(consts)
        variables = body.jaxpr.invars[first : first + len(begin)]
        return [
            self._carry(value, kind, _change(body, variable, out), loop)
            if kind != _PARAMETERS or variable is out
            else _unplaced(value.shape, [*consts, *begin, *slices], loop)
            for value, kind, variable, out in zip(
                begin, kinds, variables, outs, strict=True
            )
        ]

    def _carry(
        self, value: Value, kind: int, change: float | None, loop: Loop
    ) -> Value:
        """What one carry is in any round, given what is added to it in each."""
        notes = self.notes
        if change == 0:
            return value
        if kind == _DATA:
            notes.end(value, _name(loop))
            sources = [] if value.node is None else [(value.node, value.link)]
            node = notes.graph.add("carry", sources)
            loop.carries.append(node)
            return Value(value.shape, node)
        if change is None or value.known is None or not loop.rounds <= MOST:
            return Value(value.shape)
        numbers = value.known + change * np.arange(loop.rounds)
        return Value(value.shape, numbers=numbers, loop=loop.number)

    def _close(
        self,
        loop: Loop,
        carried: Sequence[Value],
        outs: Sequence[Value],
    ) -> None:
        """Feeds the carries of a loop with what its rounds have made of them."""
        graph = self.notes.graph
        graph.leave(loop)
        for before, after in zip(carried, outs, strict=True):
            if before.node in loop.carries and after.node is not None:
                graph.nodes[before.node].again.append((after.node, after.link))
                self._note_summed(before, after, loop)

    def _note_summed(self, before: Value, after: Value, loop: Loop) -> None:
        """Notes down slices of a weight whose results a loop adds up."""
        for use, _ in self._sums(before, after):
            own = tuple(
                own.axis
                for own in use.view.own
                if own.loop == loop.number and own.axis >= 0
            )
            if own:
                self.notes.summed.append((use, own))

    def _sums(self, before: Value, after: Value) -> list[tuple[Use, int]]:
        """The layers whose results are added to what a loop carries.

        Where a layer is called on what the loop carries, as in a residual block, its
        slices are called one after another, and are no summands.
        """
        feeds = self.notes.graph.feeds
        return [
            (use, number)
            for use, number in after.summands
            if number == before.node and not feeds(number, use.node)
        ]

    def _ends(
        self,
        begin: Sequence[Value],
        carried: Sequence[Value],
        outs: Sequence[Value],
        goes_on: Value | None = None,
    ) -> list[Value]:
        """What a loop has carried after its last round, of which data may decide."""
        graph, ends = self.notes.graph, []
        for first, before, after in zip(begin, carried, outs, strict=True):
            if before is first:
                ends.append(first)
            elif before.node is None:
                ends.append(before)
            elif after.node is None:
                ends.append(after.but(shape=before.shape))
            else:
                node = graph.add("exit", [(after.node, after.link)])
                if goes_on is not None and goes_on.node is not None:
                    node = self.notes.join("while", [Value((), node), goes_on])
                fresh = bool(self._sums(before, after))
                ends.append(Value(before.shape, node, labels=after.labels, fresh=fresh))
        return ends

    def _slice_of(self, value: Value, loop: Loop, reverse: bool) -> Value:
        """What a round of a loop gets of a value that it goes through."""
        if value.is_constant:
            inside = Value(value.shape[1:], known=value.known, most=value.most)
            if value.numbers is None or len(value.shape) != 1 or value.loop is not None:
                return inside
            numbers = value.numbers[::-1] if reverse else value.numbers
            return inside.but(numbers=numbers, loop=loop.number)
        leaves = [view.leaf for view in value.views]
        views = tuple(
            _slice_of_view(view, loop, reverse, leaves.count(view.leaf) == 1)
            for view in value.views
        )
        labels = tuple((use, view.without([0])) for use, view in value.labels)
        link = value.link
        if value.node is not None:
            link = link.then(Link(("scan",)))
        return value.but(shape=value.shape[1:], views=views, labels=labels, link=link)

    def _stack_of(self, value: Value, loop: Loop, length: int) -> Value:
        """What is left of a value after all rounds: one for each, stacked."""
        shape = (length, *value.shape)
        kept = range(1, len(shape))
        views = []
        for view in value.views:
            placed = view.broadcast(value.shape, shape, kept)
            axes = [o.axis for o in view.own if o.loop == loop.number and o.axis >= 0]
            if axes:
                rows, spans = list(placed.axes), placed.span
                rows[0] = (Part(axes[0], length),)
                own = frozenset(o for o in view.own if o.loop != loop.number)
                placed = dataclasses.replace(
                    placed, axes=tuple(rows), span=spans, own=own
                )
            views.append(placed)
        labels = tuple(
            (use, view.broadcast(value.shape, shape, kept))
            for use, view in value.labels
        )
        node, link = value.node, value.link
        if node is not None:
            node, link = self.notes.graph.add("each", [(node, link)]), SAME
        return value.but(
            shape=shape,
            node=node,
            link=link,
            views=tuple(views),
            labels=labels,
            loop=None,
            numbers=None,
            product=None,
            multiple=None,
            sign=None,
        )


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs stay as they are, and how many are carried.

    JAX says it in numbers until 0.10, and since by trees with an entry for each input.
    """
    if "ft_in" not in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = map(len, params["ft_in"].unpack())
    return consts, carry


def _name(loop: Loop) -> str:
    return "scan" if loop.rounds < math.inf else "while"


def _unplaced(shape: Shape, values: Sequence[Value], loop: Loop) -> Value:
    """What a loop has made of parameters."""
    made = dict.fromkeys(
        (x.leaf, (*x.made, _name(loop))) for v in values for x in v.views
    )
    return Value(
        shape, views=tuple(View.unplaced(leaf, shape, own) for leaf, own in made)
    )


def _slice_of_view(view: View, loop: Loop, reverse: bool, once: bool) -> View:
    """A leaf in a round of a loop that goes through an axis of the value.

    It has slices of its own in each round if the axis is one of the leaf's, and is
    there in one round only if it was stacked with others.
    """
    axes = [part.axis for part in view.axes[0]]
    own = set(view.own)
    if once and len(axes) == 1 and axes[0] is not None and axes[0] not in view.doubled:
        own.add(Own(loop.number, axes[0], _rows(view, axes[0], reverse)))
    elif once and not axes and view.span[0][1] == 1:
        own.add(Own(loop.number, -1))
    return dataclasses.replace(view, own=frozenset(own)).without([0])


def _rows(view: View, axis: int, reverse: bool) -> tuple[int, ...] | None:
    """The rows of a leaf that the rounds of a loop go through, if they are in order."""
    low, high = view.region[axis]
    if axis in view.turned or high - low != view.axes[0][0].size:
        return None
    rows = range(low, high)
    return tuple(rows[::-1] if reverse else rows)


def _iota(shape: Shape) -> Value:
    """Numbers that count up."""
    few = len(shape) == 1 and shape[0] <= MOST
    return Value(shape, numbers=np.arange(shape[0], dtype=float) if few else None)


def _change(body: ClosedJaxpr, variable: Any, out: Any) -> float | None:
    """What a loop adds to a carry in each round, ``None`` if that is not a number."""
    if variable is out:
        return 0
    for eqn in body.jaxpr.eqns:
        if out in eqn.outvars and eqn.primitive.name in ("add", "sub"):
            sign = 1 if eqn.primitive.name == "add" else -1
            numbers = [a.val for a in eqn.invars if isinstance(a, Literal)]
            if variable in [a for a in eqn.invars if not isinstance(a, Literal)]:
                first = eqn.invars[0] is variable or sign > 0
                return sign * float(numbers[0]) or None if numbers and first else None
    return None


def _readers(jaxpr: Jaxpr) -> collections.Counter:
    """How often each variable is read."""
    atoms = [atom for eqn in jaxpr.eqns for atom in eqn.invars] + list(jaxpr.outvars)
    return collections.Counter(a for a in atoms if not isinstance(a, Literal))


def _body(eqn: Any) -> ClosedJaxpr | None:
    """The jaxpr that an equation calls, if it is a call of one."""
    if eqn.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        body = eqn.params.get(name)
        if isinstance(body, ClosedJaxpr):
            return body
        if isinstance(body, Jaxpr):
            return ClosedJaxpr(body, ())
    return None


def _kind(value: Value) -> int:
    """What a value is computed from."""
    if value.node is not None:
        return _DATA
    return _PARAMETERS if value.views else _NOTHING


def _kinds(closed: ClosedJaxpr, arguments: Sequence[int]) -> list[int]:
    """What the results of a jaxpr are computed from, given that of its arguments."""
    jaxpr = closed.jaxpr
    env = dict.fromkeys(jaxpr.constvars, _NOTHING)
    env |= dict(zip(jaxpr.invars, arguments, strict=True))
    read = lambda atom: _NOTHING if isinstance(atom, Literal) else env[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        inside = [read(atom) for atom in eqn.invars]
        body = _body(eqn)
        if body is None:
            outs = [max(inside, default=_NOTHING)] * len(eqn.outvars)
        else:
            outs = _kinds(body, inside)
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
