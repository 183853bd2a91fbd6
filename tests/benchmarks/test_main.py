"""The command line, from end to end."""

import contextlib
import dataclasses
import errno
import io
import json
import pathlib
import re
import types

import datasets
import instant
import numpy as np
import pytest
import quick

import benchmarks.__main__ as cli
from benchmarks import checkpoints, plots, record
from benchmarks.experiments import EXPERIMENTS, Experiment
from benchmarks.settings import Settings

pytestmark = quick.everything

ROOT = pathlib.Path(__file__).parents[2]
PLOTS = ("accuracy", "energy", "gradients", "settling", "strength", "weights")
COMPARED = ["none", "volumization"]
SMALL = ["--epochs", "2", "--trials", "2", "--seeds", "2", "--tuning-seeds", "1"]
COMMAND = ["compare", *SMALL, "--methods", ",".join(COMPARED)]
# A source, and two trials and two seeds of each of both methods.
CELLS = 1 + 2 * (2 + 2)
TOGETHER = ["compare", "--coordinator"]


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
    more = ["--attacked", "40", "--attack-steps", "3", "--restarts", "2"]
    more += ["--epsilons", "0.05", "--tested", "200", "--whole", "--out", str(out)]
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        instant.on_one_device(patched)
        assert cli.main([*COMMAND, *more]) == 0
    (file,) = out.glob("*.json")
    return file, printed.getvalue()


def test_compare_from_end_to_end(finished):
    file, printed = finished
    files = [file, *(file.with_name(f"{file.stem}-{plot}.png") for plot in PLOTS)]
    assert set(file.parent.iterdir()) == set(files)
    assert re.fullmatch(r"digits-noise40-[0-9a-f]{8}", file.stem)
    result = record.load(file)
    assert result["complete"] and result["format"] == record.FORMAT
    assert len(result["cells"]) == CELLS and result["missing"] == 0
    assert result["data"] | {"train": 1347, "test": 200} == result["data"]
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
        for attack in ("fgsm", "pgd", "restarts", "margin", "transfer"):
            assert np.all(np.array(metrics["worst"]) <= np.array(metrics[attack]))
        for attack in ("fgsm", "pgd", "worst"):
            weaker = np.array(metrics[f"{attack} 0.05"])
            assert np.all(np.array(metrics[attack]) <= weaker)
        assert np.shape(entry["log_energy"]) == np.shape(entry["complexity"]) == (2, 2)
        assert sum(entry["gradients"]["counts"]) == 2 * 40
        at = entry["strength"]["epsilon"].index(0.1)
        assert entry["strength"]["worst"][at] <= metrics["worst"][0] + 0.01
        assert entry["strength"]["worst"] == sorted(entry["strength"]["worst"])[::-1]
        assert entry["label"].split()[0] in printed
        for layer in entry["weights"].values():
            assert (layer["wall"] is not None) == (name == "volumization")
            assert sum(layer["counts"]) in (64 * 256, 256 * 10)
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


def content(file):
    """What a comparison came to, however long it took."""
    result = json.loads(file.read_text())
    for cell in result["cells"]:
        del cell["seconds"]
    return result


def file_in(folder):
    (file,) = folder.glob("*.json")
    return file


@pytest.fixture
def trained(monkeypatch):
    """Nothing takes time; these are the epochs that networks have been trained for."""

    def draw(result, file):
        del result
        file.with_suffix(".png").touch()
        return [file.with_suffix(".png")]

    monkeypatch.setattr(plots, "draw", draw)
    return instant.fake(monkeypatch)


@pytest.fixture
def human(tmp_path, digits):
    """A file of labels of which a tenth is wrong."""
    given, file = digits.y_train.copy(), tmp_path / "human.npz"
    given[::10] = (given[::10] + 1) % 10
    np.savez(file, clean_label=digits.y_train, worse_label=given)
    return file


