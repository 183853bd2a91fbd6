"""A comparison's file from its cells: what tables and plots are drawn from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import models, record
from benchmarks.cells import ROLES, SOURCE_SEED, TUNING_SEED, Cell, Plan, Run
from benchmarks.data import Dataset
from benchmarks.environment import environment
from benchmarks.measure import LOG10_EDGES, rounded
from benchmarks.methods import METHODS, at_edge
from benchmarks.settings import (
    PLACES,
    Settings,
    split_of,
    test_examples,
    trained_on,
)
from benchmarks.train import ADVERSARY_STEPS, PROBES, STATISTICS_BATCHES

OF_ALL = ("deployed",)  # fields that are measured of all networks together


def result(
    header: dict, plan: Plan, cells: Sequence[Cell], settings: Settings
) -> dict[str, Any]:
    """All that is known of a comparison."""
    cells = sorted(cells, key=_order(settings))
    missing = plan.count(cells)
    results = {
        name: entry
        for name in settings.methods
        if (entry := _entry(name, plan, cells)) is not None
    }
    devices = dict.fromkeys(cell["device"] for cell in cells)
    return header | {
        "device": " and ".join(devices) or header["device"],
        "complete": not missing,
        "missing": missing,
        "spaces": {name: dict(space) for name, space in plan.spaces.items()},
        "results": results,
        "cells": list(cells),
    }


def settings_of(result: dict[str, Any]) -> Settings:
    """What a file is a comparison of.

    Raises:
      ValueError: It cannot be run by this version.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {k: v for k, v in result["settings"].items() if k != "last"}
    if unknown := given.keys() - names:
        raise ValueError(
            f"settings must be those of this version, which has no "
            f"{', '.join(sorted(unknown))}."
        )
    known: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
    }
    return Settings(**known)


def header(settings: Settings, data: Dataset) -> dict[str, Any]:
    """What a file says before anything is measured."""
    shown = dataclasses.asdict(settings) | {"last": settings.last}
    # Places of this machine; data.source says what was read.
    shown = {k: v for k, v in shown.items() if k not in PLACES}
    return {
        "format": record.FORMAT,
        "command": settings.command(),
        "settings": shown,
        "fixed": {
            "model": models.describe(settings.network(data.classes)),
            "adversary_steps": ADVERSARY_STEPS,
            "probes": PROBES,
            "statistics_batches": STATISTICS_BATCHES,
            "tuning_seeds": [TUNING_SEED + i for i in range(settings.tuning_seeds)],
            "seeds": list(range(settings.seeds)),
            "source_seed": SOURCE_SEED,
        },
        "data": {
            "source": data.source,
            "train": len(trained_on(data, settings, tuning=False)),
            "validation": len(split_of(data, settings)[1]),
            "test": len(test_examples(data, settings)),
            "sha256": data.digest(),
        },
        **environment(),
    }


def _entry(name: str, plan: Plan, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What is known of a method, once it has a final run."""
    if (chosen := plan.chosen(name, cells)) is None:
        return None
    wanted = {Run("final", name, chosen, cell["seed"]).key() for cell in cells}
    finals = [cell for cell in cells if Run.of(cell).key() in wanted]
    if not finals:
        return None
    curves = {c: [cell["curves"][c] for cell in finals] for c in finals[0]["curves"]}
    first = finals[0]
    entry = {
        "label": METHODS[name].label,
        "tuning": _tuning(name, plan, cells, chosen),
        **curves,
        "metrics": {
            metric: _spread([cell["metrics"][metric] for cell in finals])
            for metric in first["metrics"]
        },
        "warnings": [
            f"Seed {cell['seed']}: {cell['warning']}"
            for cell in finals
            if "warning" in cell
        ],
    }
    for of_first in ("strength", "weights"):
        if of_first in first:
            entry[of_first] = first[of_first]
    if "gradients" in first:
        counts = np.sum([cell["gradients"] for cell in finals], axis=0)
        edges = [round(float(e), 3) for e in LOG10_EDGES]
        entry["gradients"] = {"counts": counts.tolist(), "log10_edges": edges}
    return entry


def _tuning(
    name: str, plan: Plan, cells: Sequence[Cell], chosen: dict[str, float]
) -> dict[str, Any]:
    if METHODS[name].fixed is not None:
        return {"trials": [], "chosen": chosen, "score": None, "at_edge": []}
    tried = plan.tuning(name, cells) or []
    (score,) = [t["score"] for t in tried if t["hyperparameters"] == chosen]
    return {
        "trials": tried,
        "chosen": chosen,
        "score": score,
        "at_edge": at_edge(plan.spaces[name], chosen),
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """The values over seeds, and their mean and standard deviation."""
    known = np.array(values, float)
    spread = np.std(known, ddof=1) if len(known) > 1 else 0.0
    return {
        "seeds": list(values),
        "mean": rounded(known.mean()),
        "std": rounded(spread),
    }


def _order(settings: Settings):
    """Of cells in files, whatever the order in which they were made."""
    methods = ["none", *settings.methods]

    def key(cell: Cell):
        return (
            ROLES.index(cell["role"]),
            methods.index(cell["method"]),
            -1 if cell["trial"] is None else cell["trial"],
            cell["seed"],
            sorted(cell["hyperparameters"].items()),
        )

    return key
