"""The node of a tree of parameters that holds a quantized weight as bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from weightreg._core._trees import show_path


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bits", "scale"),
    meta_fields=("shape", "levels", "stack_axes"),
)
@dataclasses.dataclass(frozen=True)
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
      stack_axes: Where the weight has the axes that are the first ones of ``bits``.
    """

    bits: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    levels: str
    stack_axes: tuple[int, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights."""
        return self.scale.dtype


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is a `PackedWeight`."""
    return isinstance(node, PackedWeight)


def refuse_packed(params: Any) -> None:
    """Refuses packed weights where numbers are needed."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
        if is_packed(leaf):
            raise ValueError(
                f"params are packed at {show_path(path)}: unpack them first."
            )
