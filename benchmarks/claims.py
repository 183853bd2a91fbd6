"""Whether one method beats another, as is claimed, and whether seeds can tell."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from benchmarks.experiments import Claim

CONFIDENCE = 0.95
# From this many seeds on, runs of the same seed are compared with each other. They
# begin with the same weights and learn from the same wrong labels, and so have luck in
# common: where labels are wrong, accuracies of methods correlate by 0.3 to 0.9. Pairs
# leave half the degrees of freedom, though, which with five seeds is made up for by a
# correlation of 0.3, with three by one of 0.6.
PAIRED = 5

HELD, OPEN, FAILED = "held", "could not be told", "failed"
NOT_RUN = "not run"


class Difference(NamedTuple):
    """The mean over seeds of one method less that of another.

    Attributes:
      mean: In the metric's unit; None where a run has diverged.
      uncertainty: Half the width of its 95 % interval; None where seeds do not tell.
      seeds: Of both methods.
    """

    mean: float | None
    uncertainty: float | None
    seeds: tuple[int, int]

    @property
    def outcome(self) -> str:
        """What it means for the claim that the first method is better."""
        if self.mean is None or self.uncertainty is None:
            return OPEN
        if abs(self.mean) <= self.uncertainty:
            return OPEN
        return HELD if self.mean > 0 else FAILED


def judge(result: Mapping[str, Any] | None, claim: Claim) -> Difference | None:
    """What a comparison says of a claim.

    Args:
      result: Its file's content; None where there is none.
      claim: Of two of its methods.

    Returns:
      The difference of the two; None where either has not been run, or not measured in
      this metric.
    """
    results = (result or {}).get("results", {})
    known = [
        results[name]["metrics"][claim.metric]["seeds"]
        for name in (claim.better, claim.worse)
        if claim.metric in results.get(name, {"metrics": {}})["metrics"]
    ]
    if result is None or len(known) < 2:
        return None
    return difference(*known, of=result["settings"]["seeds"])


def difference(first: list, second: list, of: int) -> Difference:
    r"""The difference of two means, with its 95 % uncertainty.

    That is :math:`t_{0.975}(\nu) \, e`. Of pairs, :math:`e` is the standard error of
    their differences' mean; otherwise it and :math:`\nu` are Welch's,

    .. math::
      e^2 = e_1^2 + e_2^2, \quad
      \nu = e^4 / (e_1^4 / (n_1 - 1) + e_2^4 / (n_2 - 1)), \quad e_i^2 = s_i^2 / n_i.

    Args:
      first: One number a seed; None of a run that has diverged.
      second: Of the other method.
      of: How many seeds there are in all. Who has so many has all of them, in order.
    """
    seeds = len(first), len(second)
    if None in first or None in second:
        return Difference(None, None, seeds)
    a, b = np.array(first, float), np.array(second, float)
    mean = float(a.mean() - b.mean())
    if min(seeds) < 2:
        return Difference(mean, None, seeds)
    if seeds == (of, of) and of >= PAIRED:
        error, freedom = (a - b).std(ddof=1) / of**0.5, of - 1
    else:
        squared = np.array([x.var(ddof=1) / len(x) for x in (a, b)])
        error = squared.sum() ** 0.5
        parts = squared**2 / (np.array(seeds) - 1)
        freedom = error**4 / parts.sum() if error else np.inf
    quantile = t.ppf((1 + CONFIDENCE) / 2, freedom)
    return Difference(mean, float(quantile * error), seeds)
