"""What compilers make of more leaves, larger ones and stacked ones. Nothing is run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import plans, trees
from benchmarks.sizes import Sizes

ABOUT = (
    "What compilers make of more layers, larger ones and stacked ones: bytes are a "
    "parameter's, milliseconds, of processors, a leaf's."
)
FEW = ("adam", "volumized(adam)")
PROGRAMS = (*FEW, "chain(add_weissi, adam)", "chain(add_shifted_l2, adam)")
MANY = 1000  # leaves, of which only the `FEW` are compiled within minutes
# With the number of weights that are leaves of their own.
GROWTH: dict[str, tuple[int, Callable[[], Any]]] = {
    "10 layers": (10, lambda: trees.kernels(10, 64)),
    "100 layers": (100, lambda: trees.kernels(100, 64)),
    "1,000 layers": (1000, lambda: trees.kernels(1000, 64)),
    "1 million parameters": (4, lambda: trees.kernels(4, 512)),
    "17 million parameters": (4, lambda: trees.kernels(4, 2048)),
    "1.1 billion parameters": (4, lambda: trees.kernels(4, 16384)),
    "10 stacked layers": (1, lambda: stacked(10, 64)),
    "1,000 stacked layers": (1, lambda: stacked(1000, 64)),
}


def stacked(count: int, side: int) -> dict[str, Any]:
    """Layers of ``side`` by ``side`` in one leaf, with biases that tell so."""
    shapes = {"kernel": (count, side, side), "bias": (count, side)}
    return {
        "layers": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        }
    }


def here(sizes: Sizes) -> dict[str, dict[str, dict[str, float]]]:
    """Of this machine's device, up to the layers that sizes allow."""
    return counts(None, sizes.growth)


def counts(
    target: str | None,
    most: int = MANY,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Of a device that need not be there, or of this machine's.

    Args:
      target: Name in `benchmarks.targets.TARGETS`; None for this machine.
      most: Leaves, beyond which nothing is compiled.
      tick: Called with a name before each program is compiled.
    """
    return {
        name: counted(target, make(), lambda what, name=name: tick(f"{what}, {name}"))
        for name, (leaves, make) in GROWTH.items()
        if leaves <= most
    }


def programs() -> int:
    """How many are compiled, at most."""
    return sum(len(_compiled(leaves)) for leaves, _ in GROWTH.values())


def _compiled(leaves: int) -> tuple[str, ...]:
    return FEW if leaves >= MANY else PROGRAMS


def counted(
    target: str | None, params: Any, tick: Callable[[str], None] = lambda what: None
) -> dict[str, dict[str, float]]:
    """What is counted of each program."""
    leaves = len(jax.tree.leaves(params))
    planned = plans.plans(target, params, _compiled(leaves), tick)
    return {
        name: {
            "kernels": plan["kernels"],
            "bytes a parameter": plan["bytes"],
            "temporary bytes a parameter": plan["temporary_bytes"],
            "trace milliseconds": round(1000 * plan["trace_seconds"] / leaves, 1),
            "compile milliseconds": round(1000 * plan["compile_seconds"] / leaves, 1),
        }
        for name, plan in planned.items()
    }
