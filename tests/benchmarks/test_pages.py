"""The pages of results."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

import benchmarks.__main__ as cli
from benchmarks import pages, record, report

ROOT = pathlib.Path(__file__).parents[2]
COMPARED = [
    f
    for f in sorted(pages.FOLDER.glob("results/*.json"))
    if not f.name.startswith(("cost", "speed", "theory"))
]


def test_the_pages_show_the_committed_results(monkeypatch, capsys):
    assert cli.main(["pages", "--check"]) == 0
    monkeypatch.setattr(pages, "stale", lambda: [pages.FOLDER / "RESULTS.md"])
    assert cli.main(["pages", "--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "RESULTS.md" in line and "python -m benchmarks pages" in line


def test_pages_are_written_from_results_alone(tmp_path):
    (tmp_path / "results").mkdir()
    assert {page.name for page in pages.stale(tmp_path)} == {
        "RESULTS.md",
        "COSTS.md",
        "SPEED.md",
    }
    stems = ("digits-noise40", "weissi-table1-cpu-cnn", "theory-figure4", "cost-cpu")
    for stem in stems:
        shutil.copy(pages.FOLDER / f"results/{stem}.json", tmp_path / "results")
    pages.update(tmp_path)
    assert pages.stale(tmp_path) == []
    results = (tmp_path / "RESULTS.md").read_text()
    assert re.findall(r"^#{3,4} (.*)$", results, re.M) == [
        "digits-noise40",
        "weissi-table1 cnn",
        "weissi-table1-cpu-cnn",
        "theory-figure4",
    ]
    costs = (tmp_path / "COSTS.md").read_text()
    assert re.findall(r"^## (.*)$", costs, re.M) == ["cost-cpu"]
    (tmp_path / "COSTS.md").write_text(costs + "more\n")
    assert pages.stale(tmp_path) == [tmp_path / "COSTS.md"]


def test_unfinished_results_are_on_no_page(tmp_path):
    result = json.loads((pages.FOLDER / "results/digits-noise40.json").read_text())
    del result["missing"], result["cells"]  # as files once were
    record.save(result | {"complete": False}, tmp_path / "results/digits-noise40.json")
    with pytest.raises(ValueError, match=r"noise40\.json must be complete"):
        pages.update(tmp_path)


def unfinished(scale="full", **settings):
    """A comparison of which two cells are there, as a runner leaves it."""
    file = pages.FOLDER / "results/weissi-table1-cpu-mlp.json"
    result = json.loads(file.read_text())
    kept = result["results"]["weissi_paper"]
    for metric in kept["metrics"].values():
        metric |= {"seeds": metric["seeds"][:2]}
    cells = [
        {"role": "final", "method": "weissi_paper", "seed": seed} for seed in range(2)
    ]
    result |= {"complete": False, "missing": 46, "cells": cells}
    result["experiment"]["scale"] = scale
    result["settings"] |= settings
    return result | {"results": {"weissi_paper": kept}}


def test_a_table_that_lacks_cells_says_which(tmp_path):
    out = tmp_path / "results/weissi-table1-full-mlp.json"
    record.save(unfinished(), out)
    half = unfinished(dtype="bfloat16")
    record.save(half, out.with_stem("weissi-table1-full-mlp-bfloat16"))
    pages.update(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    lacking = (
        "2 of 48 cells; missing: weight decay, as in the paper (5 seeds), WEISSI, "
    )
    assert f"\n- full: {lacking}" in text
    assert f"\n- full, bfloat16: {lacking}" in text
    assert "\n- Claims on what has not been run or measured yet: 8.\n" in text
    assert "| full, bfloat16: last epochs / FGSM / PGD / all attacks |" in text
    assert "- weissi-table1: mlp-adversarial, cnn, cnn-adversarial\n" in text


def test_results_of_tables_that_are_no_longer_repeated_stay(tmp_path):
    result = unfinished() | {"experiment": {"name": "old", "part": "a", "scale": "cpu"}}
    record.save(result, tmp_path / "results/old-cpu-a.json")
    result["experiment"] = {"name": "weissi-table1", "part": "old", "scale": "cpu"}
    record.save(result, tmp_path / "results/weissi-table1-cpu-old.json")
    pages.update(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "\n## Old\n\n### old-cpu-a\n" in text
    assert "\n### weissi-table1-cpu-old\n" in text


def test_each_table_is_there_once():
    text = (pages.FOLDER / "RESULTS.md").read_text()
    for file in COMPARED:
        assert len(re.findall(f"^#{{3,4}} {file.stem}$", text, re.M)) == 1
        assert text.count(report.markdown(record.load(file))) == 1
        assert text.count(f"](results/{file.name})") == 1
        assert text.count(f"](#{file.stem}): ") == 1


def test_contents_are_in_the_order_of_the_sections():
    text = (pages.FOLDER / "RESULTS.md").read_text()
    stems = {file.stem for file in COMPARED}
    listed = re.findall(r"^  - \[(\S+)\]", text, re.M)
    headings = re.findall(r"^#{3,4} (\S+)$", text, re.M)
    assert [s for s in headings if s in stems] == [s for s in listed if s in stems]


def test_the_lead_that_nine_trials_gave_is_told_from_the_file_of_forty():
    result = record.load(pages.FOLDER / f"results/{pages.SETTLED_BY}.json")
    last = [result["results"][n]["metrics"]["last"] for n in ("binary", "weight_decay")]
    told = pages._forty({pages.SETTLED_BY: result})
    assert all(f"{100 * m['mean']:.1f} ± " in told for m in last)
    assert told in (pages.FOLDER / "RESULTS.md").read_text()
    assert pages._forty({}) == ""


def test_too_few_trials_are_told_under_each_table():
    text = (pages.FOLDER / "RESULTS.md").read_text()
    sections = dict(re.findall(r"^#{3,4} (\S+)\n(.*?)(?=^##|\Z)", text, re.M | re.S))
    for file in COMPARED:
        entries = record.load(file)["results"].values()
        tuned = [len(e["tuning"]["trials"]) for e in entries if e["tuning"]["trials"]]
        if tuned and min(tuned) < 40:
            note = f"Note: Tuned with {min(tuned)} trials a method; with fewer than 40"
            assert note in sections[file.stem]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not in a repository")
def test_every_committed_picture_is_on_a_page():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    shown = [f for f in files if f.suffix in (".md", ".ipynb") and f.is_file()]
    text = "\n".join(page.read_text() for page in shown)
    for picture in files:
        if picture.suffix == ".png" and picture.is_file():
            assert picture.name in text
