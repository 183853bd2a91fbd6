"""What the leaves of a network are, from the uses that it makes of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from weightreg._core._network import WeightLayer
from weightreg._tracing._graph import Graph, Link, worst
from weightreg._tracing._values import Notes, Use
from weightreg._tracing._views import Shape, overlap


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameters.

    Attributes:
      index: Its position.
      path: Its path.
      shape: Its shape.
      used: Whether the network computes anything from it.
    """

    index: int
    path: str
    shape: Shape
    used: bool


class Roles:
    """What all leaves are.

    Args:
      leaves: The leaves.
      notes: What the network does with them.
      stack: The axes that stack layers by a user's word, for positions of leaves.
    """

    def __init__(
        self, leaves: Sequence[Leaf], notes: Notes, stack: Mapping[int, Sequence[int]]
    ):
        self.leaves = leaves
        self.graph = notes.graph
        self.stack = stack
        self.noisy = notes.noisy
        self.uses: dict[int, list[Use]] = {leaf.index: [] for leaf in leaves}
        for use in notes.uses:
            if not use.gone:
                self.uses[use.leaf].append(use)
        for leaf, uses in self.uses.items():
            self.uses[leaf] = [u for u in uses if not u.weak] or uses
        self.summed: dict[int, set[int]] = {}
        for use, axes in notes.summed:
            self.summed.setdefault(use.leaf, set()).update(axes)
        self.shared: dict[int, set[int]] = {}
        for use, axes in notes.shared:
            self.shared.setdefault(use.leaf, set()).update(axes)

    def role(self, leaf: Leaf) -> str:
        """What a leaf is."""
        uses = self.uses[leaf.index]
        kinds = {use.kind for use in uses}
        if not uses:
            return "other (unknown)" if leaf.used else "unused"
        if "weight" in kinds and not self._agree(leaf):
            return _others(use for use in uses if use.kind == "weight")
        if kinds == {"embedding", "weight"}:
            return "embedding, weight"
        if len(kinds) == 1 and "other" not in kinds:
            return kinds.pop()
        return _others(uses)

    def layers(self) -> list[WeightLayer]:
        """The weights, in the order of their first calls."""
        weights = [leaf for leaf in self.leaves if self.role(leaf).endswith("weight")]
        weights.sort(key=lambda leaf: min(self.nodes(leaf), default=0))
        return [self._layer(leaf) for leaf in weights]

    def calls_of(self, leaf: Leaf) -> list[Use]:
        """The calls of a weight."""
        return [use for use in self.uses[leaf.index] if use.kind == "weight"]

    def nodes(self, leaf: Leaf) -> list[int]:
        """The calls of a weight in the graph."""
        return [use.node for use in self.calls_of(leaf) if use.node is not None]

    def open(self) -> list[str]:
        """What the computation leaves open."""
        noisy = {use.leaf for use in self.noisy if not use.gone}
        sentences = [
            f"{self.leaves[leaf].path}: it might be a weight that noise is added to. "
            "If so, pass the key that the noise is made from instead of the noise."
            for leaf in sorted(noisy)
            if self.role(self.leaves[leaf]) == "bias"
        ]
        for layer in self.layers():
            for axes, kind, text in self._doubts(layer):
                shown = ", ".join(map(str, sorted(axes)))
                plural = "axes" if len(axes) > 1 else "axis"
                value = sorted(axes)[0] if len(axes) == 1 else tuple(sorted(axes))
                sentences.append(
                    f"{layer.path}: {plural} {shown} of its {kind} {text}. If so, say "
                    f'stack={{"{layer.path}": {value}}}.'
                )
        return sentences

    def _doubts(self, layer: WeightLayer):
        """Axes of a weight that may be something else, with what speaks for it."""
        shared = self.shared.get(layer.index, set()) & set(layer.output_axes)
        if shared and len(layer.output_axes) > len(shared):
            yield shared, "units", "might stack layers that share an input"
        summed = self.summed.get(layer.index, set()) & set(layer.input_axes)
        if summed and len(layer.input_axes) > len(summed):
            yield summed, "inputs", "might stack layers whose results are summed"
        outer = any(u.outer for u in self.calls_of(self.leaves[layer.index]))
        if outer and not layer.convolves and len(layer.input_axes) > 1:
            first = set(layer.input_axes[:-1]) - summed
            if first:
                yield first, "inputs", "might stack layers that are mixed"

    def axes(self, leaf: Leaf, use: Use) -> tuple[tuple[int, ...], ...]:
        """The inputs, the units and the stack of a leaf at one call."""
        named = set(self.stack.get(leaf.index, ()))
        inputs = [a for a in use.inputs if a not in named]
        outputs = sorted(a for a in use.outputs if a not in named)
        own = set(range(len(leaf.shape))) - {*inputs, *outputs}
        summed = (self.summed.get(leaf.index, set()) & own) - named
        # A convolution's window comes first, and its input channels last.
        window = inputs[: use.window]
        inputs = [*window, *sorted({*inputs[use.window :], *summed})]
        return tuple(inputs), tuple(outputs), tuple(sorted(own - set(inputs)))

    def _agree(self, leaf: Leaf) -> bool:
        """Whether all calls of a weight give its axes the same meaning."""
        found = set()
        for use in self.calls_of(leaf):
            inputs, outputs, stack = self.axes(leaf, use)
            wide = lambda axes: frozenset(a for a in axes if leaf.shape[a] != 1)  # noqa: E731
            found.add((wide(inputs), wide(outputs), wide(stack), use.window))
        return len(found) == 1

    def _layer(self, leaf: Leaf) -> WeightLayer:
        calls = self.calls_of(leaf)
        use = calls[0]
        inputs, outputs, stack = self.axes(leaf, use)
        details = use.convolution or {}
        size = lambda axes: math.prod(leaf.shape[a] for a in axes)  # noqa: E731
        window = size(inputs[: use.window]) if use.window else 1
        biases = {u.bias for u in calls if u.bias is not None}
        bias = self.leaves[biases.pop()] if len(biases) == 1 else None
        if bias is not None and self.role(bias) != "bias":
            bias = None
        return WeightLayer(
            path=leaf.path,
            index=leaf.index,
            shape=leaf.shape,
            input_axes=inputs,
            output_axes=outputs,
            stack_axes=stack,
            convolves=use.window > 0,
            window=window,
            fan_in=size(inputs),
            fan_out=size(outputs) * window // details.get("groups", 1),
            calls=self._count(leaf),
            input_shape=use.shape,
            bias=bias and bias.path,
            combined=tuple(dict.fromkeys(n for u in calls for n in u.view.made)),
            **details,
        )

    def _count(self, leaf: Leaf) -> int | None:
        """How often some part of a weight is called again on its own results."""
        uses = [use for use in self.calls_of(leaf) if use.node is not None]
        most, groups = 1.0, set()
        for use in uses:
            stack = self.axes(leaf, use)[2]
            group = [u for u in uses if overlap(u.view, use.view, stack)]
            key = frozenset(map(id, group))
            if key not in groups:
                groups.add(key)
                own = {u.node: frozenset(n for n, _ in u.view.own) for u in group}
                most = max(most, self.graph.longest(own))  # pyright: ignore
        return None if math.isinf(most) else int(most)


