"""Products with packed weights, which are computed from their bits where that pays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from weightreg._core._arguments import compute_dtype, is_real
from weightreg._core._mesh import placed
from weightreg._core._packed_weight import PackedWeight
from weightreg._core._weights import is_packed
from weightreg._quantization._pack import (
    check_bits,
    levels_of,
    row_sizes,
    unit_axes,
    unpack,
)
from weightreg._quantization._quantize import level

# Sums that are fused with the unpacking: on an H100 a sketch took 0.6 of bfloat16's
# time for one row, 1.0 for two and 1.9 for four, where unpacking took 2.1 for each.
ROWS_OF_SUMS = 4
# Tables of sums have 256 entries for each byte of a row, which many units have to share
# before they pay. What they take grows with the rows, that of an unpacked kernel not.
UNITS_OF_TABLES, ROWS_OF_TABLES = 1024, 16


def packed_matmul(
    x: jax.typing.ArrayLike, packed: PackedWeight, axis: int | tuple[int, ...] = 0
) -> jax.Array:
    r"""The product of an array and a packed weight, without a kernel where that pays.

    .. math::
      y_{\ldots u} = \sum_i x_{\ldots i} \, w_{i u}

    It is ``x @ unpack(packed)`` to rounding, which sums in another order. The sums are
    in float32 at least (float64 for float64), hence for :math:`n` inputs of a unit and
    :math:`\epsilon = 2^{-24}` the error is at most
    :math:`(n + 1) \epsilon \sum_i |x_i w_{i u}|`, and one rounding to the result's
    dtype. Its derivatives are those of ``x @ unpack(packed)``.

    How it is computed depends on the platform that the program is compiled for, and on
    how many rows ``x`` has, which are all axes that are not summed over (those that
    ``jax.vmap`` adds, too):

    - On GPUs, up to 4 rows: signs are multiplied and summed in the kernel that reads
      them. It reads a bit or two for each weight, and makes no kernel of the layer.
    - On CPUs, up to 16 rows (ternary: 8) and for 1024 units or more: a table has the
      sums of eight inputs (ternary: four) for each of the 256 values of a byte, and
      each byte of a unit's row looks one up.
    - Else, and where a row of bits does not run along ``axis``, or an explicit mesh
      splits ``x``, the weight is unpacked once ``x`` is known, and multiplied.

    Args:
      x: Real numbers, whose last axis, or axes, are summed over.
      packed: One layer of what `pack` makes, ``(inputs, units)``; both may be several
        axes. For layers that are stacked, use ``jax.vmap`` or ``jax.lax.scan``.
      axis: The axis of the weight that is summed over, or several for as many of the
        last axes of ``x``: 1 for Equinox's ``(units, inputs)``.

    Returns:
      ``(*rows, *units)``, in the dtype that ``x`` and the weight promote to.

    Raises:
      TypeError: ``packed`` is no `PackedWeight`, or ``x`` holds no real numbers.
      ValueError: ``packed`` is a stack, or was cut; ``axis`` names no axis of it, or
        one twice; or the sizes of what is summed over differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> w = jnp.array([[0.3, -0.1, 0.0], [0.2, 0.2, -0.4]])
      >>> packed = wr.pack({"kernel": w}, 0.5, "ternary")["kernel"]
      >>> wr.packed_matmul(jnp.array([1.0, 2.0]), packed)
      Array([ 0.5,  0. , -1. ], dtype=float32)
    """
    x = _real(x)
    if not is_packed(packed):
        raise TypeError(
            f"packed must be a PackedWeight, as pack makes it of one weight, not "
            f"{type(packed).__name__}."
        )
    axes = axis if isinstance(axis, tuple) else (axis,)
    rank = len(packed.shape)
    own = tuple(a % rank for a in axes if -rank <= a < rank)
    if len(set(own)) < len(axes):
        raise ValueError(
            f"axis must name axes of a weight of shape {packed.shape}, each once, but "
            f"is {axis}."
        )
    last = tuple(range(x.ndim - len(own), x.ndim))
    have, want = x.shape[max(last[0], 0) :] if last else (), packed.shape
    if have != tuple(want[a] for a in own):
        raise ValueError(
            f"x has shape {x.shape}, of which the last sizes must be those that axis "
            f"{axis} has in a weight of shape {packed.shape}."
        )
    return dot(x, packed, last, own)


def _real(x: Any) -> jax.Array:
    if not is_real(x):
        raise TypeError(f"x must be an array of real numbers, not {x!r}.")
    return jnp.asarray(x)


def dot_general_of(packed: PackedWeight) -> Callable[..., jax.Array]:
    """Stands for ``jax.lax.dot_general`` in a layer that is given its kernel unpacked.

    The kernel, of which nothing is used but its dtype, is then not made. Where a layer
    asks for more than the plain product it is what is multiplied.
    """

    def dot_general(x, kernel, dimension_numbers, precision=None, **given):
        contracted, batch = dimension_numbers
        more = any(value is not None for value in (precision, *given.values()))
        if more or any(map(tuple, batch)) or x.dtype != kernel.dtype:
            return lax.dot_general(x, kernel, dimension_numbers, precision, **given)
        scale = packed.scale.astype(kernel.dtype)
        return dot(x, dataclasses.replace(packed, scale=scale), *contracted)

    return dot_general


class _Axes(NamedTuple):
    """The axes that are summed over, in the order of a row of bits where it has them.

    Attributes:
      x: Those of ``x``.
      weight: Those of the weight.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]


