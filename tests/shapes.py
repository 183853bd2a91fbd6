"""Parameters of networks as shapes, and by their paths."""

import jax
import jax.numpy as jnp


def shapes_of(model, *shape):
    """The parameters as shapes, which takes no compiling."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def flat(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))
