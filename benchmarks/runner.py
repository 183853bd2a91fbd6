"""Fills a comparison with cells, in pieces of time, and never loses a run.

After every epoch the runs in training are kept in a checkpoint beside the comparison's
file; when they are finished they become cells in that file. Both are written in one
move. So whatever ends a run, the next one goes on from the last epoch.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from benchmarks import assemble, checkpoints, measure, record
from benchmarks import data as data_module
from benchmarks.cells import Plan, Run, together
from benchmarks.checkpoints import Checkpoint
from benchmarks.data import Dataset
from benchmarks.measure import rounded
from benchmarks.methods import METHODS
from benchmarks.part import Part, keep_network, load_network, network_file
from benchmarks.settings import Settings
from benchmarks.train import SENSITIVE

ENVIRONMENT = ("device", "commit", "dirty")  # what cells of several machines differ in

Tick = Callable[[str], None]


class Clock:
    """A piece of time, and how long things take that must fit in it.

    Args:
      minutes: How long it is; None for as long as it takes.
      every: Seconds that lie between checkpoints at least; 0 for one after each epoch.
    """

    def __init__(self, minutes: float | None = None, every: float = 0.0):
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._every, self._kept = every, time.monotonic()
        self._known: dict[str, float] = {}

    def allows(self, what: str) -> bool:
        """Whether there is time for it, as long as it has taken before, and a tenth.

        All hosts go by the clock of the first: they go on together or not at all.
        """
        left = self._end - time.monotonic()
        go_on = left > 1.1 * self._known.get(what, 0.0)
        return go_on if math.isinf(self._end) else _as_the_first(go_on)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Learns how long something takes."""
        start = time.monotonic()
        yield
        self._known[what] = time.monotonic() - start

    def keeps(self) -> bool:
        """Whether the time for a checkpoint has come."""
        due = (now := time.monotonic()) - self._kept >= self._every
        if self._every and not _as_the_first(due):
            return False
        self._kept = now
        return True


@dataclasses.dataclass
class Group:
    """Runs that are trained together.

    Attributes:
      runs: Which ones.
      population: That they are.
      progress: Where they are.
      rows: What was measured after each epoch.
      began: When they would have, had they never been interrupted.
      fresh: Whether nothing of it has been compiled, which takes time that a program
        that is not known yet has to allow for.
    """

    runs: list[Run]
    population: Any
    progress: Any
    rows: list[dict[str, Any]]
    began: float
    fresh: bool = True

    def seconds(self) -> float:
        """How long they have taken."""
        return time.monotonic() - self.began


def run(
    settings: Settings,
    out: pathlib.Path,
    tick: Tick = lambda _: None,
    mark: dict | None = None,
    clock: Clock | None = None,
    first: bool = False,
) -> dict:
    """Runs what is missing of a comparison, as far as time allows.

    Args:
      settings: What to compare.
      out: JSON file, with what is finished of it.
      tick: Called after each epoch of a run, with what it was.
      mark: What else the file is to say, such as the experiment it belongs to.
      clock: The time there is.
      first: Whether to stop once every row has a seed.

    Returns:
      The content of the file.

    Raises:
      ValueError: The data cannot be compared on with these settings, or ``out`` holds a
        comparison of others.
      OSError: Data cannot be read, the result not be written, or another process is
        running the same comparison into the same file.
    """
    data = _data(settings.dataset, settings.data_dir)
    with checkpoints.alone(out):
        return Runner(settings, data, out, tick, mark, clock).run(first)


@functools.lru_cache(maxsize=1)  # parts of a table mostly share it
def _data(name: str, data_dir: str | None) -> Dataset:
    return data_module.load(name, data_dir)


