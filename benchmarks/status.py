"""What is missing of the papers' tables, and how long it would take here."""

import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from rich.table import Table

from benchmarks import flops, models, record
from benchmarks.devices import described, rate
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
      seconds: That what is left would take.
      measured: Whether that goes by runs on such a device, rather than by operations,
        whose number says how long it takes at least.
    """

    part: str
    done: int
    all: int
    missing: dict[str, int]
    seconds: float
    measured: bool


def states(
    names: Iterable[str],
    scale: str,
    folder: pathlib.Path,
    device: str | None = None,
    **how: Any,
) -> list[State]:
    """The state of every part of some experiments.

    Args:
      names: Of experiments.
      scale: Of their runs.
      folder: Where their files are.
      device: A kind of device that need not be here, such as ``"H100"``.
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
            found.append(state(file.stem, settings, cells, device))
    return found


def state(
    part: str,
    settings: Settings,
    cells: list[dict[str, Any]],
    device: str | None = None,
) -> State:
    """How far a comparison is, from its cells alone."""
    wanted = _wanted(settings)
    done = Counter((cell["role"], cell["method"]) for cell in cells)
    left = {key: max(count - done[key], 0) for key, count in wanted.items()}
    speeds = _measured(settings, cells, device or described())
    seconds = 0.0
    for (role, method), count in left.items():
        if count:
            epoch = count * speeds.get(role, 0.0)
            epoch = epoch or _by_operations(settings, method, count, device)
            seconds += _epochs(settings, role) * epoch
    return State(
        part,
        sum(wanted.values()) - sum(left.values()),
        sum(wanted.values()),
        {m: n for (role, m), n in left.items() if role == "final" and n},
        seconds,
        bool(speeds),
    )


def table(found: Iterable[State], device: str | None = None) -> Table:
    """The table for a terminal."""
    where = device or described()
    shown = Table(title=f"What is missing, and what it would take on {where}")
    for name in ("part", "runs", "missing final runs", "time"):
        shown.add_column(name, overflow="fold")
    for s in found:
        shown.add_row(s.part, f"{s.done} of {s.all}", _missing(s.missing), _time(s))
    return shown


def _missing(counts: dict[str, int]) -> str:
    """Methods by how many of their runs are missing."""
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        by_count.setdefault(count, []).append(name)
    return "; ".join(f"{n} of {', '.join(names)}" for n, names in by_count.items())


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


def _measured(
    settings: Settings, cells: list[dict[str, Any]], device: str
) -> dict[str, float]:
    """Seconds an epoch, by role, of runs that were made on such devices."""
    there: dict[str, list[float]] = {}
    for cell in cells:
        if device in cell["device"]:
            epoch = cell["seconds"] / _epochs(settings, cell["role"])
            there.setdefault(cell["role"], []).append(epoch)
    return {role: sum(known) / len(known) for role, known in there.items()}


def _by_operations(
    settings: Settings, method: str, count: int, device: str | None
) -> float:
    """Seconds that an epoch of some runs of a method takes at least.

    An accelerator has many small networks make their steps at once.

    Raises:
      ValueError: Nobody knows how fast the device is, and it is not here.
    """
    kind = device or jax.devices()[0].device_kind
    known = flops.epoch_seconds(settings, method, kind)
    if known is None and device is not None:
        kinds = ", ".join(dict.fromkeys(name for name, _ in flops.RATES))
        raise ValueError(f"device must have {kinds} in its name, not be {device!r}.")
    if known is None:
        return count * flops.epoch_flops(settings, method) / rate()
    return known if models.MODELS[settings.model].together else count * known


def _time(s: State) -> str:
    hours, minutes = divmod(round(s.seconds / 60), 60)
    text = f"{hours} h {minutes} min" if hours else f"{s.seconds:.0f} s"
    return text if s.measured or not s.seconds else f"at least {text}"
