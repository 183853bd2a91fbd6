"""Plots from results."""

import pytest

from benchmarks import pages, plots, record

ALWAYS = ["accuracy", "energy", "gradients", "strength", "weights"]


@pytest.mark.parametrize(
    ("stem", "also"),
    [("enc-tables-cpu-tuned", "sensitivity"), ("quantization-cpu-mnist", "levels")],
)
def test_all_plots_are_drawn_from_committed_results(stem, also, tmp_path):
    result = record.load(pages.FOLDER / f"results/{stem}.json")
    drawn = plots.draw(result, tmp_path / f"{stem}.json")
    assert sorted(drawn) == sorted(tmp_path.iterdir())
    names = {tmp_path / f"{stem}-{plot}.png" for plot in (*ALWAYS, also)}
    assert set(drawn) == names
    for picture in drawn:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_a_run_without_results(tmp_path):
    result = {"results": {}, "settings": {}}
    assert plots.draw(result, tmp_path / "a.json") == []
    assert list(tmp_path.iterdir()) == []
