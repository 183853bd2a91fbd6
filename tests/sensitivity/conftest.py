"""Here networks are compared with formulas, which a GPU's default is too coarse for."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
