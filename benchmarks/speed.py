"""What this machine takes for steps, training, sensitivity, populations and bits.

To add a part, add an entry to `PARTS`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks import growth, speed_parts, speed_torch, step_plans, targets
from benchmarks.environment import environment
from benchmarks.record import FORMAT
from benchmarks.sizes import SIZES, Sizes
from benchmarks.targets import TARGETS


class Part(NamedTuple):
    """Something to measure.

    Attributes:
      about: What its numbers are, in a sentence.
      measure: From sizes to columns of a table, and from their rows to numbers.
      counts: Whether these count what compilers do, rather than time what runs.
      needs: A package that need not be installed, which is also the name of an extra.
    """

    about: str
    measure: Callable[[Sizes], dict[str, Any]]
    counts: bool = False
    needs: str | None = None


PARTS: dict[str, Part] = {
    "optimizers": Part(
        "Steps of optimizers, relative to Adam's.", speed_parts.optimizers
    ),
    "training": Part(
        "Training steps with Adam, relative to those without regularization, and how "
        "many examples a second.",
        speed_parts.trained,
    ),
    "gbr": Part(
        "Sensitivity to inputs, relative to running the network on them once.",
        speed_parts.gbr,
    ),
    "populations": Part(
        "An epoch of a run: one after another on each device, and all at once.",
        speed_parts.populations,
    ),
    "bits": Part(
        "Inference in floating point and from bits, relative to the first.",
        speed_parts.bits,
    ),
    "torch": Part(
        "Steps of optimizers in PyTorch and here, relative to PyTorch's Adam. Without "
        f"those that {speed_torch.PATIENCE} seconds were too few to compile.",
        speed_torch.optimizers,
        needs="torch",
    ),
    "growth": Part(growth.ABOUT, growth.here, counts=True),
}


def chosen(names: Sequence[str] | None) -> dict[str, Part]:
    """Parts by their names; without names, all that can be measured here.

    Raises:
      ValueError: A part is unknown, or needs what is not installed.
    """
    if unknown := set(names or ()) - set(PARTS):
        raise ValueError(
            f"parts must be among {', '.join(PARTS)}, not {', '.join(sorted(unknown))}."
        )
    parts = {name: PARTS[name] for name in PARTS if name in (names or PARTS)}
    absent = left_out(parts)
    if names and absent:
        raise ValueError(f"parts cannot be measured: {' '.join(absent.values())}")
    return {name: part for name, part in parts.items() if name not in absent}


def ticks(target: str | None, names: Sequence[str] | None) -> int:
    """How often `run`, or `plan` for a target, tells what is going on.

    Raises:
      ValueError: See `chosen` and `planned`.
    """
    if target:
        return sum(part.programs for part in planned(names).values())
    return len(chosen(names))


def left_out(parts: dict[str, Part]) -> dict[str, str]:
    """The parts that cannot be measured here, and why."""
    return {
        name: f"{part.needs} is not installed: see the extra {part.needs}."
        for name, part in parts.items()
        if part.needs and not find_spec(part.needs)
    }


def run(
    sizes: str,
    parts: Sequence[str] | None = None,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measures parts.

    Args:
      sizes: Name in `SIZES`.
      parts: Names in `PARTS`; None for all that can be measured here.
      tick: Called with a part's name before it is measured.

    Raises:
      ValueError: See `chosen`.
    """
    found, code = chosen(parts), environment()  # before the code can change
    tables: dict[str, dict[str, Any]] = {"timed": {}, "counted": {}}
    for name, part in found.items():
        tick(name)
        columns = part.measure(SIZES[sizes])
        if not part.counts:
            columns = {title: _plain(column) for title, column in columns.items()}
        kind = tables["counted" if part.counts else "timed"]
        kind[name] = {"about": part.about, "columns": columns}
    words = ["python -m benchmarks speed", f"--sizes {sizes}"]
    words += [f"--parts {','.join(found)}"] if parts else []
    return {
        "format": FORMAT,
        "command": " ".join(words),
        **code,
        "seed": speed_parts.SEED,
        "sizes": dataclasses.asdict(SIZES[sizes]),
        "left_out": {} if parts else left_out(PARTS),
        **tables,
    }


def _plain(column: speed_parts.Column) -> dict[str, dict[str, float]]:
    """As it is written: with names, and without what there is not."""
    return {
        name: {k: v for k, v in timing._asdict().items() if v is not None}
        for name, timing in column.items()
    }


class Plans(NamedTuple):
    """Something to plan for a device that need not be there.

    Attributes:
      about: What is counted, in a sentence.
      count: From a target, and what is called with each program's name, to columns of a
        table, and from their rows to numbers.
      programs: How many are compiled.
    """

    about: str
    count: Callable[..., dict[str, Any]]
    programs: int


PLANNED: dict[str, Plans] = {
    "training": Plans(step_plans.ABOUT, step_plans.counts, len(step_plans.COMPILED)),
    "growth": Plans(growth.ABOUT, growth.counts, growth.programs()),
}


def planned(names: Sequence[str] | None) -> dict[str, Plans]:
    """What is planned for a target, by its names; without names, all.

    Raises:
      ValueError: One is unknown.
    """
    if unknown := set(names or ()) - set(PLANNED):
        raise ValueError(
            f"parts for a --target must be among {', '.join(PLANNED)}, not "
            f"{', '.join(sorted(unknown))}."
        )
    return {name: PLANNED[name] for name in PLANNED if name in (names or PLANNED)}


def plan(
    target: str,
    names: Sequence[str] | None = None,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Plans parts for a device that need not be there.

    Args:
      target: Name in `benchmarks.targets.TARGETS`.
      names: See `planned`.
      tick: Called with a name before each program is compiled.

    Raises:
      ValueError: A part is unknown, or the target's compiler is not there.
    """
    found = planned(names)
    targets.device(target)  # before JAX is asked for the machine's own devices
    code = environment() | {"device": f"planned for one {TARGETS[target].device}"}
    words = [f"python -m benchmarks speed --target {target}"]
    words += [f"--parts {','.join(found)}"] if names else []
    return {
        "format": FORMAT,
        "command": " ".join(words),
        **code,
        "compiler": {p: version(p) for p in ("jax", *TARGETS[target].packages)},
        "left_out": {},
        "timed": {},
        "counted": {
            name: {"about": part.about, "columns": part.count(target, tick=tick)}
            for name, part in found.items()
        },
    }
