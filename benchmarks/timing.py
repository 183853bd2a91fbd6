"""Comparing times on machines that are never quiet."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def relative_times(
    steps: dict[str, Callable[[Any], Any]],
    carries: dict[str, Any],
    rounds: int = 200,
    seconds: float = math.inf,
) -> dict[str, float]:
    """Time of each step over that of the first: the median of ratios.

    The steps take turns in one process, in another order each round, so that what else
    the machine does, and who went before, hits them alike.

    Args:
      steps: Compiled functions from a carry to the next.
      carries: What each starts from.
      rounds: How many turns each has, at most.
      seconds: After how long no further turn begins, once each has had ten.
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
            carries[name] = jax.block_until_ready(steps[name](carries[name]))
            times[name].append(time.perf_counter() - start)
    base = times[next(iter(steps))]
    return {
        name: round(statistics.median(t / b for t, b in zip(own, base, strict=True)), 3)
        for name, own in times.items()
    }
