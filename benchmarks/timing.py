"""Comparing times on machines that are never quiet."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """How long a step takes, by the medians over turns.

    Attributes:
      ratio: Its time over that of the first step in the same turn.
      low: The lower quartile of these ratios.
      high: The upper quartile of them.
      seconds: Of one step.
      a_second: Examples that a step sees, over its time, if it sees some.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    a_second: float | None = None

    def each(self, count: int) -> "Timing":
        """Of one of ``count`` equal things that the step does."""
        return self._replace(seconds=_rounded(self.seconds / count))

    def rated(self, examples: int) -> "Timing":
        """Of a step that sees examples."""
        return self._replace(a_second=_rounded(examples / self.seconds))


def relative_times(
    steps: dict[str, Callable[[Any], Any]],
    carries: dict[str, Any],
    rounds: int = 200,
    seconds: float = math.inf,
    calls: int = 1,
) -> dict[str, Timing]:
    """Time of each step, and over that of the first: medians and quartiles.

    The steps take turns in one process, in another order each round, so that what else
    the machine does, and who went before, hits them alike.

    Args:
      steps: Compiled functions from a carry to the next.
      carries: What each starts from.
      rounds: How many turns each has, at most.
      seconds: After how long no further turn begins, once each has had ten.
      calls: How often a step is called in its turn, one call waiting for none.
    """
    rng = np.random.default_rng(0)
    carries = {name: step(carries[name]) for name, step in steps.items()}  # warm up
    times: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for turn in range(rounds):
        if turn >= 10 and time.perf_counter() - begun > seconds:
            break
        for name in rng.permutation(list(steps)).tolist():
            jax.block_until_ready(carries[name])
            start = time.perf_counter()
            for _ in range(calls):
                carries[name] = steps[name](carries[name])
            jax.block_until_ready(carries[name])
            times[name].append((time.perf_counter() - start) / calls)
    base = np.array(times[next(iter(steps))])
    return {name: _timing(np.array(own), base) for name, own in times.items()}


def _timing(own: np.ndarray, base: np.ndarray) -> Timing:
    low, ratio, high = np.round(np.quantile(own / base, (0.25, 0.5, 0.75)), 3).tolist()
    return Timing(ratio, low, high, _rounded(np.median(own)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
