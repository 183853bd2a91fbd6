"""Every function for users who let JAX refuse to broadcast between ranks."""

import functools

import jax
import jax.numpy as jnp
import pytest
import quick

import weightreg as wr

pytestmark = quick.everything

PARAMS = {
    "a": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
}
X, LABELS = jnp.ones((7, 6)), jnp.zeros(7, int)
PROBES = {"probes": 2, "key": jax.random.key(0)}


def network(x, *_):
    return jnp.tanh(x @ PARAMS["a"]["kernel"]) @ PARAMS["b"]["kernel"]


CALLS = {
    "input_gradient_norms": functools.partial(wr.input_gradient_norms, network),
    "jacobian_norms": functools.partial(wr.jacobian_norms, network),
    "jacobian_norms, probes": functools.partial(wr.jacobian_norms, network, **PROBES),
    "gbr": functools.partial(wr.gbr, network),
    "gbr, probes": functools.partial(wr.gbr, network, **PROBES),
    "probabilities": functools.partial(wr.gbr, wr.probabilities(network)),
    "label_probability": functools.partial(wr.gbr, wr.label_probability(network)),
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", CALLS)
def test_measures_and_their_derivatives(name, batch_size):
    def total(x):
        found = CALLS[name](x, LABELS, batch_size=batch_size)
        return sum(map(jnp.sum, jax.tree.leaves(found)))

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(total), X)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_bounds(norm):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(functools.partial(wr.input_gradient_bound, norm=norm), PARAMS)
        jax.eval_shape(wr.gbr_bounds, PARAMS)