def test_the_recorded_command_repeats_the_result(trained, human, tmp_path):
    given = ["--labels", f"{human}:worse_label", "--loss", "mmc", "--whole"]
    given += ["--tested", "50", "--epsilons", "0.2,0.05", "--source-epochs", "1"]
    given += ["--adversarial", "--schedule", "thirds", "--dtype", "bfloat16"]
    assert cli.main([*COMMAND, *given, "--out", str(tmp_path / "first")]) == 0
    first = file_in(tmp_path / "first")
    known = record.load(first)["settings"]
    expected = {"labels": "worse_label", "noise": 0.0, "loss": "mmc", "whole": True}
    expected |= {"tested": 50, "epsilons": [0.2, 0.05], "source_epochs": 1}
    assert known | expected == known and "labels_file" not in known
    words = record.load(first)["command"].replace("LABELS:", f"{human}:").split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    assert cli.main([*words[3:], "--out", str(tmp_path / "again")]) == 0
    assert content(tmp_path / "again" / first.name) == content(first)
    assert len(trained) == 2 * (1 + 2 * (CELLS - 1))


def test_labels_that_do_not_fit_are_told_in_one_line(human, tmp_path, capsys):
    with np.load(human) as arrays:
        np.savez(tmp_path / "other.npz", **arrays, other=arrays["clean_label"][1:])
    for labels, message in (
        (f"{tmp_path}/none.npz:worse_label", "which is no file"),
        (f"{human}:aggre_label", "has no array 'aggre_label'"),
        (f"{tmp_path}/other.npz:other", "expected an integer from 0 to 9 for each"),
    ):
        assert cli.main(["compare", "--labels", labels, "--out", str(tmp_path)]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_rerun_of_a_complete_comparison_shows_it(trained, tmp_path, capsys):
    command = [*COMMAND, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    first, file = capsys.readouterr().out, file_in(tmp_path)
    before = file.read_bytes()
    trained.clear()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first and "none" in first
    assert not trained and file.read_bytes() == before


@pytest.mark.parametrize("epochs", [1, 4, 9])
def test_after_an_interrupt_the_same_command_goes_on(
    epochs, trained, tmp_path, monkeypatch, capsys
):
    assert cli.main([*COMMAND, "--out", str(tmp_path / "whole")]) == 0
    whole, once = file_in(tmp_path / "whole"), sorted(trained)
    trained.clear()
    command, epoch = [*COMMAND, "--out", str(tmp_path / "ended")], []

    def interrupted(self, progress):
        if len(epoch) == epochs:
            raise KeyboardInterrupt
        epoch.append(1)
        return instant.Population.train(self, progress)

    class Interrupted(instant.Population):
        train = interrupted

    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.part.Population", Interrupted)
        capsys.readouterr()
        assert cli.main(command) == 130
    ended = tmp_path / "ended" / whole.name
    assert not list(ended.parent.glob("*.partial*"))
    if epochs > 2:  # the first cell is that of the source, and has a network
        assert record.load(ended)["missing"] and not record.load(ended)["complete"]
        assert f"The result is in {ended}" in capsys.readouterr().out
        assert cli.main(["report", str(ended)]) == 0
        assert "cells; missing: " in " ".join(capsys.readouterr().out.split())
    assert checkpoints.path(ended).is_file() == (epochs != 4)  # between groups of runs
    assert cli.main(command) == 0
    assert content(ended) == content(whole) and sorted(trained) == once
    assert {*ended.parent.iterdir()} == {ended, ended.with_suffix(".png")}


def test_a_disk_that_fills_up_ends_the_run_with_one_line(
    trained, tmp_path, monkeypatch, capsys
):
    command, write, written = [*COMMAND, "--out", str(tmp_path)], record.write, []

    def filling(content, out):
        if len(written) == 8:
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        written.append(out)
        write(content, out)

    with monkeypatch.context() as patched:
        patched.setattr(record, "write", filling)
        assert cli.main(command) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after that with the devices
    assert re.fullmatch(r"error: .*No space left on device.*digits-noise40.*", line)
    there, before = content(file_in(tmp_path))["cells"], len(trained)
    assert there and before < 1 + 2 * CELLS
    assert cli.main(command) == 0
    after = content(file_in(tmp_path))
    assert after["complete"] and all(cell in after["cells"] for cell in there)


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    trained, tmp_path, monkeypatch, capsys
):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(record, "write", denied)
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", denied)
    for command in (["compare"], ["cost"], ["speed"], ["theory"]):
        assert cli.main([*command, "--out", str(tmp_path)]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert "Permission denied" in line and str(tmp_path) in line
    assert list(tmp_path.iterdir()) == [] and len(trained) == 1


def test_in_no_time_nothing_is_trained_and_later_the_rest(trained, tmp_path, capsys):
    command = [*COMMAND, "--out", str(tmp_path)]
    assert cli.main([*command, "--minutes", "0"]) == 0
    assert record.load(file_in(tmp_path))["missing"] == CELLS and not trained
    assert "Nothing is finished yet." in capsys.readouterr().out
    assert cli.main([*command, "--minutes", "60"]) == 0
    assert record.load(file_in(tmp_path))["complete"]


@pytest.mark.parametrize(("seconds", "checkpoints"), [(None, 10), ("600", 0)])
def test_checkpoints_are_as_far_apart_as_asked(
    seconds, checkpoints, trained, tmp_path, monkeypatch
):
    """Two runs at once: a group for the source, and two for each method."""
    write, written = record.write, []
    monkeypatch.setattr(record, "write", lambda c, o: (written.append(o), write(c, o)))
    apart = [] if seconds is None else ["--checkpoint-seconds", seconds]
    assert cli.main([*COMMAND, *apart, "--out", str(tmp_path)]) == 0
    assert sum(file.suffix == ".checkpoint" for file in written) == checkpoints


@pytest.fixture
def tables(monkeypatch):
    """An experiment of two parts, of which one has labels of humans."""
    shared = {"dataset": "digits", "epochs": 1, "seeds": 3, "attacked": 0}
    parts = {"human": {"noise": 0.0, "labels": "worse_label"}, "drawn": {"noise": 0.1}}
    scales = {scale: {"methods": ("binary_paper",)} for scale in ("smoke", "cpu")}
    both = Experiment(
        title="digits",
        shared=shared,
        parts=parts,
        scales=scales,
        limited={"full": ()},
        paper={part: {"binary_paper": {"last": 0.5}} for part in parts},
        note="None.",
    )
    monkeypatch.setitem(EXPERIMENTS, "weissi-table1", both)  # one of the choices
    return ["experiment", "weissi-table1"]


@pytest.mark.parametrize(
    ("minutes", "order"),
    [([], [0, 1, 2, 0, 1, 2]), (["--minutes", "60"], [0, 0, 1, 2, 1, 2])],
)
def test_in_a_piece_of_time_every_part_comes_to_a_first_seed(
    minutes, order, tables, trained, human, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("jax.device_count", lambda: 1)
    out = ["--labels", str(human), "--out", str(tmp_path / "out")]
    assert cli.main([*tables, *minutes, *out]) == 0
    assert [seed for seed, *_ in trained] == order
    names = [f"weissi-table1-cpu-{part}.json" for part in ("human", "drawn")]
    assert {f.name for f in (tmp_path / "out").iterdir()} == set(names)  # no plots
    printed = capsys.readouterr().out
    for name, part in zip(names, ("human", "drawn"), strict=True):
        result = record.load(tmp_path / "out" / name)
        mark = {"name": "weissi-table1", "part": part, "scale": "cpu"}
        assert result["complete"] and result["experiment"] == mark
        assert f"{tmp_path / 'out' / name}." in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "human of weissi-table1 must have the labels that people gave"),
        (["--parts", "drawn", "--labels", "a.npz"], "--labels must be left out"),
        (["--scale", "full"], "--scale must be among smoke, cpu for weissi-table1"),
    ],
)
def test_an_experiment_that_cannot_be_run_is_told_before(
    words, message, tables, trained, tmp_path, capsys
):
    assert cli.main([*tables, *words, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not trained and not list(tmp_path.iterdir())


def test_no_part_of_an_experiment_begins_where_another_cannot(
    trained, finished, tmp_path, capsys
):
    """Settings of a table's last part have changed since its file was written."""
    result, name = record.load(finished[0]), "weissi-table1-cpu-cnn-adversarial.json"
    settings = EXPERIMENTS["weissi-table1"].settings("cnn-adversarial", "cpu")
    result["settings"] = cli._shown(Settings.of(**settings)) | {"trials": 7}
    record.save(result, tmp_path / name)
    assert cli.main(["experiment", "weissi-table1", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} holds another comparison, whose trials is 7" in line


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
        (["compare", "--dataset", "svhn"], "dataset.* 'svhn'"),
        (["compare", "--dataset", "imdb", "--attacked", "5"], "attacked must be 0 for"),
        (["compare", "--minutes", "-1"], "--minutes: must be a number .* but is -1"),
        (["experiment", "quantization", "--minutes", "nan"], "--minutes: .* is nan"),
        (["compare", "--checkpoint-seconds", "-5"], "--checkpoint-seconds: .* is -5"),
        (["compare", "--checkpoint-seconds", "soon"], "must be a number .* is soon"),
        (
            ["compare", "--labels", "a.npz"],
            "--labels: must be F[I]LE:NAME, .* is a.npz",
        ),
        (["compare", "--labels", "a.npz:"], "--labels: must be F[I]LE:NAME"),
        (["compare", "--labels", "a:b", "--noise", "0.1"], "noise must be 0 where"),
        (["compare", "--epsilons", "0.1,x"], "--epsilons: must be numbers, .* 0.1,x"),
        (["compare", "--epsilons", "0.1,-1"], "epsilons must be at least 0 .* is -1.0"),
        (
            ["compare", "--epsilons", "0.1", "--attacked", "0"],
            "epsilons .* must be left out where attacked is 0",
        ),
        (["compare", "--loss", "hinge"], "loss must be among .*, not 'hinge'"),
        (["compare", "--tested", "0"], "tested must be at least 1 .*, but is 0"),
        (["compare", "--processes", "2"], "all or none, but --coordinator is not"),
        (["compare", "--process", "0"], "all or none, but --coordinator is not"),
        (
            ["compare", "--coordinator", "localhost:1"],
            "--coordinator, --processes, --process must be .* but --processes is not",
        ),
        (
            [*TOGETHER, "localhost:1", "--processes", "2", "--process", "2"],
            "--process must be less than --processes, which is 2, but is 2",
        ),
        ([*TOGETHER, "here"], "--coordinator: must be HOST:PORT, but is here"),
        (["compare", "--process", "-1"], "--process: must be a whole number of at l"),
        (
            [*TOGETHER, "localhost:1", "--processes", "2", "--process", "0"],
            "--coordinator localhost:1 cannot be joined",  # since JAX runs already
        ),
        (
            ["status", "enc-imagenet"],
            "--scale must be among smoke, full for enc-",
        ),
        (["status", "table9"], "name: invalid choice: 'table9'"),
        (["merge"], "required: results"),
        (["merge", "FILE"], "FILE must be JSON"),
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


def test_theory_is_reported_like_comparisons(tmp_path, monkeypatch, capsys):
    from benchmarks import theory

    committed = ROOT / "benchmarks/results/theory-figure4.json"
    monkeypatch.setattr(theory, "run", lambda: json.loads(committed.read_text()))
    assert cli.main(["theory", "--out", str(tmp_path)]) == 0
    names = {"theory-figure4.json", "theory-figure4-errors.png"}
    assert {f.name for f in tmp_path.iterdir()} == names
    assert record.load(tmp_path / committed.name) == record.load(committed)
    assert f"The result is in {tmp_path / committed.name}" in capsys.readouterr().out


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