class Runner:
    """One comparison in the making, see `run`."""

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        out: pathlib.Path,
        tick: Tick = lambda _: None,
        mark: dict | None = None,
        clock: Clock | None = None,
    ):
        self._settings, self._out, self._tick = settings, out, tick
        self._clock = clock or Clock()
        self._part = Part(settings, data)
        self._plan = Plan(settings, self._part.spaces())
        self._header = assemble.header(settings, data) | (mark or {})
        shown = self._header["settings"]
        about, fixed = self._header["data"], self._header["fixed"]
        record.refuse_another(shown, out, about, fixed)
        kept = {k: v for k, v in shown.items() if k != "mapping"}
        self._about = json.dumps([kept, self._header["data"]], sort_keys=True)
        self._cells = record.load(out).get("cells", []) if out.exists() else []
        self._more: dict[str, Any] = {}

    def run(self, first: bool = False) -> dict:
        """Trains group after group until nothing is missing or time is over."""
        while (group := self._next()) is not None:
            (run, *_), kept = group
            if first and kept is None and run.role == "final" and run.seed > 0:
                break
            if not self._train(*group):
                break
        else:
            self._complete()
        return self._save()

    def _next(self) -> tuple[list[Run], Checkpoint | None] | None:
        """The runs that come next, and how far they are."""
        missing = self._plan.missing(self._cells)
        if not missing and not self._networks_missing():
            return None
        kept = checkpoints.load(self._out, self._about)
        if kept is not None:
            keys = {run.key() for run in [*missing, *self._networks_missing()]}
            if all(run.key() in keys for run in kept.runs):
                return kept.runs, kept
        finals = [run for run in missing if run.role == "final"]
        again = self._networks_missing() if finals or not missing else []
        return together([*again, *missing], self._part.width), None

    def _networks_missing(self) -> list[Run]:
        """Runs that are cells, but whose networks are needed and not here.

        They were made on another machine, or their files have been deleted.
        """
        wanted = []
        attacked = [r for r in self._plan.missing(self._cells) if r.role == "final"]
        if attacked:
            wanted += self._plan.source()
        if self._settings.deploy and not self._more_is_known():
            finals = (Run.of(cell) for cell in self._cells if cell["role"] == "final")
            wanted += [run for run in finals if run.method in self._settings.deploy]
        here = {run.key() for run in map(Run.of, self._cells)}
        return [
            run
            for run in wanted
            if run.key() in here and not network_file(self._out, _name(run)).is_file()
        ]

    def _more_is_known(self) -> bool:
        if self._more:
            return True
        return self._out.exists() and "deployed" in record.load(self._out)

    def _train(self, runs: list[Run], kept: Checkpoint | None) -> bool:
        """Trains some runs to their end, and says whether there was time for it."""
        clock, role = self._clock, runs[0].role
        if not clock.allows("start"):
            return False
        group = self._begin(runs, kept)
        while len(group.rows) < self._epochs(role):
            if not clock.allows(self._next_epoch(group)):
                self._keep(group)
                return False
            self._epoch(group)
        if not clock.allows(f"measure {role}"):
            self._keep(group)
            return False
        with clock.timed(f"measure {role}"):
            self._finish(group)
        return True

    def _begin(self, runs: list[Run], kept: Checkpoint | None) -> Group:
        """Runs where they start, or where they were when they were kept."""
        began = time.monotonic()
        with self._clock.timed("start"):
            population, progress = self._part.start(runs)
            if kept is None:
                return Group(runs, population, progress, [], began)
            progress = population.place(progress, kept.leaves)
        return Group(runs, population, progress, kept.rows, began - kept.seconds)

    def _epoch(self, group: Group) -> None:
        """Trains for an epoch, and keeps the runs if it is time to."""
        row = {}
        with self._clock.timed(self._next_epoch(group)):
            group.progress = group.population.train(group.progress)
            jax.block_until_ready(group.progress)  # or else no time would seem to pass
            if self._measures(group):
                row = dict(group.population.measure(group.progress)._asdict())
            if row and group.runs[0].role == "trial":
                row["tested"] = group.population.test(group.progress)
        group.rows.append(row)
        group.fresh = False
        for run in group.runs:
            self._tick(METHODS[run.method].label)
        if self._clock.keeps():
            self._keep(group)

    def _measures(self, group: Group) -> bool:
        """Whether something is measured after the next epoch.

        Trials are chosen by the last ones alone.
        """
        left = self._epochs(group.runs[0].role) - len(group.rows)
        return group.runs[0].role != "trial" or left <= self._settings.last

    def _next_epoch(self, group: Group) -> str:
        """What the clock knows it as."""
        if group.fresh:
            return "first epoch"
        program = "-".join(group.runs[0].program)
        return f"{'measured ' * self._measures(group)}epoch of {program}"

    def _finish(self, group: Group) -> None:
        """Makes cells of runs that have come to their end."""
        networks = [None] * len(group.runs)
        if group.runs[0].role != "trial":
            networks = group.population.networks(group.progress)
        seconds = group.seconds() / len(group.runs)
        known = {Run.of(cell).key() for cell in self._cells}
        for i, run in enumerate(group.runs):
            if run.key() in known:
                self._keep_network(networks[i], run)  # all that was missing of it
                continue
            rows = [{name: v[i] for name, v in row.items()} for row in group.rows]
            self._add(run, rows, networks[i], seconds)
        self._save()
        checkpoints.discard(self._out)

    def _epochs(self, role: str) -> int:
        source = self._settings.source_epochs or self._settings.epochs
        return source if role == "source" else self._settings.epochs

    def _keep(self, group: Group) -> None:
        """Writes a checkpoint; all hosts have to give their runs for it."""
        leaves = jax.tree.leaves(group.population.fetch(group.progress))
        if jax.process_index() == 0:
            about, seconds = self._about, group.seconds()
            kept = Checkpoint(about, group.runs, leaves, group.rows, seconds)
            checkpoints.save(kept, self._out)
        _wait("checkpoint")

    def _add(self, run: Run, rows: list[dict], network: Any, seconds: float) -> None:
        """Makes a cell of a finished run."""
        cell = {**run._asdict(), "hyperparameters": dict(run.hyperparameters)}
        if run.role == "trial":
            metrics, more = self._of_trial(rows), {}
        elif run.role == "source":
            metrics, more = {"last": rounded(rows[-1]["accuracy"])}, {}
            self._keep_network(network, run)
        else:
            metrics, more = self._of_final(run, rows, network)
        known = self._header
        where = {name: known[name] for name in ENVIRONMENT if name in known}
        measured = {"metrics": metrics, **more, "seconds": round(seconds, 1), **where}
        self._cells = [*self._cells, cell | measured]

    def _of_trial(self, rows: list[dict]) -> dict[str, float | None]:
        """What a trial is chosen by, and accuracy on test examples, which it is not."""
        by = {"accuracy": "accuracy", "fgsm": "attacked"}[self._settings.tune_for]
        last = rows[-self._settings.last :]
        return {
            "score": rounded(np.mean([row[by] for row in last])),
            "tested": rounded(np.mean([row["tested"] for row in last])),
        }

    def _of_final(
        self, run: Run, rows: list[dict], network: Any
    ) -> tuple[dict[str, float | None], dict[str, Any]]:
        settings = self._settings
        curve = np.array([row["accuracy"] for row in rows])
        metrics = {
            "best": rounded(curve.max()),
            "last": rounded(curve[-self._settings.last :].mean()),
        }
        curves = {"test_accuracy": curve}
        for name in ("log_energy", "complexity"):
            curves[name] = np.array([row[name] for row in rows])
        if METHODS[run.method].levels:
            curves["level_distance"] = np.array([row["distance"] for row in rows])
        if settings.sensitivity:
            fitted = [row["training_accuracy"] for row in rows]
            curves["training_accuracy"] = np.array(fitted)
            for i, f in enumerate(SENSITIVE):
                name = f"gbr of {f}"
                curves[name] = np.array([row["gbr"][i] for row in rows])
                metrics[name] = rounded(curves[name][-1])
        if run.method in settings.deploy:
            self._keep_network(network, run)
        source = self._part.source(self._out) if settings.attacked else None
        attacked, more = measure.of_network(
            run, network, self._part.data, settings, source
        )
        listed = {name: [rounded(v) for v in values] for name, values in curves.items()}
        return metrics | attacked, {"curves": listed, **more}

    def _keep_network(self, network: Any, run: Run) -> None:
        if jax.process_index() == 0:
            keep_network(network, self._out, _name(run))
        _wait("network")

    def _complete(self) -> None:
        """What is measured of all networks together, once there are all."""
        if not self._settings.deploy or self._more_is_known():
            return
        kept = {}
        for name in self._settings.deploy:
            runs = [Run.of(c) for c in self._cells if c["role"] == "final"]
            files = [
                network_file(self._out, _name(run))
                for run in runs
                if run.method == name
            ]
            networks = [load_network(file) for file in files]
            kept[name] = self._plan.chosen(name, self._cells), networks
        self._more["deployed"] = measure.deploy(kept, self._part.data, self._settings)

    def _save(self) -> dict:
        """Writes the comparison as far as it is."""
        old = record.load(self._out) if self._out.exists() else {}
        more = {k: old[k] for k in assemble.OF_ALL if k in old} | self._more
        result = assemble.result(self._header, self._plan, self._cells, self._settings)
        result |= more
        result["complete"] &= "deployed" in result or not self._settings.deploy
        _wait("measured")  # by what may be deleted now
        if jax.process_index() == 0:
            record.save(result, self._out)
            if result["complete"]:
                checkpoints.discard(self._out)
                for file in self._out.parent.glob(f"{self._out.stem}.*.network"):
                    file.unlink()
        _wait("result")
        return result


def _name(run: Run) -> str:
    """What a run's network is called."""
    return "source" if run.role == "source" else f"{run.method}-{run.seed}"


def _as_the_first(decided: bool) -> bool:
    """What the first host has decided, whose clock the others go by."""
    if jax.process_count() == 1:
        return decided
    return bool(multihost_utils.broadcast_one_to_all(np.array(decided)))


def _wait(name: str) -> None:
    """Until all hosts are here: what the first one has written, all can read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
