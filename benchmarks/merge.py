"""Puts together what several machines have made of the same comparison."""

import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import assemble, record
from benchmarks.cells import Plan, Run


def merge(files: Sequence[pathlib.Path]) -> dict[str, Any]:
    """One comparison with the cells of all files.

    Where two files have the same run, the first one's cell stands: numbers of two
    machines differ by rounding.

    Raises:
      ValueError: The files are of different comparisons, or one has no cells.
      OSError: One cannot be read.
    """
    results = [record.load(file) for file in files]
    first, cells = results[0], {}
    for file, result in zip(files, results, strict=True):
        if "cells" not in result:
            raise ValueError(
                f"{file} must have cells, as comparisons that were run do."
            )
        for name in ("settings", "fixed", "data", "spaces"):
            if _shown(result, name) != _shown(first, name):
                raise ValueError(
                    f"{file} must be of the same comparison as {files[0]}, but differs "
                    f"in {name}: {_difference(result[name], first[name])}."
                )
        for cell in result["cells"]:
            cells.setdefault(Run.of(cell).key(), cell)
    settings = assemble.settings_of(first)
    plan = Plan(settings, first["spaces"])
    made_of_cells = {"complete", "missing", "results", "cells", *assemble.OF_ALL}
    header = {k: v for k, v in first.items() if k not in made_of_cells}
    more = {k: r[k] for r in reversed(results) for k in assemble.OF_ALL if k in r}
    return assemble.result(header, plan, [*cells.values()], settings) | more


def _shown(result: dict, name: str) -> dict:
    return {k: v for k, v in result[name].items() if k != "mapping"}


def _difference(one: dict, other: dict) -> str:
    names = [k for k in {**one, **other} if one.get(k) != other.get(k)]
    return ", ".join(f"{k} is {one.get(k)}, not {other.get(k)}" for k in names)
