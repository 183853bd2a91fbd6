"""Whether a ranking of tuned methods still depends on how many trials they had."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def courses(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Test accuracy of the best trial so far, over the number of trials.

    The best one is the best by the score, which is what is chosen by; test accuracy
    chooses nothing. Of methods that were not tuned there is none, and of files that do
    not tell it.
    """
    found = {}
    for name, entry in result["results"].items():
        trials = entry["tuning"]["trials"]
        if trials and all(trial.get("tested") is not None for trial in trials):
            found[name] = _course(trials)
    return found


def _course(trials: list[dict]) -> list[float]:
    scores = [-np.inf if t["score"] is None else t["score"] for t in trials]
    best = [int(np.argmax(scores[: n + 1])) for n in range(len(scores))]
    return [trials[i]["tested"] for i in best]


def settled(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first two tuned methods, if they have been over the last half of the trials.

    Raises:
      LookupError: Fewer than two methods tell, or they had a single trial.
    """
    known = courses(result)
    most = max(map(len, known.values()), default=0)
    if len(known) < 2 or most < 2:
        raise LookupError("there are no two tuned methods whose trials were tested.")
    rankings = {_first_two(known, n) for n in range(most // 2, most)}
    return rankings.pop() if len(rankings) == 1 else None


def _first_two(known: Mapping[str, list[float]], trial: int) -> tuple[str, str]:
    """By what each had after a trial, or after its last one."""
    reached = {name: c[min(trial, len(c) - 1)] for name, c in known.items()}
    first, second, *_ = sorted(reached, key=lambda name: -reached[name])
    return first, second
