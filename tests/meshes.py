"""Meshes of virtual CPU devices, whatever other devices a machine has."""

import math
import re

import jax
import pytest
from jax.sharding import AxisType, Mesh

# Operations by which devices tell each other something.
COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-broadcast"
    r"|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\((.*?)\)"
)


def cpu_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], axis_type: AxisType = AxisType.Auto
) -> Mesh:
    """A mesh of the first CPU devices. Skips the test where there are too few."""
    needed, devices = math.prod(shape), cpu_devices()
    if len(devices) < needed:
        pytest.skip(f"needs {needed} CPU devices and there are {len(devices)}")
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[:needed])


def cpu_devices() -> list[jax.Device]:
    """All CPU devices, of which there are none where JAX is told to start none."""
    try:
        return jax.devices("cpu")
    except RuntimeError:
        return []


def collectives(program: str) -> dict[str, int]:
    """What devices tell each other, and the most numbers of an array among it.

    Operands and results are both counted, whichever of them the compiler's text tells
    the shapes of.
    """
    largest = {}
    for result, name, operands in COLLECTIVE.findall(program):
        for dims in re.findall(r"\b[a-z]\w*\[([\d,]*)\]", result + operands):
            size = math.prod(int(d) for d in dims.split(",") if d)
            largest[name] = max(size, largest.get(name, 0))
    return largest
