"""Tables and sentences from results."""

import json

import numpy as np
import pytest

from benchmarks import report
from benchmarks.experiments import EXPERIMENTS
from benchmarks.pages import FOLDER

COMMITTED = [
    f
    for f in sorted(FOLDER.glob("results/*.json"))
    if not f.name.startswith(("cost", "speed", "theory"))
]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.stem)
def test_committed_results_are_whole(file):
    result = json.loads(file.read_text())
    assert result["complete"] or result["missing"]
    assert "/" not in result["command"].replace("//", "")
    mark = result.get("experiment", {"name": "", "part": ""})
    if "cells" not in result:
        fewer = {"enc-tables": 3, "quantization": 3}
        one = mark["part"] == "distributions"  # of weights, one network each
        assert result["settings"]["seeds"] >= (1 if one else fewer.get(mark["name"], 5))
    elif mark["name"]:  # older ones stay as they were declared
        given = EXPERIMENTS[mark["name"]].settings(mark["part"], mark["scale"])
        kept = {name: result["settings"][name] for name in given}
        assert kept == json.loads(json.dumps(given))


def entry(label, *last, edge=(), trials=40):
    spread = np.std(last, ddof=1) if len(last) > 1 else 0.0
    metric = {"seeds": [*last], "mean": np.mean(last), "std": spread}
    return {
        "label": label,
        "warnings": [],
        "metrics": {"best": metric, "last": metric, "worst": metric},
        "tuning": {"trials": [{}] * trials, "at_edge": list(edge), "chosen": {}},
    }


def compared(*entries, seeds=3, **more):
    results = {e["label"].lower(): e for e in entries}
    settings = {"seeds": seeds, "methods": [*results]}
    return {"complete": True, "settings": settings, "results": results} | more


A = entry("A", 0.78, 0.80, 0.82)


def test_the_verdict_is_honest_about_ties_and_edges():
    result = compared(A, entry("B", 0.80, 0.81, 0.82, edge=["v"]))
    lines = report.verdict(result)
    assert lines[0] == (
        "Highest accuracy in the last epochs: B (81.0 %), then A (80.0 %); the gap is "
        "1.0 ± 4.2 points, so which is better cannot be told."
    )
    assert lines[1].startswith("Highest accuracy under all attacks: B (81.0 %)")
    assert "edge of its range in v" in lines[2]
    result = compared(A, entry("B", 0.89, 0.90, 0.91))
    assert report.verdict(result)[0].endswith("; the gap is 10.0 ± 4.2 points.")
    result["results"]["a"]["warnings"] = ["Seed 0: Gradients are masked."]
    assert "Warning: A: Seed 0: Gradients are masked." in report.verdict(result)
    assert not any("trials" in line for line in report.verdict(result))


def test_what_was_not_attacked_is_in_no_table_and_no_sentence():
    result = compared(A, entry("B", 0.9, 0.9, 0.9))
    for each in result["results"].values():
        del each["metrics"]["worst"]
    assert report.header(result) == ["method", "settings", "best", "last epochs"]
    assert report.rows(result)[1] == ["B", "", "90.0 ± 0.0", "90.0 ± 0.0"]
    assert not any("attacks" in line for line in report.verdict(result))


def test_further_radii_have_a_table_of_their_own():
    result = compared(A)
    result["settings"]["epsilons"] = [0.05, 0.01]
    metrics = result["results"]["a"]["metrics"]
    for radius in ("0.05", "0.01"):
        metrics |= {f"{attack} {radius}": metrics["last"] for attack in ("fgsm", "pgd")}
    head, (row,) = report.further(result)
    assert head[1:5] == ["FGSM, 0.01", "PGD, 0.01", "all attacks, 0.01", "FGSM, 0.05"]
    assert row == ["A", *["80.0 ± 2.0", "80.0 ± 2.0", ""] * 2]
    assert report.further(compared(A))[1] == []


def tuned(label, *tested):
    trials = [
        {"score": score, "tested": accuracy} for score, accuracy in enumerate(tested)
    ]
    known = entry(label, 0.7, 0.8, 0.9)
    return known | {"tuning": known["tuning"] | {"trials": trials}}


def test_the_verdict_says_whether_tuning_has_settled():
    first = tuned("A", *[0.1] * 20, *[0.9] * 20)
    settled = report.verdict(compared(first, tuned("B", *[0.5] * 40)))
    assert settled[-1].startswith("Over the last half of the trials, the first two")
    assert settled[-1].endswith("have been A and then B.")
    late = tuned("B", *[0.5] * 39, 0.95)
    assert "has not settled" in report.verdict(compared(first, late))[-1]


def test_the_verdict_says_when_trials_are_too_few_to_rank():
    fixed = entry("C", 0.7, 0.71, 0.72, trials=0)
    few = compared(A, entry("B", 0.9, 0.91, 0.92, trials=39), fixed)
    lines = report.verdict(few)
    assert lines[2].startswith(
        "Note: Tuned with 39 trials a method; with fewer than 40"
    )
    assert lines[2].endswith("the ranking may not have settled.")
    lines = report.verdict(compared(fixed, entry("D", 0.6, 0.6, 0.6, trials=0)))
    assert lines[2] == "Note: No method was tuned: this ranks settings, not methods."


def test_one_seed_and_equal_seeds_tell_no_spread():
    one = compared(entry("A", 0.8), entry("B", 0.7), seeds=1)
    assert "one seed cannot tell which is better" in report.verdict(one)[0]
    assert report.rows(one)[0][2] == "80.0"
    alike = compared(entry("A", 0.8, 0.8), entry("B", 0.7, 0.7), seeds=2)
    assert "the gap is the same for all seeds" in report.verdict(alike)[0]
    alone = report.verdict(compared(A))
    assert alone[0] == "Highest accuracy in the last epochs: A (80.0 %)."


def test_the_verdict_on_what_is_not_complete():
    unfinished = compared(A) | {"complete": False}
    assert report.verdict(unfinished)[-1].startswith("Interrupted or still going on")
    assert report.verdict(unfinished | {"results": {}}) == ["Nothing is finished yet."]
    finals = [{"role": "final", "method": "a", "seed": n} for n in range(2)]
    others = [{"role": "trial", "method": "weissi", "seed": 9}]
    cells = {"complete": False, "missing": 44, "cells": finals + others}
    some = compared(A, **cells)
    some["settings"]["methods"].append("weissi")
    said = "3 of 47 cells; missing: A (1 seed), WEISSI (3 seeds)."
    assert report.verdict(some)[-1] == said
    assert report.verdict(some | {"results": {}})[-1].startswith("3 of 47 cells; ")


def test_the_papers_rows_stand_beside_a_comparison_on_the_same_wrong_labels():
    alike = compared(A)
    alike["settings"] |= {"dataset": "mnist", "noise": 0.8}
    published, note = report.paper(alike)
    assert published["none_adam"] == {"best": 87.04, "last": 35.88} and note
    clean = compared(A)
    clean["settings"] |= {"dataset": "mnist", "noise": 0.0}
    assert report.paper(clean) == ({}, None)


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
