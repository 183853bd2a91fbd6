"""Which devices JAX uses, and whether the machine has better ones that it does not see.

To add a kind of accelerator, add an entry to `ACCELERATORS`.
"""

import functools
import os
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Accelerator(NamedTuple):
    """How the system shows one, and what JAX needs for it.

    Attributes:
      files: Pattern of the device files by which a process reaches them.
      extra: Of JAX, that has to be installed.
    """

    files: str
    extra: str


ACCELERATORS: dict[str, Accelerator] = {
    "an NVIDIA GPU": Accelerator("dev/nvidia[0-9]*", "cuda13"),
    "an AMD GPU": Accelerator("dev/kfd", "rocm7-local"),
    "a TPU": Accelerator("dev/accel[0-9]*", "tpu"),
}


def announce() -> None:
    """Says on standard error what is going to run where. JAX starts, if it has not."""
    print(f"on {described()} (JAX {jax.__version__})", file=sys.stderr)
    for line in unseen(jax.default_backend(), os.environ.get("JAX_PLATFORMS")):
        print(line, file=sys.stderr)


def described() -> str:
    """How many devices there are, and of which kind."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


@functools.cache
def rate() -> float:
    """Operations a second of this machine's first device, in products of float32."""
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(6):  # the first one compiles
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def unseen(
    backend: str, asked: str | None, root: pathlib.Path = pathlib.Path("/")
) -> list[str]:
    """A warning for each kind of accelerator that the system has and JAX does not use.

    There is none where JAX runs on an accelerator, or the user has chosen a platform.

    Args:
      backend: JAX's default one.
      asked: The platforms that the user has asked for, if any.
      root: Of the file system.
    """
    if backend != "cpu" or asked:
        return []
    return [
        f"warning: {name} is here ({found[0]}), but JAX runs on CPU: pip install "
        f"'jax[{extra}]', or set JAX_PLATFORMS=cpu if that is meant."
        for name, (files, extra) in ACCELERATORS.items()
        if (found := sorted(root.glob(files)))
    ]
