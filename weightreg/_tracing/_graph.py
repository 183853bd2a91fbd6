"""The calls of a network's layers, what feeds them, and how often each is called again.

A layer is called again where its result feeds its next call, in depth or in a loop. To
be mapped over data, or over slices of one kernel, is one call.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple


class Link(NamedTuple):
    """What a value is to the node that it was computed from.

    Attributes:
      primitives: What lies between, in order.
      degree: The degree in which the value is positively homogeneous in the node's,
        and ``None`` where it is not known to be.
      slope: What distances of the node's value are at most multiplied by, in the
        Euclidean norm.
    """

    primitives: tuple[str, ...] = ()
    degree: Fraction | None = Fraction(1)
    slope: float = 1.0

    def then(self, other: "Link") -> "Link":
        """One link after another."""
        known = self.degree is not None and other.degree is not None
        return Link(
            self.primitives + other.primitives,
            self.degree * other.degree if known else None,  # pyright: ignore
            self.slope * other.slope,
        )


SAME = Link()
"""The link of a node to itself."""


@dataclasses.dataclass
class Node:
    """A value that others are computed from.

    Attributes:
      kind: ``"input"``, ``"call"``, ``"join"`` of several values, ``"loop"``, which
        only marks where one begins, ``"carry"``, ``"exit"``, ``"each"`` (the results of
        all rounds), or ``"output"``.
      sources: The nodes that it is computed from. A carry has those before the loop.
      again: The sources of a carry in all rounds but the first.
    """

    kind: str
    sources: list[tuple[int, Link]]
    again: list[tuple[int, Link]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Loop:
    """A loop: its nodes are those from ``start`` to before ``stop``.

    Attributes:
      rounds: How many there are, infinitely many where that is not known.
      carries: Its carries.
    """

    number: int
    rounds: float
    start: int
    stop: int = 0
    carries: list[int] = dataclasses.field(default_factory=list)


class Graph:
    """All nodes of a network in the order in which they are computed."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.loops: list[Loop] = []

    def add(self, kind: str, sources: Iterable[tuple[int, Link]] = ()) -> int:
        """Adds a node and gives its number."""
        self.nodes.append(Node(kind, list(sources)))
        return len(self.nodes) - 1

    def enter(self, rounds: float) -> Loop:
        """Begins a loop."""
        self.loops.append(Loop(len(self.loops), rounds, self.add("loop")))
        return self.loops[-1]

    def leave(self, loop: Loop) -> None:
        """Ends a loop."""
        loop.stop = len(self.nodes)

    def origins(self, number: int, link: Link = SAME) -> dict[int, Link]:
        """The nodes of which either one or another is where a value comes from.

        They are the node itself, unless it is one of those that loops have.
        """
        found: dict[int, Link] = {}
        seen: dict[int, Link] = {}
        turns = False
        waiting = [(number, link)]
        while waiting:
            number, link = waiting.pop()
            node = self.nodes[number]
            if node.kind not in ("carry", "exit", "each"):
                found[number] = worst(found.get(number), link)
            elif number not in seen:
                seen[number] = link
                before = [*node.sources, *node.again]
                waiting += [(n, other.then(link)) for n, other in before]
            else:
                first = seen[number]
                grows = link.slope > first.slope * (1 + 1e-9)
                turns = turns or grows or link.degree != first.degree
        if turns:  # Each round of a loop adds to what lies between.
            return {n: Link(x.primitives, None, math.inf) for n, x in found.items()}
        return found

    def before(self, number: int) -> frozenset[int]:
        """All nodes that a node is computed from, and itself."""
        seen, waiting = set(), [number]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                own = self.nodes[node]
                waiting += [n for n, _ in (*own.sources, *own.again)]
        return frozenset(seen)

    def feeds(self, number: int | None, other: int | None) -> bool:
        """Whether one node is what another is computed from."""
        both = number is not None and other is not None
        return both and number in self.before(other)  # pyright: ignore

    def longest(self, own: Mapping[int, frozenset[int]]) -> float:
        """The most of some nodes that are on one path through the network.

        Args:
          own: These nodes, each with the numbers of the loops in every round of which
            it stands for another one.
        """
        depth = [0.0] * len(self.nodes)
        self._walk(depth, 0, len(self.nodes), own)
        return max((depth[node] for node in own), default=0)

    def _walk(self, depth: list[float], start: int, stop: int, own: Mapping) -> None:
        """Gives nodes their depth: how many of ``own`` a path to them has at most."""
        loops = {loop.start: loop for loop in self.loops}
        number = start
        while number < stop:
            node = self.nodes[number]
            if number in loops:
                self._turn(depth, loops[number], own)
                number = loops[number].stop
            else:
                if node.kind != "carry":
                    depth[number] = _deepest(depth, node.sources) + (number in own)
                number += 1

    def _turn(self, depth: list[float], loop: Loop, own: Mapping) -> None:
        """Gives the nodes of a loop the depths that they have in the last round."""
        lasting = {n: loops for n, loops in own.items() if loop.number not in loops}
        nodes = [self.nodes[n] for n in loop.carries]
        carried = [_deepest(depth, node.sources) for node in nodes]
        left, before = loop.rounds - 1, None

        def round_of(own: Mapping) -> list[float]:
            for number, own_depth in zip(loop.carries, carried, strict=True):
                depth[number] = own_depth
            self._walk(depth, loop.start + 1, loop.stop, own)
            return [_deepest(depth, node.again) for node in nodes]

        while left > 0:
            after = round_of(lasting)
            steps = [b - a for a, b in zip(carried, after, strict=True)]
            if steps == before or not any(steps):  # It goes on like this.
                carried = [
                    c + (left * s if s else 0)
                    for c, s in zip(carried, steps, strict=True)
                ]
                break
            if loop.rounds - left > 2 * len(nodes) and math.isinf(left):
                carried = [
                    math.inf if s else c for c, s in zip(carried, steps, strict=True)
                ]
                break
            carried, before, left = after, steps, left - 1
        round_of(own)


def worst(one: Link | None, other: Link) -> Link:
    """What is true of both of two links."""
    if one is None:
        return other
    degree = one.degree if one.degree == other.degree else None
    return Link(one.primitives, degree, max(one.slope, other.slope))


def _deepest(depth: list[float], sources: Iterable[tuple[int, Link]]) -> float:
    return max((depth[number] for number, _ in sources), default=0)
