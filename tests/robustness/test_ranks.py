"""Every function for users who let JAX refuse to broadcast between ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import weightreg as wr

X, LABELS = jnp.full((5, 2, 3), 0.5), jnp.zeros(5, int)
CENTRE = wr.max_mahalanobis(classes=3, features=6)
BOUNDS = {"numbers": (0, 1), "arrays": (np.zeros(3), np.ones(3)), "none": None}


def loss(x, y):
    return jnp.sum(x**2, (1, 2)) * (1 + y)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("epsilon", [0.1, np.full(5, 0.1)], ids=["one", "each"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks(norm, epsilon, bounds):
    given = {"norm": norm, "bounds": BOUNDS[bounds]}
    draws = {"key": jax.random.key(0), "restarts": 2}
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda x: wr.fgsm(loss, x, LABELS, epsilon, **given), X)
        attack = lambda x: wr.pgd(loss, x, LABELS, epsilon, steps=2, **draws, **given)  # noqa: E731
        jax.eval_shape(attack, X)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "loss", [wr.generalized_cross_entropy, CENTRE], ids=["cross-entropy", "centre"]
)
def test_losses(loss, shape):
    labels = jnp.zeros(shape[:-1], int)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(lambda z: loss(z, labels).sum()), jnp.ones(shape))
        jax.eval_shape(CENTRE.logits, jnp.ones(shape))
