"""What compiled steps read, write and hold, which does not depend on the machine.

Times do depend on it, so nothing here is timed.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cost import OPTIMIZERS, compiled_step, memory

PARAMS = {str(i): jnp.ones((256, 256)) for i in range(4)}
COUNT = 4 * 256**2


def step_memory(name):
    return memory(compiled_step(OPTIMIZERS[name](), PARAMS, PARAMS), COUNT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other fusions on a GPU")
@pytest.mark.parametrize(
    ("name", "moved", "held"),
    [("adam", 40, 0), ("chain(adam, volumize)", 40, 0), ("volumized(adam)", 68, 5)],
)
def test_memory_of_a_step(name, moved, held):
    """Bytes a parameter, of which Adam cannot do with fewer than 28."""
    got = step_memory(name)
    assert got["bytes"] <= moved + 1
    assert got["temporary_bytes"] <= held + 0.2
