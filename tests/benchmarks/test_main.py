"""The command line, from end to end."""

import contextlib
import dataclasses
import errno
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types

import datasets
import numpy as np
import pytest

import benchmarks.__main__ as cli
from benchmarks import compare, record
from benchmarks.settings import Settings

ROOT = pathlib.Path(__file__).parents[2]
PLOTS = ("accuracy", "energy", "gradients", "strength", "weights")


COMPARED = ["none", "volumization", "weissi"]


SMALL = ["--epochs", "2", "--trials", "2", "--seeds", "2", "--tuning-seeds", "1"]
COMMAND = ["compare", *SMALL, "--methods", ",".join(COMPARED)]


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
    assert list(tmp_path.iterdir()) == []  # there is nothing that could be kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of a small comparison by the command line, and what was printed."""
    out = tmp_path_factory.mktemp("compare")
    command = [*COMMAND, "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    (file,) = out.glob("*.json")
    return file, printed.getvalue()


def test_compare_from_end_to_end(finished):
    file, printed = finished
    files = [file, *(file.with_name(f"{file.stem}-{plot}.png") for plot in PLOTS)]
    assert set(file.parent.iterdir()) == set(files)
    assert re.fullmatch(r"digits-noise40-[0-9a-f]{8}", file.stem)
    result = record.load(file)
    assert result["complete"] and result["format"] == record.FORMAT
    assert "commit" in result
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
    assert "Highest accuracy in the last epochs: " in printed
    assert "Highest accuracy under all attacks: " in printed
    assert "Tuned with 2 trials a method" in printed


def test_table_and_plots_come_from_the_json_alone(finished, tmp_path, capsys):
    file, printed = finished
    assert cli.main(["report", str(file), "--out", str(tmp_path / "new")]) == 0
    again = capsys.readouterr().out
    assert again.split("wrote")[0] == printed.split("wrote")[0]
    for plot in (f"{file.stem}-{plot}.png" for plot in PLOTS):
        drawn = (tmp_path / "new" / plot).read_bytes()
        assert drawn == file.with_name(plot).read_bytes()


def test_the_recorded_command_repeats_the_result(finished, tmp_path):
    file, _ = finished
    first = json.loads(file.read_text())
    words = first["command"].split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    assert cli.main([*words[3:], "--out", str(tmp_path)]) == 0
    second = json.loads((tmp_path / file.name).read_text())
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
    (file,) = tmp_path.glob("*.json")
    assert ".partial-" in file.name
    result = json.loads(file.read_text())
    assert list(result["results"]) == ["none"] and not result["complete"]
    printed = capsys.readouterr().out
    assert "Interrupted" in printed and str(file) in printed
    assert file.with_name(f"{file.stem}-accuracy.png").is_file()
    assert len(list(tmp_path.iterdir())) == 1 + len(PLOTS)
    assert cli.main(["report", str(record.complete_of(file))]) == 2
    error = capsys.readouterr().err
    assert "only what a run has finished of it" in error and str(file) in error


@pytest.fixture
def standing(finished, tmp_path, monkeypatch):
    """A complete result, and runs of its settings that take no time to come to it."""
    file, _ = finished
    results = json.loads(file.read_text())["results"]
    monkeypatch.setattr(compare, "_source", lambda *_: None)
    monkeypatch.setattr(compare, "tune", lambda name, *_: results[name]["tuning"])
    monkeypatch.setattr(compare, "final", lambda name, *_: (dict(results[name]), []))
    monkeypatch.setattr(compare, "step_times", lambda *_: {})
    return pathlib.Path(shutil.copy(file, tmp_path))


def test_an_interrupted_rerun_leaves_the_complete_result(standing, monkeypatch, capsys):
    before, whole = standing.read_bytes(), compare.final

    def interrupted(name, *args):
        if name == "weissi":
            raise KeyboardInterrupt
        return whole(name, *args)

    monkeypatch.setattr(compare, "final", interrupted)
    assert cli.main([*COMMAND, "--out", str(standing.parent)]) == 130
    printed = capsys.readouterr().out
    assert standing.read_bytes() == before
    (left,) = record.partials(standing)
    assert list(record.load(left)["results"]) == ["none", "volumization"]
    assert "Interrupted" in printed and f"The result is in {left}" in printed
    assert f"{standing}, which is complete, stands as it was." in printed
    assert cli.main(["report", str(standing), "--out", str(standing.parent)]) == 0
    printed = capsys.readouterr().out
    assert "Interrupted" not in printed.split("wrote")[0]
    assert f"{left} is of another run, interrupted or still going on." in printed


def test_a_rerun_replaces_the_result_when_it_is_complete(standing):
    old = json.loads(standing.read_text())
    assert cli.main([*COMMAND, "--out", str(standing.parent)]) == 0
    new = json.loads(standing.read_text())
    assert old["relative_step_time"] and new == old | {"relative_step_time": {}}
    assert not record.partials(standing)


def test_a_killed_rerun_leaves_the_complete_result(finished, tmp_path):
    old = pathlib.Path(shutil.copy(finished[0], tmp_path))
    before = old.read_bytes()
    rerun = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *COMMAND, "--out", tmp_path],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while not record.partials(old):
            assert rerun.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        rerun.kill()
        rerun.wait()
    assert old.read_bytes() == before
    (left,) = record.partials(old)
    assert record.load(left)["complete"] is False


