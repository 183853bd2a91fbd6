"""Small dense networks of which sensitivity is measured and bounded."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import quick

from weightreg import input_gradient_norms


def norms_of(f, x, *args, **kwargs):
    """Compiled, which takes less time than step by step."""
    compiled = quick.jit(lambda x, *args: input_gradient_norms(f, x, *args, **kwargs))
    return compiled(x, *args)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relu_mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def random_mlp(rng, widths):
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(a, b)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=b), jnp.float32),
        }
        for a, b in itertools.pairwise(widths)
    ]
