"""What a step of an optimizer costs: time, memory traffic and temporaries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import weightreg as wr
from benchmarks import deploy, models, programs
from benchmarks.environment import environment
from benchmarks.programs import STEPS
from benchmarks.record import FORMAT
from benchmarks.timing import Timing, relative_times
from benchmarks.train import initialize
from benchmarks.training import ENC, REGULARIZERS, Task, cross_entropy, step

LEAVES = 16
TIMED = ("adam", "adamw", "chain(adam, volumize)", "volumized(adam)")
TIMED += ("chain(add_weissi, adam)",)
OPTIMIZERS = {name: STEPS[name] for name in TIMED}
TRAINED = ("mlp1024", "cnn16")


# Of whole training steps with momentum.
REGULARIZED = ("none", "add_decayed_weights", "weissi in the loss", "add_weissi")
REGULARIZED += ("equivalent_norm", "equivalent_norm and add_shifted_l2")


def compiled_step(tx: optax.GradientTransformation, params: Any, grads: Any):
    """The optimizer's part of a step, compiled."""
    run, arguments, donated = programs.step(tx, params, grads)
    return jax.jit(run, donate_argnums=donated).lower(*arguments).compile()


def memory(compiled, parameters: int) -> dict[str, float]:
    """Bytes a parameter that a compiled step reads and writes, and holds beside."""
    return {
        "bytes": round(compiled.cost_analysis()["bytes accessed"] / parameters, 1),
        "temporary_bytes": round(
            compiled.memory_analysis().temp_size_in_bytes / parameters, 1
        ),
    }


def training_times(model: str, batch: int, rounds: int) -> dict[str, float]:
    """Times of training steps with each of `REGULARIZED`, relative to none."""
    network, x, y = _task(model, batch)
    loss, steps, carries = cross_entropy(network), {}, {}
    for name in REGULARIZED:
        optimizer = optax.sgd(1e-3, momentum=0.9)
        variables = initialize(network, 0, x[:1])[0]
        task = Task(loss, variables, x, y)
        run, (*carry, _, _), donated = step(task, REGULARIZERS[name], optimizer)
        compiled = jax.jit(run, donate_argnums=donated)
        steps[name] = lambda carry, run=compiled: run(*carry, x, y)
        carries[name] = carry
    return _ratios(relative_times(steps, carries, rounds))


def _ratios(times: dict[str, Timing]) -> dict[str, float]:
    return {name: time.ratio for name, time in times.items()}


def inference_times(model: str, batch: int, rounds: int) -> dict[str, float]:
    """Times of inference without the map, after it was folded in, and with it."""
    network, x, _ = _task(model, batch)
    params = initialize(network, 0, x[:1])[0]["params"]
    plain = jax.jit(lambda p: models.logits(network, {"params": p}, x))
    mapped = jax.jit(lambda p: models.logits(network, {"params": ENC(p)}, x))
    steps = {"plain": plain, "folded": plain, "mapped in every call": mapped}
    # Each its own, or whoever shares them with another would find them in the cache.
    copy = jax.tree.map(jnp.copy, params)
    given = {"plain": params, "folded": ENC(params), "mapped in every call": copy}
    runs = {k: lambda _, k=k, step=step: step(given[k]) for k, step in steps.items()}
    return _ratios(relative_times(runs, dict.fromkeys(runs), rounds))


def forms_of(model: str, rounds: int) -> dict[str, dict]:
    """Bytes and times of running a network in floating point and from bits."""
    network, x, _ = _task(model, max(deploy.BATCHES))
    variables, _ = initialize(network, 0, x[:1])
    forms = list(deploy.FLOATS)
    for levels in ("binary", "ternary"):
        forms += deploy.packed_forms(levels, wr.he_volume(0.5))
    return deploy.measure(
        network, {form.label: (form, variables) for form in forms}, x, rounds
    )


def _task(model: str, batch: int):
    """A network, and a batch of noise."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(batch, 28, 28)), jnp.float32)
    return models.make(model, 10), x, jnp.asarray(rng.integers(0, 10, batch))


def run(side: int, rounds: int) -> dict:
    """Measures all optimizers on ``LEAVES`` float32 kernels of ``side`` by ``side``."""
    keys = jax.random.split(jax.random.key(0), LEAVES)
    grads = {str(i): jax.random.normal(k, (side, side)) for i, k in enumerate(keys)}
    parameters = LEAVES * side**2
    compiled, steps, carries = {}, {}, {}
    for name, make in OPTIMIZERS.items():
        tx = make()
        compiled[name] = run = compiled_step(tx, grads, grads)
        params = jax.tree.map(lambda g: jnp.array(0.01 * g), grads)
        carries[name] = params, tx.init(params)
        steps[name] = lambda carry, run=run: run(*carry, grads)
    times = relative_times(steps, carries, rounds)
    return {
        "format": FORMAT,
        "command": f"python -m benchmarks cost --side {side} --rounds {rounds}",
        "parameters": parameters,
        **environment(),
        "optimizers": {
            name: {"relative_time": times[name].ratio}
            | memory(compiled[name], parameters)
            for name in OPTIMIZERS
        },
        "training": {model: training_times(model, 100, rounds) for model in TRAINED},
        "inference": {model: inference_times(model, 100, rounds) for model in TRAINED},
        "forms": {model: forms_of(model, rounds) for model in TRAINED},
    }
