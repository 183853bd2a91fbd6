"""Tables of papers can be run again: each one's smoke scale, on data made up here."""

import itertools
import json

import instant
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quick
from parquet import write_parquet

import benchmarks.__main__ as cli
from benchmarks import glove, report, standings
from benchmarks.experiments import EXPERIMENTS
from benchmarks.settings import Settings

pytestmark = quick.everything

SIZES = (170, 20)  # of which a fifth is held out, and the others are a batch
WORDS = ("good", "bad", "day", "film")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Images, texts with vectors, and labels, nearly all at random."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_parquet(root / "mnist", "image", (28, 28), SIZES)
    (_, y), _ = write_parquet(root / "cifar10", "img", (32, 32, 3), SIZES, "JPEG")
    np.savez(root / "human.npz", clean_label=y, worse_label=(y + 1) % 10)
    (root / "imdb").mkdir()
    for split, size in zip(("train", "test"), SIZES, strict=True):
        texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(size)]
        table = pa.table({"text": texts, "label": rng.integers(0, 2, size)})
        pq.write_table(table, root / "imdb" / f"{split}.parquet")
    for split, i in itertools.product(("train", "val"), range(1000)):
        path = root / "imagenet" / split / f"n{i:04d}" / "0.JPEG"
        path.parent.mkdir(parents=True)
        PIL.Image.new("RGB", (4, 5), (i % 256, i // 4, 0)).save(path)
    vectors = {word: np.float32([i, -i]) for i, word in enumerate(WORDS)}
    glove.save(root / "glove.6B.2d.txt", vectors)
    return root


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_in_small(name, folder, tmp_path, monkeypatch, capsys):
    instant.on_one_device(monkeypatch)
    experiment = EXPERIMENTS[name]
    command = ["experiment", name, "--scale", "smoke", "--data-dir", str(folder)]
    parts = {
        part: Settings.of(**experiment.settings(part, "smoke"))
        for part in experiment.parts_at("smoke")
    }
    if any(settings.labels for settings in parts.values()):
        command += ["--labels", str(folder / "human.npz")]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    files = {part: tmp_path / f"{name}-smoke-{part}.json" for part in parts}
    assert set(tmp_path.iterdir()) == set(files.values())
    for part, settings in parts.items():
        result = json.loads(files[part].read_text())
        assert result["complete"] and f"The result is in {files[part]}" in printed
        assert list(result["results"]) == list(settings.methods)
        for entry in result["results"].values():
            known = {"best", "last"} | (
                {"fgsm", "pgd", "worst"} if settings.attacked else set()
            )
            assert known <= entry["metrics"].keys()
            assert len(entry["metrics"]["last"]["seeds"]) == settings.seeds
        if settings.dataset == "cifar10":  # which no title may hide
            assert "CIFAR-10 (as JPEG)" in report.markdown(result)
        check_page(
            standings.table(experiment, part, {"smoke": result}), experiment, part
        )


def check_page(lines, experiment, part):
    """The paper's numbers stand beside ours, and every row has every column."""
    text = "\n".join(lines)
    for row in experiment.paper[part].values():
        for number in row.values():
            assert f"{number:.1f}" in text
    for table in text.split("\n\n"):
        columns = {row.count("|") for row in table.splitlines() if row[:1] == "|"}
        assert len(columns) <= 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_there_is_something_to_run_in_small(name):
    assert EXPERIMENTS[name].parts_at("smoke")
