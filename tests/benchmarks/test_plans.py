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
# Optimizer steps and maps of test_meshes.py, on a mesh of a target's four devices.
SPLIT = """
import functools, json, sys
import jax, numpy as np
from benchmarks import targets
devices = np.array(targets.devices(sys.argv[1])).reshape(2, 2)
sys.path.append("tests")
import meshes, test_meshes
mesh = jax.sharding.Mesh(devices, ("data", "model"))
there = functools.partial(test_meshes.abstract, mesh)
params, moved = there(jax.eval_shape(test_meshes.network)), {}
for name in json.loads(sys.argv[2]):
    if name in test_meshes.MAPS:
        run, most, given = *test_meshes.MAPS[name], (params,)
    else:
        tx, most = test_meshes.LINKS[name]
        run, given = tx.update, (params, there(jax.eval_shape(tx.init, params)), params)
    text = jax.jit(run).lower(*given).compile().as_text()
    moved[name] = max(meshes.collectives(text).values(), default=0), most
print(json.dumps(moved))
"""
SPLIT_PROGRAMS = ["volumized(adam)", "volumized_laprop", "quantize_every", "add_weissi"]
SPLIT_PROGRAMS += ["add_weissi(spectral)", "add_shifted_l2", "vjp(equivalent_norm)"]
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
    *rows("h100", "resnet50", [WEISSI[0]], 2.2, 33),
    *rows("h100", "stage", SHIFTED, 3, 40),
    *rows("h100", "8x2048x2048", STEPS, 1, 28),
    *rows("h100", "8x2048x2048", SGD, 1, 20),
    *rows("h100", "8x2048x2048", WEISSI, 5, 33),
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
def compiler(target, request):
    absent = targets.missing(target)
    if absent and "plans" not in request.config.option.markexpr:
        pytest.skip(f"{', '.join(absent)} not installed: see the extra {target}")
    assert not absent


@pytest.fixture
def plan(target, tree, program, compiler, planned):
    return planned(target)[tree][program]


@pytest.mark.parametrize(("target", "tree", "program", "kernels", "moved"), ROWS)
def test_a_plan_has_few_kernels_and_bytes(plan, tree, kernels, moved):
    assert plan["kernels"] <= kernels * LEAVES[tree] + ONCE
    assert plan["bytes"] <= moved + 0.1


# The benchmarks' step and that of Flax and Optax alone, of small residual networks, in
# bfloat16, where a cast too many shows.
TRAINING = """
import functools, json
import jax, jax.numpy as jnp, optax
from benchmarks import networks, plain, targets, train

targets.device("h100")
dtype, tx = jnp.bfloat16, optax.adam(1e-3)
x = jax.ShapeDtypeStruct((128, 16, 16, 3), jnp.float32)
y, key = jax.ShapeDtypeStruct((128,), jnp.int32), jax.eval_shape(jax.random.key, 0)
ours = networks.NormResNet(10, (1, 1), 16, 1, dtype=dtype)
theirs = plain.ResNet(10, (1, 1), 16, dtype)
given = {"model": ours, "classes": 10, "batch": 128}
training = train.Training(**given, optimizer=lambda hyper: tx)
own = functools.partial(train.train_step, training, tx, {})
other = functools.partial(plain.train_step, theirs, tx)
planned = []
for model, step, more in ((ours, own, (x, y, key)), (theirs, other, (x, y))):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    carry = params, stats, jax.eval_shape(tx.init, params)
    planned.append(targets.plan("h100", step, (*carry, *more), (0, 1, 2)))
print(json.dumps([plan[:3] for plan in planned]))
"""


@pytest.mark.parametrize("target", ["h100"])
def test_a_training_step_is_planned_as_without_us(target, compiler):
    """In kernels, bytes and temporaries, to a tenth."""
    command = [sys.executable, "-c", TRAINING]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours, plain = json.loads(ran.stdout)
    assert all(own <= 1.1 * other for own, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("target", targets.TARGETS)
def test_no_weight_moves_between_four_devices(target, compiler):
    """Of FSDP, tensor parallelism and both: see test_meshes.py."""
    command = [sys.executable, "-c", SPLIT, target, json.dumps(SPLIT_PROGRAMS)]
    printed = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=300
    ).stdout
    moved = json.loads(printed)
    assert list(moved) == SPLIT_PROGRAMS
    for name, (numbers, most) in moved.items():
        assert numbers <= most, name


@pytest.mark.parametrize("levels", ["binary", "ternary"])
@pytest.mark.parametrize("target", targets.TARGETS)
def test_products_with_bits_make_no_kernel_of_a_layer(
    target, levels, compiler, planned
):
    """For one row: two layers of 4096 x 4096, of which an H100 makes a kernel each."""
    plan, size = planned(target)["products"][levels], 4096**2
    bits = {"binary": 1, "ternary": 2}[levels] * 2 * size / 8
    assert plan["temporary_bytes"] < size / 100
    if target == "h100":
        assert plan["kernels"] == 2
        assert bits < plan["bytes"] < 1.02 * bits
