"""What compilers plan for optimizer steps and maps on a device that need not be there.

Plans are counts, not times: nothing is run.
"""

import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import programs, targets, trees
from benchmarks.environment import environment
from benchmarks.record import FORMAT
from benchmarks.targets import TARGETS


def ticks(target: str) -> int:
    """How many programs `run` compiles."""
    return sum(len(programs.names(kinds)) for kinds in TARGETS[target].trees.values())


def run(target: str, tick: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Plans the programs of a target for its trees.

    Args:
      target: Name in `TARGETS`.
      tick: Called with a name before each program is compiled.

    Raises:
      ValueError: The target's compiler is not there.
    """
    targets.device(target)  # before JAX is asked for the machine's own devices
    code = environment()  # before it can change, as compilers take minutes
    about, planned = {}, {}
    for tree, kinds in TARGETS[target].trees.items():
        params = trees.TREES[tree]()
        leaves = jax.tree.leaves(params)
        about[tree] = {"leaves": len(leaves), "parameters": _size(leaves)}
        planned[tree] = plans(
            target,
            params,
            programs.names(kinds),
            lambda name, t=tree: tick(f"{name}, {t}"),
        )
    return {
        "format": FORMAT,
        "command": f"python -m benchmarks cost --target {target}",
        "target": target,
        **code,
        "device": f"planned for one {TARGETS[target].device}",
        "compiler": {p: version(p) for p in ("jax", *TARGETS[target].packages)},
        "trees": about,
        "plans": planned,
    }


def plans(
    target: str | None,
    params: Any,
    names: Iterable[str],
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, float]]:
    """Plans programs for a tree; times to compile are relative to the first one's."""
    # The first program waits for its compiler to be loaded.
    targets.plan(target, jnp.sin, (jax.ShapeDtypeStruct((), jnp.float32),))
    leaves = jax.tree.leaves(params)
    size, base, planned = _size(leaves), 0.0, {}
    for name in names:
        tick(name)
        plan = targets.plan(target, *programs.program(name, params))
        base = base or plan.compile_seconds
        planned[name] = {
            "kernels": plan.kernels,
            "kernels_a_leaf": round(plan.kernels / len(leaves), 2),
            "bytes": round(plan.bytes / size, 1),
            "temporary_bytes": round(plan.temporary_bytes / size, 2),
            "trace_seconds": round(plan.trace_seconds, 2),
            "compile_seconds": round(plan.compile_seconds, 2),
            "relative_compile_time": round(plan.compile_seconds / base, 2),
        }
    return planned


def _size(leaves: list[Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)
