"""VGG: its layers, its maxima, and what it drops."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal, randomized
from flax import linen as nn
from quick import jit as quick
from shapes import shapes_of

import weightreg as wr
from benchmarks import models, networks
from benchmarks.networks.vgg import maxima


def test_vgg16_has_thirteen_convolutions_and_two_dense_layers():
    params = shapes_of(networks.VGG(10), 1, 32, 32, 3)
    kernels = [layer.shape for layer in wr.weight_layers(params)]
    assert kernels[-2:] == [(512, 512), (512, 10)]
    features = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    channels = [3, *features[:-1]]
    expected = [(3, 3, n, m) for n, m in zip(channels, features, strict=True)]
    assert kernels[:-2] == expected


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 1, 2)])
def test_maxima_are_flaxs_and_so_is_their_gradient(shape):
    x, window = normal(*shape), (2, 2)
    pool = lambda x: nn.max_pool(x, window, window, "SAME")  # noqa: E731

    @quick
    def both(x):
        results = []
        for reduce in (maxima, pool):
            y, pullback = jax.vjp(reduce, x)
            results.append((y, *pullback(jnp.sin(y))))
        return results

    chex.assert_trees_all_close(*both(x), rtol=1e-6)


def test_half_of_the_dense_layers_units_are_dropped_in_training():
    """The outputs tell which, since there are more of them than units."""
    model, x = networks.VGG(10, (), 1), normal(40, 2, 2, 3)
    params = randomized(shapes_of(model, *x.shape))
    run = functools.partial(models.training_logits, model)
    logits, _ = quick(run)({"params": params}, x, jax.random.key(0))
    hidden, out = params["Dense_0"], params["Dense_1"]
    units = np.maximum(x.reshape(40, -1) @ hidden["kernel"] + hidden["bias"], 0)
    got = (logits - out["bias"]) @ np.linalg.pinv(out["kernel"])
    factors = got[units > 0.1] / units[units > 0.1]
    np.testing.assert_allclose(factors[factors > 1], 2, rtol=0.01)
    np.testing.assert_allclose(factors[factors < 1], 0, atol=0.01)
    assert 0.4 < np.mean(factors > 1) < 0.6
