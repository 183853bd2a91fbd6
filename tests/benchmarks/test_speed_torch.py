"""PyTorch's steps, where it is installed, are ours."""

import time
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from benchmarks import programs, speed_parts, speed_torch


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "adam"),
        ({"walls": True}, "chain(adam, volumize)"),
        ({"walls": True, "momentum": True}, "volumized(adam)"),
    ],
)
def test_steps_are_the_same(options, name):
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 4096), np.float32)}  # walls at 0.019
    program = programs.program(name, shapes)
    params, _, grads = speed_parts.values(program.arguments)
    state = programs.STEPS[name]().init(params)
    leaves = speed_torch.tensors(shapes)
    run = speed_torch.step(shapes, leaves, **options)
    for _ in range(3):
        run(None)
        params, state = program.run(params, state, grads)
    np.testing.assert_allclose(
        leaves[0].detach().numpy(), params["kernel"], rtol=1e-4, atol=1e-7
    )


def test_what_takes_too_long_is_ended():
    with pytest.raises(speed_torch.TooLong), speed_torch.limited(1):
        time.sleep(20)
    with speed_torch.limited(1):
        pass
    time.sleep(1.1)
