"""Maps over examples a batch at a time, each where its examples are."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weightreg._core._arguments import check_count
from weightreg._core._mesh import parts, split_like


def map_batches(
    f: Callable[..., Any], xs: tuple[Any, ...], batch_size: int | None
) -> Any:
    """Maps ``f`` over the first axes of ``xs``, at most ``batch_size`` at a time.

    The examples fill a table row by row, and a batch is some of its columns. Where
    devices split the rows among them, each has its part of every batch already.
    """
    x = jax.tree.leaves(xs)[0]
    xs = jax.tree.map(lambda a: split_like(a, x), xs)
    if batch_size is None:
        return jax.vmap(f)(*xs)
    size = check_count("batch_size", batch_size, 1)
    if size >= len(x):
        return jax.checkpoint(jax.vmap(f))(*xs)
    rows = _rows(x, size)
    columns, width = len(x) // rows, max(size // rows, 1)
    table = jax.tree.map(lambda a: a.reshape(rows, columns, *a.shape[1:]), xs)

    # A derivative, too, holds no more than one batch, since it computes them again.
    @functools.partial(jax.checkpoint, static_argnums=1)
    def batch(start: int | jax.Array, width: int) -> Any:
        cut = lambda a: lax.dynamic_slice_in_dim(a, start, width, 1)  # noqa: E731
        out = jax.vmap(f)(*jax.tree.map(lambda a: _merge(cut(a), 0), table))
        return jax.tree.map(lambda a: a.reshape(rows, width, *a.shape[1:]), out)

    # The batch_size of lax.map would divide by 0 where outputs have no entries.
    out = lax.map(lambda i: batch(i * width, width), jnp.arange(columns // width))
    out = jax.tree.map(lambda a: _merge(jnp.moveaxis(a, 0, 1), 1), out)
    if rest := columns % width:
        last = batch(columns - rest, rest)
        out = jax.tree.map(lambda *ab: jnp.concatenate(ab, 1), out, last)
    return jax.tree.map(lambda a: _merge(a, 0), out)


def _rows(x: jax.Array, size: int) -> int:
    """How many rows the table of the examples ``x`` has.

    They are a multiple of the number of devices, of which only explicit meshes tell.
    With others that number is taken to be a power of two up to ``size``.
    """
    known = parts(x)
    share = max(size // known, 1)
    return known * math.gcd(len(x) // known, 2 ** (share.bit_length() - 1))


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """An axis and the next one as one."""
    end = axis + 2
    return x.reshape(*x.shape[:axis], math.prod(x.shape[axis:end]), *x.shape[end:])
