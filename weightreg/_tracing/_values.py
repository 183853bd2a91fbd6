"""Values of a computation, and the uses that a network makes of its parameters."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from weightreg._tracing._graph import SAME, Graph, Link
from weightreg._tracing._links import through
from weightreg._tracing._views import Shape, View

# What a sum or a product makes of a leaf.
KINDS = {
    **dict.fromkeys(("add", "sub", "add_any"), "bias"),
    **dict.fromkeys(("mul", "div"), "scale"),
}
# Constants of more elements are not looked at, nor loops of more rounds.
MOST = 100_000
_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Use:
    """What a network does with a leaf at one place.

    Attributes:
      leaf: Position of the leaf.
      kind: ``"weight"``, ``"bias"``, ``"scale"``, ``"embedding"``, or ``"other"``.
      name: The primitive that uses it.
      view: How the leaf lies there.
      weak: Whether the use does not matter where there is another one, as where a leaf
        is returned as it is, or only a statistic of it is used.
      node: The call of a layer, in the graph.
      inputs: The axes of the leaf that a weight is contracted along.
      outputs: Those that number units.
      window: How many of the inputs are a convolution's window.
      convolution: The primitive's own parameters.
      shape: The shape of the array that a weight is applied to.
      outer: Whether that array is an outer product of others.
      bias: The leaf that is added to the units.
      biases: How many leaves are.
      factor: What its numbers are at most multiplied by before, infinite where they are
        repeated.
      gone: Whether the use has turned out to be a part of another.
    """

    leaf: int
    kind: str
    name: str
    view: View
    weak: bool = False
    node: int | None = None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    window: int = 0
    convolution: dict[str, Any] | None = None
    shape: Shape = ()
    outer: bool = False
    bias: int | None = None
    biases: int = 0
    factor: float = 1.0
    gone: bool = False

    def unseen(self) -> tuple[int, ...]:
        """The axes of the leaf that are neither inputs nor units at this place."""
        axes = range(len(self.view.region))
        return tuple(a for a in axes if a not in (*self.inputs, *self.outputs))


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value: constant, made of parameters alone, or computed from data.

    Attributes:
      shape: Its shape.
      node: The node of the graph that it is computed from, ``None`` if from none.
      link: How it is computed from the node.
      views: The leaves that it is made of, or that have just changed data.
      uses: The uses of these that were noted down when they changed data. They are
        taken back where the leaves turn out to be weights that data have changed.
      labels: The units that its axes number: the weights of layers, each with a view of
        it that has these axes.
      fresh: Whether only rearrangements and sums lie between it and the layers.
      product: The data that it is the product of with leaves, if nothing else is made
        of it but what reads it next.
      outer: Whether it is a product of data along axes of their own.
      known: The number that a constant repeats, if it does.
      numbers: The numbers of a constant with one axis of some size, or what a single
        number is in each round of a loop.
      loop: That loop.
      multiple: The value that it is a multiple of, by its number, and the factor.
      sign: The value whose sign it tells, by its number.
      summands: Layers to whose units the value of another node was added, and the node.
      random: Whether it depends on random numbers alone.
      most: The largest size that a constant's numbers have.
      number: Its own number. A value that is moved or changed has another one.
    """

    shape: Shape
    node: int | None = None
    link: Link = SAME
    views: tuple[View, ...] = ()
    uses: tuple[Use, ...] = ()
    labels: tuple[tuple[Use, View], ...] = ()
    fresh: bool = False
    product: "Value | None" = None
    outer: bool = False
    known: float | None = None
    numbers: np.ndarray | None = None
    loop: int | None = None
    multiple: tuple[int, float] | None = None
    sign: int | None = None
    summands: tuple[tuple[Use, int], ...] = ()
    random: bool = False
    most: float = math.inf
    number: int = dataclasses.field(default_factory=_numbers.__next__)

    @property
    def is_parameter(self) -> bool:
        """Whether it is made of parameters, and perhaps of constants, alone."""
        return self.node is None and bool(self.views)

    @property
    def is_constant(self) -> bool:
        """Whether it is made of neither data nor parameters."""
        return self.node is None and not self.views

    def base(self) -> tuple[int, float]:
        """The value that it is a multiple of, and the factor."""
        return self.multiple or (self.number, 1.0)

    def but(self, **changes: Any) -> "Value":
        """The value with changes."""
        return dataclasses.replace(self, number=next(_numbers), **changes)


