"""What users pass, checked: numbers, schedules, and trees that belong to parameters.

Trees are matched by key paths and never by containers, so that a plain dict can
describe an ``nnx.State``, and a tree given for all parameters still fits after
``optax.masked`` has cut holes (``optax.MaskedNode``) into them.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey
from optax._src.base import NO_PARAMS_MSG  # not public, but the error users know

KeyPath: TypeAlias = tuple[Any, ...]

Number: TypeAlias = jax.typing.ArrayLike | optax.Schedule
"""A number, an array, a traced array, or a schedule of the step count."""


class CountState(NamedTuple):
    """State of a transformation that only counts its steps.

    Attributes:
      count: Steps taken, for schedules; int32 scalar.
    """

    count: jax.typing.ArrayLike

    @classmethod
    def zero(cls) -> "CountState":
        """The state before the first step."""
        return cls(jnp.zeros([], jnp.int32))

    def next(self) -> "CountState":
        """The state after one more step."""
        return CountState(optax.safe_increment(self.count))


class EqualByFields:
    """Of dataclasses that are equal if their fields are, which may be arrays."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        names = [field.name for field in dataclasses.fields(cast(Any, self))]
        return all(_equal(getattr(self, n), getattr(other, n)) for n in names)

    def __hash__(self) -> int:
        # Fields may be arrays and trees, which have no hash, and equal numbers of
        # different kinds need not have the same.
        return hash(type(self))


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal. What does not compare is equal to itself."""
    try:
        return a is b or bool(a == b)
    except Exception:  # arrays of several elements, and traced ones
        return False


def is_real(value: Any) -> bool:
    """Whether something is a real number or an array of such, traced or not."""
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError):
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_scalar(
    name: str, value: Any, low: float, high: float, kind: str = "a scalar"
) -> None:
    """Refuses what is no real scalar, or is known not to be in ``[low, high]``.

    No infinite number is accepted, whatever ``high`` is.
    """
    if not is_real(value) or np.shape(value) != ():
        raise TypeError(f"{name} must be {kind}, not {value!r}.")
    if isinstance(value, Tracer):
        return
    known = float(np.asarray(value))  # in NumPy, since under jit all of JAX is traced
    if not (low <= known <= high and known < math.inf):
        ends = f"in [{low}, {high}]"
        allowed = f"at least {low} and finite" if math.isinf(high) else ends
        raise ValueError(f"{name} must be {allowed}, but is {value}.")


def check_scheduled(name: str, value: Any, low: float, high: float) -> None:
    """Refuses what is no schedule, no real scalar, or is not in ``[low, high]``."""
    if not callable(value):
        check_scalar(name, value, low, high, "a scalar or a schedule")


def check_count(name: str, value: Any, least: int, *, traced: bool = False) -> Any:
    """Takes an integer, which may be ``traced``, or has to be known before tracing."""
    if traced and isinstance(value, Tracer):
        if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be an integer, not {value!r}.")
        return value
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}.") from None
    if count < least:
        raise ValueError(f"{name} must be {least} or more, but is {count}.")
    return count


def check_boolean(name: str, value: Any) -> None:
    """Refuses what is neither ``True`` nor ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a boolean, not {value!r}.")


