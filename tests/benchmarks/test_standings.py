"""A paper's table beside what was measured."""

from collections import Counter

import numpy as np
import pytest

from benchmarks import claims, standings
from benchmarks.experiments import Claim, Experiment

EXPERIMENT = Experiment(
    title="a table",
    shared={},
    parts={"part": {}, "figure": {}},
    scales={},
    paper={
        "part": {
            "l2_paper": {"best": 90.5, "last": 80.0},
            "weissi_paper": {"last": 85.25},
            "dropout": {"last": 70.0},
        },
        "figure": {},
    },
    note="",
    claims={
        "part": (
            Claim("weissi_paper", "l2_paper", "last"),
            Claim("weissi_paper", "l2_paper", "fgsm 0.05"),
            Claim("weissi", "l2", "best"),
        )
    },
)


def entry(trials=0, **metrics):
    known = {
        name.replace("_", " "): {
            "seeds": values,
            "mean": np.mean(values),
            "std": np.std(values, ddof=1) if len(values) > 1 else 0.0,
        }
        for name, values in metrics.items()
    }
    return {"label": "", "metrics": known, "tuning": {"trials": [{}] * trials}}


def compared(scale="cpu", seeds=3, dtype="float32", **entries):
    methods = ["weissi_paper", "l2_paper", "weissi", "l2"]
    return {
        "complete": True,
        "experiment": {"name": "name", "part": "part", "scale": scale},
        "settings": {"seeds": seeds, "methods": methods, "dtype": dtype},
        "results": entries,
    }


CPU = compared(
    l2_paper=entry(best=[0.8, 0.81, 0.82], last=[0.7, 0.71, 0.72]),
    weissi_paper=entry(best=[0.8], last=[0.9]),
    weissi=entry(8, best=[0.9, 0.91, 0.92], last=[0.9, 0.9, 0.9]),
    l2=entry(40, best=[0.7, 0.71, 0.72], last=[0.9, 0.9, 0.9]),
)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_the_papers_numbers_and_ours_at_each_scale():
    head, _, *rows = standings.table(EXPERIMENT, "part", {"cpu": CPU})[:7]
    assert cells(head) == [
        "method",
        "settings",
        "paper: best / last epochs",
        "cpu: best / last epochs",
    ]
    assert [cells(row) for row in rows] == [
        ["WEISSI, as in the paper", "fixed", "*- / 85.2*", "80.0 / 90.0 (1)"],
        [
            "weight decay, as in the paper",
            "fixed",
            "*90.5 / 80.0*",
            "81.0 ± 1.0 / 71.0 ± 1.0 (3)",
        ],
        ["dropout", "", "*- / 70.0*", ""],
        ["WEISSI", "tuned", "", "91.0 ± 1.0 / 90.0 ± 0.0 (3)"],
        ["weight decay (L2)", "tuned", "", "71.0 ± 1.0 / 90.0 ± 0.0 (3)"],
    ]


def test_further_radii_and_figures_without_numbers_have_their_tables():
    lines = standings.table(EXPERIMENT, "part", {"cpu": CPU})
    assert "| method | settings | paper: FGSM 0.05 | cpu: FGSM 0.05 |" in lines
    head, *_ = standings.table(EXPERIMENT, "figure", {"cpu": CPU})
    assert cells(head) == ["method", "settings", "cpu: best / last epochs"]


def test_claims_have_their_differences_and_what_is_too_few_to_tell():
    _, _, last, best, _, left, _ = standings.judged(EXPERIMENT, "part", {"cpu": CPU})
    assert cells(last) == [
        "WEISSI, as in the paper beats weight decay, as in the paper",
        "last epochs",
        "*+5.2*",
        "could not be told (19.0 points, one seed)",
        "not run",
    ]
    assert cells(best)[3] == "held (20.0 ± 2.3 points; after 8 trials)"
    assert left == "- Claims on what has not been run or measured yet: 1."  # FGSM 0.05
    assert standings.judged(EXPERIMENT, "figure", {"cpu": CPU}) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_summary_takes_what_there_is_of_a_scale(dtype):
    full = compared("full", dtype=dtype, **CPU["results"])
    results = {standings.scale_of(full): full}
    paper, tuned = standings.summary(EXPERIMENT, "part", results)
    assert paper[1:] == [
        "not run",
        "**could not be told**: last epochs; **not run**: FGSM 0.05",
    ]
    assert tuned[1:] == ["not run", "**held**: best; after 8 trials"]
    assert standings.counted(EXPERIMENT, "part", results, "full") == Counter(
        {claims.OPEN: 1, claims.NOT_RUN: 1, claims.HELD: 1}
    )
    assert standings.counted(EXPERIMENT, "part", results, "cpu")[claims.NOT_RUN] == 3


def test_what_is_not_complete_says_so():
    done = [{"role": "final", "method": "l2", "seed": seed} for seed in range(3)]
    some = CPU | {"complete": False, "missing": 9, "cells": done}
    last = standings.table(EXPERIMENT, "part", {"cpu": some})[-2]
    assert last.startswith("- cpu: 3 of 12 cells; missing: ")
    assert "(3 seeds)" in last and "weight decay (L2)" not in last
