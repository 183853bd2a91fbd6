"""PyTorch's steps, where it is installed, are ours."""

import time

import jax
import numpy as np
import pytest

from benchmarks import programs, speed_parts, speed_torch


@pytest.mark.skipif(not speed_torch.find_spec("torch"), reason="torch is not installed")
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
    run = speed_torch.step(shapes, **options)
    for _ in range(3):
        run()
        params, state = program.run(params, state, grads)
    np.testing.assert_allclose(
        run.leaves[0].detach().numpy(), params["kernel"], rtol=1e-4, atol=1e-7
    )


def test_what_takes_too_long_is_ended():
    with pytest.raises(TimeoutError), speed_torch.limited(1):
        time.sleep(20)
    with speed_torch.limited(1):
        pass
    time.sleep(1.1)
