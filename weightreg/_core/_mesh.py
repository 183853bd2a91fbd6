"""Where sums over split axes go, which a mesh with explicit axes wants to be told."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def placed(
    x: jax.Array, axes: Iterable[int], kept: tuple[int, ...] | None
) -> PartitionSpec | None:
    """How an array of some ``axes`` of ``x`` is placed on an explicit mesh.

    Only the axes ``kept`` stay split, or all if it is ``None``. The result is ``None``
    for all other meshes, which place arrays by themselves.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    stay = range(x.ndim) if kept is None else kept
    return PartitionSpec(*(sharding.spec[a] if a in stay else None for a in axes))


def gathered(x: jax.Array, kept: Iterable[int]) -> jax.Array:
    """An array equal to ``x``, of which an explicit mesh splits only axes ``kept``."""
    spec = placed(x, range(x.ndim), tuple(kept))
    if spec is None:
        return x
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def is_split(x: jax.Array, axis: int) -> bool:
    """Whether an explicit mesh splits an axis, which is then not to be cut."""
    return placed(x, (axis,), None) not in (None, PartitionSpec(None))


def first_of(x: jax.Array, axes: Iterable[int]) -> jax.Array:
    """The first entry along some axes, which are kept."""
    for axis in axes:
        if not is_split(x, axis):
            x = lax.slice_in_dim(x, 0, 1, axis=axis)
            continue
        # An explicit mesh does not cut a split axis, but can be asked for one entry.
        index = (*(slice(None),) * axis, jnp.zeros(1, jnp.int32))
        kept = tuple(a for a in range(x.ndim) if a != axis)
        whole = placed(x, range(x.ndim), kept)
        x = x.at[index].get(out_sharding=whole)
    return x


def split_like(x: jax.typing.ArrayLike, like: jax.Array) -> jax.typing.ArrayLike:
    """``x``, whose first axis an explicit mesh splits as it does that of ``like``."""
    first = placed(like, (0,), None)
    if first is None:
        return x
    mesh, spec = jax.typeof(like).sharding.mesh, jax.typeof(x).sharding.spec
    where = NamedSharding(mesh, PartitionSpec(*first, *spec[1:]))
    return jax.sharding.reshard(x, where)


def parts(x: jax.Array) -> int:
    """Into how many parts an explicit mesh splits the first axis."""
    (names,) = placed(x, (0,), None) or (None,)
    names = names if isinstance(names, tuple) else (names,)
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in names if name is not None)
