"""Tables and sentences from results."""

import json

import pytest

from benchmarks import report
from benchmarks.experiments import EXPERIMENTS
from benchmarks.pages import FOLDER

COMMITTED = [
    f
    for f in sorted(FOLDER.glob("results/*.json"))
    if not f.name.startswith(("cost", "speed"))
]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.stem)
def test_committed_results_are_whole(file):
    result = json.loads(file.read_text())
    mark = result.get("experiment") or {"name": None}
    assert result["complete"]
    fewer = {"enc-tables": 3, "quantization": 3}
    one = mark.get("part") == "distributions"  # of weights, one network each
    assert result["settings"]["seeds"] >= (1 if one else fewer.get(mark["name"], 5))
    assert "/" not in result["command"].replace("//", "")
    if mark["name"]:
        given = EXPERIMENTS[mark["name"]].settings(mark["part"], mark["scale"])
        kept = {name: result["settings"][name] for name in given}
        assert kept == json.loads(json.dumps(given))


def entry(label, last, std, edge=(), trials=40):
    metric = {"mean": last, "std": std}
    return {
        "label": label,
        "warnings": [],
        "metrics": {"last": metric, "worst": metric},
        "tuning": {"trials": [{}] * trials, "at_edge": list(edge)},
    }


def compared(*entries, seeds=5):
    results = {e["label"].lower(): e for e in entries}
    return {"complete": True, "settings": {"seeds": seeds}, "results": results}


def test_the_verdict_is_honest_about_ties_and_edges():
    result = compared(entry("A", 0.8, 0.02), entry("B", 0.81, 0.01, ["v"]))
    lines = report.verdict(result)
    first = "Highest accuracy in the last epochs: B (81.0 %), then A (80.0 %)"
    assert lines[0].startswith(first)
    assert "within one standard deviation" in lines[0]
    assert lines[0].endswith("so which is better cannot be told.")
    assert lines[1].startswith("Highest accuracy under all attacks: B (81.0 %)")
    assert "edge of its range in v" in lines[2]
    result["results"]["b"]["metrics"]["last"]["mean"] = 0.9
    assert "5.0 standard deviations" in report.verdict(result)[0]
    result["results"]["a"]["warnings"] = ["Seed 0: Gradients are masked."]
    assert "Warning: A: Seed 0: Gradients are masked." in report.verdict(result)
    assert not any("trials" in line for line in report.verdict(result))


def test_the_verdict_says_when_trials_are_too_few_to_rank():
    fixed = entry("C", 0.7, 0.01, trials=0)
    few = compared(entry("A", 0.8, 0.01), entry("B", 0.9, 0.01, trials=39), fixed)
    lines = report.verdict(few)
    assert lines[2].startswith(
        "Note: Tuned with 39 trials a method; with fewer than 40"
    )
    assert lines[2].endswith("the ranking may not have settled.")
    lines = report.verdict(compared(fixed, entry("D", 0.6, 0.01, trials=0)))
    assert lines[2] == "Note: No method was tuned: this ranks settings, not methods."


def test_one_seed_and_equal_seeds_tell_no_spread():
    one = compared(entry("A", 0.8, 0.0), entry("B", 0.8, 0.0), seeds=1)
    assert "one seed cannot tell which is better" in report.verdict(one)[0]
    alike = compared(entry("A", 0.8, 0.0), entry("B", 0.7, 0.0))
    assert "the gap is the same for all seeds" in report.verdict(alike)[0]
    alone = report.verdict(compared(entry("A", 0.8, 0.0)))
    assert alone[0] == "Highest accuracy in the last epochs: A (80.0 %)."


def test_the_verdict_on_what_is_not_complete():
    unfinished = compared(entry("A", 0.8, 0.01)) | {"complete": False}
    assert report.verdict(unfinished)[-1].startswith("Interrupted or still going on")
    assert report.verdict(unfinished | {"results": {}}) == ["Nothing is finished yet."]


def test_what_has_diverged_is_said_to_have():
    result = json.loads((FOLDER / "results/enc-tables-cpu-tuned.json").read_text())
    metrics = result["results"]["enc"]["metrics"]
    metrics["gbr of logits"] |= {"mean": None, "std": None}
    column = report.header(result).index("GBR (logits)")
    l2, enc = report.rows(result)
    assert enc[column] == "diverged" and "±" in l2[column]


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "1 x cpu, commit not recorded"),
        ({"commit": "0123456789abcdef", "dirty": False}, "1 x cpu, commit 0123456789"),
        (
            {"commit": "0123456789abcdef", "dirty": True},
            "1 x cpu, commit 0123456789, with changes",
        ),
        (
            {"commit": None, "no_commit": "not a git repository"},
            "1 x cpu, commit not recorded (not a git repository)",
        ),
    ],
)
def test_the_code_is_told_beside_the_device(known, said):
    assert report.origin({"device": "1 x cpu"} | known) == said
