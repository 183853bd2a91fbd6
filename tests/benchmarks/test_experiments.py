"""Tables of papers can be run again."""

import dataclasses
import json

import numpy as np
import pytest
from parquet import write_parquet

import benchmarks.__main__ as cli
from benchmarks import compare, models, networks, report, train
from benchmarks.experiments import EXPERIMENTS
from benchmarks.settings import Settings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_can_be_run_and_have_the_papers_numbers(name):
    experiment = EXPERIMENTS[name]
    assert set(experiment.paper) == set(experiment.parts)
    for scale in experiment.scales:
        for part in experiment.parts:
            settings = Settings.of(**experiment.settings(part, scale))
            assert f"--dataset {settings.dataset}" in settings.command()
            assert ("--augment flip_crop" in settings.command()) == (
                name == "enc-tables"
            )
    for row in (r for rows in experiment.paper.values() for r in rows.values()):
        assert set(row) <= set(report.COLUMNS) and all(
            9 < v < 100 for v in row.values()
        )


def untimed(monkeypatch):
    """Without the times of steps, for which all is compiled once more."""
    monkeypatch.setattr(compare, "step_times", lambda *args: dict.fromkeys(args[2], 1))


def test_an_experiment_from_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = {"dataset": "digits", "epochs": 1, "trials": 1, "seeds": 2, "model": "mlp"}
    tiny |= {"examples": 200, "attacked": 20, "restarts": 2, "attack_steps": 2}
    tiny |= {"methods": ("weissi_paper",)}
    untimed(monkeypatch)
    experiment = EXPERIMENTS["weissi-table1"]
    small = dataclasses.replace(experiment, scales={"cpu": tiny}, resized={})
    monkeypatch.setitem(EXPERIMENTS, "weissi-table1", small)
    command = ["experiment", "weissi-table1", "--parts", "mlp-adversarial"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    files = sorted(f.name for f in tmp_path.glob("*.json"))
    stem = "weissi-table1-cpu-mlp"
    assert files == [f"{stem}-adversarial.json"]
    result = json.loads((tmp_path / f"{stem}-adversarial.json").read_text())
    assert result["settings"]["adversarial"] == 0.01
    fixed = result["results"]["weissi_paper"]["tuning"]
    assert fixed["trials"] == [] and fixed["chosen"]["energy"] == 1e-6
    table = report.markdown(result)
    assert "| *paper: WEISSI* | |  | *98.1* | *95.3* | *95.2* |  | |" in table
    assert "The paper trains for 60 epochs" in table
    assert cli.main(["experiment", "weissi-table1", "--parts", "x"]) == 2
    assert "parts must be among mlp" in capsys.readouterr().err


def test_a_table_of_sensitivity_from_end_to_end(tmp_path, monkeypatch):
    """On images as JPEG and in bfloat16, which no title may hide."""
    write_parquet(tmp_path / "cifar10", "img", (32, 32, 3), (100, 30), "JPEG")
    tiny = networks.NormMLP((8,), 10)
    monkeypatch.setitem(
        models.MODELS,
        "tiny",
        models.Model(
            make=lambda classes: tiny, output="Dense_1/kernel", normalized=True
        ),
    )
    small = {"model": "tiny", "epochs": 2, "seeds": 2, "batch": 20, "attacked": 10}
    small |= {"restarts": 2, "attack_steps": 2, "sensitivity": 20, "examples": 60}
    small |= {"methods": ("enc_learnt",)}
    untimed(monkeypatch)
    experiment = EXPERIMENTS["enc-tables"]
    changed = dataclasses.replace(experiment, scales={"cpu": small})
    monkeypatch.setitem(EXPERIMENTS, "enc-tables", changed)
    command = ["experiment", "enc-tables", "--parts", "tables", "--out", str(tmp_path)]
    command += ["--data-dir", str(tmp_path), "--dtype", "bfloat16"]
    assert cli.main(command) == 0
    stem = "enc-tables-cpu-tables-bfloat16"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["data"]["source"].endswith("encoded as JPEG")
    assert (tmp_path / f"{stem}-sensitivity.png").is_file()
    for entry in result["results"].values():
        assert np.shape(entry["training_accuracy"]) == (2, 2)
        for f in train.SENSITIVE:
            curves = np.array(entry[f"gbr of {f}"])
            last = entry["metrics"][f"gbr of {f}"]["seeds"]
            np.testing.assert_array_equal(curves[:, -1], last)
            assert np.all(curves > 0)
    text = report.markdown(result)
    assert "**CIFAR-10 (as JPEG), tiny, bfloat16, flip_crop, 2 seeds" in text
    assert "| all attacks | GBR (logits) | GBR (probabilities) |" in text
    assert "| *paper: ImageNet, eq. 22* | |  | *77.4* |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
