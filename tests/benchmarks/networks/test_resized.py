"""Images are scaled before a network, which is the same network else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from drawn import normal, randomized

from benchmarks import models
from benchmarks.networks import MLP, NormMLP, Resized

pytestmark = quick.everything


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 2, 4, 3)])
def test_a_network_sees_images_of_another_size(shape):
    inner = NormMLP((4,), 2)
    resized, x = Resized(inner, 3), normal(*shape)
    scaled = jax.image.resize(x, (shape[0], 3, 3, *shape[3:]), "bilinear")
    variables = jax.eval_shape(inner.init, jax.random.key(0), scaled)
    own = jax.eval_shape(resized.init, jax.random.key(0), x)
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    assert jax.tree.leaves(own) == jax.tree.leaves(variables)
    network = {
        "params": randomized(variables["params"]),
        "batch_stats": jax.tree.map(
            lambda leaf: np.ones(leaf.shape, leaf.dtype), variables["batch_stats"]
        ),
    }

    @jax.jit
    def both(x, scaled):
        gradient = jax.grad(lambda x: models.logits(resized, network, x).sum())(x)
        return gradient, *(
            (models.logits(m, network, i), models.training_logits(m, network, i))
            for m, i in ((resized, x), (inner, scaled))
        )

    gradient, got, expected = both(x, scaled)
    assert gradient.shape == x.shape  # so that attacks move the pixels of the data
    assert "batch_stats" in got[1][1]
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_known_of_a_network_is_known_of_it_resized():
    plain = models.make("efficientnet_lite0", 3, jnp.bfloat16)
    resized = models.make("efficientnet_lite0", 3, jnp.bfloat16, resize=32)
    assert isinstance(resized, Resized)
    assert resized.trains and resized.dropout == 0.2
    assert models.describe(resized) == {**models.describe(plain), "resize": 32}
    assert not Resized(MLP((4,), 2), 3).trains
    float32 = models.in_dtype(resized, jnp.float32)
    assert float32 == models.make("efficientnet_lite0", 3, resize=32)
