"""What a regularizer adds to a training step on an H100, by its compiler's plan.

A plan counts kernels and bytes and times nothing. What these take lies between bounds
that follow from two numbers that were measured on such a card, what a copy within its
memory moves in a second and how long the bare step runs, and from one that was not: a
kernel takes at most three microseconds beside its bytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks import models, targets, training

ABOUT = (
    "Training steps of ResNet-18 on images of 32 by 32 in batches of 128, with Adam in "
    "float32. Bytes alone: the time of a step over the bare one's 5.02 ms, if what it "
    "adds moves at 2.44 TB/s. At most: likewise, if each kernel takes 3 µs beside. The "
    "last column says how many µs it may take for the limit to hold. Where such steps "
    "were timed on a card, at commit 5a8b5f9, a kernel took 0.7 to 1 µs with WEISSI "
    "(1.06 and 1.07 of the bare step's time; 230 kernels and 317 MB more in its plan) "
    "and 1.7 µs with equivalent norms (1.10; 162 kernels and 554 MB)."
)
MODEL, CLASSES, BATCH = "resnet18_norm", 10, 128
BYTES_A_SECOND = 2.44e12  # of a copy within an H100's memory
SECONDS_A_KERNEL = 3e-6  # not measured; more than launching one by one takes
BARE_SECONDS = 5.02e-3  # of the step without regularization
# Times of steps over the bare one's, which are not to be exceeded.
LIMITS: dict[str, float] = {
    "volumized": 1.03,
    "weissi in the loss": 1.03,
    "add_weissi": 1.03,
    "equivalent_norm": 1.04,
    "add_shifted_l2": 1.03,
}
COMPILED = ("none", *LIMITS)


def counts(
    target: str, tick: Callable[[str], None] = lambda what: None
) -> dict[str, dict[str, dict[str, float]]]:
    """What each step has beside the bare one, and what that takes at most.

    Args:
      target: Name in `benchmarks.targets.TARGETS`.
      tick: Called with a name before each program is compiled.
    """
    targets.device(target)
    model = models.make(MODEL, CLASSES)
    x = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    y = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    task = training.Task(training.cross_entropy(model), variables, x, y)
    planned = {}
    for name in COMPILED:
        tick(name)
        regularizer = training.REGULARIZERS[name]
        program = training.step(task, regularizer, optax.adam(1e-3))
        planned[name] = targets.plan(target, *program)
    bare = planned["none"]
    return {
        f"{MODEL}, batch {BATCH}": {
            name: _row(name, plan, bare) for name, plan in planned.items()
        }
    }


def _row(name: str, plan: targets.Plan, bare: targets.Plan) -> dict[str, float]:
    kernels, bytes = plan.kernels - bare.kernels, plan.bytes - bare.bytes
    row = {
        "kernels": plan.kernels,
        "gigabytes": round(plan.bytes / 1e9, 3),
        "temporary gigabytes": round(plan.temporary_bytes / 1e9, 3),
        "added kernels": kernels,
        "added megabytes": round(bytes / 1e6, 1),
        "bytes alone": round(ratio(0, bytes), 3),
        "at most": round(ratio(kernels, bytes), 3),
    }
    if name not in LIMITS:
        return row
    left = (LIMITS[name] - ratio(0, bytes)) * BARE_SECONDS
    return row | {
        "limit": LIMITS[name],
        "µs a kernel": round(1e6 * left / max(kernels, 1), 2),
    }


def ratio(kernels: int, bytes: float) -> float:
    """Time of a step over the bare one's, from what it has beside that one.

    Kernels and bytes are taken to wait for each other, which on a card they do not.
    """
    added = max(kernels, 0) * SECONDS_A_KERNEL + max(bytes, 0) / BYTES_A_SECOND
    return 1 + added / BARE_SECONDS
