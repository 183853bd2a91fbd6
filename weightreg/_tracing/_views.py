"""Parameters as they lie in the values of a computation: whose axes are whose.

A network rearranges its parameters before it uses them: it transposes, slices and joins
them, and merges or splits their axes. A `View` follows one leaf through all that.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A factor of an axis of a value: an axis of the leaf, or a part of one.

    Attributes:
      axis: The axis of the leaf, or ``None`` where the value repeats itself.
      size: Its size here.
    """

    axis: int | None
    size: int


class Own(NamedTuple):
    """Slices of a leaf of which each round of a loop has another one.

    Attributes:
      loop: The loop.
      axis: The axis of the leaf that they are along, -1 where the leaf is there in one
        round only.
      rows: Which slice each round has, or ``None`` if that is not known.
    """

    loop: int
    axis: int
    rows: tuple[int, ...] | None = None


class LostError(Exception):
    """A rearrangement after which no axis of the value is one of the leaf's."""


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf of the parameters as it lies in a value.

    Attributes:
      leaf: Position of the leaf.
      axes: For each axis of the value the parts that it is made of, the outermost
        first. There are none where the value repeats itself along the axis.
      span: For each axis of the value where the leaf begins and how long it is, which
        differs from the whole where several leaves have been joined.
      region: For each axis of the leaf the stretch of it that is there.
      shape: The shape of the leaf.
      inner: Axes of the leaf that were contracted with constants or parameters.
      partner: Whether parameters were among these.
      empty: Whether zeros were.
      own: The slices of it that rounds of loops have.
      turned: Axes of the leaf whose slices are in another order.
      doubled: Axes of the leaf of which slices may be there twice.
      looked: Axes of the leaf along which data have chosen.
      factor: What its numbers were at most multiplied by.
      made: The primitives that have combined the leaf with others, or changed it.
      reduced: The primitive after which only a statistic of the leaf is there, such as
        its norm, or ``""``.
    """

    leaf: int
    axes: tuple[tuple[Part, ...], ...]
    span: tuple[tuple[int, int], ...]
    region: tuple[tuple[int, int], ...]
    shape: Shape
    inner: frozenset[int] = frozenset()
    partner: bool = False
    empty: bool = False
    own: frozenset[Own] = frozenset()
    turned: frozenset[int] = frozenset()
    doubled: frozenset[int] = frozenset()
    looked: frozenset[int] = frozenset()
    factor: float = 1.0
    made: tuple[str, ...] = ()
    reduced: str = ""

    @classmethod
    def whole(cls, leaf: int, shape: Shape) -> "View":
        """All of a leaf as it is."""
        axes = tuple((Part(axis, size),) for axis, size in enumerate(shape))
        span = tuple((0, size) for size in shape)
        return cls(leaf, axes, span, span, shape)

    @classmethod
    def unplaced(cls, leaf: int, shape: Shape, made: tuple[str, ...]) -> "View":
        """A leaf of which it is not known how it lies in a value of some shape."""
        span = tuple((0, size) for size in shape)
        return cls(leaf, ((),) * len(shape), span, (), (), made=made, reduced=made[-1])

    def at(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The axes of the leaf that some axes of the value are made of, in order."""
        return leaf_axes(p for k in axes for p in self.axes[k])

    def occupied(self) -> frozenset[int]:
        """The axes of the value along which it is not repeated."""
        return frozenset(
            k for k, parts in enumerate(self.axes) if any(p.size > 1 for p in parts)
        )

    def marked(self, *names: str) -> "View":
        """The view with further primitives that have changed it."""
        made = tuple(dict.fromkeys((*self.made, *names)))
        return dataclasses.replace(self, made=made)

    def contracted(
        self, axes: Sequence[int], partner: bool, empty: bool, name: str
    ) -> "View":
        """The view without axes that were contracted with another value's."""
        view = dataclasses.replace(
            self.without(axes),
            inner=self.inner | frozenset(self.at(axes)),
            partner=self.partner or partner,
            empty=self.empty or empty,
        )
        if not any(view.axes):
            view = dataclasses.replace(view, reduced=view.reduced or name)
        return view.marked(name) if partner else view

    def times(self, factor: float) -> "View":
        """The view after a product with numbers that are at most so large."""
        return dataclasses.replace(self, factor=self.factor * factor)

    def cut(self) -> list[tuple[int, int]]:
        """The stretches of those axes of the leaf of which only a slice is left."""
        seen = {*self.at(range(len(self.axes))), *self.inner}
        taken = {*self.looked, *(own.axis for own in self.own)}
        left = set(range(len(self.region))) - seen - taken
        return [self.region[a] for a in sorted(left) if self.shape[a] != 1]

    def leads(self, stack: Shape) -> bool:
        """Whether the first axes of the leaf, of these sizes, are those of a slice."""
        count = len(stack)
        seen = {*self.at(range(len(self.axes))), *self.inner}
        wide = [a for a, size in enumerate(self.shape) if size != 1]
        first = all((a in seen) != (a < count) for a in wide)
        return first and self.shape[:count] == stack

    def order(self) -> bool:
        """Whether its slices and its rows are in the order of the leaf."""
        rows = self.at(self.occupied())
        return not self.turned & {*rows, *(own.axis for own in self.own)}

    def permuted(self, permutation: Sequence[int]) -> "View":
        """The view after a transposition."""
        return self._with([(self.axes[k], self.span[k]) for k in permutation])

    def broadcast(self, old: Shape, shape: Shape, dimensions: Sequence[int]) -> "View":
        """The view after the axes of an old shape became some of a larger one's."""
        new: list[tuple[tuple[Part, ...], tuple[int, int]]]
        new = [((), (0, size)) for size in shape]
        for axis, k in enumerate(dimensions):
            if old[axis] == shape[k]:
                new[k] = self.axes[axis], self.span[axis]
        return self._with(new)

    def without(self, axes: Sequence[int]) -> "View":
        """The view without some axes of the value."""
        kept = [k for k in range(len(self.axes)) if k not in axes]
        return self.permuted(kept)

    def statistic(self, axes: Sequence[int], name: str) -> "View":
        """What a reduction over some axes of the value leaves of the view."""
        gone = any(part.size > 1 for k in axes for part in self.axes[k])
        reduced = self.reduced or (name if gone else "")
        return dataclasses.replace(self.without(axes), reduced=reduced)

    def moved(self, axis: int, offset: int) -> "View":
        """The view further along an axis, where others were put before it."""
        span = list(self.span)
        span[axis] = span[axis][0] + offset, span[axis][1]
        return dataclasses.replace(self, span=tuple(span))

    def repeated(self, axis: int, size: int) -> "View":
        """The view along an axis of another size, along which it is repeated."""
        span = list(self.span)
        span[axis] = 0, size
        return dataclasses.replace(self, span=tuple(span))

    def tiled(self, axis: int, count: int) -> "View":
        """The view repeated as a whole along an axis."""
        axes, span = list(self.axes), list(self.span)
        parts = axes[axis]
        size = math.prod(part.size for part in parts) if parts else 0
        if parts and span[axis] != (0, size):
            raise LostError
        axes[axis] = (Part(None, count), *parts) if parts else ()
        span[axis] = 0, count * span[axis][1]
        return dataclasses.replace(self, axes=tuple(axes), span=tuple(span))

    def sliced(self, axis: int, start: int, stop: int, stride: int) -> "View | None":
        """The view in a stretch of the value, ``None`` where nothing of it is there.

        Raises:
          LostError: The stretch ends within a row of merged axes.
        """
        begin, size = self.span[axis]
        low, high = max(start, begin), min(stop, begin + size)
        first = -(-(low - start) // stride)  # the first position that is in the view
        count = -(-(high - start) // stride) - first
        if low >= high or count < 1:
            return None
        offset = start + first * stride - begin
        if (low, high, stride) == (begin, begin + size, 1):
            parts, region = self.axes[axis], self.region
        else:
            parts, region = self._cut(self.axes[axis], offset, count, stride)
        axes, span = list(self.axes), list(self.span)
        axes[axis], span[axis] = parts, (first, count)
        return dataclasses.replace(
            self, axes=tuple(axes), span=tuple(span), region=region
        )

    def picked(self, axis: int, count: int, order: int) -> "View":
        """The view after ``count`` of its rows were picked in some order."""
        axes, span, rows = list(self.axes), list(self.span), self.at([axis])[:1]
        axes[axis] = tuple(Part(a, count) for a in rows)
        span[axis] = 0, count
        view = dataclasses.replace(self, axes=tuple(axes), span=tuple(span))
        return view if order > 0 else view.reversed([axis], twice=order == 0)

    def reversed(self, axes: Sequence[int], twice: bool = False) -> "View":
        """The view in another order along some axes, perhaps with some rows twice."""
        turned = self.turned | frozenset(self.at(axes))
        doubled = self.doubled | frozenset(self.at(axes) if twice else ())
        return dataclasses.replace(self, turned=turned, doubled=doubled)

    def reshaped(self, old: Shape, new: Shape) -> "View":
        """The view after a reshape of the value.

        Raises:
          LostError: The reshape does not only merge and split axes.
        """
        placed: list[tuple[tuple[Part, ...], tuple[int, int]]] = []
        for olds, news in _blocks(old, new):
            axes = [(self.axes[k], self.span[k], old[k]) for k in olds]
            placed += _regrouped(axes, [new[k] for k in news])
        return self._with(placed)

    def _with(self, placed: Sequence) -> "View":
        axes = tuple(parts for parts, _ in placed)
        return dataclasses.replace(
            self, axes=axes, span=tuple(span for _, span in placed)
        )

    def _cut(self, parts: tuple[Part, ...], offset: int, count: int, stride: int):
        """The parts of an axis of which only a stretch is left, and the region."""
        if not parts:
            return parts, self.region
        major, *minor = parts
        row = math.prod(part.size for part in minor)
        if minor and stride == 1 and count == 1:
            return (Part(major.axis, 1),), self.region
        if (stride != 1 and minor) or offset % row or count % row:
            raise LostError
        region = list(self.region)
        if major.axis is not None:
            low, high = region[major.axis]
            if high - low == major.size:  # else it is a part of the axis only
                begin = low + offset // row
                length = (count // row - 1) * stride + 1
                region[major.axis] = begin, begin + length
        return (Part(major.axis, count // row), *minor), tuple(region)


def leaf_axes(parts: Iterable[Part]) -> tuple[int, ...]:
    """The axes of the leaf among some parts, each once, in order."""
    return tuple(dict.fromkeys(p.axis for p in parts if p.axis is not None))


def rejoined(views: Sequence[View], axis: int) -> list[View]:
    """Views with the slices of each leaf that lie in order along an axis as one."""
    whole: list[View] = []
    for view in views:
        joined = _join(whole[-1], view, axis) if whole else None
        whole[-1:] = [*whole[-1:], view] if joined is None else [joined]
    return whole


def _join(a: View, b: View, axis: int) -> View | None:
    """Two views of a leaf as one, if the second goes on where the first ends."""
    changed = [
        k for k, (x, y) in enumerate(zip(a.region, b.region, strict=False)) if x != y
    ]
    if a.leaf != b.leaf or len(changed) != 1:
        return None
    (cut,) = changed
    (low, middle), (start, high) = a.region[cut], b.region[cut]
    begin, end = a.span[axis], b.span[axis]
    minor = tuple(part for part in a.axes[axis] if part.axis != cut)
    own = tuple(part for part in b.axes[axis] if part.axis != cut)
    if middle != start or begin[0] + begin[1] != end[0] or minor != own:
        return None
    parts, span, region = list(a.axes), list(a.span), list(a.region)
    parts[axis] = (Part(cut, high - low), *minor)
    span[axis] = begin[0], begin[1] + end[1]
    region[cut] = low, high
    one = dataclasses.replace(
        a, axes=tuple(parts), span=tuple(span), region=tuple(region)
    )
    rest = dataclasses.replace(b, axes=one.axes, span=one.span, region=one.region)
    return one if one == rest else None


def overlap(a: View, b: View, axes: Iterable[int]) -> bool:
    """Whether two views of a leaf have slices along some axes in common."""
    pairs = [(a.region[k], b.region[k]) for k in axes]
    return all(x[0] < y[1] and y[0] < x[1] for x, y in pairs)


def _blocks(old: Shape, new: Shape):
    """The smallest stretches of axes of both shapes that hold equally many numbers."""
    if 0 in old:  # Sizes say nothing about axes that hold nothing.
        raise LostError
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        before = after = 1
        while True:
            if before <= after and i < len(old) and (before < after or not olds):
                before *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new) and (after < before or not news):
                after *= new[j]
                news.append(j)
                j += 1
            else:
                break
            if before == after and olds and news:
                break
        yield olds, news


def _regrouped(axes: Sequence, sizes: Sequence[int]) -> list:
    """The new axes of one block of a reshape, each with its parts and its span."""
    if not sizes:
        return []
    whole = all(span == (0, total) for _, span, total in axes)
    length = math.prod(span[1] for _, span, _ in axes)
    first = next((i for i, size in enumerate(sizes) if size > 1), 0)
    if whole:
        start, sizes = 0, list(sizes)
    else:
        start, rest = _stretch(axes, list(sizes[first:]), length)
        sizes = [*sizes[:first], *rest]
    parts = [p for own, span, _ in axes for p in own or (Part(None, span[1]),)]
    new = []
    for position, size in enumerate(sizes):
        taken = _take(parts, size)
        if all(part.axis is None for part in taken):
            taken = ()
        new.append((taken, (start if position == first else 0, size)))
    return new


def _stretch(axes: Sequence, sizes: list[int], length: int) -> tuple[int, list[int]]:
    """Where a stretch of the outermost axis begins in the new one, and its sizes."""
    wide = [k for k, (_, _, total) in enumerate(axes) if total > 1]
    if any(axes[k][1] != (0, axes[k][2]) for k in wide[1:]):
        raise LostError
    rows = math.prod(axes[k][2] for k in wide[1:])
    start, minor = axes[wide[0]][1][0] * rows, math.prod(sizes[1:])
    if start % minor or length % minor:
        raise LostError
    return start // minor, [length // minor, *sizes[1:]]


def _take(parts: list[Part], size: int) -> tuple[Part, ...]:
    """Takes the outermost parts that make an axis of a size, and splits the last."""
    taken = []
    while parts and (size > 1 or parts[0].size == 1):
        part = parts.pop(0)
        if size % part.size == 0:
            taken.append(part)
            size //= part.size
        elif part.size % size == 0:
            taken.append(Part(part.axis, size))
            parts.insert(0, Part(part.axis, part.size // size))
            size = 1
        else:
            raise LostError
        if size == 1 and not (parts and parts[0].size == 1):
            break
    return tuple(taken)
