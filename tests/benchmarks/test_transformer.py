"""The transformer whose layers are scanned."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import transformer
from benchmarks.transformer import Size

SIZE = Size(layers=3, width=16, vocabulary=11, length=5)


def noise(shapes):
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def test_tokens_see_what_came_before_them_in_all_layers():
    params, run = noise(transformer.shapes(SIZE)), jax.jit(transformer.logits)
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    logits = run(params, tokens)
    assert logits.shape == (1, 5, 11) and jnp.all(jnp.isfinite(logits))
    later = run(params, tokens.at[0, 3].set(9))
    np.testing.assert_allclose(later[0, :3], logits[0, :3], rtol=1e-5)
    assert np.abs(later[0, 4] - logits[0, 4]).max() > 1e-2
    for layer in range(SIZE.layers):
        kernel = params["blocks"]["down"]["kernel"].at[layer].set(0)
        other = {**params["blocks"], "down": {**params["blocks"]["down"]}}
        other["down"]["kernel"] = kernel
        assert np.abs(run({**params, "blocks": other}, tokens) - logits).max() > 1e-2
