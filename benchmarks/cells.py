"""What a comparison is filled with: runs that are to be made, and cells of those made.

A cell is a run with what was measured of it, and stands in the comparison's file. So a
comparison that was ended too early goes on where it stopped, and those of several
machines are put together.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.methods import BASES, METHODS, Space, trials
from benchmarks.settings import Settings

TUNING_SEED = 1_000_000  # far from the seeds of the final runs
SOURCE_SEED = 2_000_000  # of the network that attacks are transferred from
ROLES = ("source", "trial", "final")

Cell = Mapping[str, Any]


class Run(NamedTuple):
    """A network to be trained.

    Attributes:
      role: ``"trial"`` of a method's tuning, ``"final"``, or ``"source"``, which
        attacks are transferred from.
      method: Name in ``benchmarks/methods.py``.
      hyperparameters: Of the method.
      seed: Of initialization, noise and order.
      trial: Its place among the trials.
    """

    role: str
    method: str
    hyperparameters: Mapping[str, float]
    seed: int
    trial: int | None = None

    def key(self) -> tuple:
        """What tells it from all other runs of a comparison."""
        return self.role, self.method, self.numbers, self.seed, self.trial

    @property
    def numbers(self) -> tuple[tuple[str, str], ...]:
        """The hyperparameters, to ten digits: machines differ in the last one."""
        return tuple(sorted((k, f"{v:.10g}") for k, v in self.hyperparameters.items()))

    @property
    def program(self) -> tuple[str, str]:
        """Runs of which this is the same are rows of one compiled program."""
        return self.role, METHODS[self.method].like or self.method

    @classmethod
    def of(cls, cell: Cell) -> "Run":
        """The run of a cell."""
        return cls(*(cell[name] for name in cls._fields))


class Plan:
    """The runs of a comparison, in the order in which its table needs them.

    Args:
      settings: What is compared.
      spaces: Where each method that is tuned is searched.
    """

    def __init__(self, settings: Settings, spaces: Mapping[str, Space]):
        self.spaces = spaces
        self._settings = settings
        self._trials = {
            name: trials(space, settings.trials) for name, space in spaces.items()
        }

    def missing(self, cells: Iterable[Cell]) -> list[Run]:
        """What is left to do and can be done now: tuning comes before its final runs.

        First one seed of every row, the rows at fixed settings before those that are
        tuned, and then the other seeds.
        """
        cells = list(cells)
        done = {Run.of(cell).key() for cell in cells}
        return [run for run in self._all(cells) if run.key() not in done]

    def count(self, cells: Iterable[Cell]) -> int:
        """How many runs are left, those included whose settings are not known yet."""
        cells, s = list(cells), self._settings
        waiting = sum(self.chosen(name, cells) is None for name in s.methods)
        return len(self.missing(cells)) + waiting * s.seeds

    def trials(self, method: str) -> list[Run]:
        """The runs of a method's tuning; those of one trial follow each other."""
        return [
            Run("trial", method, hyper, TUNING_SEED + seed, i)
            for i, hyper in enumerate(self._trials.get(method, []))
            for seed in range(self._settings.tuning_seeds)
        ]

    def tuning(self, method: str, cells: Iterable[Cell]) -> list[dict[str, Any]] | None:
        """What each trial came to, in their order; None while some are missing."""
        known = {Run.of(cell).key(): cell["metrics"] for cell in cells}
        runs = self.trials(method)
        if any(run.key() not in known for run in runs):
            return None
        return [
            {
                "hyperparameters": dict(tried[0].hyperparameters),
                "score": _mean(known[run.key()]["score"] for run in tried),
                "tested": _mean(known[run.key()]["tested"] for run in tried),
            }
            for _, tried in _grouped(runs)
        ]

    def chosen(self, method: str, cells: Iterable[Cell]) -> dict[str, float] | None:
        """The hyperparameters of a method's final runs, once they are known."""
        if (fixed := METHODS[method].fixed) is not None:
            return dict(fixed)
        if (tried := self.tuning(method, cells)) is None:
            return None
        scores = [-np.inf if t["score"] is None else t["score"] for t in tried]
        return tried[int(np.argmax(scores))]["hyperparameters"]

    def source(self) -> list[Run]:
        """The network that attacks are transferred from, if there are attacks."""
        usual = {"learning_rate": BASES[self._settings.optimizer].usual}
        wanted = self._settings.attacked > 0
        return [Run("source", "none", usual, SOURCE_SEED)] * wanted

    def _all(self, cells: list[Cell]) -> Iterable[Run]:
        methods, seeds = self._settings.methods, range(self._settings.seeds)
        tuned = [name for name in methods if METHODS[name].fixed is None]
        fixed = [name for name in methods if name not in tuned]
        yield from self.source()
        for name in [*fixed, *tuned]:
            yield from self.trials(name)
            yield from self._finals(name, seeds[:1], cells)
        for seed in seeds[1:]:
            for name in methods:
                yield from self._finals(name, [seed], cells)

    def _finals(self, method: str, seeds, cells: list[Cell]) -> Iterable[Run]:
        if (hyper := self.chosen(method, cells)) is not None:
            yield from (Run("final", method, hyper, seed) for seed in seeds)


def together(runs: list[Run], width: int | None) -> list[Run]:
    """The first of some runs and those that are trained with it, in one program.

    Args:
      runs: In order.
      width: How many can be at most; None for all that share the program.
    """
    same = [run for run in runs if run.program == runs[0].program]
    return same[:width]


def _grouped(runs: list[Run]) -> list[tuple[int | None, list[Run]]]:
    by = itertools.groupby(runs, key=lambda run: run.trial)
    return [(trial, list(members)) for trial, members in by]


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None where a run has none."""
    known = list(values)
    if None in known:
        return None
    return round(float(np.mean(np.array(known, float))), 5)
