"""Quantized weights as bits: one for a binary weight, two for a ternary one."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from weightreg._core._arguments import each, is_box, is_real, leaf_path
from weightreg._core._mesh import gathered
from weightreg._core._packed_weight import PackedWeight
from weightreg._core._weights import (
    Dims,
    Mask,
    filter_axes,
    is_packed,
    likely_input_axes,
    stack_axes,
)
from weightreg._quantization._quantize import (
    PLANES,
    check_levels,
    codes,
    level,
    scales_of,
)


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
      params: Any tree of parameters.
      volume: The height ``V`` of the levels, one for each layer: a finite number, a
        tree of these (or a prefix), or a function of the parameters.
      levels: ``"binary"`` or ``"ternary"``.
      mask: Which leaves to pack, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, each of which has a scale of its own. So may each filter
        of a grouped or depthwise convolution in a traced network.

    Returns:
      The tree of ``params`` with a `PackedWeight` in the place of each weight, and of
      the box with metadata that Flax may have put around it.

    Raises:
      ValueError: ``V`` is negative, NaN, or infinite or rounded to 0 in the weights'
        dtype, as far as it is known before tracing; ``volume`` differs within a layer;
        a tree does not match the parameters; a rule meets a leaf without fans;
        ``levels`` is neither; or weights are packed already.
      TypeError: ``volume`` is a schedule, or a weight is no floating-point array of 16,
        32 or 64 bits.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, section 5.4, which counts 32 times fewer bits.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"kernel": jnp.array([[0.3, -0.1, 0.0]]), "bias": jnp.ones(3)}
      >>> packed = wr.pack(params, 0.5, "binary")
      >>> packed["kernel"].bits.tolist(), packed["kernel"].scale  # a row for each unit
      ([[[0], [128], [0]]], Array(0.5, dtype=float32))
      >>> wr.unpack(packed)["kernel"]
      Array([[ 0.5, -0.5,  0.5]], dtype=float32)
    """
    check_levels(levels)
    scales = scales_of("pack", params, volume, mask, dims)
    paths = jax.tree_util.tree_leaves_with_path(params)
    stacked = stack_axes("pack", params, mask, dims, known=False)
    filters = filter_axes(params, dims)
    inputs = likely_input_axes(params, mask, dims)
    packed = {}
    for i, w in each(params, scales):
        own = _apart(stacked[i], filters[i], scales[i])
        scale = _one_per_layer(leaf_path(paths[i][0]), scales[i], w, own)
        packed[i] = _encode(w, scale, levels, own, inputs[i])
    # Bits have other axes than the weight, which the names on its box would not fit.
    nodes, structure = jax.tree.flatten(params, is_leaf=is_box)
    return structure.unflatten([packed.get(i, node) for i, node in enumerate(nodes)])


def unpack(packed: Any, *, after: Any = None) -> Any:
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
      after: An array, or a tree of arrays, that is computed before anything is
        unpacked: a layer's inputs. Only those count that are being traced.

    Returns:
      The tree with an array in the place of each `PackedWeight`.

    Raises:
      TypeError: ``after`` holds something else than arrays of real numbers.
      ValueError: Bits are not those of a whole layer.

    Example:
      >>> packed = wr.pack({"kernel": jnp.array([[0.3, -0.1]])}, 0.5, "ternary")
      >>> wr.unpack(packed)
      {'kernel': Array([[0.5, 0. ]], dtype=float32)}
    """
    numbers = _first_numbers(after)

    def one(node: Any) -> Any:
        if not is_packed(node):
            return node
        check_bits(node)
        # All weights are made of the scale, which is the smallest array that can wait.
        scale = functools.reduce(lambda scale, x: _after(x, scale), numbers, node.scale)
        return _decode(dataclasses.replace(node, scale=scale))

    return jax.tree.map(one, packed, is_leaf=is_packed)


def _first_numbers(after: Any) -> list[jax.Array]:
    """Takes one number of every array that is being traced and has any."""
    for leaf in jax.tree.leaves(after):
        if not is_real(leaf):
            raise TypeError(f"after must hold arrays of real numbers, not {leaf!r}.")
    arrays = [x for x in jax.tree.leaves(after) if isinstance(x, Tracer) and x.size]
    return [gathered(x, ())[(0,) * x.ndim] for x in arrays]


def _apart(stacked, filters, scale) -> tuple[int, ...]:
    """The axes that layers are stacked along, or filters that have a scale each."""
    own = [a for a in filters if scale.ndim and scale.shape[a] != 1]
    return tuple(sorted({*stacked, *own}))


def _one_per_layer(path, scale, leaf, stacked) -> jax.Array:
    """Gives every stacked layer its scale, which must not differ within the layer."""
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


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # Equal shapes share a trace.
def _encode(w, scale, levels, stacked, inputs) -> PackedWeight:
    own = [a for a in range(w.ndim) if a not in stacked]
    shape, stack = tuple(w.shape[a] for a in own), scale.shape
    inputs = tuple(own.index(a) for a in sorted(inputs) if a in own)
    w = gathered(jnp.moveaxis(w, stacked, range(len(stack))), range(len(stack)))
    nan = jnp.any(jnp.isnan(w), range(len(stack), w.ndim))
    packed = PackedWeight(
        bits=w,
        scale=jnp.where(nan, jnp.nan, scale),
        shape=shape,
        levels=levels,
        stack_axes=stacked,
        input_axes=inputs,
    )
    rows = [len(stack) + a for a in (*unit_axes(packed), *inputs)]
    w = w.transpose(*range(len(stack)), *rows)
    w = w.reshape(*stack, *row_sizes(packed))
    signs = codes(w, scale[..., None, None], levels)
    planes = jnp.stack([plane for plane in signs if plane is not None], -3)
    return dataclasses.replace(packed, bits=jnp.packbits(planes, -1))


@jax.jit
def _decode(packed: PackedWeight) -> jax.Array:
    stack, order = packed.scale.shape, (*packed.input_axes, *unit_axes(packed))
    shape = tuple(packed.shape[a] for a in order)
    if not packed.bits.size:
        return _in_place(jnp.zeros((*stack, *packed.shape), packed.dtype), packed)
    bits = gathered(packed.bits, range(len(stack)))
    columns = lax.platform_dependent(bits, cpu=_copied, default=_columns)
    w = levels_of(packed, columns, -2)
    units, inputs = row_sizes(packed)
    w = w.reshape(*stack, -1, units)[..., :inputs, :].reshape(*stack, *shape)
    places = [len(stack) + order.index(a) for a in range(len(order))]
    return _in_place(w.transpose(*range(len(stack)), *places), packed)


def _columns(bits: jax.Array) -> jax.Array:
    """The bytes of each input's eight, for all units in a row."""
    return jnp.swapaxes(bits, -1, -2)


