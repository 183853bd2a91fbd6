"""Methods: what they do, and how they are searched."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import weightreg as wr
from benchmarks import models
from benchmarks.methods import BASES, METHODS, at_edge, trials

NETWORK = {
    "Dense_0": {"kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.ones(2)},
    "Dense_1": {"kernel": jnp.array([[2.0, 1], [-1, 3]]), "bias": jnp.ones(2)},
}


tree_leaves = jax.tree_util.tree_leaves_with_path


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if "box" not in name])
def test_every_hyperparameter_acts_and_only_weights_are_regularized(name, base):
    space = METHODS[name].whole_space(base, NETWORK)
    if fixed := METHODS[name].fixed:
        space = {k: (value, 100 * value or 0.1) for k, value in fixed.items()}
    if "one_minus_alpha" in space:
        space["one_minus_alpha"] = (1e-4, 1.0)
    params = NETWORK
    grads = [jax.tree.map(lambda p, c=c: c * p, params) for c in (1.0, -0.5)]

    def trained(hyper):
        tx, new = METHODS[name].build(hyper, base, epoch=2), params  # not quantized yet
        state = tx.init(new)
        for g in grads:
            updates, state = tx.update(g, state, new)
            new = optax.apply_updates(new, updates)
        return new

    middle = {k: float(np.sqrt(low * high)) for k, (low, high) in space.items()}
    for parameter, (_, high) in space.items():
        one, other = trained(middle), trained(middle | {parameter: high})
        one, other = one["Dense_0"], other["Dense_0"]
        assert jnp.any(one["kernel"] != other["kernel"])
        unchanged = bool(jnp.all(one["bias"] == other["bias"]))
        assert unchanged == (parameter != "learning_rate")


@pytest.mark.parametrize("name", METHODS)
def test_trials_fill_the_space_of_every_method_alike(name):
    space = METHODS[name].whole_space("adam", NETWORK)
    tried = trials(space, 64)
    assert len(tried) == 64 and tried == trials(space, 64)
    for parameter, (low, high) in space.items():
        places = [np.log(t[parameter] / low) / np.log(high / low) for t in tried]
        assert np.all(np.histogram(places, 4, (0, 1))[0] >= 14)


def test_the_edge_of_a_range_is_told():
    space = {"learning_rate": (1e-4, 1e-2), "strength": (1e-2, 1e2)}
    middle = {"learning_rate": 1e-3, "strength": 1.0}
    assert at_edge(space, middle) == []
    assert at_edge(space, middle | {"strength": 1.01e-2}) == ["strength"]


def test_an_energy_that_no_strength_outweighs_is_refused():
    deep = {f"Dense_{i}": jnp.full((4, 4), 1e3) for i in range(100)}
    with pytest.raises(ValueError, match="compare weissi_log"):
        METHODS["weissi"].whole_space("adam", deep)


def test_the_cnn_form_and_the_output_layer_of_parseval(digits):
    """What the papers do otherwise in convolutions and in the last layer."""
    model = models.make("cnn8", 10)
    init = quick.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    hyper = {"learning_rate": 1.0, "energy": 1e-3, "complexity": 0.0, "beta": 0.1}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def change(name):
        tx = METHODS[name].build(hyper, "momentum")
        return quick.jit(tx.update)(zeros, tx.init(params), params)[0]

    penalty = wr.weissi(1e-3, 0.0, exponents=wr.cnn_exponents)
    expected = jax.tree.map(jnp.negative, quick.jit(jax.grad(penalty))(params))
    chex.assert_trees_all_close(change("weissi_cnn"), expected, rtol=1e-6)
    *convolutions, last = (layer.path for layer in wr.weight_layers(params))
    step = {jax.tree_util.keystr(k): v for k, v in tree_leaves(change("parseval"))}
    own = {jax.tree_util.keystr(k): v for k, v in tree_leaves(params)}
    np.testing.assert_allclose(step[last], -2e-4 * own[last], rtol=1e-6)
    assert "Dense" in last and len(convolutions) == 2
    for path in convolutions:
        w = np.asarray(own[path], np.float64).reshape(-1, own[path].shape[-1])
        want = 0.1 * (w - w @ w.T @ w)
        np.testing.assert_allclose(step[path].reshape(w.shape), want, atol=1e-5)


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