def shape_of(variable: Any) -> Shape:
    """The shape of a variable of a jaxpr."""
    return tuple(getattr(variable.aval, "shape", ()))


def constant(x: Any) -> Value:
    """A constant, of which the number is known that it repeats."""
    shape = np.shape(x)
    dtype = getattr(x, "dtype", np.result_type(type(x)))
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    real = any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not 0 < math.prod(shape) <= MOST or not real:
        return Value(shape)
    numbers = np.asarray(x, np.float64)
    first = numbers.flat[0]
    known = float(first) if np.all(numbers == first) else None
    most = float(np.max(np.abs(numbers)))
    row = numbers if numbers.ndim == 1 else None
    return Value(shape, known=known, most=most, numbers=row)


class Notes:
    """What has been seen of a network so far.

    Attributes:
      graph: What is computed from what.
      uses: The uses of all leaves, in order.
      shared: Weights and those of their output axes that turned out to be the stack of
        a later layer, or to be averaged over.
      noisy: The uses of biases that might be weights with noise.
      summed: Pairs of a weight and those of its axes that number slices of it whose
        results are summed.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.uses: list[Use] = []
        self.noisy: list[Use] = []
        self.shared: list[tuple[Use, tuple[int, ...]]] = []
        self.summed: list[tuple[Use, tuple[int, ...]]] = []

    def use(self, kind: str, name: str, view: View, **details: Any) -> Use:
        """Notes down a use."""
        weak = details.pop("weak", bool(view.reduced))
        if view.reduced and kind != "weight":
            kind, name = "other", view.reduced
        use = Use(view.leaf, kind, name, view, weak, **details)
        self.uses.append(use)
        return use

    def end(self, value: Value, name: str, weak: bool = False) -> None:
        """Notes down that leaves are used as they are by a primitive."""
        for view in value.views if value.node is None else ():
            self.use("other", name, view, weak=weak or bool(view.reduced))

    def note_apart(self, value: Value) -> None:
        """Notes down units of which the network's results keep some apart.

        Members of an ensemble come before a batch, and other units after it.
        """
        for use, view in value.labels:
            places = sorted(view.occupied())
            gaps = [k for k, n in itertools.pairwise(places) if n != k + 1]
            axes = tuple(a for a in view.at(gaps) if a in use.outputs)
            if axes:
                self.shared.append((use, axes))

    def combine(self, eqn: Any, values: Iterable[Value]) -> tuple[int | None, Link]:
        """The node and the link of what an equation computes from its operands."""
        values = list(values)
        nodes = list(dict.fromkeys(v.node for v in values if v.node is not None))
        if not nodes:
            return None, Link()
        if len(nodes) == 1:
            return nodes[0], through(eqn, values, nodes[0])
        return self.join(eqn.primitive.name, values), Link()

    def join(self, name: str, values: Iterable[Value]) -> int:
        """A new node that is computed from several values."""
        step = Link((name,), None, math.inf)
        return self.graph.add(
            "join", [(v.node, v.link.then(step)) for v in values if v.node is not None]
        )


def other(eqn: Any, values: Sequence[Value], notes: Notes) -> list[Value]:
    """A primitive that says nothing of what the axes of parameters mean."""
    name = eqn.primitive.name
    # What is computed from parameters alone may be used as a weight later on, as
    # may the parameters themselves beside a statistic.
    alone = all(value.node is None for value in values)
    for value in values:
        notes.end(value, name, weak=alone)
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
