"""What the leaves of a network are, from the uses that it makes of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from weightreg._core._network import WeightLayer
from weightreg._tracing._values import Notes, Use
from weightreg._tracing._views import Shape, overlap


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameters.

    Attributes:
      index: Its position.
      path: Its path.
      shape: Its shape.
      dtype: Its dtype.
      used: Whether the network computes anything from it.
    """

    index: int
    path: str
    shape: Shape
    dtype: Any
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
        self.every: dict[int, list[Use]] = {leaf.index: [] for leaf in leaves}
        for use in notes.uses:
            if not use.gone:
                self.every[use.leaf].append(use)
        self.uses = {
            leaf: [use for use in uses if not use.weak] or uses
            for leaf, uses in self.every.items()
        }
        self.summed, self.shared = _by_leaf(notes.summed), _by_leaf(notes.shared)
        weights = [leaf for leaf in leaves if self.role(leaf).endswith("weight")]
        weights.sort(key=lambda leaf: min(self.nodes(leaf), default=0))
        self.layers = [self._layer(leaf) for leaf in weights]

    def role(self, leaf: Leaf) -> str:
        """What a leaf is."""
        uses = self.uses[leaf.index]
        kinds = {use.kind for use in uses}
        if not uses:  # Integers are not followed.
            return f"other ({leaf.dtype})" if leaf.used else "unused"
        if "weight" in kinds and not self._agree(leaf):
            return _others(use for use in uses if use.kind == "weight")
        if kinds == {"embedding", "weight"}:
            return "embedding, weight"
        if len(kinds) == 1 and "other" not in kinds:
            return kinds.pop()
        return _others(uses)

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
        for layer in self.layers:
            for axes, kind, text in self._doubts(layer):
                shown = ", ".join(map(str, sorted(axes)))
                plural = "axes" if len(axes) > 1 else "axis"
                value = sorted(axes)[0] if len(axes) == 1 else tuple(sorted(axes))
                sentences.append(
                    f"{layer.path}: {plural} {shown} of its {kind} {text}. If so, say "
                    f'stack={{"{layer.path}": {value}}}.'
                )
        return sentences

    def fixed(self, layer: WeightLayer) -> str:
        """Why a weight cannot be rescaled by itself, or ``""``."""
        others = [u for u in self.every[layer.index] if u.kind != "weight"]
        stack = tuple(layer.shape[a] for a in layer.stack_axes)
        if layer.calls != 1:
            count = "an unknown number of" if layer.calls is None else layer.calls
            return f"it is called {count} times, and each call would be rescaled"
        if layer.combined:
            return (
                f"the weight is made from it and others ({', '.join(layer.combined)})"
            )
        if others:
            return f"it has another use ({', '.join({u.name: 0 for u in others})})"
        if layer.passes != math.prod(stack):
            return "its stacked layers are not all called one on another's results"
        return self._unscalable_bias(layer, stack)

    def _unscalable_bias(self, layer: WeightLayer, stack: Shape) -> str:
        """Why a layer's bias cannot be rescaled with its weight, or ``""``."""
        calls = self.calls_of(self.leaves[layer.index])
        biases = {use.bias for use in calls if use.bias is not None}
        if layer.bias is None and biases:
            return "it has several biases, or not at each call"
        for bias in biases:
            uses, path = self.every[bias], self.leaves[bias].path
            if {use.kind for use in uses} != {"bias"} or len(uses) != len(calls):
                return f"its bias {path} has another use"
            if not all(use.view.leads(stack) for use in uses):
                return f"its bias {path} is stacked otherwise"
        return ""

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

    def _summed_inputs(self, leaf: Leaf, use: Use) -> set[int]:
        """Inputs that number slices, which may all see the same input."""
        inputs, _, _ = self.axes(leaf, use)
        return (self.summed.get(leaf.index, set()) & {*inputs}) - {*use.inputs}

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
        biases = {u.bias if u.biases == 1 else None for u in calls}
        found = biases.pop() if len(biases) == 1 else None
        bias = None if found is None else self.leaves[found]
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
            calls=_whole(self._count(leaf)),
            passes=_whole(
                self.graph.longest(dict.fromkeys(self.nodes(leaf), frozenset()))
            ),
            input_shape=use.shape,
            bias=bias and bias.path,
            reach=window * size(self._summed_inputs(leaf, use)),
            factor=max(u.factor for u in calls),
            combined=tuple(dict.fromkeys(n for u in calls for n in u.view.made)),
            **details,
        )

    def _count(self, leaf: Leaf) -> float:
        """How often some part of a weight is called again on its own results."""
        uses = [use for use in self.calls_of(leaf) if use.node is not None]
        most, groups = 1.0, set()
        for use in uses:
            stack = self.axes(leaf, use)[2]
            group = [u for u in uses if overlap(u.view, use.view, stack)]
            key = frozenset(map(id, group))
            if key not in groups:
                groups.add(key)
                own = {u.node: frozenset(o.loop for o in u.view.own) for u in group}
                most = max(most, self.graph.longest(own))  # pyright: ignore
        return most


def _by_leaf(found: Sequence[tuple[Use, tuple[int, ...]]]) -> dict[int, set[int]]:
    """The axes of each leaf among those that were noted down for its uses."""
    axes: dict[int, set[int]] = {}
    for use, own in found:
        axes.setdefault(use.leaf, set()).update(own)
    return axes


def _whole(count: float) -> int | None:
    """A count, or ``None`` if it is not known."""
    return None if math.isinf(count) else max(int(count), 1)


def _others(uses) -> str:
    """The role of a leaf that is no one thing, with the primitives that it comes to."""
    return f"other ({', '.join(dict.fromkeys(use.name for use in uses))})"
