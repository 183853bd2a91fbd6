"""What is missing of the papers' tables, and how long it would take here."""

import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from rich.table import Table

from benchmarks import flops, record
from benchmarks.devices import described
from benchmarks.experiments import EXPERIMENTS
from benchmarks.methods import METHODS
from benchmarks.settings import Settings


class State(NamedTuple):
    """How far a part of a table is.

    Attributes:
      part: What it is called: experiment, scale and part.
      done: Runs that are cells.
      all: Runs that it has in all.
      missing: Final runs that are left, by method.
      seconds: That what is left would take here; None where that is not known.
      measured: Whether that goes by runs on such a device, rather than by operations.
    """

    part: str
    done: int
    all: int
    missing: dict[str, int]
    seconds: float | None
    measured: bool


def states(
    names: Iterable[str], scale: str, folder: pathlib.Path, **how: Any
) -> list[State]:
    """The state of every part of some experiments.

    Args:
      names: Of experiments.
      scale: Of their runs.
      folder: Where their files are.
      **how: Further settings, such as ``dtype``.
    """
    found = []
    for name in names:
        chosen = EXPERIMENTS[name]
        for part in chosen.parts_at(scale):
            settings = Settings.of(**chosen.settings(part, scale) | how)
            words = [name, scale, part]
            words += [settings.dtype] * (settings.dtype != "float32")
            file = folder / f"{'-'.join(words)}.json"
            cells = record.load(file).get("cells", []) if file.is_file() else []
            found.append(state(file.stem, settings, cells))
    return found


def state(part: str, settings: Settings, cells: list[dict[str, Any]]) -> State:
    """How far a comparison is, from its cells alone."""
    wanted = _wanted(settings)
    done = Counter((cell["role"], cell["method"]) for cell in cells)
    left = {key: max(count - done[key], 0) for key, count in wanted.items()}
    speeds = _measured(settings, cells)
    seconds = [
        count * _epochs(settings, role) * speed if speed is not None else None
        for (role, method), count in left.items()
        if count
        for speed in [speeds.get(role) or _by_operations(settings, method)]
    ]
    return State(
        part,
        sum(wanted.values()) - sum(left.values()),
        sum(wanted.values()),
        {m: n for (role, m), n in left.items() if role == "final" and n},
        None if None in seconds else sum(filter(None, seconds)),
        bool(speeds),
    )


def table(found: Iterable[State]) -> Table:
    """The table for a terminal."""
    shown = Table(title=f"What is missing, and what it would take on {described()}")
    for name in ("part", "runs", "missing final runs", "time"):
        shown.add_column(name, overflow="fold")
    for s in found:
        missing = ", ".join(f"{name} {count}" for name, count in s.missing.items())
        shown.add_row(s.part, f"{s.done} of {s.all}", missing, _time(s))
    return shown


def _wanted(settings: Settings) -> dict[tuple[str, str], int]:
    """How many runs a comparison has, by role and method."""
    wanted = {("source", "none"): int(settings.attacked > 0)}
    for name in settings.methods:
        if METHODS[name].fixed is None:
            wanted["trial", name] = settings.trials * settings.tuning_seeds
        wanted["final", name] = settings.seeds
    return wanted


def _epochs(settings: Settings, role: str) -> int:
    source = settings.source_epochs or settings.epochs
    return source if role == "source" else settings.epochs


def _measured(settings: Settings, cells: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds an epoch, by role, of runs that were made on such devices."""
    here: dict[str, list[float]] = {}
    for cell in cells:
        if cell["device"] == described():
            epoch = cell["seconds"] / _epochs(settings, cell["role"])
            here.setdefault(cell["role"], []).append(epoch)
    return {role: sum(known) / len(known) for role, known in here.items()}


def _by_operations(settings: Settings, method: str) -> float | None:
    kind = jax.devices()[0].device_kind
    return flops.epoch_seconds(settings, method, kind)


def _time(s: State) -> str:
    if s.seconds is None:
        return "not known here"
    hours, minutes = divmod(round(s.seconds / 60), 60)
    text = f"{hours} h {minutes} min" if hours else f"{s.seconds:.0f} s"
    return text if s.measured or not s.seconds else f"{text}, by its operations"
