"""A machine whose GPU stays unused is not measured without a word."""

import re

import jax
import pytest

import benchmarks.__main__ as cli
from benchmarks import devices
from benchmarks.devices import ACCELERATORS

FILES = {"NVIDIA": "nvidia0", "AMD": "kfd", "TPU": "accel0"}
# Of a driver without a card, and of what no extra of JAX is for.
OTHERS = ("nvidiactl", "nvidia-uvm", "accel", "null")


@pytest.fixture
def root(tmp_path):
    """A file system without an accelerator."""
    (tmp_path / "dev").mkdir()
    for file in OTHERS:
        (tmp_path / "dev" / file).touch()
    return tmp_path


@pytest.mark.parametrize("name", ACCELERATORS)
def test_an_accelerator_that_jax_does_not_see_is_named(name, root):
    assert devices.unseen("cpu", None, root) == []
    file = root / "dev" / FILES[name.split()[1]]
    file.touch()
    (line,) = devices.unseen("cpu", None, root)
    assert name in line and str(file) in line
    assert f"pip install 'jax[{ACCELERATORS[name].extra}]'" in line
    assert devices.unseen("cpu", "", root) == [line]
    assert devices.unseen("cpu", "cpu", root) == []
    assert devices.unseen("gpu", None, root) == []


def test_a_run_says_what_it_runs_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(devices, "unseen", lambda *given: ["warning: a GPU is here"])
    monkeypatch.setattr(cli, "_fill", lambda *given: None)
    monkeypatch.setattr(cli, "show", lambda *given: None)
    monkeypatch.setattr("benchmarks.cost.run", lambda *given: {})
    experiment = ["experiment", "weissi-table1", "--parts", "mlp"]
    for command in (["compare"], experiment, ["cost"]):
        assert cli.main([*command, "--out", str(tmp_path)]) == 0
        said = capsys.readouterr()
        line, warning = said.err.splitlines()
        assert re.fullmatch(r"on \d+ x \w+ \(JAX [\d.]+\)", line)
        assert f" {jax.device_count()} x {jax.devices()[0].device_kind} " in line
        assert warning == "warning: a GPU is here" and not said.out
