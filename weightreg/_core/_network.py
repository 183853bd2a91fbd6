"""What is known of a network: its layers, and what lies between them.

`trace_network` makes a `Network`, and every method takes one for ``dims``.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from weightreg._core._arguments import EqualByFields


@dataclasses.dataclass(frozen=True)
class WeightLayer:
    """One weight of a network: a leaf of the parameters, and the roles of its axes.

    The attributes after ``fan_out`` are known of a traced network (`trace_network`),
    and are what they are by default for weights that a tree or ``dims`` tells of.

    Attributes:
      path: Key path of the leaf, as ``jax.tree_util.keystr`` prints it.
      index: Position of the leaf in ``jax.tree.leaves(params)``.
      shape: Shape of the leaf.
      input_axes: Axes over which a unit sums its inputs, window axes included, which
        come first.
      output_axes: Axes that number the units.
      stack_axes: Axes along which several layers are stacked (``nn.scan``).
      convolves: Whether it is the kernel of a convolution.
      window: Number of window positions of a convolution, 1 for anything else.
      fan_in: Inputs of one unit: the product of the input axes.
      fan_out: Units that one input reaches, times window: ``jax.nn.initializers``
        counts so, and a grouped convolution has a ``groups``-th of its units.
      calls: How often the network calls the layer again on its own results, at least
        1: the time steps of a recurrence, or 2 for a layer used twice in depth.
        ``None`` where that is not known, in a ``while``.
      passes: How often one path through the network goes through the layer, or through
        any of those that are stacked in it: more than ``calls`` where stacked layers
        follow each other, and 1 where they work side by side (heads, members of an
        ensemble). ``None`` where that is not known.
      groups: The groups of a grouped convolution, of which each has its own inputs.
      strides: Strides of a convolution's window, ``()`` for anything else.
      padding: Padding of a convolution, a pair for each axis of the window.
      dilation: Dilation of a convolution's window.
      input_dilation: Dilation of a transposed convolution's input.
      input_shape: Shape of the array that the first call is applied to.
      bias: Path of the leaf that is added to the layer's units, if there is one.
      reach: How many of its units at most see one input, at different places: the size
        of a convolution's window. Where several input axes may be attention's or a
        window, they are taken for one, which is safe.
      factor: What the leaf's numbers are at most multiplied by to make the weight,
        infinite where some are repeated.
      combined: The primitives that make the weight from this leaf and other ones, as
        in weight normalization, ``()`` where the leaf itself is the weight.
    """

    path: str
    index: int
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    convolves: bool
    window: int
    fan_in: int
    fan_out: int
    calls: int | None = 1
    passes: int | None = None
    groups: int = 1
    strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    bias: str | None = None
    reach: int = 1
    factor: float = 1.0
    combined: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Network(EqualByFields):
    """What a network does with each of its parameters: see `trace_network`.

    ``str(net)`` is a table of it. A ``Network`` is told for ``dims`` of every method:
    it fits all trees that have the traced leaves, in their shapes, or some of them.

    Attributes:
      layers: The weights, a `WeightLayer` each, in the order of their first calls.
      between: For each pair of neighbours in ``layers`` the primitives that lie between
        them, in order, or ``None`` where the second is not fed by the first alone or
        the first feeds others.
      roles: What each leaf is, by its path: ``"weight"``, ``"bias"``, ``"scale"``,
        ``"embedding"``, ``"embedding, weight"`` (a tied one), ``"unused"``, or
        ``"other (...)"`` with the primitive that it comes to.
      dims: The axes of the weights for Optax's Muon: a tree of
        ``optax.contrib.MuonDimensionNumbers``, with ``None`` for all other leaves (and
        for weights without units, which no matrix is).
      open: What the computation leaves open, as sentences. ``stack=`` decides it.
      shapes: The shape of each leaf, by its path.
      links: For pairs of neighbours that are a chain, by their paths, what keeps scale
        from being shifted between them, ``""`` for nothing.
      fixed: What keeps each layer from being rescaled, by its path, ``""`` for nothing.
      unbounded: Why the product of the layers' norms does not bound the network's, or
        ``""`` where it does.
    """

    layers: tuple[WeightLayer, ...]
    between: tuple[tuple[str, ...] | None, ...]
    roles: dict[str, str]
    dims: Any
    open: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    links: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unbounded: str = ""

    def __repr__(self) -> str:
        weights, leaves = len(self.layers), len(self.roles)
        return f"Network({weights} weights among {leaves} parameters)"

    def __str__(self) -> str:
        layers = {layer.path: layer for layer in self.layers}
        rows: list[tuple[str, ...]] = [_HEAD]
        for path, role in self.roles.items():
            rows.append(_row(path, self.shapes[path], role, layers.get(path)))
        lines = _table(rows)
        return "\n".join([*lines, *(f"Open: {sentence}" for sentence in self.open)])


_HEAD = ("path", "shape", "role", "inputs", "units", "stack", "calls", "bias", "notes")


def _row(
    path: str, shape: tuple[int, ...], role: str, layer: WeightLayer | None
) -> tuple[str, ...]:
    """What the table says of a leaf."""
    sizes = "x".join(map(str, shape)) or "()"
    if layer is None:
        return path, sizes, role, "", "", "", "", "", ""
    axes = (layer.input_axes, layer.output_axes, layer.stack_axes)
    calls = "?" if layer.calls is None else str(layer.calls)
    shown = (", ".join(map(str, own)) for own in axes)
    return path, sizes, role, *shown, calls, _beside(layer), _notes(layer)


def _beside(layer: WeightLayer) -> str:
    """The path of a layer's bias, from the module that both are in, if it is one."""
    bias = layer.bias or ""
    module = layer.path[: max(layer.path.rfind("["), layer.path.rfind("."), 0)]
    return bias.removeprefix(module)


def _notes(layer: WeightLayer) -> str:
    """What else the table says of a weight."""
    notes = []
    if layer.convolves:
        axes = layer.input_axes[: len(layer.strides)]
        window = (layer.shape[a] for a in axes)
        notes.append(f"window {'x'.join(map(str, window))}")
    if any(s != 1 for s in layer.strides):
        notes.append(f"strides {'x'.join(map(str, layer.strides))}")
    if layer.groups != 1:
        notes.append(f"{layer.groups} groups")
    if layer.combined:
        notes.append(f"by {', '.join(layer.combined)}")
    return "; ".join(notes)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns. Those without entries are left out."""
    columns = [c for c in zip(*rows, strict=True) if any(c[1:]) or c[0] == "path"]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
