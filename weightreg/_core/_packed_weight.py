"""The node of a tree of parameters that holds a quantized weight as bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


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
      stack_axes: The axes of the weight that are the first ones of ``bits``.
    """

    bits: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    levels: str
    stack_axes: tuple[int, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights."""
        return self.scale.dtype
