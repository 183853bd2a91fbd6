"""Quantized weights as bits: one for a binary weight, two for a ternary one."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from weightreg._mesh import gathered
from weightreg._numbers import is_real
from weightreg._quantize import check_levels, codes, level, weights_with_scales
from weightreg._trees import show_path
from weightreg._weights import Dims, Mask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bits", "scale"),
    meta_fields=("shape", "dtype", "levels", "stack_axes"),
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
      dtype: Of the weights.
      levels: ``"binary"`` or ``"ternary"``.
      stack_axes: Where the weight has the axes that are the first ones of ``bits``.
    """

    bits: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    dtype: jnp.dtype
    levels: str
    stack_axes: tuple[int, ...]

    def unpack(self) -> jax.Array:
        """The weight, of its own shape and dtype."""
        return _decode(self)


def pack(
    params: Any, volume: Any, levels: str, *, mask: Mask = None, dims: Dims = None
) -> Any:
    r"""Quantizes the weights, and stores one bit or two for each of them.

    A binary weight takes one bit and a ternary one two, and every layer has one scale,
    ``V``. (Five ternary weights would fit in a byte, but take several times as long to
    decode.) Biases, normalization parameters and all else that is no weight are kept.

    The result is a tree of arrays: it goes through ``jax.jit``, is sharded and saved
    like any parameters, and ``unpack(pack(params, volume, levels))`` is what `binarize`
    or `ternarize` makes of the parameters, bit for bit. (Except that NaN is no level: a
    layer that holds one gets a scale of NaN.)

    Args:
      params: As in `binarize`.
      volume: As in `binarize`, one number for each layer.
      levels: ``"binary"`` or ``"ternary"``.
      mask: Which leaves to pack, as in `binarize`.
      dims: What the axes of weights mean: see `weight_layers`. Axes that it does not
        name stack layers, with a scale each.

    Returns:
      The tree of ``params`` with a `PackedWeight` in the place of each weight.

    Raises:
      ValueError: As `binarize`; ``levels`` is neither; ``params`` are packed already;
        or ``volume`` differs within a layer.
      TypeError: As `binarize`.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, section 5.4, which counts 32 times fewer bits.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"kernel": jnp.array([[0.3, -0.1, 0.0]]), "bias": jnp.ones(3)}
      >>> packed = wr.pack(params, 0.5, "binary")
      >>> packed["kernel"].bits, packed["kernel"].scale
      (Array([[64]], dtype=uint8), Array(0.5, dtype=float32))
      >>> wr.unpack(packed)["kernel"]
      Array([[ 0.5, -0.5,  0.5]], dtype=float32)
    """
    check_levels(levels)
    refuse_packed(params)
    leaves, treedef = jax.tree.flatten(params)
    weights = weights_with_scales("pack", params, volume, mask, dims)
    for index, weight in weights.items():
        scale = _one_per_layer(weight.path, weight.scale, weight.leaf, weight.stacked)
        leaves[index] = _encode(weight.leaf, scale, levels, weight.stacked)
    return jax.tree.unflatten(treedef, leaves)


def unpack(packed: Any, *, after: jax.Array | None = None) -> Any:
    """The parameters that a packed tree stands for.

    Inside of ``jax.jit`` a network runs on bits: its kernels are made when they are
    needed, and gone when the call is over:

        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import weightreg as wr
        >>> model, x = nn.Dense(4), jnp.ones((2, 3))
        >>> packed = wr.pack(model.init(jax.random.key(0), x)["params"], 0.5, "binary")
        >>> run = jax.jit(lambda p, x: model.apply({"params": wr.unpack(p)}, x))
        >>> run(packed, x).shape
        (2, 4)

    Pass the packed tree as an argument, as here: what a compiled function closes over
    XLA may unpack once and for all.

    Nothing keeps XLA from unpacking all layers before it runs the first one, and on CPU
    it does; the call then holds the whole network in floating point. ``after`` says
    what comes first, so that one layer at a time is held:

        >>> def network(layers, x):
        ...     for layer in layers:
        ...         x = jax.nn.relu(x @ wr.unpack(layer, after=x)["kernel"])
        ...     return x

    ``weightreg.linen.unpack_layers`` does this for networks in Flax's linen.

    Args:
      packed: What `pack` returns, or any tree that holds `PackedWeight`.
      after: An array that is computed before anything is unpacked: a layer's input.

    Returns:
      The tree with an array in the place of each `PackedWeight`.

    Example:
      >>> packed = wr.pack({"kernel": jnp.array([[0.3, -0.1]])}, 0.5, "ternary")
      >>> wr.unpack(packed)
      {'kernel': Array([[0.5, 0. ]], dtype=float32)}
    """
    first = None if after is None else _first_number(after)

    def one(node: Any) -> Any:
        if not is_packed(node):
            return node
        # The scale is what all weights are made of, and the smallest array to wait.
        scale = node.scale if first is None else _then(first, node.scale)
        return dataclasses.replace(node, scale=scale).unpack()

    return jax.tree.map(one, packed, is_leaf=is_packed)


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is a `PackedWeight`."""
    return isinstance(node, PackedWeight)


def refuse_packed(params: Any) -> None:
    """Refuses packed weights where numbers are needed."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
        if is_packed(leaf):
            raise ValueError(
                f"params are packed already at {show_path(path)}: unpack them first."
            )


