"""Tables and sentences from results."""

import json
import pathlib

import pytest

import benchmarks.__main__ as cli
from benchmarks import report
from benchmarks.experiments import EXPERIMENTS

PLOTS = ("accuracy", "energy", "gradients", "strength", "weights")


ROOT = pathlib.Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["readme", "--check"]) == 0
    blocks, stale = tuple(report.BLOCKS), tmp_path / "README.md"
    pair = "<!-- {0}:begin -->\nSTALE\n<!-- {0}:end -->\nb\n".format
    stale.write_text(f"a\n{''.join(map(pair, blocks))}c\n")
    assert not report.update_readme(stale, check=True)
    assert not report.update_readme(stale)
    assert report.update_readme(stale, check=True)
    text = stale.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\nc\n")
    assert text.count("\nb\n") == len(blocks)
    assert "STALE" not in text


COMMITTED = [f for f in sorted(report.RESULTS.glob("*.json")) if "cost" not in f.name]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.stem)
def test_committed_results_are_whole_and_have_their_plots(file):
    result = json.loads(file.read_text())
    mark = result.get("experiment") or {"name": None}
    assert result["complete"]
    fewer = {"enc-tables": 3, "quantization": 3}
    one = mark.get("part") == "distributions"  # of weights, one network each
    assert result["settings"]["seeds"] >= (1 if one else fewer.get(mark["name"], 5))
    assert "/" not in result["command"].replace("//", "")
    shown = [*PLOTS, *["sensitivity"] * bool(result["settings"].get("sensitivity"))]
    quantized = any("level_distance" in e for e in result["results"].values())
    shown += ["levels"] * quantized
    for plot in shown:
        assert file.with_name(f"{file.stem}-{plot}.png").is_file()
    if mark["name"]:
        given = EXPERIMENTS[mark["name"]].settings(mark["part"], mark["scale"])
        kept = {name: result["settings"][name] for name in given}
        assert kept == json.loads(json.dumps(given))


def test_the_verdict_is_honest_about_ties_and_edges():
    def entry(label, last, std, edge=()):
        metric = {"mean": last, "std": std}
        return {
            "label": label,
            "warnings": [],
            "metrics": {"last": metric, "worst": metric},
            "tuning": {"at_edge": list(edge)},
        }

    result = {
        "complete": True,
        "results": {"a": entry("A", 0.8, 0.02), "b": entry("B", 0.81, 0.01, ["v"])},
    }
    lines = report.verdict(result)
    assert lines[0].startswith("Generalizes best: B (81.0 %), then A (80.0 %)")
    assert "within one standard deviation" in lines[0]
    assert "edge of its range in v" in lines[2]
    result["results"]["b"]["metrics"]["last"]["mean"] = 0.9
    assert "5.0 standard deviations" in report.verdict(result)[0]
    result["results"]["a"]["warnings"] = ["Seed 0: Gradients are masked."]
    assert "Warning: A: Seed 0: Gradients are masked." in report.verdict(result)
