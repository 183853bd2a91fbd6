"""A comparison's runs come in the order in which its table needs them."""

import dataclasses

import numpy as np
import pytest

from benchmarks.cells import SOURCE_SEED, TUNING_SEED, Plan, Run, together
from benchmarks.methods import METHODS
from benchmarks.settings import Settings

SPACE = {"learning_rate": (1e-3, 1e-2), "strength": (1e-4, 1e-1)}


def plan(**given):
    asked = {"methods": ("l2", "binary_paper"), "trials": 2, "seeds": 2}
    settings = Settings.of("digits", tuning_seeds=2, **asked | given)
    return Plan(settings, {"l2": SPACE})


def cell(run, score=0.5):
    """A cell of a run, as far as plans look at it."""
    metrics = {"score": score, "tested": score / 2}
    return {**run._asdict(), "metrics": metrics}


def test_one_seed_of_every_row_comes_first_and_tuning_before_its_finals():
    order, cells = [], []
    while missing := plan().missing(cells):
        order.append((missing[0].role, missing[0].method, missing[0].seed))
        cells.append(cell(missing[0]))
    trials = [("trial", "l2", TUNING_SEED + seed) for seed in (0, 1, 0, 1)]
    assert order == [
        ("source", "none", SOURCE_SEED),
        ("final", "binary_paper", 0),
        *trials,
        ("final", "l2", 0),
        ("final", "l2", 1),
        ("final", "binary_paper", 1),
    ]


def test_what_is_left_counts_runs_whose_settings_are_not_known_yet():
    whole = plan()
    assert whole.count([]) == 1 + 2 + 4 + 2 == len(whole.missing([])) + 2
    assert plan(attacked=0).count([]) == 8


def test_the_best_trial_by_its_mean_over_tuning_seeds_is_chosen():
    whole = plan()
    runs = whole.trials("l2")
    scores = [0.9, 0.2, 0.5, 0.7]  # of two seeds each
    cells = [cell(run, score) for run, score in zip(runs, scores, strict=True)]
    assert whole.chosen("l2", cells[:-1]) is None
    assert whole.chosen("l2", cells) == runs[2].hyperparameters
    tried = whole.tuning("l2", cells)
    assert [trial["score"] for trial in tried] == [0.55, 0.6]
    assert [trial["tested"] for trial in tried] == [0.275, 0.3]


def test_a_trial_that_diverges_is_not_chosen():
    whole = plan()
    runs = whole.trials("l2")
    scores = [None, 0.9, 0.1, 0.1]
    cells = [cell(run, 0.0) for run in runs]
    for made, score in zip(cells, scores, strict=True):
        made["metrics"] = {"score": score, "tested": score}
    assert whole.chosen("l2", cells) == runs[2].hyperparameters
    assert whole.tuning("l2", cells)[0]["score"] is None


def test_runs_of_one_program_are_trained_together(monkeypatch):
    alike = dataclasses.replace(METHODS["binary_paper"], like="l2")
    monkeypatch.setitem(METHODS, "binary_paper", alike)
    runs = [
        Run("final", "binary_paper", {}, 0),
        Run("trial", "l2", {}, 0, 0),
        Run("final", "none", {}, 0),
        Run("final", "l2", {}, 0),
        Run("final", "binary_paper", {}, 1),
    ]
    assert together(runs, None) == [runs[0], runs[3], runs[4]]
    assert together(runs, 2) == [runs[0], runs[3]]


def test_machines_may_differ_in_the_last_digit():
    """As their exponential functions do, by which spaces are filled."""
    whole, cells = plan(), []
    while missing := whole.missing(cells):
        run = missing[0]
        next_to = {k: float(np.nextafter(v, 1)) for k, v in run.hyperparameters.items()}
        cells.append(cell(run._replace(hyperparameters=next_to)))
    assert len(cells) == 9 and whole.count(cells) == 0


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_cells_come_back_as_the_runs_that_they_are_of(kept):
    whole, cells = plan(), []
    while missing := whole.missing(cells):
        cells.append(cell(missing[0]))
    left = {run.key() for run in whole.missing(cells[:kept])}
    assert not left & {Run.of(made).key() for made in cells[:kept]}
    assert whole.missing(cells) == [] and whole.count(cells) == 0
