"""What optimizers of methods do, and the maps of weights beside them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from shapes import flat, shapes_for

import weightreg as wr
from benchmarks import models
from benchmarks.methods import METHODS

pytestmark = quick.everything

NETWORK = {
    "Dense_0": {"kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.ones(2)},
    "Dense_1": {"kernel": jnp.array([[2.0, 1], [-1, 3]]), "bias": jnp.ones(2)},
}


HYPER = {"learning_rate": 1.0, "energy": 1e-3, "complexity": 0.0, "beta": 0.1}


def change(name, params, output):
    """What a method alone makes of weights, without a gradient of the loss."""
    tx = METHODS[name].build(HYPER, "momentum", output)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return flat(quick.jit(tx.update)(zeros, tx.init(params), params)[0])


def parseval_step(w):
    rows = np.asarray(w, np.float64).reshape(-1, w.shape[-1])
    return 0.1 * (rows - rows @ rows.T @ rows).reshape(w.shape)


def test_the_cnn_form_and_the_output_layer_of_parseval():
    """What the papers do otherwise in convolutions and in the last layer."""
    init = quick.jit(models.make("cnn8", 10).init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    output = models.MODELS["cnn8"].output
    penalty = wr.weissi(1e-3, 0.0, exponents=wr.cnn_exponents)
    expected = jax.tree.map(jnp.negative, quick.jit(jax.grad(penalty))(params))
    got = change("weissi_cnn", params, output)
    chex.assert_trees_all_close(got, flat(expected), rtol=1e-6)
    step, own = change("parseval", params, output), flat(params)
    np.testing.assert_allclose(step[output], -2e-4 * own[output], rtol=1e-6)
    convolutions = [
        path for path in own if path.startswith("Conv") and "kernel" in path
    ]
    assert len(convolutions) == 2
    for path in convolutions:
        np.testing.assert_allclose(step[path], parseval_step(own[path]), atol=1e-5)


# Those for ImageNet are the same at other strides.
@pytest.mark.parametrize("name", [n for n in models.MODELS if "imagenet" not in n])
def test_parseval_spares_the_output_layer_of_every_model(name):
    """And no other; all arrays are of two numbers an axis, which is quick."""
    shapes = shapes_for(name, 10)
    rng = np.random.default_rng(0)
    drawn = lambda leaf: jnp.asarray(rng.normal(size=[2] * leaf.ndim), jnp.float32)  # noqa: E731
    params, output = jax.tree.map(drawn, shapes), models.MODELS[name].output
    step, own = change("parseval", params, output), flat(params)
    for path, weight in flat(wr.weight_mask(params)).items():
        others = parseval_step(own[path]) if weight else np.zeros(own[path].shape)
        expected = -2e-4 * own[path] if path == output else others
        np.testing.assert_allclose(step[path], expected, atol=1e-5, err_msg=path)


def test_an_output_layer_that_is_not_there_is_an_error():
    message = "no 'Dense_2/kernel'; they have Dense_0/bias, Dense_0/kernel, Dense_1"
    with pytest.raises(ValueError, match=message):
        METHODS["parseval"].build(HYPER, "adam", "Dense_2/kernel").init(NETWORK)


def test_baselines_give_units_their_own_norm():
    params = {
        "a": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))}
    }
    kernel = METHODS["wn"].norm({})(params)["a"]["kernel"]
    np.testing.assert_allclose(jnp.sum(kernel**2, 0), 1.0, rtol=1e-5)
    kernel = METHODS["ws"].norm({})(params)["a"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel, 0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(kernel, 0), 0.0, atol=1e-6)


def test_straight_through_is_the_gradient_of_the_quantized_network():
    """With respect to its weights, in the place of that by the stored ones."""
    hyper, method = {"v": 0.3}, METHODS["ternary_ste"]
    quantize = method.norm(hyper)
    loss = lambda p: jnp.sum(jnp.sin(p["Dense_0"]["kernel"]) ** 2)  # noqa: E731
    got = jax.grad(lambda p: loss(quantize(p)))(NETWORK)
    expected = jax.grad(loss)(wr.ternarize(NETWORK, method.walls(hyper)))
    chex.assert_trees_all_close(got, expected)
    assert jnp.any(
        got["Dense_0"]["kernel"] != jax.grad(loss)(NETWORK)["Dense_0"]["kernel"]
    )
