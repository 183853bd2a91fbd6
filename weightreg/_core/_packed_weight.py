"""The node of a tree of parameters that holds a quantized weight as bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bits", "scale"),
    meta_fields=("shape", "levels", "stack_axes"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight in bits, as `pack` makes it: a node of a tree of parameters.

    Weights are numbered along the last axis first, and eight of them share a byte, the
    first one in its highest bit. What is left of the last byte is 0. Layers that are
    stacked each have bytes of their own, so that ``jax.lax.scan`` and ``jax.vmap`` can
    take them one by one.

    Attributes:
      bits: uint8, ``(*stack, planes, bytes)``. The last plane says which weights are
        negative; that before it, of ternary ones, which are not 0.
      scale: ``V``, in the weights' dtype, ``(*stack,)``.
      shape: Shape of one layer.
      levels: ``"binary"`` or ``"ternary"``.
      stack_axes: The axes of the weight that are the first ones of ``bits``.
    """

    bits: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    levels: str
    stack_axes: tuple[int, ...]

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