def _others(uses) -> str:
    """The role of a leaf that is no one thing, with the primitives that it comes to."""
    return f"other ({', '.join(dict.fromkeys(use.name for use in uses))})"


class Chains:
    """What lies between the layers of a network.

    Args:
      graph: What is computed from what.
      nodes: The calls of each layer.
      output: The node of the network's results.
    """

    def __init__(self, graph: Graph, nodes: Mapping[str, Sequence[int]], output: int):
        self.graph = graph
        self.output = output
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

    def link(self, first: str, second: str, nodes: Mapping) -> Link | None:
        """What lies between two layers that are a chain, or ``None``."""
        links: list[Link] = []
        for node in nodes[second]:
            if len(self.owners[node]) != 1 or len(self.graph.nodes[node].sources) != 1:
                return None
            for source, link in self.sources[node].items():
                owner = self.owners.get(source, [])
                if owner == [first]:
                    links.append(link)
                elif owner != [second]:
                    return None
        for node in nodes[first]:
            for reader in self.readers.get(node, ()):
                if self.owners.get(reader, []) not in ([first], [second]):
                    return None
        found: Link | None = None
        for link in links:
            found = worst(found, link)
        return found

    def again(self, path: str, nodes: Mapping) -> Link | None:
        """What lies between a layer's results and its own next call, if it has one."""
        found: Link | None = None
        for node in nodes[path]:
            for source, link in self.sources[node].items():
                if path in self.owners.get(source, []):
                    found = worst(found, link)
        return found

    def unbounded(self, layers: Sequence[WeightLayer]) -> str:
        """Why the product of all layers' norms is no bound of the network's, or ``""``.

        Every layer has to be called on the results of one other, or on the input, with
        nothing between that enlarges distances.
        """
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
