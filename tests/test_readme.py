"""The README's lines run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import weightreg as wr

README = pathlib.Path(__file__).parent.parent / "README.md"
(USE,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
LEVELS = jnp.array([-1, 0, 1]) * jnp.float32(0.5 * 3**0.5)  # of two units
TRANSFORMATION = re.compile(r"^tx = .*$", re.MULTILINE)


def names(folder=pathlib.Path()):
    """What the lines take for given."""
    dense = lambda n: {"kernel": jnp.ones((n, 2)), "bias": jnp.ones(2)}  # noqa: E731
    params = {"Dense_0": dense(3), "Dense_1": dense(2)}

    def model(x):
        for layer in params.values():
            x = x @ layer["kernel"] + layer["bias"]
        return x

    return {
        "params": params,
        "loss": lambda x, y: jnp.sum((model(x).T - y) ** 2, 0),
        "x": jnp.full((4, 3), 0.5),
        "y": jnp.zeros(4, int),
        "key": jax.random.key(0),
        "model": model,
        "file": folder / "network.safetensors",
        "net_loss": lambda params: jnp.sum(params["Dense_0"]["kernel"]),
    }


def test_the_other_lines_run(tmp_path):
    given = names(tmp_path)
    exec(USE, given)
    assert max(given["far"].values()) > 0
    assert jnp.all(jnp.isin(wr.unpack(given["packed"])["Dense_0"]["kernel"], LEVELS))
    assert [layer.fan_in for layer in given["layers"]] == [3, 2]
    assert given["x_adv"].shape == given["x"].shape
    assert jnp.isfinite(given["penalty"]) and given["norms"].shape == (4, 2)
    assert jnp.isfinite(given["gbr"]) and given["estimate"].mean.shape == (4,)
    assert len(given["left"]) == 2


@pytest.mark.parametrize("line", TRANSFORMATION.findall(USE))
def test_every_transformation_steps(line):
    given, start = names(), USE[: USE.index("tx = ")]
    exec(start + line, given)
    params, tx = given["params"], given["tx"]
    updates, _ = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for layer in new.values():
        kernel = layer["kernel"]
        assert jnp.all(jnp.isfinite(kernel)) and jnp.any(kernel != 1)
