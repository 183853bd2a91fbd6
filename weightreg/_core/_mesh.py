"""Where sums over split axes go on a mesh whose explicit axes want to be told."""

from collections.abc import Iterable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def placed(
    x: jax.Array, axes: Iterable[int], kept: tuple[int, ...] | None
) -> PartitionSpec | None:
    """How an array of some ``axes`` of ``x`` is placed on an explicit mesh.

    Only the axes ``kept`` stay split; with ``None``, all do. The result is ``None`` for
    all other meshes, which find it out by themselves.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = sharding.spec
    return PartitionSpec(
        *(spec[a] if kept is None or a in kept else None for a in axes)
    )


def gathered(x: jax.Array, kept: Iterable[int]) -> jax.Array:
    """``x``, of which an explicit mesh splits no axes but those ``kept``."""
    spec = placed(x, range(x.ndim), tuple(kept))
    if spec is None:
        return x
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))
