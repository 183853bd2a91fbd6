"""Claims, and what seeds can tell of them."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import claims
from benchmarks.claims import FAILED, HELD, OPEN
from benchmarks.experiments import Claim

CLAIM = Claim("a", "b", "last")


def compared(seeds=5, **values):
    results = {
        name: {"metrics": {"last": {"seeds": given}}} for name, given in values.items()
    }
    return {"settings": {"seeds": seeds}, "results": results}


@pytest.mark.parametrize(
    ("a", "b", "outcome"),
    [
        ([0.90, 0.91, 0.92], [0.80, 0.81, 0.79], HELD),
        ([0.80, 0.81, 0.79], [0.90, 0.91, 0.92], FAILED),
        ([0.90, 0.80, 0.85], [0.80, 0.86, 0.82], OPEN),
        ([0.9], [0.1, 0.1, 0.1], OPEN),  # a single seed
        ([0.9, 0.9], [0.1, 0.1, 0.1], HELD),  # no spread at all
        ([0.5, 0.5], [0.5, 0.5], OPEN),
        ([0.9, None], [0.1, 0.1], OPEN),  # diverged
    ],
)
def test_differences_are_told_from_their_uncertainty(a, b, outcome):
    found = claims.judge(compared(a=a, b=b), CLAIM)
    assert found is not None and found.outcome == outcome
    assert found.seeds == (len(a), len(b))


def test_what_was_not_run_is_not_judged():
    assert claims.judge(None, CLAIM) is None
    assert claims.judge(compared(a=[0.9, 0.8]), CLAIM) is None
    other = Claim("a", "b", "fgsm")
    assert claims.judge(compared(a=[0.9, 0.8], b=[0.9, 0.8]), other) is None


def test_uncertainties_are_those_of_scipy():
    rng = np.random.default_rng(0)
    common = rng.normal(size=5)
    a, b = (common + rng.normal(size=5) / 2 for _ in range(2))
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = claims.difference([*a], [*b], of=5)
    assert found.uncertainty == pytest.approx((paired.high - paired.low) / 2)
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = claims.difference([*a], [*b], of=6)  # which seed is whose is not known
    assert found.uncertainty == pytest.approx((welch.high - welch.low) / 2)
    few = stats.ttest_ind(a[:3], b[:2], equal_var=False).confidence_interval(0.95)
    found = claims.difference([*a[:3]], [*b[:2]], of=3)
    assert found.uncertainty == pytest.approx((few.high - few.low) / 2)
    assert found.mean == pytest.approx(a[:3].mean() - b[:2].mean())


def test_methods_that_are_alike_are_rarely_told_apart():
    """An interval of 95 % has its difference in 19 of 20 cases."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        luck = rng.normal(size=5)
        a, b = (luck + rng.normal(size=5) for _ in range(2))
        wrong += claims.difference([*a], [*b], of=5).outcome != OPEN
    assert 8 <= wrong <= 32