def test_a_disk_that_fills_up_ends_the_run_with_one_line(standing, monkeypatch, capsys):
    """What was written of this run before, and the complete result, stay."""
    before, write, written = standing.read_bytes(), record.write, []

    def filling(content, out):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        written.append(out)
        write(content, out)

    monkeypatch.setattr(record, "write", filling)
    assert cli.main([*COMMAND, "--out", str(standing.parent)]) == 2
    assert standing.read_bytes() == before
    (left,) = record.partials(standing)
    assert list(record.load(left)["results"]) == ["none"]
    *_, line = capsys.readouterr().err.splitlines()  # after that with the devices
    assert "No space left on device" in line and str(left) in line


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    tmp_path, monkeypatch, capsys
):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(record, "write", denied)
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", denied)
    for command in (["compare"], ["cost"], ["speed"]):
        assert cli.main([*command, "--out", str(tmp_path)]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert "Permission denied" in line and str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_no_part_of_an_experiment_begins_where_another_cannot(
    tmp_path, monkeypatch, capsys
):
    """Settings of a table's last part have changed since its file was written."""
    committed = ROOT / "benchmarks/results/weissi-table1-cpu-cnn-adversarial.json"
    result = json.loads(committed.read_text())
    result["settings"]["trials"] = 7
    record.save(result, tmp_path / committed.name)
    monkeypatch.setattr(cli, "_compare", None)
    assert cli.main(["experiment", "weissi-table1", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{committed.name} holds another comparison, whose trials is 7" in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["cost", "--side", "0"], "--side: must be a whole number of at least 1"),
        (["cost", "--side", "-1"], "but is -1"),
        (["cost", "--rounds", "0"], "--rounds: must be a whole number of at least 1"),
        (["cost", "--rounds", "many"], "but is many"),
        (["cost", "--out", "FILE"], "--out: must be a folder, but FILE is a file"),
        (["speed", "--parts", "bits,x"], "parts must be among .*, not x"),
        (["speed", "--sizes", "huge"], "--sizes: invalid choice: 'huge'"),
        (["speed", "--target", "v5e"], "--target: invalid choice: 'v5e'"),
        (["speed", "--target", "h100", "--sizes", "cpu"], "not of a --target"),
        (
            ["speed", "--target", "h100", "--parts", "bits"],
            "parts for a --target must be among training, growth, not bits",
        ),
        (["compare", "--out", "FILE/below"], "--out: must be a folder, but FILE is"),
        (["report", "FILE", "--out", "FILE"], "--out: must be a folder, but FILE is"),
        (["compare", "--dataset", "imagenet"], "dataset.* 'imagenet'"),
        (["compare", "--epsilon", "-1"], "epsilon must be at least 0 .*, but is -1.0"),
        (["compare", "--epsilon", "nan"], "epsilon must be .* but is nan"),
        (["compare", "--epsilon", "inf"], "epsilon must be .* but is inf"),
        (["compare", "--adversarial", "inf"], "adversarial must be .* but is inf"),
        (["compare", "--seeds", "-3"], "seeds must be at least 1 and .*, but is -3"),
        (["compare", "--seeds", "1.5"], "--seeds: invalid int value: '1.5'"),
        (["compare", "--methods", "none,magic"], "methods must be .* not magic"),
        (["compare", "--mapping", "both"], "--mapping: invalid choice: 'both'"),
        (["experiment", "table9"], "name: invalid choice: 'table9'"),
        (["experiment", "quantization", "--parts", "x"], "parts must be .* not x"),
        (["report", "FILE"], "FILE must be JSON"),
        (["report", "FILE/below"], "FILE/below"),
        (["report", "FILE.json"], "No such file or directory: 'FILE.json'"),
        (["show"], "invalid choice: 'show'"),
        ([], "required"),
    ],
)
def test_bad_arguments_are_told_in_one_line(words, named, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("no result")
    assert cli.main([word.replace("FILE", str(file)) for word in words]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert re.search(named.replace("FILE", re.escape(str(file))), line)
    assert not output.out and list(tmp_path.iterdir()) == [file]


def test_an_interrupt_of_any_command_ends_it_with_130(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "load", interrupted)
    assert cli.main(["report", "a.json"]) == 130


def test_costs_are_reported_like_comparisons(tmp_path, monkeypatch, capsys):
    from benchmarks import cost

    committed = ROOT / "benchmarks/results/cost-cpu.json"
    assert cli.main(["report", str(committed)]) == 0
    result = json.loads(committed.read_text())
    time = result["optimizers"]["chain(adam, volumize)"]["relative_time"]
    assert f"| `chain(adam, volumize)` | {time:.2f} |" in capsys.readouterr().out
    monkeypatch.setattr(cost, "run", lambda side, rounds: result)
    monkeypatch.setattr(cli.jax, "default_backend", lambda: "cpu")
    for words in ([], ["--side", "8"], ["--rounds", "9"]):
        assert cli.main(["cost", *words, "--out", str(tmp_path)]) == 0
    names = {"cost-cpu.json", "cost-cpu-side8.json", "cost-cpu-rounds9.json"}
    assert {f.name for f in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("backend", "model", "asked", "mapping"),
    [
        ("cpu", "mlp", None, "devices"),
        ("gpu", "mlp", None, "vmap"),
        ("gpu", "cnn", None, "devices"),
        ("cpu", "mlp", "vmap", "vmap"),
        ("gpu", "cnn", "vmap", "vmap"),
        ("gpu", "mlp", "devices", "devices"),
    ],
)
def test_dense_networks_are_mapped_at_once_off_cpu(
    backend, model, asked, mapping, monkeypatch
):
    fake = types.SimpleNamespace(default_backend=lambda: backend)
    monkeypatch.setattr(cli, "jax", fake)
    settings = Settings.of("digits", model=model)
    assert cli._mapped(settings, asked) == dataclasses.replace(
        settings, mapping=mapping
    )


def test_each_core_is_a_device(monkeypatch):
    devices = {}
    config = types.SimpleNamespace(update=devices.__setitem__)
    monkeypatch.setattr(cli, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(cli, "_cores", lambda: 3)
    cli._spread_over_cores()
    assert devices == {"jax_num_cpu_devices": 3}


def test_missing_data_says_what_to_do(tmp_path, monkeypatch, capsys):
    command = ["compare", "--dataset", "cifar10", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--data-dir", str(tmp_path)]) == 2
    assert "train.parquet" in capsys.readouterr().err

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert cli.main(command) == 2
    assert "--data-dir DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("deployed",), {}),
        (("settings", "sensitivity"), 5),
        (("settings", "augment"), 5),
        (("settings", "noise"), 10**400),
        (("results", "none", "test_accuracy"), []),
        (("results", "none", "test_accuracy"), ["a"]),
        (("results", "none", "tuning", "at_edge"), [1]),
    ],
)
def test_a_damaged_value_is_told_with_its_file(path, value, tmp_path, capsys):
    result = json.loads((ROOT / "benchmarks/results/digits-noise40.json").read_text())
    inner = result
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(result))
    assert cli.main(["report", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file} must be as")


def test_empty_names_are_no_names(tmp_path, capsys):
    """An empty list of augmentations is that of the defaults, not one of its own."""
    empty = ["--augment", "", "--deploy", "", "--methods", ""]
    assert cli.main(["compare", *empty, "--out", str(tmp_path)]) == 2
    assert "methods must be one or more" in capsys.readouterr().err
