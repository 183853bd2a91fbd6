"""Results as files."""

import errno
import json
import os
import pathlib
import re
import threading

import numpy as np
import pytest

from benchmarks import measure, record
from benchmarks.settings import Settings

RESULTS = pathlib.Path(measure.__file__).parent / "results"
DIGITS = RESULTS / "digits-noise40.json"


def test_what_has_diverged_is_recorded(tmp_path):
    values = [1.0, np.nan, -np.inf, 1e-12 / 3]
    rounded = [measure.rounded(value) for value in values]
    assert rounded == [1.0, None, None, 3.3333e-13]
    record.save({"curve": rounded}, tmp_path / "out.json")
    with pytest.raises(ValueError):
        record.save({"curve": values}, tmp_path / "out.json")


def test_files_are_readable_as_far_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        record.save({}, tmp_path / "out.json")
    finally:
        os.umask(old)
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o640


def full_disk(monkeypatch):
    """Lets all that is written from now on go to a disk without room."""
    open_file = pathlib.Path.open

    def full(path, mode):
        open_file(path, mode).close()
        return open_file(pathlib.Path("/dev/full"), "wb")

    monkeypatch.setattr(pathlib.Path, "open", full)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    record.save({"a": 1}, out)
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device: .*out\.json") as error:
        record.save({"a": 2}, out)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert json.loads(out.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [out]


def test_readers_and_writers_at_once_see_whole_files(tmp_path):
    out, done, seen = tmp_path / "out.json", threading.Event(), set()
    contents = [{"a": [n] * 10_000 * (n + 1)} for n in range(2)]
    record.save(contents[0], out)

    def read():
        while not done.is_set():
            seen.add(len(json.loads(out.read_text())["a"]))

    def save(content):
        for _ in range(30):
            record.save(content, out)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=save, args=(c,)) for c in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert seen and seen <= {10_000, 20_000}
    assert list(tmp_path.iterdir()) == [out]


def test_a_comparison_is_not_written_over_one_of_other_settings(tmp_path):
    out = tmp_path / "out.json"
    record.refuse_another({"epochs": 80}, out)  # there is none yet
    result = json.loads(DIGITS.read_text())
    record.save(result, out)
    with pytest.raises(ValueError, match=r"out.json holds .* epochs is 80, not 81"):
        record.refuse_another({"epochs": 81}, out)
    record.refuse_another({"epochs": 80, "mapping": "vmap", "new": 1}, out)
    result["data"]["sha256"] = "of other examples"
    record.save(result, out)
    with pytest.raises(ValueError, match=r"whose sha256 is of other examples, not "):
        record.refuse_another({}, out, {"sha256": "of these"})


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_committed_results_can_be_loaded(file):
    assert record.load(file) == json.loads(file.read_text())


def without(*path):
    result = json.loads(DIGITS.read_text())
    inner = result
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return json.dumps(result)


def changed(**values):
    return json.dumps(json.loads(DIGITS.read_text()) | values)


def tried(**trial):
    results = json.loads(DIGITS.read_text())["results"]
    results["l2"]["tuning"]["trials"] = [trial]
    return changed(results=results)


def test_what_is_not_attacked_and_not_complete_can_be_loaded(tmp_path):
    result = json.loads(DIGITS.read_text())
    for entry in result["results"].values():
        for name in ("fgsm", "pgd", "worst"):
            del entry["metrics"][name]
        del entry["strength"], entry["gradients"]
        for trial in entry["tuning"]["trials"]:
            trial["tested"] = None
    cell = {"role": "trial", "method": "l2", "seed": 0, "trial": 3}
    result |= {"complete": False, "missing": 1, "cells": [cell, cell | {"trial": None}]}
    record.save(result, tmp_path / "out.json")
    assert record.load(tmp_path / "out.json") == result


