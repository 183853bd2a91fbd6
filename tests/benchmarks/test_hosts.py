"""Two processes that fill one comparison together come to what one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import instant
import jax
import pytest

import benchmarks.__main__ as cli

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = ["compare", "--methods", "l2", "--epochs", "2", "--trials", "2"]
COMMAND += ["--tuning-seeds", "1", "--seeds", "3", "--attacked", "0"]
PROCESSES = 2


def content(file):
    """A comparison, but for what machines differ in."""
    result = json.loads(file.read_text())
    for part in (result, *result["cells"]):
        del part["device"]
        part.pop("seconds", None)
    return result


@pytest.fixture
def together(tmp_path):
    """The folder that two processes write into, as soon as they are done."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    out = tmp_path / "together"
    several = ["--coordinator", address, "--processes", str(PROCESSES), "--minutes"]
    several += ["60", "--checkpoint-seconds", "0.5"]
    command = [*COMMAND, *several, "--out", str(out), "--process"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *command, str(i)],
            env=os.environ | cache | {"JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    printed = []

    def finish():
        for process in running:
            printed.append(process.communicate(timeout=300))
            assert process.returncode == 0, printed[-1][1]
        return out, printed

    try:
        yield finish
    finally:
        for process in running:
            process.kill()
            with process:  # which closes its pipes and waits
                pass


def test_two_processes_fill_a_comparison_as_one(together, tmp_path, monkeypatch):
    instant.on_one_device(monkeypatch)
    alone = tmp_path / "alone"
    assert cli.main([*COMMAND, "--out", str(alone)]) == 0
    folder, printed = together()
    (file,) = alone.glob("*.json")
    assert {f.name for f in folder.iterdir()} == {f.name for f in alone.iterdir()}
    assert content(folder / file.name) == content(file)
    said = [f"The result is in {folder / file.name}." in out for out, _ in printed]
    assert said == [True, False]
