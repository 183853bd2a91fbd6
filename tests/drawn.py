"""Normal numbers, the same at every call, for what is not to be zero."""

import jax
import numpy as np


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomized(params, scale=0.3):
    """The same tree with normal numbers, so that nothing is zero."""
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        np.float32(scale) * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)
