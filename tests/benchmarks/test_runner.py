"""A run that is ended at any moment goes on from there, to the same numbers."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import random

import instant
import jax
import numpy as np
import pytest

from benchmarks import checkpoints, record, runner
from benchmarks.settings import Settings

SETTINGS = Settings.of(
    "digits",
    methods=("binary_paper", "l2"),
    epochs=3,
    trials=3,
    tuning_seeds=1,
    seeds=2,
    attacked=10,
    attack_steps=2,
    restarts=2,
    deploy=(),
)


# Of programs that are compiled soon.
KILLED = dataclasses.replace(SETTINGS, methods=("l2",), epochs=40, attacked=0)


class Ended(BaseException):
    """What ends a run."""


@pytest.fixture
def faked(monkeypatch):
    return instant.fake(monkeypatch)


def content(file):
    """A file without what two runs may differ in."""
    result = json.loads(file.read_text())
    for cell in result["cells"]:
        del cell["seconds"]
    return result


@pytest.mark.parametrize("seed", range(5))
def test_ended_before_or_after_any_file_is_written_nothing_is_lost(
    seed, faked, tmp_path, monkeypatch
):
    whole, ended = tmp_path / "whole.json", tmp_path / "ended.json"
    runner.run(SETTINGS, whole)
    epochs = len(faked)
    assert epochs == 3 * (1 + 3 + 2 * 2)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.json"}
    faked.clear()
    moments, write = random.Random(seed), record.write
    lives, finished = 0, False
    while not finished:
        lives += 1
        last, after = moments.randint(1, 4), moments.random() < 0.5
        number = itertools.count(1)

        def end(content, out, after=after, written=number, last=last):
            ends = next(written) == last
            if after or not ends:
                write(content, out)
            if ends:
                raise Ended

        with monkeypatch.context() as patched:
            patched.setattr(record, "write", end)
            with contextlib.suppress(Ended):
                finished = runner.run(SETTINGS, ended)["complete"]
    assert lives > 5
    assert content(ended) == content(whole)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.json", "ended.json"}
    # An epoch is repeated by a life that ended before it was kept, and by no other.
    assert len(faked) - epochs <= 2 * lives


def test_in_a_piece_of_time_it_stops_at_a_checkpoint_and_goes_on(
    faked, tmp_path, monkeypatch
):
    whole, pieces = tmp_path / "whole.json", tmp_path / "pieces.json"
    runner.run(SETTINGS, whole)
    epochs = sorted(faked)
    faked.clear()

    class Short(runner.Clock):
        """Time for two things."""

        def __init__(self):
            super().__init__()
            self._left = 3

        def allows(self, what):
            self._left -= 1
            return self._left >= 0

    missing = []
    while not missing or missing[-1]:
        missing.append(runner.run(SETTINGS, pieces, clock=Short())["missing"])
    assert len(missing) > 4
    assert record.load(pieces)["complete"]
    assert content(pieces) == content(whole)
    assert sorted(faked) == epochs  # none was repeated


def test_time_is_not_begun_with_that_does_not_suffice(monkeypatch):
    now = 0.0
    monkeypatch.setattr(runner.time, "monotonic", lambda: now)
    clock = runner.Clock(minutes=1, every=30)
    assert clock.allows("epoch")
    with clock.timed("epoch"):
        now = 20.0
    assert clock.allows("epoch") and not clock.keeps()
    now = 39.0
    assert not clock.allows("epoch") and clock.allows("another") and clock.keeps()
    now = 61.0
    assert not clock.allows("another") and not clock.keeps()
    assert runner.Clock().allows("epoch")


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path):
    out = tmp_path / "a.json"
    kept = checkpoints.Checkpoint("these", [], [np.ones(2)], [], 1.0)
    checkpoints.save(kept, out)
    assert checkpoints.load(out, "others") is None
    loaded = checkpoints.load(out, "these")
    assert loaded is not None and loaded.seconds == 1.0
    np.testing.assert_array_equal(loaded.leaves[0], np.ones(2))
    checkpoints.path(out).write_bytes(b"no checkpoint")
    with pytest.raises(
        ValueError, match=r"a\.checkpoint must be a checkpoint .*delete"
    ):
        checkpoints.load(out, "these")


def test_two_processes_do_not_fill_one_file(tmp_path):
    out = tmp_path / "a.json"
    with (
        checkpoints.alone(out),
        pytest.raises(OSError, match="being filled by another process"),
        checkpoints.alone(out),
    ):
        pass
    with checkpoints.alone(out):  # free again
        pass
    assert not list(tmp_path.iterdir())


def _fill(out, cache):
    """What the processes that are killed do."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    runner.run(KILLED, out)


def test_killed_at_ten_random_moments_it_gives_the_same_numbers(tmp_path):
    """By the system, so that nothing of the process can clean up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "benchmarks.runner"])
    whole, killed, cache = (tmp_path / name for name in ("a.json", "b.json", "cache"))

    def lives(out, seconds=None):
        process = context.Process(target=_fill, args=(out, cache))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return False
        assert process.exitcode == 0
        return True

    assert lives(whole, 300)
    moments, kills = random.Random(0), 0
    while kills < 10 and not lives(killed, moments.uniform(0.5, 1.5)):
        kills += 1
    assert kills > 2
    assert lives(killed, 300)
    assert content(killed) == content(whole)
