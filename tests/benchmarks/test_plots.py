"""Plots from results."""

import pytest

from benchmarks import pages, plots, record

ALWAYS = ["accuracy", "energy", "gradients", "strength", "weights"]


@pytest.mark.parametrize(
    ("stem", "also"),
    [
        ("enc-tables-cpu-tuned", ["sensitivity"]),
        ("quantization-cpu-mnist", ["levels", "settling"]),
    ],
)
def test_all_plots_are_drawn_from_committed_results(stem, also, tmp_path):
    result = record.load(pages.FOLDER / f"results/{stem}.json")
    drawn = plots.draw(result, tmp_path / f"{stem}.json")
    assert sorted(drawn) == sorted(tmp_path.iterdir())
    names = {tmp_path / f"{stem}-{plot}.png" for plot in (*ALWAYS, *also)}
    assert set(drawn) == names
    for picture in drawn:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_a_run_without_results(tmp_path):
    result = {"results": {}, "settings": {}}
    assert plots.draw(result, tmp_path / "a.json") == []
    assert list(tmp_path.iterdir()) == []


def metric(*seeds):
    return {"seeds": [*seeds], "mean": sum(seeds) / len(seeds), "std": 0.01}


def entry(trials=(), **chosen):
    """What plots need of a method that was not attacked."""
    names = ("score", "tested")
    return {
        "label": "A",
        "tuning": {
            "trials": [dict(zip(names, t, strict=True)) for t in trials],
            "chosen": chosen,
        },
        "metrics": {"best": metric(0.8, 0.9), "last": metric(0.7, 0.8)},
        "test_accuracy": [[0.5, 0.7], [0.6, 0.8]],
        "log_energy": [[1.0, 2.0]] * 2,
        "complexity": [[1.0, 2.0]] * 2,
        "weights": {"['kernel']": {"counts": [1, 2], "edges": [0, 1, 2], "wall": None}},
    }


def compared(**entries):
    settings = {"dataset": "mnist", "noise": 0.8, "model": "mlp", "seeds": 2}
    settings |= {"adversarial": 0.0, "epsilon": 0.03, "epsilons": [0.05, 0.01]}
    data = {"source": "files"}
    return {"settings": settings, "data": data, "results": entries}


def vol(v, alpha, rate=1e-4):
    return entry(learning_rate=rate, v=v, one_minus_alpha=1 - alpha)


def test_grids_and_trials_are_drawn_where_there_are_some(tmp_path):
    places = [(0.25, 0.5), (0.25, 0.99), (1, 0.5)]
    methods = {f"vol_{v}_{alpha}": vol(v, alpha) for v, alpha in places}
    result = compared(**methods, again=vol(1, 0.5, rate=2e-4), none=entry())
    assert {alpha: [*line] for alpha, line in plots._grid(result).items()} == {
        0.5: [0.25, 1],
        0.99: [0.25],
    }
    assert plots._grid(result)[0.5][1] is methods["vol_1_0.5"]
    out = tmp_path / "a.json"
    del result["results"]["again"]["weights"]  # as where the first seed is missing
    tuned = entry([(0.5, 0.6), (0.7, 0.65)], v=0.3, one_minus_alpha=0.1)
    drawn = plots.draw(result | {"results": result["results"] | {"t": tuned}}, out)
    names = ["accuracy", "energy", "weights", "settling", "grid", "grid_curves"]
    assert [p.name for p in drawn] == [f"a-{name}.png" for name in names]
    for picture in drawn:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_accuracies_within_several_radii_are_points_of_all_seeds():
    known = entry()
    known["metrics"] |= {"fgsm": metric(0.5, 0.7), "fgsm 0.05": metric(0.1, 0.3)}
    radii, means, deviations = plots._radii(compared(a=known), known, "fgsm")
    assert radii.tolist() == [0.03, 0.05]
    assert means.tolist() == pytest.approx([60, 20])
    assert deviations.tolist() == [1, 1]
    assert plots._radii(compared(a=known), known, "pgd") == []


@pytest.mark.parametrize(("fixed", "left"), [(8, 10), (9, 2), (0, 2)])
def test_tuned_methods_are_left_where_colours_do_not_suffice(fixed, left):
    tuned = dict.fromkeys(("a", "b"), entry(trials=[(0.5, 0.4)]))
    result = compared(**{f"at {n}": entry() for n in range(fixed)}, **tuned)
    assert len(plots._drawn(result)) == left
    alone = compared(**{f"at {n}": entry() for n in range(11)})
    assert len(plots._drawn(alone)) == 11
