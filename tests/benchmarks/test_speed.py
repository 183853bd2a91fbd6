"""Every part of the speeds, at sizes that take no time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

import benchmarks.__main__ as cli
from benchmarks import growth, programs, record, report, speed, speed_parts, training
from benchmarks.sizes import SIZES
from benchmarks.timing import Timing

TIMED = ("optimizers", "training", "gbr", "populations", "bits")
# One of each kind will do; what they are named by is tested where they are listed.
STEPS = {name: programs.STEPS[name] for name in ("sgd, momentum", "adam")}
REGULARIZERS = {name: training.REGULARIZERS[name] for name in ("none", "volumize")}


@pytest.fixture
def calls(monkeypatch):
    """Steps are called twice instead of timed; how often each was called in a turn."""
    asked = []

    def twice(steps, carries, rounds, seconds, calls=1):
        asked.append(calls)
        for name, step in steps.items():
            step(step(carries[name]))
        return {name: Timing(1 + i, 1, 3, 6.0) for i, name in enumerate(steps)}

    def traced(given):
        """Programs that only say which shapes come out of which."""
        return {
            name: lambda *given, run=program.run: speed_parts.values(
                jax.eval_shape(run, *given)
            )
            for name, program in given.items()
        }

    counts = dict.fromkeys(("kernels", "bytes", "temporary_bytes"), 1)
    counts |= {"trace_seconds": 1.0, "compile_seconds": 2.0}
    monkeypatch.setattr(growth.plans, "plans", lambda *_: {"adam": counts})
    monkeypatch.setattr(programs, "compiled", traced)
    monkeypatch.setattr(speed_parts, "relative_times", twice)
    monkeypatch.setattr(speed_parts, "STEPS", STEPS)
    monkeypatch.setattr(training, "REGULARIZERS", REGULARIZERS)
    return asked


def test_every_part_is_measured_written_and_shown(calls, tmp_path, capsys):
    words = ["speed", "--sizes", "quick", "--out", str(tmp_path)]
    assert cli.main([*words, "--parts", ",".join([*TIMED, "growth"])]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f"speed-cpu-quick-{'-'.join(TIMED)}-growth.json"
    result = record.load(file)
    assert tuple(result["timed"]) == TIMED
    row = result["counted"]["growth"]["columns"]["10 layers"]["adam"]
    assert row["trace milliseconds"] == 100.0
    assert result["sizes"]["batches"] == [1, 2] and result["seed"] == 0
    rows = {part: rows_of(table) for part, table in result["timed"].items()}
    assert rows == {
        "optimizers": {
            "2x8x8, one by one": [*STEPS],
            "2x8x8, 2 in one program": [*STEPS],
        },
        "training": {
            "mlp, batch 4": [*REGULARIZERS],
            "transformer, batch 2": [*REGULARIZERS],
        },
        "gbr": {"mlp, 4 examples": ["the network", "exact", "2 probes", "8 probes"]},
        "populations": {"mlp, 2 runs": ["devices", "vmap"]},
        "bits": {
            f"batch {batch}": [
                *("float32", "bfloat16", "binary bits", "binary bits, by layers"),
                *("ternary bits", "ternary bits, by layers"),
            ]
            for batch in (1, 2)
        },
    }
    columns = result["timed"]["optimizers"]["columns"]
    assert [c["adam"]["seconds"] for c in columns.values()] == [6.0, 3.0]
    assert calls[:2] == [2, 1] and calls[-1] == 2
    columns = result["timed"]["training"]["columns"]
    rates = [column["none"]["a_second"] for column in columns.values()]
    assert rates == [0.6667, 0.3333]  # 4 and 2 examples in 6 seconds
    shown = capsys.readouterr().out
    assert "| none | 1.00 (1.00 to 3.00), 6e+03 ms, 1 a second |" in shown
    assert "| adam | 2.00 (1.00 to 3.00), 6e+03 ms | 2.00" in shown
    assert "| 10 layers | adam | 1 | 1 | 1 | 100.0 | 200.0 |" in shown
    assert f"--sizes quick --parts {','.join(TIMED)},growth`" in shown


def rows_of(table):
    return {title: [*column] for title, column in table["columns"].items()}


def test_a_program_of_several_steps_does_what_calls_do():
    program = programs.program("volumized(adam)", {"kernel": jnp.full((3, 2), 0.3)})
    params, state, grads = speed_parts.values(program.arguments)
    looped = speed_parts._repeated(program, 3).run(params, state, grads)
    for _ in range(3):
        params, state = program.run(params, state, grads)
    for got, expected in zip(
        *map(jax.tree.leaves, (looped, (params, state))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not np.allclose(params["kernel"], grads["kernel"])


@quick.everything
def test_a_plain_network_takes_the_place_of_its_own(calls):
    """Its step goes from shapes to the same shapes, with as many of them."""
    sizes = dataclasses.replace(
        SIZES["quick"], trained=(("resnet18_norm", "bfloat16"),)
    )
    task, beside = speed_parts.tasks(sizes)["resnet18_norm, bfloat16, batch 4"]
    ours = training.step(task, REGULARIZERS["none"], programs.STEPS["adam"]())
    (theirs,) = beside.values()
    sizes_of = []
    for program in (ours, theirs):
        out = jax.eval_shape(program.run, *program.arguments)
        given = jax.eval_shape(lambda p=program: p.arguments[:3])
        assert out == given
        sizes_of.append(sorted(leaf.size for leaf in jax.tree.leaves(out)))
    assert sizes_of[0] == sizes_of[1]


def test_what_is_not_installed_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert "torch" in speed.PARTS and "torch" not in speed.chosen(None)
    with pytest.raises(ValueError, match="torch is not installed: see the extra torch"):
        speed.chosen(["bits", "torch"])
    result = {"timed": {}, "counted": {}, "left_out": speed.left_out(speed.PARTS)}
    result |= {"command": "c", "device": "d"}
    assert "Left out: torch is not installed" in report.speed_markdown(result)


def test_limits_are_compared_with_what_is_known():
    column = f"{report.MODEL}, batch {report.BATCH}"
    planned = {
        "volumized": {"bytes alone": 1.01, "at most": 1.02},
        "equivalent_norm": {"bytes alone": 1.02, "at most": 1.041},
        "add_weissi": {"bytes alone": 1.031, "at most": 1.041},
    }
    timed = {"volumized": {"ratio": 1.01, "low": 1.0, "high": 1.02, "seconds": 5e-3}}
    result = {"device": "planned for one NVIDIA H100", "timed": {}}
    result["counted"] = {"training": {"columns": {column: planned}}}
    lines = report.limits_table({"plan": result})
    assert "| volumized | 1.03 | 1.010 | 1.020 | kept |  |" in lines
    assert "| `equivalent_norm` | 1.04 | 1.020 | 1.041 | open |  |" in lines
    assert "| `add_weissi` | 1.03 | 1.031 | 1.041 | exceeded |  |" in lines
    assert "No GPU has been timed yet" in lines[-1]
    measured = {"device": "1 x NVIDIA H100 80GB HBM3", "counted": {}}
    measured["timed"] = {"training": {"columns": {column: timed}}}
    lines = report.limits_table({"plan": result, "run": measured})
    row = "| volumized | 1.03 | 1.010 | 1.020 | kept | 1.01 (1.00 to 1.02), 5 ms |"
    assert row in lines and "No GPU" not in lines[-1]
    measured["device"] = "2 x cpu"
    assert "No GPU" in report.limits_table({"run": measured})[-1]


def test_parts_are_planned_for_a_device_that_is_not_there(
    monkeypatch, tmp_path, capsys
):
    def counts(target, tick):
        tick("adam")
        return {"10 layers": {"adam": {"kernels": 10}}}

    part = speed.PLANNED["growth"]._replace(count=counts)
    monkeypatch.setitem(speed.PLANNED, "growth", part)
    monkeypatch.setattr(speed.targets, "device", lambda target: None)
    monkeypatch.setattr(speed, "version", lambda package: "1.2.3")
    words = ["speed", "--target", "h100", "--parts", "growth", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    result = record.load(tmp_path / "speed-h100-growth.json")
    assert result["device"] == "planned for one NVIDIA H100 80GB HBM3"
    assert not result["timed"]
    shown = capsys.readouterr().out
    assert "| 10 layers | adam | 10 |" in shown and "jaxlib 1.2.3" in shown
