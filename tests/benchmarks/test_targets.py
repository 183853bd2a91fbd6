"""Compiling for devices that are not there, as far as that goes without compilers.

What the compilers themselves say is in test_plans.py.
"""

import pathlib
import re
import tomllib

import pytest

import benchmarks.__main__ as cli
from benchmarks import plans, programs, record, report, targets, trees
from benchmarks.targets import TARGETS

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused (a: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} multiply(%a, %a)
}

ENTRY %main.3 (p: f32[8,8], c: s32[]) -> (f32[8,8], s32[]) {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0), metadata={op_name="params[\\'0\\']"}
  %c = s32[]{:T(128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %add.1 = s32[]{:T(128)} add(%c, %one)
  %f = (f32[8,8]{1,0:T(8,128)}, /*index=1*/f32[8]{0:T(256)S(1)}) fusion(%p), kind=kLoop
  %g = f32[8,8]{1,0:T(8,128)} get-tuple-element(%f), index=0
  ROOT %t = (f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%g, %add.1)
}

%after (a: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%a)
}
"""


def test_instructions_of_the_entry_alone_are_counted():
    found = targets.opcodes(PROGRAM)
    alike = ["parameter", "parameter", "constant", "add", "fusion"]
    assert found == [*alike, "get-tuple-element", "tuple"]
    kernels = {name: list(filter(t.is_kernel, found)) for name, t in TARGETS.items()}
    assert kernels == {"h100": ["add", "fusion"], "v5e": ["fusion"]}


@pytest.mark.parametrize("target", TARGETS)
def test_a_compiler_that_is_missing_is_named_with_its_extra(
    target, tmp_path, monkeypatch, capsys
):
    *_, absent = TARGETS[target].packages
    monkeypatch.setattr(targets, "_installed", lambda package: package != absent)
    command = ["cost", "--target", target, "--out", str(tmp_path)]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: target {target} needs {absent}: .*\[{target}\]'", line)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_cannot_be_loaded_is_told_in_one_line(
    tmp_path, monkeypatch, capsys
):
    def refuse(**arguments):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets, "_installed", lambda package: True)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(targets.jax.config, "update", lambda *setting: None)
    assert cli.main(["cost", "--target", "h100", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: target h100 cannot be compiled for (topology not")


@pytest.mark.parametrize("option", ["--side", "--rounds"])
def test_nothing_is_measured_on_a_target(option, tmp_path, capsys):
    command = ["cost", "--target", "v5e", option, "8", "--out", str(tmp_path)]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.startswith("error: --side and --rounds are of meas")


def test_targets_name_trees_and_programs_that_there_are():
    for target in TARGETS.values():
        assert target.trees.keys() <= trees.TREES.keys()
        given = {kind for kinds in target.trees.values() for kind in kinds}
        assert given == programs.KINDS.keys()


def test_every_target_has_an_extra_that_pins_its_compiler():
    """Of packages that come in by those that are pinned, these pin the versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    for name in TARGETS:
        own, *pinned = project["optional-dependencies"][name]
        assert own == "weightreg[costs]"
        versions = dict(re.match(r"([\w-]+)\S*==(\S+);", p).groups() for p in pinned)
        jax = {v for package, v in versions.items() if package.startswith("jax")}
        assert "jax" in versions and len(jax) == 1
        assert all(p.endswith("platform_machine == 'x86_64'") for p in pinned)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """A result of the command line with a compiler that always plans the same."""
    plan = targets.Plan(322, 28.0 * 25_557_032, 0, 1.25, 5.5)
    compiled = []
    monkeypatch.setattr(targets, "plan", lambda *given: compiled.append(given) or plan)
    monkeypatch.setattr(targets, "device", lambda target: None)
    monkeypatch.setattr(plans, "version", lambda package: "1.0")
    assert cli.main(["cost", "--target", "h100", "--out", str(tmp_path)]) == 0
    assert plans.ticks("h100") + len(TARGETS["h100"].trees) == len(compiled)
    (file,) = tmp_path.iterdir()
    assert file.name == "cost-h100.json"
    return file, capsys.readouterr().out


def test_plans_are_results_like_others(planned, capsys):
    file, printed = planned
    result = record.load(file)
    assert record.is_cost(result) and result["target"] == "h100"
    assert result["trees"]["resnet50"] == {"leaves": 161, "parameters": 25_557_032}
    adam = result["plans"]["resnet50"]["adam"]
    assert adam == {
        "kernels": 322,
        "kernels_a_leaf": 2.0,
        "bytes": 28.0,
        "temporary_bytes": 0.0,
        "trace_seconds": 1.25,
        "compile_seconds": 5.5,
        "relative_compile_time": 1.0,
    }
    row = "| `adam` | 2.00 | 28.0 | 0.0 | 1.2 | 5.5 | 1.00 |"
    text = report.cost_markdown(result)
    assert all(part in text for part in (row, report.origin(result), "plugin 1.0"))
    assert cli.main(["report", str(file)]) == 0
    again = capsys.readouterr().out
    assert again == printed and row in again
