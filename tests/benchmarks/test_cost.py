"""What compiled steps read, write and hold, which does not depend on the machine.

Times do depend on it, so nothing here is timed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from benchmarks import cost, timing
from benchmarks.cost import OPTIMIZERS, compiled_step, memory
from benchmarks.timing import relative_times

PARAMS = {str(i): jnp.ones((256, 256)) for i in range(4)}
COUNT = 4 * 256**2


def step_memory(name):
    return memory(compiled_step(OPTIMIZERS[name](), PARAMS, PARAMS), COUNT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other fusions on a GPU")
@pytest.mark.parametrize(
    ("name", "moved", "held"),
    [
        ("adam", 40, 0),
        ("chain(adam, volumize)", 40, 0),
        ("volumized(adam)", 64, 4),
        ("chain(add_weissi, adam)", 78, 3),  # a CPU reads once for each sum
    ],
)
def test_memory_of_a_step(name, moved, held):
    """Bytes a parameter, of which Adam cannot do with fewer than 28."""
    got = step_memory(name)
    assert got["bytes"] <= moved + 1
    assert got["temporary_bytes"] <= held + 0.2


def test_relative_times_are_medians_over_turns(monkeypatch):
    """By a clock that the steps themselves move, twice as fast in every other round."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step(name, seconds):
        def advance(carry):
            calls.append(name)
            slow = (
                (len(calls) - 1) // 3 % 2
            )  # what else the machine does hits all alike
            now[0] += seconds * (1 + slow)
            return carry + 1

        return advance

    steps = {name: step(name, s) for name, s in zip("abc", (2, 3, 1), strict=True)}
    times = relative_times(steps, dict.fromkeys("abc", 0), rounds=20)
    assert times == {
        "a": (1.0, 1.0, 1.0, 3.0, None),
        "b": (1.5, 1.5, 1.5, 4.5, None),
        "c": (0.5, 0.5, 0.5, 1.5, None),
    }
    orders = {tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)}
    assert len(calls) == 63 and len(orders) > 3
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_quartiles_are_those_of_the_ratios(monkeypatch):
    """By a clock that one step moves farther each time it is called."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def growing(carry):
        calls.append(carry)
        now[0] += len(calls)

    def steady(carry):
        now[0] += 2.0

    steps = {"steady": steady, "growing": growing}
    times = relative_times(steps, dict.fromkeys(steps), rounds=4)
    assert times["growing"] == (1.75, 1.375, 2.125, 3.5, None)  # 2, 3, 4 and 5 seconds
    assert times["growing"].each(7).seconds == 0.5
    assert times["growing"].rated(7).a_second == 2.0
    calls.clear()
    times = relative_times(steps, dict.fromkeys(steps), rounds=1, calls=3)
    assert times["growing"] == (1.5, 1.5, 1.5, 3.0, None)  # 2, 3 and 4 seconds
    assert len(calls) == 1 + 3


@quick.everything
def test_training_steps_are_timed_with_what_they_say(monkeypatch):
    """Penalties in the loss and in the chain take the same step, and others do not."""
    params = {}

    def end(steps, carries, rounds):
        params.update({name: step(carries[name])[0] for name, step in steps.items()})
        return {}

    monkeypatch.setattr(cost, "relative_times", end)
    # With the benchmark's own rate the first step would differ by roundings alone.
    sgd = functools.partial(optax.sgd, 100.0)
    monkeypatch.setattr(cost.optax, "sgd", lambda rate, momentum: sgd(momentum))
    cost.training_times("mlp", 8, rounds=1)
    kernel = lambda name: params[name]["Dense_0"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(
        kernel("weissi in the loss"), kernel("add_weissi"), rtol=1e-5, atol=1e-7
    )
    plain = np.asarray(kernel("none"))
    for name in ("add_decayed_weights", "add_weissi", "equivalent_norm"):
        assert np.abs(kernel(name) - plain).max() > 2e-5
    with_penalty = kernel("equivalent_norm and add_shifted_l2")
    assert np.abs(with_penalty - kernel("equivalent_norm")).max() > 2e-5


def test_folded_networks_run_the_program_of_plain_ones(monkeypatch):
    outputs = {}

    def once(steps, carries, rounds):
        outputs.update({name: step(carries[name]) for name, step in steps.items()})
        return {}

    monkeypatch.setattr(cost, "relative_times", once)
    cost.inference_times("mlp", 8, rounds=1)
    np.testing.assert_array_equal(outputs["folded"], outputs["mapped in every call"])
    assert np.abs(outputs["folded"] - outputs["plain"]).max() > 0


def test_turns_end_when_time_is_up(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step(carry):
        calls.append(1)
        now[0] += 1.0

    relative_times({"a": step}, {"a": None}, rounds=100, seconds=25)
    assert len(calls) == 1 + 26
    calls.clear()
    relative_times({"a": step}, {"a": None}, rounds=100, seconds=5)
    assert len(calls) == 1 + 10
