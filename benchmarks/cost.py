"""What a step of an optimizer costs: time, memory traffic and temporaries."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import weightreg as wr
from benchmarks.record import environment

LEAVES = 16
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3, mask=wr.weight_mask),
    "chain(adam, volumize)": lambda: optax.chain(
        optax.adam(1e-3), wr.volumize(wr.he_volume(0.5), 0.99)
    ),
    "volumized(adam)": lambda: wr.volumized(
        optax.adam(1e-3), wr.he_volume(0.5), alpha=0.99
    ),
}


def relative_times(
    steps: dict[str, Callable[[Any], Any]], carries: dict[str, Any], rounds: int = 200
) -> dict[str, float]:
    """Time of each step over that of the first: the median of ratios.

    The steps take turns in one process, in another order each round, so that what else
    the machine does, and who went before, hits them alike.

    Args:
      steps: Compiled functions from a carry to the next.
      carries: What each starts from.
      rounds: How many turns each has.
    """
    rng = np.random.default_rng(0)
    carries = {name: step(carries[name]) for name, step in steps.items()}  # warm up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in rng.permutation(list(steps)).tolist():
            jax.block_until_ready(carries[name])
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](carries[name]))
            times[name].append(time.perf_counter() - start)
    base = times[next(iter(steps))]
    return {
        name: round(statistics.median(t / b for t, b in zip(own, base, strict=True)), 3)
        for name, own in times.items()
    }


def compiled_step(tx: optax.GradientTransformation, params: Any, grads: Any):
    """The optimizer's part of a step, compiled with parameters and state donated.

    Both come first, and in this order they go out: XLA pairs donated inputs with
    outputs in turn, and copies every array where the orders differ.
    """

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, grads).compile()


def memory(compiled, parameters: int) -> dict[str, float]:
    """Bytes a parameter that a compiled step reads and writes, and holds beside."""
    return {
        "bytes": round(compiled.cost_analysis()["bytes accessed"] / parameters, 1),
        "temporary_bytes": round(
            compiled.memory_analysis().temp_size_in_bytes / parameters, 1
        ),
    }


def run(side: int, rounds: int) -> dict:
    """Measures all optimizers on ``LEAVES`` float32 kernels of ``side`` by ``side``."""
    keys = jax.random.split(jax.random.key(0), LEAVES)
    grads = {str(i): jax.random.normal(k, (side, side)) for i, k in enumerate(keys)}
    parameters = LEAVES * side**2
    compiled, steps, carries = {}, {}, {}
    for name, make in OPTIMIZERS.items():
        tx = make()
        compiled[name] = step = compiled_step(tx, grads, grads)
        params = jax.tree.map(lambda g: jnp.array(0.01 * g), grads)
        carries[name] = params, tx.init(params)
        steps[name] = lambda carry, step=step: step(*carry, grads)
    times = relative_times(steps, carries, rounds)
    return {
        "command": f"python -m benchmarks cost --side {side} --rounds {rounds}",
        "parameters": parameters,
        **environment(),
        "optimizers": {
            name: {"relative_time": times[name]} | memory(compiled[name], parameters)
            for name in OPTIMIZERS
        },
    }
