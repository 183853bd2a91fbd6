"""The command line, from end to end."""

import contextlib
import io
import json
import re

import datasets
import numpy as np
import pytest

import benchmarks.__main__ as cli
from benchmarks import compare

PLOTS = ("accuracy", "energy", "gradients", "strength", "weights")


COMPARED = ["none", "volumization", "weissi"]


SMALL = ["--epochs", "2", "--trials", "2", "--seeds", "2", "--tuning-seeds", "1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "5000"], "batch must be at most 1077"),
        (["--sensitivity", "5000"], "sensitivity must be at most 1077"),
        (["--augment", "cutout"], r"augment takes images .*, not examples of \(64,\)"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(given, message, tmp_path, capsys):
    assert cli.main(["compare", *given, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison by the command line, and what it printed."""
    out = tmp_path_factory.mktemp("compare")
    command = ["compare", *SMALL, "--methods", ",".join(COMPARED), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    return out, printed.getvalue()


def test_compare_from_end_to_end(finished):
    out, printed = finished
    stem = "digits-noise40"
    files = [f"{stem}.json", *(f"{stem}-{plot}.png" for plot in PLOTS)]
    assert {f.name for f in out.iterdir()} == set(files)
    result = json.loads((out / f"{stem}.json").read_text())
    assert result["complete"]
    assert list(result["results"]) == COMPARED
    assert not set(result["fixed"]["tuning_seeds"]) & set(result["fixed"]["seeds"])
    for name, entry in result["results"].items():
        assert len(entry["tuning"]["trials"]) == 2
        best = max(entry["tuning"]["trials"], key=lambda t: t["score"])
        assert best["hyperparameters"] == entry["tuning"]["chosen"]
        curves = np.array(entry["test_accuracy"])
        assert curves.shape == (2, 2)
        metrics = {k: m["seeds"] for k, m in entry["metrics"].items()}
        np.testing.assert_array_equal(metrics["best"], curves.max(1))
        np.testing.assert_allclose(metrics["last"], curves[:, -1:].mean(1))
        for metric, values in metrics.items():
            summary = entry["metrics"][metric]
            assert summary["mean"] == pytest.approx(np.mean(values), abs=1e-5)
            assert summary["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        assert np.all(np.array(metrics["pgd"]) <= np.array(metrics["fgsm"]) + 0.01)
        assert np.all(np.array(metrics["fgsm"]) < curves[:, -1])
        for attack in ("fgsm", "pgd", "restarts", "margin", "transfer"):
            assert np.all(np.array(metrics["worst"]) <= np.array(metrics[attack]))
        assert np.shape(entry["log_energy"]) == np.shape(entry["complexity"]) == (2, 2)
        assert sum(entry["gradients"]["counts"]) == 2 * 450
        at = entry["strength"]["epsilon"].index(0.1)
        assert entry["strength"]["worst"][at] <= metrics["worst"][0] + 0.01
        assert entry["strength"]["worst"] == sorted(entry["strength"]["worst"])[::-1]
        assert entry["label"].split()[0] in printed
        for layer in entry["weights"].values():
            assert (layer["wall"] is not None) == (name == "volumization")
            assert sum(layer["counts"]) in (64 * 256, 256 * 10)
    assert result["relative_step_time"]["none"] == 1.0
    assert "Generalizes best" in printed and "Resists attack best" in printed


def test_table_and_plots_come_from_the_json_alone(finished, tmp_path, capsys):
    out, printed = finished
    stem = "digits-noise40"
    assert cli.main(["report", str(out / f"{stem}.json"), "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert again.split("wrote")[0] == printed.split("wrote")[0]
    for plot in (f"{stem}-{plot}.png" for plot in PLOTS):
        assert (tmp_path / plot).read_bytes() == (out / plot).read_bytes()


def test_the_recorded_command_repeats_the_result(finished, tmp_path):
    out, _ = finished
    first = json.loads((out / "digits-noise40.json").read_text())
    words = first["command"].split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    assert cli.main([*words[3:], "--out", str(tmp_path)]) == 0
    second = json.loads((tmp_path / "digits-noise40.json").read_text())
    del first["relative_step_time"], second["relative_step_time"]
    assert first == second


def test_an_interrupt_leaves_what_is_finished(tmp_path, monkeypatch, capsys):
    whole = compare.final

    def interrupted(name, *args):
        if name == "weight_decay":
            raise KeyboardInterrupt
        return whole(name, *args)

    monkeypatch.setattr(compare, "final", interrupted)
    assert cli.main(["compare", *SMALL, "--out", str(tmp_path)]) == 130
    result = json.loads((tmp_path / "digits-noise40.json").read_text())
    assert list(result["results"]) == ["none"] and not result["complete"]
    assert "Interrupted" in capsys.readouterr().out
    assert (tmp_path / "digits-noise40-accuracy.png").is_file()
    assert not list(tmp_path.glob("*.part"))


def test_missing_data_says_what_to_do(tmp_path, monkeypatch, capsys):
    command = ["compare", "--dataset", "cifar10", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--data-dir", str(tmp_path)]) == 2
    assert "train.parquet" in capsys.readouterr().err

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert cli.main(command) == 2
    assert "--data-dir DIR" in capsys.readouterr().err
