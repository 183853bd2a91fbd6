"""EfficientNet-Lite0: how its blocks are skipped."""

import functools

import jax
import numpy as np
from drawn import normal, randomized
from quick import jit as quick

from benchmarks.networks.efficientnet import InvertedBlock


def test_examples_skip_a_block_in_training():
    h = normal(40, 3, 3, 2)
    kept = InvertedBlock(2, 3, 3, 1, dropout=0.0)
    init = functools.partial(kept.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), h)
    network = {**variables, "params": randomized(variables["params"])}
    network["batch_stats"] = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables["batch_stats"]
    )

    def branch(dropout):
        block = kept.clone(dropout=dropout)
        rngs = {"dropout": jax.random.key(0)}
        out, _ = block.apply(network, h, True, rngs=rngs, mutable=["batch_stats"])
        return out - h

    whole, some = quick(lambda: (branch(0.0), branch(0.25)))()
    ratios = np.sum(some * whole, (1, 2, 3)) / np.sum(whole**2, (1, 2, 3))
    skipped = np.abs(ratios) < 1e-3
    np.testing.assert_allclose(ratios[~skipped], 4 / 3, rtol=1e-3)
    np.testing.assert_allclose(some[~skipped] * 0.75, whole[~skipped], atol=1e-3)
    assert 0.1 < skipped.mean() < 0.4
