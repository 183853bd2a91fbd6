"""What is missing of tables, and how long it would take."""

import json
import pathlib

import pytest

import benchmarks
import benchmarks.__main__ as cli
from benchmarks import devices, flops, status
from benchmarks.experiments import EXPERIMENTS
from benchmarks.settings import Settings

RESULTS = pathlib.Path(benchmarks.__file__).parent / "results"
SETTINGS = Settings.of(
    "digits",
    methods=("binary_paper", "l2"),
    epochs=10,
    trials=3,
    tuning_seeds=2,
    seeds=5,
    source_epochs=4,
)
SOURCE = {"role": "source", "method": "none", "seconds": 8.0}
TRIAL = {"role": "trial", "method": "l2", "seconds": 20.0}
FINAL = {"role": "final", "method": "binary_paper", "seconds": 50.0}


@pytest.fixture
def here(monkeypatch):
    """A device on which nothing is known of operations."""
    monkeypatch.setattr(status, "described", lambda: "1 x card")
    monkeypatch.setattr(flops, "epoch_seconds", lambda *_: None)


def cells(*given, device="1 x card"):
    return [cell | {"device": device} for cell in given]


def test_runs_that_are_no_cells_are_missing(here):
    found = status.state("a", SETTINGS, cells(SOURCE, TRIAL, TRIAL, FINAL))
    assert (found.done, found.all) == (4, 1 + 3 * 2 + 2 * 5)
    assert found.missing == {"binary_paper": 4, "l2": 5}
    assert found.seconds == 4 * 20 + 9 * 50 and found.measured


def test_what_was_measured_elsewhere_says_nothing_of_the_time_here(here, monkeypatch):
    elsewhere = cells(SOURCE, TRIAL, FINAL, device="1 x other")
    found = status.state("a", SETTINGS, elsewhere)
    assert found.done == 3 and found.seconds is None and not found.measured
    monkeypatch.setattr(flops, "epoch_seconds", lambda settings, method, kind: 0.5)
    found = status.state("a", SETTINGS, elsewhere)
    assert found.seconds == (5 + 4 + 5) * 10 * 0.5 and not found.measured


def test_nothing_is_missing_of_what_is_complete(here):
    found = status.state("a", SETTINGS, cells(SOURCE, *6 * [TRIAL], *5 * [FINAL]))
    assert found.missing == {"l2": 5}
    tuned = FINAL | {"method": "l2"}
    every = cells(SOURCE, *6 * [TRIAL], *5 * [FINAL], *5 * [tuned])
    found = status.state("a", SETTINGS, every)
    assert found.done == found.all and not found.missing and found.seconds == 0


@pytest.mark.parametrize(
    ("seconds", "measured", "text"),
    [
        (None, False, "not known here"),
        (0.0, False, "0 s"),
        (59.6, True, "60 s"),
        (7199.0, True, "2 h 0 min"),
        (5000.0, False, "1 h 23 min, by its operations"),
    ],
)
def test_times_are_told_in_hours(seconds, measured, text):
    state = status.State("a", 1, 2, {"l2": 1}, seconds, measured)
    (*_, column) = status.table([state]).columns
    assert list(column.cells) == [text]


def test_the_command_says_how_far_each_part_is(tmp_path, capsys):
    result = json.loads((RESULTS / "weissi-table1-cpu-mlp.json").read_text())
    for cell in result["cells"]:
        cell |= {"device": devices.described(), "seconds": 6000.0}
    result["cells"] = result["cells"][:-3]
    (tmp_path / "weissi-table1-cpu-mlp-bfloat16.json").write_text(json.dumps(result))
    command = ["status", "weissi-table1", "--out", str(tmp_path)]
    for dtype, known in (("float32", False), ("bfloat16", True)):
        assert cli.main([*command, "--dtype", dtype]) == 0
        printed = capsys.readouterr().out
        rows = [line.replace(" ", "") for line in printed.splitlines() if "│" in line]
        assert len(rows) == len(EXPERIMENTS["weissi-table1"].parts)
        assert ("98of101│weissi3│5h0min" in rows[0]) == known, rows
        assert "0of101" in rows[1] and ("-bfloat16│" in rows[1]) == known
        assert "notknownhere" in rows[1] and devices.described() in printed