def _first_number(after: Any) -> jax.Array | None:
    """A number of an array, if that is being traced and has any."""
    if not is_real(after):
        raise TypeError(f"after must be an array of real numbers, not {after!r}.")
    if not isinstance(after, Tracer) or not after.size:
        return None
    return lax.stop_gradient(gathered(after, ())[(0,) * after.ndim])


def _one_per_layer(path, scale, leaf, stacked) -> jax.Array:
    """The scale of every stacked layer."""
    if scale.ndim and any(
        size != 1 for axis, size in enumerate(scale.shape) if axis not in stacked
    ):
        raise ValueError(
            f"volume at {path} must be one number for each layer, but has shape "
            f"{scale.shape} where the weight has {leaf.shape}"
            + (f", with layers stacked along {stacked}." if stacked else ".")
            + " Axes that stack layers are those that dims= does not name."
        )
    stack = tuple(leaf.shape[a] for a in stacked)
    kept = tuple(scale.shape[a] for a in stacked) if scale.ndim else ()
    return jnp.broadcast_to(scale.reshape(kept or (1,) * len(stack)), stack)


@functools.partial(jax.jit, static_argnums=(2, 3))  # traced once for one shape
def _encode(w, scale, levels, stacked) -> PackedWeight:
    shape = tuple(n for axis, n in enumerate(w.shape) if axis not in stacked)
    stack, count = scale.shape, math.prod(shape)
    w = gathered(jnp.moveaxis(w, stacked, range(len(stack))), range(len(stack)))
    w = w.reshape(*stack, count)
    nan = jnp.any(jnp.isnan(w), -1)
    signs = codes(w, scale[..., None], levels)
    planes = jnp.stack([plane for plane in signs if plane is not None], -2)
    return PackedWeight(
        bits=jnp.packbits(planes, -1),
        scale=jnp.where(nan, jnp.nan, scale),
        shape=shape,
        dtype=w.dtype,
        levels=levels,
        stack_axes=stacked,
    )


@jax.jit
def _decode(packed: PackedWeight) -> jax.Array:
    stack, count = packed.scale.shape, math.prod(packed.shape)
    bits = gathered(packed.bits, range(len(stack)))
    # Plane by plane: on CPU both at once would take several times as long.
    plane = lambda i: jnp.unpackbits(bits[..., i, :], -1, count).astype(bool)  # noqa: E731
    nonzero = plane(0) if packed.levels == "ternary" else None
    w = level(nonzero, plane(-1), packed.scale[..., None])
    w = w.reshape(*stack, *packed.shape)
    # Loops take the first axes of a stack away, and stacks of networks have more.
    gone = len(packed.stack_axes) - len(stack)
    here = packed.stack_axes[max(gone, 0) :]
    return jnp.moveaxis(w, range(-min(gone, 0), len(stack)), [a - gone for a in here])


@jax.custom_batching.custom_vmap
def _then(first: jax.Array, x: jax.Array) -> jax.Array:
    """``x``, but not before the number ``first`` is known."""
    # An optimization barrier would say so, but is gone when XLA orders things on CPU.
    # Of a number and its successor one is even; XLA does not know.
    number = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits |= (number * (number + 1) & 1).astype(bits.dtype)
    return lax.bitcast_convert_type(bits, x.dtype)


@_then.def_vmap
def _then_batched(axis_size, batched, first, x):
    """The first of a batch will do: else each example had bits of its own."""
    del axis_size
    return _then(first[0] if batched[0] else first, x), batched[1]