def check_shape(where: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> None:
    """Refuses a shape that does not broadcast to a whole array's."""
    try:
        fits = np.broadcast_shapes(shape, whole) == whole
    except ValueError:
        fits = False
    if not fits:
        broadcast = f" or broadcast to shape {whole}" if whole else ""
        raise ValueError(f"{where} must be a scalar{broadcast}, but has shape {shape}.")


def at(
    name: str, number: Number, count: jax.typing.ArrayLike, shape: tuple[int, ...] = ()
) -> jax.typing.ArrayLike:
    """The value of a number or schedule at a step, to be broadcast to ``shape``."""
    return given(name, number(count), shape) if callable(number) else number


def given(name: str, value: Any, shape: tuple[int, ...]) -> jax.typing.ArrayLike:
    """What a schedule gives, which has to be numbers that broadcast to ``shape``."""
    if not is_real(value):
        raise TypeError(f"{name} must be a schedule of numbers, but gives {value!r}.")
    check_shape(name, jnp.shape(value), shape)
    return value


def floats(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """Takes an array, which has to be one of floats."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating dtype, not {array.dtype}.")
    return array


def compute_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """A dtype of at least 32 bits that holds values of all ``dtypes`` exactly.

    Raises:
      TypeError: JAX promotes one of them to none, such as a float of 8 bits.
    """
    try:
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    except jax.dtypes.TypePromotionError as error:
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise TypeError(
            f"there is no arithmetic in {names}, only in floats of 16 bits or more: "
            "cast, or leave leaves out with mask=."
        ) from error


def show_path(path: KeyPath) -> str:
    """A leaf's path as a user would write it, e.g. ``['Dense_0']['kernel']``."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def leaf_path(path: KeyPath) -> str:
    """A leaf's path, without the ``.value`` that boxes and ``nnx.State`` append."""
    return show_path(own_path(path))


def own_path(path: KeyPath) -> KeyPath:
    """A leaf's path, without the ``.value`` that boxes and ``nnx.State`` append."""
    return path[:-1] if path[-1:] == _BOXED else path


def is_hole(node: Any) -> bool:
    """Whether a node stands for parameters that are not there."""
    return node is None or isinstance(node, optax.MaskedNode)


def is_function(x: Any) -> bool:
    """Whether an argument is a function, not a tree whose class can be called.

    Equinox modules can be called, and a mask or a tree of volumes made of one too.
    """
    leaves = jax.tree.leaves(x)
    all_callable = bool(leaves) and all(map(callable, leaves))
    return callable(x) and (isinstance(x, jax.tree_util.Partial) or all_callable)


def refuse_step_count(argument: str, params: Any) -> None:
    """Says that ``inject_hyperparams`` has called a rule as if it were a schedule."""
    if jax.tree_util.all_leaves([params]) and jnp.issubdtype(
        jnp.result_type(params), jnp.integer
    ):
        raise TypeError(
            f"{argument} must be called with parameters, but got a step count. Under "
            f"optax.inject_hyperparams pass static_args={argument!r}, since it takes "
            "every function for a schedule."
        )


def match(
    name: str,
    tree: Any,
    params: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """Finds the entry of ``tree`` for every leaf of ``params``.

    Args:
      name: What the tree is called in errors: the argument the user passed.
      tree: A tree with the structure of ``params``, or a prefix of it. ``None``
        entries are values like any other.
      params: The parameters.
      is_leaf: Further nodes of ``tree`` to be taken as entries.

    Returns:
      One entry a leaf, in the order in which JAX flattens ``params``.

    Raises:
      ValueError: A leaf has no entry, or an entry has no leaf.
    """

    def stop(node: Any) -> bool:
        return is_hole(node) or (is_leaf is not None and is_leaf(node))

    leaves = _own_paths(params)
    if not leaves:  # Optax's placeholder trees, and models without parameters
        return []
    entries = dict(_own_paths(tree, stop))
    unused = set(entries)
    found = []
    for path, _ in leaves:
        prefixes = (path[:n] for n in range(len(path), -1, -1))
        prefix = next((p for p in prefixes if p in entries), None)
        if prefix is None:
            raise ValueError(
                f"{name} must be one value, or a tree that matches the parameters or "
                f"a prefix of them, but has no entry for {show_path(path)}. It has: "
                f"{', '.join(map(show_path, entries)) or 'nothing'}."
            )
        unused.discard(prefix)
        found.append(entries[prefix])
    holes = {path for path, node in _own_paths(params, is_hole) if is_hole(node)}
    above = {hole[:n] for hole in holes for n in range(len(hole) + 1)}
    for path in unused:
        below = any(path[:n] in holes for n in range(len(path)))
        if path not in above and not below and not is_hole(entries[path]):
            raise ValueError(
                f"{name} has an entry at {show_path(path)}, where the parameters have "
                f"none. They have: {', '.join(show_path(p) for p, _ in leaves)}."
            )
    return found


def _own_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[KeyPath, Any]]:
    """The leaves of a tree with their paths, on which boxes leave no trace.

    ``nnx.State`` and linen's metadata put a leaf alone into a node, under ``value``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    under = collections.Counter(
        path[:n] for path, _ in leaves for n in range(len(path))
    )
    return [
        (path[:-1] if path[-1:] == _BOXED and under[path[:-1]] == 1 else path, leaf)
        for path, leaf in leaves
    ]


_BOXED = (GetAttrKey("value"),)


def check_params(params: Any) -> None:
    """Raises Optax's error where a transformation was not given the parameters."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)


def each(params: Any, wanted: Iterable[int]) -> Iterator[tuple[int, jax.Array]]:
    """The leaves at some positions among those of ``params``, as arrays."""
    leaves = jax.tree.leaves(params)
    for index in wanted:
        yield index, jnp.asarray(leaves[index])


def each_with_update(
    params: Any, updates: Any, wanted: Iterable[int]
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """The leaves at some positions of ``params``, each with what is to be added to it.

    Raises:
      ValueError: ``updates`` have another structure than the parameters, or another
        shape at one of these positions.
    """
    try:
        flat = jax.tree.structure(params).flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"updates must have the structure of params: {error}"
        ) from error
    paths = jax.tree_util.tree_leaves_with_path(params)
    for index, leaf in each(params, wanted):
        if jnp.shape(flat[index]) != leaf.shape:
            raise ValueError(
                f"updates has shape {jnp.shape(flat[index])} at "
                f"{show_path(paths[index][0])}, where params has {leaf.shape}."
            )
        yield index, leaf, jnp.asarray(flat[index])


def is_box(node: Any) -> bool:
    """Whether a node is one of Flax's boxes: one array, and what its axes are called.

    That is a parameter of linen with metadata, or a variable in an ``nnx.State``. An
    array of another shape must not lie in it, whose axes have other names or none.
    """
    if not hasattr(type(node), "add_axis"):  # Other wrappers have to stay as they are.
        return False
    inside, _ = jax.tree_util.tree_flatten_with_path(node, lambda x: x is not node)
    (path, child), *more = inside or [((), None)]
    named = path == (GetAttrKey("value"),) and not more
    return named and jax.tree_util.all_leaves([child])


def spread(params: Any, values: Mapping[int, Any], otherwise: Any) -> Any:
    """A tree like ``params`` with values at some positions, and one value elsewhere.

    The values are none of the parameters, and lie in no boxes (`is_box`).
    """
    structure = jax.tree.structure(params, is_leaf=is_box)
    return structure.unflatten(
        [values.get(index, otherwise) for index in range(structure.num_leaves)]
    )


def replaced(tree: Any, new: Mapping[int, Any], params: Any) -> Any:
    """``tree``, of the structure of ``params``, with new leaves at some positions."""
    structure = jax.tree.structure(params)
    leaves = structure.flatten_up_to(tree)
    for index, leaf in new.items():
        leaves[index] = leaf
    return structure.unflatten(leaves)