def dot(x: jax.Array, packed: PackedWeight, x_axes: Any, weight_axes: Any) -> jax.Array:
    """What ``jax.lax.dot_general`` makes of ``x`` and the weight, without batches.

    Raises:
      ValueError: Layers are stacked in the weight, or something has been cut out of it.
    """
    if packed.scale.ndim:
        raise ValueError(
            f"packed must be one layer, but has {packed.scale.shape} of shape "
            f"{packed.shape}: use jax.vmap or jax.lax.scan."
        )
    check_bits(packed, "packed")
    pairs = sorted(zip(weight_axes, x_axes, strict=True))
    axes = _Axes(tuple(b for _, b in pairs), tuple(a for a, _ in pairs))
    return _dot(x, packed, axes)


@functools.partial(jax.jit, static_argnums=2)  # Equal shapes share a trace.
def _dot(x: jax.Array, packed: PackedWeight, axes: _Axes) -> jax.Array:
    if axes.weight != packed.input_axes or placed(x, (), None) is not None:
        return _unpacked(x, packed, axes)

    @jax.custom_jvp
    def product(x, packed):
        return _best(x, packed, axes)

    @product.defjvp
    def product_jvp(primals, tangents):
        # The derivatives have all rows, so that a kernel is what they need.
        _, tangent = jax.jvp(functools.partial(_unpacked, axes=axes), primals, tangents)
        return product(*primals), tangent

    return product(x, packed)


def _best(x: jax.Array, packed: PackedWeight, axes: _Axes) -> jax.Array:
    """The product by the plan that takes the least time for so many rows."""

    @custom_vmap
    def product(x, packed):
        return _planned(x, packed, axes)

    @product.def_vmap
    def batched(size, batched, x, packed):
        """Rows are counted with those of a batch, unless each has its own weight."""
        _, of_packed = batched
        if not any(jax.tree.leaves(of_packed)):
            moved = _Axes(tuple(a + 1 for a in axes.x), axes.weight)
            return _best(x, packed, moved), True
        places = [jax.tree.map(lambda b: 0 if b else None, t) for t in batched]
        one = functools.partial(_planned, axes=axes)
        return jax.vmap(one, places, axis_size=size)(x, packed), True

    return product(x, packed)


def _planned(x: jax.Array, packed: PackedWeight, axes: _Axes) -> jax.Array:
    units, inputs = row_sizes(packed)
    unpacked = functools.partial(_unpacked, axes=axes)
    rows = x.size // max(inputs, 1)
    if not x.size or not units:
        return unpacked(x, packed)
    in_rows = lambda plan: functools.partial(_in_rows, axes=axes, plan=plan)  # noqa: E731
    plans = {}
    if rows <= ROWS_OF_SUMS:
        plans["cuda"] = plans["rocm"] = in_rows(_sums)
    if rows * len(packed.bits) <= ROWS_OF_TABLES and units >= UNITS_OF_TABLES:
        plans["cpu"] = in_rows(_tables)
    return lax.platform_dependent(x, packed, default=unpacked, **plans)


def _unpacked(x: jax.Array, packed: PackedWeight, axes: _Axes) -> jax.Array:
    """Unpacks the weight once ``x`` is known, and multiplies."""
    dtype = jnp.result_type(x, packed.dtype)
    w = unpack(packed, after=x).astype(dtype)
    return lax.dot_general(x.astype(dtype), w, (axes, ((), ())))


def _in_rows(x: jax.Array, packed: PackedWeight, axes: _Axes, plan: Any) -> jax.Array:
    """Runs a plan on a matrix of ``x`` whose rows are as long as those of the bits."""
    dtype = jnp.result_type(x, packed.dtype)
    rows = [a for a in range(x.ndim) if a not in axes.x]
    shape = *(x.shape[a] for a in rows), *(packed.shape[a] for a in unit_axes(packed))
    _, inputs = row_sizes(packed)
    x = x.transpose(*rows, *axes.x).reshape(-1, inputs).astype(compute_dtype(dtype))
    # Zeros meet the bits that are left of the last byte.
    x = jnp.pad(x, ((0, 0), (0, -inputs % 8)))
    return plan(x, packed).astype(dtype).reshape(shape)


def _sums(x: jax.Array, packed: PackedWeight) -> jax.Array:
    """Multiplies and sums, which XLA fuses with the unpacking."""
    w = levels_of(packed, packed.bits, -1).astype(x.dtype)  # (units, bytes, 8)
    x = x.reshape(-1, 1, *w.shape[1:])
    return jnp.sum(x * w, (-2, -1))


def _tables(x: jax.Array, packed: PackedWeight) -> jax.Array:
    """Adds what tables say of the inputs that share a byte, for all units at once."""
    codes, ternary = packed.bits[-1], packed.levels == "ternary"
    if ternary:  # Four weights in a byte: which are not 0, and which are negative.
        nonzero, negative = packed.bits
        pair = nonzero & 0xF0 | negative >> 4, nonzero << 4 | negative & 0x0F
        codes = jnp.stack(pair, -1).reshape(len(negative), -1)
    bits = jnp.unpackbits(jnp.arange(256, dtype=jnp.uint8)[:, None], -1).astype(bool)
    planes = jnp.split(bits, len(packed.bits), -1)
    levels = level(planes[0] if ternary else None, planes[-1], packed.scale)
    levels = levels.astype(x.dtype)  # (256, inputs of a group)
    groups = x.reshape(len(x), -1, levels.shape[1]).transpose(1, 2, 0)

    def add(total, group):
        x, code = group
        table = jnp.dot(levels, x, precision="highest")  # (256, rows)
        return total + table.at[code].get(mode="promise_in_bounds"), None

    zeros = jnp.zeros((len(codes), len(x)), x.dtype)
    return lax.scan(add, zeros, (groups, codes.T))[0].T
