"""What a table of a paper is made of: runs, the paper's numbers, and its claims."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one method beats another, as a paper says or its table shows.

    Attributes:
      better: Name in `benchmarks.methods.METHODS`, as is ``worse``.
      worse: What it is said to beat.
      metric: In what; more is better.
    """

    better: str
    worse: str
    metric: str = "last"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table of a paper, as comparisons to run and numbers to set beside them.

    Attributes:
      title: What it repeats.
      shared: Settings of all its comparisons.
      parts: Further settings of each comparison, by name, in the order in which they
        are wanted, as their methods are.
      scales: Further settings of all comparisons at each scale.
      paper: The paper's rows of each part: the name of the method, or a label where
        none here is the paper's, and metrics in percent.
      note: In what the paper's runs differ.
      resized: Further settings of single comparisons, by ``(scale, part)``.
      limited: The parts of a scale that has not all of them.
      claims: What is to hold in each part, if something is claimed.
    """

    title: str
    shared: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, Rows]
    note: str
    resized: Mapping[tuple[str, str], Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    limited: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    claims: Mapping[str, tuple[Claim, ...]] = dataclasses.field(default_factory=dict)

    def parts_at(self, scale: str) -> tuple[str, ...]:
        """The names of the comparisons that a scale has."""
        return self.limited.get(scale, tuple(self.parts))

    def settings(self, part: str, scale: str) -> dict[str, Any]:
        """All settings of one comparison."""
        resized = self.resized.get((scale, part), {})
        return {**self.shared, **self.parts[part], **self.scales[scale], **resized}


def best_and_last(rows: Mapping[str, tuple[float, float]]) -> Rows:
    """The best epoch's test accuracy, and the last ten epochs'."""
    return {name: {"best": best, "last": last} for name, (best, last) in rows.items()}


def beaten(better: str, worse: tuple[str, ...], *metrics: str) -> tuple[Claim, ...]:
    """One method beats each of some, in each of some metrics."""
    return tuple(Claim(better, name, metric) for metric in metrics for name in worse)
