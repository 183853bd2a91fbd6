"""What grows with a tree, and what does not."""

import jax
import pytest

from benchmarks import growth, programs, report, trees
from benchmarks.plans import plans


@pytest.mark.parametrize("name", growth.PROGRAMS)
def test_stacked_layers_are_one_program_however_many_there_are(name):
    def size(count):
        program = programs.program(name, growth.stacked(count, 4))
        traced = jax.make_jaxpr(program.run)(*program.arguments)
        return str(traced).count(" = ")

    assert size(10) == size(1000) > 10


def test_bytes_a_parameter_do_not_grow_with_layers():
    few, many = (
        plans(None, trees.kernels(count, 32), ["chain(adam, volumize)"])
        for count in (10, 100)
    )
    moved = [p["chain(adam, volumize)"]["bytes"] for p in (few, many)]
    assert moved[0] >= 28 and abs(moved[1] / moved[0] - 1) < 0.02


def test_only_few_programs_are_compiled_for_a_thousand_leaves(monkeypatch):
    counts = {"kernels": 1, "bytes": 28.0, "temporary_bytes": 0.0}
    counts |= {"trace_seconds": 1.0, "compile_seconds": 3.0}
    compiled = []

    def planned(target, params, names, tick):
        assert target == "h100"
        for name in names:
            tick(name)
        return dict.fromkeys(names, counts)

    monkeypatch.setattr(growth.plans, "plans", planned)
    found = growth.counts("h100", tick=compiled.append)
    assert list(found) == list(growth.GROWTH)
    assert list(found["1,000 layers"]) == list(growth.FEW)
    assert list(found["1,000 stacked layers"]) == list(growth.PROGRAMS)
    assert len(compiled) == growth.programs() == 7 * 4 + 2
    assert found["10 layers"]["adam"]["compile milliseconds"] == 300.0
    assert "1,000 layers" not in growth.counts("h100", most=100)
    head, rows = report._counted(found)
    assert head[2] == "kernels" and rows[0][:4] == ["10 layers", "adam", "1", "28.0"]
