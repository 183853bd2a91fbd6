"""The node of a tree of parameters that holds a quantized weight as bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bits", "scale"),
    meta_fields=("shape", "levels", "stack_axes", "input_axes"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight in bits, as `pack` makes it: a node of a tree of parameters.

    Each unit's weights are a row of bits, in the order of its inputs, eight to a byte
    and the first one in its highest bit. What is left of a row's last byte is 0. So a
    product reads bits in the order in which it sums. Layers that are stacked each have
    bytes of their own, so that ``jax.lax.scan`` and ``jax.vmap`` can take them one by
    one.

    Attributes:
      bits: uint8, ``(*stack, planes, units, bytes)``. The last plane says which weights
        are negative; that before it, of ternary ones, which are not 0.
      scale: ``V``, in the weights' dtype, ``(*stack,)``.
      shape: Shape of one layer.
      levels: ``"binary"`` or ``"ternary"``.
      stack_axes: The axes of the weight that are the first ones of ``bits``.
      input_axes: The axes of ``shape`` that a row runs along, all others number rows.
        They say where bits are, and not what a weight is: where that is not known, the
        last axis numbers rows.
    """

    bits: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    levels: str
    stack_axes: tuple[int, ...]
    input_axes: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        """Whether all is equal, the bits too, so that a copy is equal."""
        if not isinstance(other, PackedWeight):
            return NotImplemented
        forms = map(jax.tree.structure, (self, other))
        arrays = (self.bits, other.bits), (self.scale, other.scale)
        return len({*forms}) == 1 and all(_equal(a, b) for a, b in arrays)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights."""
        return self.scale.dtype


def _equal(a: Any, b: Any) -> bool:
    """Whether two arrays are equal, or what stands for them, such as their shapes."""
    if not (hasattr(a, "__array__") and hasattr(b, "__array__")):
        return a is b or a == b
    return a is b or (a.dtype == b.dtype and bool(jnp.array_equal(a, b)))


_META = ("shape", "levels", "stack_axes", "input_axes")


def register_state(register: Callable[..., None]) -> None:
    """Lets packed weights go through Flax's state dicts.

    Args:
      register: ``flax.serialization.register_serialization_state``, which is passed
        since this library imports Flax in the modules for it only.
    """
    register(PackedWeight, _to_state, _from_state, override=True)


def _to_state(packed: PackedWeight) -> dict[str, Any]:
    """A packed weight as a dict, which also says which weights the bits are."""
    return {
        "bits": packed.bits,
        "scale": packed.scale,
        "shape": _numbered(packed.shape),
        "levels": packed.levels,
        "stack_axes": _numbered(packed.stack_axes),
        "input_axes": _numbered(packed.input_axes),
    }


def _numbered(numbers: tuple[int, ...]) -> dict[str, int]:
    """A tuple as Flax's own state dicts have it."""
    return {str(i): number for i, number in enumerate(numbers)}


def _from_state(target: PackedWeight, state: Any) -> PackedWeight:
    """Takes bits and scale from a dict, which has to be of such a weight as target."""
    expected = _to_state(target)
    if isinstance(state, dict) and set(expected) - set(state) == {"input_axes"}:
        raise ValueError(
            "the state of a PackedWeight has no input_axes: it is of the first layout "
            "of bits. Restore it with the weightreg that wrote it, save it there with "
            "save_packed, and read that file with load_packed."
        )
    if not isinstance(state, dict) or set(state) != set(expected):
        have = list(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"the state of a PackedWeight must have {list(expected)}, but is {have}: "
            "it is of another network than the target, or of one that is not packed."
        )
    for name in _META:
        if state[name] != expected[name]:
            raise ValueError(
                f"{name} of a PackedWeight is {_shown(state[name])} in the state, but "
                f"{_shown(expected[name])} in the target: pack the target as the saved "
                "network was packed, or restore what was saved of the target's kind."
            )
    for name in ("bits", "scale"):
        have, want = (
            (x[name].shape, jnp.dtype(x[name].dtype)) for x in (state, expected)
        )
        if have != want:
            raise ValueError(
                f"{name} of a PackedWeight has shape {have[0]} and dtype {have[1]} in "
                f"the state, but {want[0]} and {want[1]} in the target."
            )
    return dataclasses.replace(target, bits=state["bits"], scale=state["scale"])


def _shown(value: Any) -> Any:
    """A tuple as it was before it was numbered."""
    return tuple(value.values()) if isinstance(value, dict) else repr(value)