def _copied(bits: jax.Array) -> jax.Array:
    """The same in memory, where XLA would read them from afar for each weight anew.

    It says so by an index: of what is only moved XLA makes no copy.
    """
    return jnp.take(_columns(bits), jnp.arange(bits.shape[-1]), -2, mode="clip")


def levels_of(packed: PackedWeight, bits: jax.Array, axis: int) -> jax.Array:
    """The weight of every bit; the eight of a byte are in an axis of their own.

    Args:
      packed: Whose levels they are.
      bits: Bytes in any order, ``(*stack, planes, ., .)``.
      axis: The axis of the result that numbers the bits of a byte, from the end.
    """
    # Masks take a fraction of the time that shifts take on CPU, plane by plane.
    masks = _MASKS.reshape(8, *(1,) * ~axis)
    plane = lambda i: jnp.expand_dims(bits[..., i, :, :], axis) & masks != 0  # noqa: E731
    nonzero = plane(0) if packed.levels == "ternary" else None
    return level(nonzero, plane(-1), packed.scale[..., None, None, None])


# Of the bits of a byte, the first one in its highest bit.
_MASKS = 1 << np.arange(7, -1, -1, dtype=np.uint8)


def unit_axes(packed: PackedWeight) -> tuple[int, ...]:
    """The axes of a layer that number its rows of bits."""
    return tuple(a for a in range(len(packed.shape)) if a not in packed.input_axes)


def row_sizes(packed: PackedWeight) -> tuple[int, int]:
    """How many rows of bits there are in a plane, and how many weights in a row."""
    axes = unit_axes(packed), packed.input_axes
    units, inputs = (math.prod(packed.shape[a] for a in own) for own in axes)
    return units, inputs


def bits_shape(packed: PackedWeight) -> tuple[int, ...]:
    """The shape of the bits of a weight out of which nothing has been cut."""
    units, inputs = row_sizes(packed)
    return (*packed.scale.shape, PLANES[packed.levels], units, -(-inputs // 8))


def check_bits(packed: PackedWeight, where: str = "a packed weight") -> None:
    """Refuses bits of which something else has been cut out than a layer."""
    expected = bits_shape(packed)
    if packed.bits.shape != expected:
        raise ValueError(
            f"{where} has bits of shape {packed.bits.shape}, where {packed.levels} "
            f"weights {packed.shape} have {expected}: they have been sliced, or are of "
            "the first layout of bits. Pack with dims=wr.trace_network(fn, params, x), "
            "with layers along axis 0, or unpack them before."
        )


def _in_place(w: jax.Array, packed: PackedWeight) -> jax.Array:
    """Puts the axes of a weight whose stack comes first where they belong."""
    # Loops take the first axes of a stack away, and stacks of networks have more.
    depth = packed.scale.ndim
    gone = len(packed.stack_axes) - depth
    here = packed.stack_axes[max(gone, 0) :]
    return jnp.moveaxis(w, range(-min(gone, 0), depth), [a - gone for a in here])


@jax.custom_jvp
def _after(first: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``x``, but not before the number ``first`` is known."""
    return _tied(first, x)


@_after.defjvp
def _after_jvp(primals, tangents):
    return _after(*primals), tangents[1]


@custom_vmap
def _tied(first: jax.Array, x: jax.Array) -> jax.Array:
    # An optimization barrier would say so, but is gone when XLA orders things on CPU.
    # Of a number and its successor one is even, which XLA does not know.
    number = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits |= (number * (number + 1) & 1).astype(bits.dtype)
    return lax.bitcast_convert_type(bits, x.dtype)


@_tied.def_vmap
def _tied_batched(axis_size, batched, first, x):
    """Waits for the first of a batch only, or each example had bits of its own."""
    del axis_size
    return _tied(gathered(first, ())[0] if batched[0] else first, x), batched[1]