COST = json.loads((RESULTS / "cost-cpu.json").read_text())
TIMES = {"about": "", "columns": {"a": {"b": {"ratio": "1"}}}}
SPEED = {"command": "", "device": "", "left_out": {}, "counted": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"must be a result .*holds \[1\]"),
        ('{"a": 1}', "lacks the field complete"),
        ("", "must be JSON"),
        (DIGITS.read_text()[:5000], "must be JSON"),
        ("[" * 200_000, "must be JSON"),
        (without("device"), "lacks the field device"),
        (without("settings", "epsilon"), "lacks the field settings.epsilon"),
        (
            without("results", "l2", "metrics", "worst", "mean"),
            "lacks the field results.l2.metrics.worst.mean",
        ),
        (changed(results=[]), r"must have an object as results, but has \[\]"),
        (changed(complete="yes"), "must have true or false as complete"),
        (changed(relative_step_time={"l2": "1"}), "a number as relative_step_time.l2"),
        (changed(missing="2"), "must have a whole number as missing"),
        (changed(cells=[{"role": "final"}]), r"lacks the field cells\[0\].method"),
        (
            changed(cells=[{"role": "trial", "method": "l2", "seed": "0"}]),
            r"must have a whole number as cells\[0\].seed",
        ),
        (tried(score=0.5), r"trials\[0\].hyperparameters"),
        (
            tried(hyperparameters={}, score="a"),
            r"null as results.l2.tuning.trials\[0\]",
        ),
        (tried(hyperparameters={}, score=None, tested=[]), r"trials\[0\].tested"),
        (changed(format=2), "has format 2, but this version reads 1"),
        (changed(format=None), "has format None"),
        (json.dumps(COST | {"forms": None}), "must have an object as forms"),
        (
            json.dumps(COST | {"optimizers": {"adam": {"bytes": 1}}}),
            "lacks the field optimizers.adam.relative_time",
        ),
        ('{"timed": {}}', "lacks the field command"),
        (
            json.dumps(SPEED | {"timed": {"bits": TIMES}}),
            "a number as timed.bits.columns.a.b.ratio",
        ),
    ],
)
def test_what_is_no_result_is_refused(text, message, tmp_path):
    file = tmp_path / "out.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        record.load(file)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "digits-noise40"),
        ({"epochs": 80, "trials": 40, "mapping": "vmap"}, "digits-noise40"),
        ({"data_dir": "/data"}, "digits-noise40"),
        ({"noise": 0.8}, "digits-noise80"),
        ({"noise": 0.29}, "digits-noise29"),
        ({"dataset": "mnist", "noise": 0}, "mnist-noise0"),
        (
            {"model": "mlp1024", "optimizer": "momentum"},
            "digits-noise40-mlp1024-momentum",
        ),
        ({"schedule": "steps"}, "digits-noise40-steps"),
        ({"dtype": "float32"}, "digits-noise40"),
        ({"dtype": "bfloat16"}, "digits-noise40-bfloat16"),
        (
            {"dataset": "cifar10", "augment": ("flip_crop", "mixup")},
            "cifar10-noise40-flip_crop-mixup",
        ),
    ],
)
def test_names_say_in_words_what_was_compared(given, name):
    assert Settings.of(**({"dataset": "digits"} | given)).name() == name


def test_other_settings_have_other_names():
    given = [{}, {"noise": 0.401}, {"noise": 0.404}, {"methods": ("none", "l2")}]
    given += [{"methods": ("none",), "deploy": ("none",)}, {"examples": 500}]
    given += [{name: 5} for name in ("seeds", "epochs", "batch", "trials", "attacked")]
    given[given.index({"seeds": 5})] = {"seeds": 6}
    given += [{"tuning_seeds": 5}, {"attack_steps": 5}, {"restarts": 5}]
    given += [{"sensitivity": 5}, {"tune_for": "fgsm"}, {"epsilon": 0.2}]
    given += [{"adversarial": 0.01}, {"adversarial": 0.02}, {"optimizer": "momentum"}]
    names = [Settings.of("digits", **settings).name() for settings in given]
    assert len(set(names)) == len(names)
    again = [Settings.of("digits", **settings).name() for settings in given]
    assert names == again
    assert re.fullmatch(r"digits-noise40-[0-9a-f]{8}", names[3])
    assert re.fullmatch(r"digits-noise40-adversarial-[0-9a-f]{8}", names[-2])
    one, other = (Settings.of("digits", epsilon=epsilon) for epsilon in (1, 1.0))
    assert one.name() == other.name()
