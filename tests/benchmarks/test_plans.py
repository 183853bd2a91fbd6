"""What compilers plan for an H100 and a TPU v5e, of which there need be none.

Where the extras ``h100`` and ``v5e`` are not installed these tests are skipped, unless
they are asked for by ``-m plans``. The trees are small: what a leaf costs is the same.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import targets

pytestmark = pytest.mark.plans
ROOT = pathlib.Path(__file__).parents[2]
# JAX chooses its platforms once in a process, so each target has one of its own.
PLAN = """
import json, sys
from benchmarks import plans, targets, trees
target, wanted = sys.argv[1], json.loads(sys.argv[2])
made = {"stage": lambda: trees.resnet([(3, 512)])} | trees.TREES
planned = {t: plans.plans(target, made[t](), names) for t, names in wanted.items()}

import jax, jax.numpy as jnp
import weightreg as wr

def network(layers, x):
    for layer in layers:
        x = jnp.tanh(wr.packed_matmul(x, layer))
    return x

planned["products"] = {}
for levels in ("binary", "ternary"):
    kernel = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    packed = jax.eval_shape(lambda w: wr.pack(w, 0.1, levels, mask=True), kernel)
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    plan = targets.plan(target, network, ([packed] * 2, x))
    planned["products"][levels] = plan._asdict()
print(json.dumps(planned))
"""
LEAVES = {"resnet50": 161, "stage": 35, "8x2048x2048": 8, "4x4096x4096": 4}
ONCE = 4  # kernels of a step that work on scalars, such as Adam's bias corrections
STEPS = ("volumized(adam)", "chain(adam, volumize)", "volumized_laprop")
STEPS += ("adam", "laprop", "chain(adam, quantize_every)")
SGD = ("sgd, momentum", "volumized(sgd, momentum)")
WEISSI = ("chain(add_weissi, adam)", "chain(add_weissi(log), adam)")
SHIFTED = ("chain(add_shifted_l2, adam)",)


def rows(target, tree, programs, kernels, moved):
    """Programs with the most kernels a leaf and the most bytes a parameter."""
    return [(target, tree, program, kernels, moved) for program in programs]


ROWS = [
    *rows("h100", "stage", STEPS, 1, 28),
    *rows("h100", "stage", SGD, 1, 20),
    *rows("h100", "resnet50", [WEISSI[0]], 3.1, 33),
    *rows("h100", "stage", SHIFTED, 3, 40),
    *rows("h100", "8x2048x2048", STEPS, 1, 28),
    *rows("h100", "8x2048x2048", SGD, 1, 20),
    *rows("h100", "8x2048x2048", WEISSI, 8, 33),
    *rows("h100", "8x2048x2048", SHIFTED, 8, 40),
    *rows("h100", "8x2048x2048", ["equivalent_norm(22)"], 6, 16),
    *rows("h100", "8x2048x2048", ["vjp(equivalent_norm(22))"], 8, 36),
    *rows("h100", "8x2048x2048", ["equivalent_norm(20)"], 7, 16),
    *rows("h100", "8x2048x2048", ["vjp(equivalent_norm(20))"], 10, 32),
    *rows("v5e", "4x4096x4096", ["adam", "laprop", "chain(adam, volumize)"], 1, 36),
    *rows("v5e", "4x4096x4096", ["chain(adam, quantize_every)"], 1, 36),
    *rows("v5e", "4x4096x4096", ["volumized(adam)"], 1, 36),
    *rows("v5e", "4x4096x4096", ["volumized_laprop"], 2, 36),
    *rows("v5e", "4x4096x4096", SGD, 1, 27),
    # Without copies ahead of time into on-chip memory these would be 32 and 36.
    *rows("v5e", "4x4096x4096", [WEISSI[0]], 6, 54),
    *rows("v5e", "4x4096x4096", SHIFTED, 9, 53),
]


def wanted(target):
    """The programs of a target's rows, by their trees, Adam's first."""
    found = {tree: ["adam"] for own, tree, *_ in ROWS if own == target}
    for own, tree, program, *_ in ROWS:
        if own == target and program not in found[tree]:
            found[tree].append(program)
    return found


@pytest.fixture(scope="module")
def planned():
    """From a target to its plans, for which all compilers run at the same time."""
    running, printed = {}, {}
    for target in targets.TARGETS:
        if not targets.missing(target):
            command = [sys.executable, "-c", PLAN, target, json.dumps(wanted(target))]
            running[target] = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, text=True
            )

    def of(target):
        if target not in printed:
            printed[target] = running[target].communicate()[0]
        assert running[target].returncode == 0
        return json.loads(printed[target])

    yield of
    for process in running.values():
        process.kill()
        with process:  # which closes its pipe and waits
            pass


@pytest.fixture
def plan(target, tree, program, planned, request):
    check_asked(target, request)
    return planned(target)[tree][program]


def check_asked(target, request):
    """Skips a test without its compiler, unless plans are asked for."""
    absent = targets.missing(target)
    if absent and "plans" not in request.config.option.markexpr:
        pytest.skip(f"{', '.join(absent)} not installed: see the extra {target}")
    assert not absent


@pytest.mark.parametrize(("target", "tree", "program", "kernels", "moved"), ROWS)
def test_a_plan_has_few_kernels_and_bytes(plan, tree, kernels, moved):
    assert plan["kernels"] <= kernels * LEAVES[tree] + ONCE
    assert plan["bytes"] <= moved + 0.1


@pytest.mark.parametrize("levels", ["binary", "ternary"])
@pytest.mark.parametrize("target", targets.TARGETS)
def test_products_with_bits_make_no_kernel_of_a_layer(target, levels, planned, request):
    """For one row: two layers of 4096 x 4096, of which an H100 makes a kernel each."""
    check_asked(target, request)
    plan, size = planned(target)["products"][levels], 4096**2
    bits = {"binary": 1, "ternary": 2}[levels] * 2 * size / 8
    assert plan["temporary_bytes"] < size / 100
    if target == "h100":
        assert plan["kernels"] == 2
        assert bits < plan["bytes"] < 1.02 * bits
