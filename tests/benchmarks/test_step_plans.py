"""From what a plan counts to how long a step takes at most."""

import pytest

from benchmarks import step_plans
from benchmarks.targets import Plan


def test_what_is_added_takes_its_time():
    """A millisecond for bytes, and one for kernels, of a step of 5.02."""
    added = step_plans.ratio(kernels=0, bytes=2.44e9)
    assert added == pytest.approx(1 + 1 / 5.02)
    assert step_plans.ratio(333, 0) == pytest.approx(1 + 0.999 / 5.02)
    assert step_plans.ratio(-3, -1e9) == 1


def test_steps_are_compared_with_the_bare_one(monkeypatch):
    sizes = iter(range(10))

    def plan(target, run, arguments, donated):
        assert target == "h100" and donated == (0, 1, 2)
        assert arguments[3].shape == (128, 32, 32, 3)
        i = next(sizes)
        return Plan(100 + 10 * i, 1e9 + 1e6 * i, 2e9, 0.1, 0.2)

    monkeypatch.setattr(step_plans.targets, "device", lambda target: None)
    monkeypatch.setattr(step_plans.targets, "plan", plan)
    names = []
    (rows,) = step_plans.counts("h100", names.append).values()
    assert names == list(rows) == ["none", *step_plans.LIMITS]
    assert rows["none"]["at most"] == 1 and "limit" not in rows["none"]
    second = rows["weissi in the loss"]
    assert (second["added kernels"], second["added megabytes"]) == (20, 2.0)
    assert second["limit"] == 1.03
    assert second["bytes alone"] == 1.0
    assert second["µs a kernel"] == round((0.03 * 5020 - 2e6 / 2.44e6) / 20, 2)
    assert second["at most"] == round(1 + (60e-6 + 2e6 / 2.44e12) / 5.02e-3, 3)
