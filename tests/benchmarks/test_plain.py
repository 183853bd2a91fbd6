"""Plain Flax and Optax train the same network by the same step."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit as quick
from shapes import shapes_of

from benchmarks import models, networks, plain


def renamed(variables):
    """The tree of our network by the names of Flax's layers."""
    if not isinstance(variables, dict):
        return variables
    new = lambda name: re.sub("^Norm(?=Block)|olution", "", name)  # noqa: E731
    return {new(name): renamed(leaf) for name, leaf in variables.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_resnet18_norm_has_the_same_parameters(dtype):
    ours = shapes_of(models.make("resnet18_norm", 10, dtype=dtype), 1, 32, 32, 3)
    assert renamed(ours) == shapes_of(plain.resnet18(10, dtype), 1, 32, 32, 3)


def test_the_network_is_the_same():
    """In a step, and after it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 6, 3)).astype(np.float32)
    ours = networks.NormResNet(10, (1, 1), 20, 1)
    theirs = plain.ResNet(10, (1, 1), 20, jnp.float32)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    draw = lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype)  # noqa: E731
    variables = jax.tree.map(draw, variables)

    @quick
    def both(variables, x):
        logits, after = models.training_logits(ours, variables, x)
        known = renamed(variables)
        expected, stats = theirs.apply(known, x, train=True, mutable=["batch_stats"])
        last = models.logits(ours, {**variables, **after}, x)
        return (
            (logits, renamed(after), last),
            (expected, stats, theirs.apply({**known, **stats}, x)),
        )

    got, expected = both(variables, x)
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-3)
    assert np.std(got[0]) > 0.1


def test_the_step_keeps_shapes_and_dtypes():
    model, x = plain.ResNet(10, (1,), 4, jnp.bfloat16), jnp.zeros((2, 6, 6, 3))
    tx, y = optax.adam(1e-3), jnp.zeros(2, int)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    start = params, stats, jax.eval_shape(tx.init, params)
    one = functools.partial(plain.train_step, model, tx)
    assert jax.eval_shape(one, *start, x, y) == start
