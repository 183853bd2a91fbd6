"""What an experiment is."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table of a paper, as comparisons to run and numbers to set beside them.

    Attributes:
      title: What it repeats.
      shared: Settings of all its comparisons.
      parts: Further settings of each comparison, by name.
      scales: Further settings of all comparisons at each scale.
      paper: The paper's rows of each part: label, and metrics in percent.
      note: In what the paper's runs differ.
      resized: Further settings of single comparisons, by ``(scale, part)``.
    """

    title: str
    shared: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, Mapping[str, Mapping[str, float]]]
    note: str
    resized: Mapping[tuple[str, str], Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )

    def settings(self, part: str, scale: str) -> dict[str, Any]:
        """All settings of one comparison."""
        resized = self.resized.get((scale, part), {})
        return {**self.shared, **self.parts[part], **self.scales[scale], **resized}
