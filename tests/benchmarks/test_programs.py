"""The programs whose costs are counted do what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from benchmarks import programs, trees

pytestmark = quick.everything

KERNEL = jnp.full((3, 2), 0.5).at[0, 0].set(-0.25)


def compiled(program):
    return jax.jit(program.run, donate_argnums=program.donated)


def assert_close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", programs.STEPS)
def test_a_step_is_a_step(name):
    params = {"kernel": KERNEL}
    grads = {"kernel": jnp.arange(6.0).reshape(3, 2) - 2.5}
    tx = programs.STEPS[name]()
    updates, state = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates), state
    given = {"kernel": jnp.copy(KERNEL)}
    got = compiled(programs.program(name, params))(given, tx.init(params), grads)
    assert_close(got, expected)


@pytest.mark.parametrize("name", programs.MAPS)
def test_a_map_comes_alone_and_with_its_pullback(name):
    params, cotangents = {"kernel": KERNEL}, {"kernel": KERNEL**2 + 1}
    mapped, pullback = jax.vjp(programs.MAPS[name](), params)
    assert_close(compiled(programs.program(name, params))(params), mapped)
    got = compiled(programs.program(f"vjp({name})", params))(params, cotangents)
    assert_close(got, (mapped, pullback(cotangents)))


def test_programs_are_compiled_by_their_names():
    given = {
        "twice": programs.Program(lambda x: 2 * x, (KERNEL,)),
        "half": programs.Program(lambda x: x / 2, (KERNEL,), donated=(0,)),
    }
    run = programs.compiled(given)
    assert list(run) == ["twice", "half"]
    assert_close(run["twice"](KERNEL), 2 * KERNEL)
    assert_close(run["half"](jnp.copy(KERNEL)), KERNEL / 2)


def test_all_are_compared_with_adam():
    assert programs.names(["steps"]) == list(programs.STEPS)
    maps = [*programs.MAPS, *programs.PULLBACKS]
    assert programs.names(["maps"]) == ["adam", *maps]
    assert programs.names(["steps", "maps"]) == [*programs.STEPS, *maps]


@pytest.mark.parametrize(
    ("tree", "leaves", "parameters"),
    [
        ("resnet50", 161, 25_557_032),  # as in the paper and everywhere since
        ("resnet50, narrow", 161, 1_993_976),
        ("transformer of 100M", 18, 100_819_216),
        ("1000x64x64", 1000, 1000 * 64**2),
        ("32x2048x2048", 32, 32 * 2048**2),
        ("8x2048x2048", 8, 8 * 2048**2),
        ("4x4096x4096", 4, 4 * 4096**2),
    ],
)
def test_trees_have_their_leaves(tree, leaves, parameters):
    found = jax.tree.leaves(trees.TREES[tree]())
    assert len(found) == leaves
    assert sum(leaf.size for leaf in found) == parameters
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}
