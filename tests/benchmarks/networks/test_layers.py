"""What several networks are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from quick import jit as quick

from benchmarks import models, networks
from benchmarks.networks.layers import as_images


def test_images_may_lack_the_axis_of_channels():
    x = normal(2, 3, 4)
    np.testing.assert_array_equal(as_images(x), x[..., None])
    np.testing.assert_array_equal(as_images(x[..., None]), x[..., None])


NORMED = {
    "mlp_norm": networks.NormMLP((16,), 10),
    "resnet_norm": networks.NormResNet(10, (1, 2), 4),
    "bottleneck": networks.NormResNet(10, (1, 1), 4, 1, True, groups=2, inner=2),
    "densenet": networks.DenseNet(10, (1, 1), 4),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_normalization_follows_every_kernel(name):
    """Hence the scale of no unit's weights changes the outputs, the last one's too."""
    model, x = NORMED[name], 10 * normal(16, 8, 8, 3)
    variables = quick(model.init)(jax.random.key(0), x[:1])
    rng = np.random.default_rng(0)
    run = quick(lambda v: models.training_logits(model, v, x))
    logits, after = run(variables)
    scaled = jax.tree.map(
        lambda p: p * rng.uniform(1, 4, p.shape[-1]) if p.ndim > 1 else p,
        variables["params"],
    )
    got, _ = run({**variables, "params": scaled})
    np.testing.assert_allclose(got, logits, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(jnp.mean(logits, 0), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(logits, 0), 1, rtol=1e-3)
    assert after.keys() == {"batch_stats"}
    before = jax.tree.leaves(variables["batch_stats"])
    moved = zip(before, jax.tree.leaves(after), strict=True)
    assert all(np.abs(a - b).max() > 0 for a, b in moved)
    inference = quick(functools.partial(models.logits, model))(
        {**variables, **after}, x
    )
    assert inference.shape == (16, 10) and np.abs(inference - logits).max() > 0.01
