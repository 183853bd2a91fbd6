"""What lies between the layers of a network."""

import itertools
import math
from collections.abc import Mapping, Sequence

from weightreg._core._network import WeightLayer
from weightreg._tracing._graph import Graph, Link, worst
from weightreg._tracing._values import Use


class Chains:
    """What lies between the layers of a network.

    Args:
      graph: What is computed from what.
      nodes: The calls of each layer.
      output: The node of the network's results.
    """

    def __init__(self, graph: Graph, nodes: Mapping[str, Sequence[int]], output: int):
        self.graph, self.nodes, self.output = graph, nodes, output
        self.owners: dict[int, list[str]] = {}
        for path, own in nodes.items():
            for node in dict.fromkeys(own):
                self.owners.setdefault(node, []).append(path)
        # What each node is computed from, and what is computed from it.
        self.sources: dict[int, dict[int, Link]] = {}
        self.readers: dict[int, set[int]] = {}
        for number, node in enumerate(graph.nodes):
            if node.kind in ("call", "join", "output"):
                found: dict[int, Link] = {}
                for source, link in node.sources:
                    for n, own in graph.origins(source, link).items():
                        found[n] = worst(found.get(n), own)
                        self.readers.setdefault(n, set()).add(number)
                self.sources[number] = found

    def link(self, first: str, second: str) -> Link | None:
        """What lies between two layers that are a chain, or ``None``."""
        links: list[Link] = []
        for node in self.nodes[second]:
            if len(self.owners[node]) != 1 or len(self.graph.nodes[node].sources) != 1:
                return None
            for source, link in self.sources[node].items():
                owner = self.owners.get(source, [])
                if owner == [first]:
                    links.append(link)
                elif owner != [second]:
                    return None
        for node in self.nodes[first]:
            for reader in self.readers.get(node, ()):
                if self.owners.get(reader, []) not in ([first], [second]):
                    return None
        found: Link | None = None
        for link in links:
            found = worst(found, link)
        return found

    def in_order(self, uses: Sequence[Use], stack: Sequence[int]) -> Link | None:
        """What lies between stacked layers that are called one after another.

        It is ``None`` where they are called in another order than they are stacked in,
        or where something else is fed by one of them, or is one's source.
        """
        if len(stack) != 1 or any(use.view.turned & {*stack} for use in uses):
            return None
        if len(uses) == 1 and uses[0].view.own:
            return self._from_round_to_round(uses[0], stack[0])
        found: Link | None = None
        rows = [use.view.region[stack[0]] for use in uses]
        if rows != [(k, k + 1) for k in range(uses[0].view.shape[stack[0]])]:
            return None
        for before, after in itertools.pairwise(uses):
            sources = self.sources[after.node]  # pyright: ignore
            if {*sources} != {before.node} or self.readers[before.node] != {after.node}:  # pyright: ignore
                return None
            found = worst(found, sources[before.node])  # pyright: ignore
        return found

    def _from_round_to_round(self, use: Use, axis: int) -> Link | None:
        """What lies between the calls in two rounds of a loop that goes forward."""
        node, rows = use.node, tuple(range(use.view.shape[axis]))
        in_turn = [(own.axis, own.rows) for own in use.view.own] == [(axis, rows)]
        read = self._read_by(node)
        kinds = {n: self.graph.nodes[n].kind for n in read}
        carries = [n for n in read if kinds[n] == "carry"]
        if not in_turn or {*kinds.values()} - {"carry", "exit"}:
            return None
        if any(self._read_by(carry) != [node] for carry in carries):
            return None
        return self.sources[node].get(node)  # pyright: ignore

    def _read_by(self, source: int | None) -> list[int]:
        """The nodes that are computed from one directly."""
        return [
            number
            for number, node in enumerate(self.graph.nodes)
            if any(n == source for n, _ in (*node.sources, *node.again))
        ]

    def unbounded(self, layers: Sequence[WeightLayer]) -> str:
        """Why the product of all layers' norms is no bound of the network's, or ``""``.

        Every layer has to be called on the results of one other, or on the input, with
        nothing between that enlarges distances.
        """
        if len(self.graph.nodes[self.output].sources) != 1:
            return "there are several results, or none that depends on the input"
        before = self.graph.before(self.output)
        if any(self.graph.nodes[n].kind == "each" for n in before):
            return "the results of all rounds of a loop are kept"
        for layer in layers:
            if reason := _enlarged(layer):
                return f"{layer.path} {reason}"
        waiting, seen = [self.output], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if reason := self._reason(node):
                return reason
            waiting += self.sources.get(node, ())
        on_the_way = {path for n in seen for path in self.owners.get(n, ())}
        for layer in layers:
            if layer.path not in on_the_way:
                return f"{layer.path} does not lie between the inputs and the results"
            if layer.calls is None:
                return f"how often {layer.path} is called is not known"
        return ""

    def _reason(self, number: int) -> str:
        node = self.graph.nodes[number]
        name = self._name(number)
        if node.kind == "join":
            what = node.sources[0][1].primitives[-1:] if node.sources else ()
            return f"branches come together ({', '.join(what)})"
        if node.kind == "call" and (
            len(node.sources) != 1 or len(self.owners.get(number, ())) != 1
        ):
            return f"{name} is not called on one array alone"
        for source, link in self.sources.get(number, {}).items():
            if link.slope > 1 + 1e-6:
                between = ", ".join(link.primitives) or "nothing"
                return (
                    f"what lies between {self._name(source)} and {name} ({between}) is "
                    "not known to keep all distances from growing"
                )
        return ""

    def _name(self, number: int) -> str:
        kinds = {"input": "the input", "output": "the result"}
        node = self.graph.nodes[number]
        return kinds.get(node.kind) or ", ".join(self.owners.get(number, ["a branch"]))


def _enlarged(layer: WeightLayer) -> str:
    """Why a layer's norm may be larger than its leaf's, or ``""``."""
    if layer.combined:
        return f"is made into the weight with others ({', '.join(layer.combined)})"
    stack = math.prod(layer.shape[a] for a in layer.stack_axes)
    if layer.calls is not None and layer.passes != layer.calls * stack:
        return "stacks layers that work side by side, or are not all called"
    if layer.factor > 1:
        return "is multiplied by numbers beyond 1, or repeated"
    return ""
