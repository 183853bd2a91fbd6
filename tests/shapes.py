"""Parameters of networks as shapes, and by their paths."""

import jax
import jax.numpy as jnp

from benchmarks import models


def shapes_of(model, *shape, dtype=jnp.float32):
    """The parameters as shapes, which takes no compiling."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def shapes_for(name, classes):
    """Those of a network by its name, for small images or for short texts."""
    model = models.make(name, classes)
    if name == "lstm_attention":
        return shapes_of(model, 2, 12, dtype=jnp.int32)
    return shapes_of(model, 2, 12, 12, 3)


def flat(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))
