"""The recurrent network against Flax's cell, and what its padding and vectors do."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit as quick
from shapes import flat, shapes_of

import weightreg as wr
from benchmarks import models
from benchmarks.networks.attention import LSTM, LSTMAttention

SMALL = LSTMAttention(3, hidden=4)
VECTORS = jax.random.normal(jax.random.key(1), (9, 5))
X = jnp.array([[2, 5, 8, 3], [7, 1, 0, 0]])


@pytest.fixture(scope="module")
def variables():
    """Of the small network, whose vectors are given as training gives them."""
    constants = {"constants": {"vectors": VECTORS}}
    start = quick(lambda key: SMALL.apply(constants, X, rngs=key, mutable=["params"]))
    return start({"params": jax.random.key(0)})[1] | constants


logits = quick(SMALL.apply)


def test_the_layer_is_flaxs():
    rng, x = np.random.default_rng(0), np.ones((6, 2, 5), np.float32)
    shapes = shapes_of(LSTM(4), *x.shape)
    x, params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), (x, shapes)
    )
    cell = {}
    for ours, flaxs in zip(("input", "forget", "cell", "output"), "ifgo", strict=True):
        seen, state = params[f"{ours}_x"], params[f"{ours}_h"]
        cell[f"i{flaxs}"] = {"kernel": seen["kernel"]}
        cell[f"h{flaxs}"] = {"kernel": state["kernel"], "bias": seen["bias"]}
    rnn = nn.RNN(nn.OptimizedLSTMCell(4), time_major=True)
    expected = quick(rnn.apply)({"params": {"cell": cell}}, x)
    got = quick(LSTM(4).apply)({"params": params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_padding_changes_nothing(variables):
    longer = jnp.pad(X[:, :2], ((0, 0), (0, 3)))
    got, padded = logits(variables, X), logits(variables, longer)
    np.testing.assert_allclose(padded[1], got[1], atol=1e-6)
    assert np.abs(padded[0] - got[0]).max() > 1e-3


def test_every_word_and_its_place_count(variables):
    got = logits(variables, X)
    for other in (X.at[0, 3].set(4), X[:, ::-1]):
        assert np.abs(logits(variables, other)[0] - got[0]).min() > 1e-6


def test_a_text_of_padding_alone_has_logits(variables):
    assert np.all(np.isfinite(logits(variables, jnp.zeros_like(X))))


@pytest.mark.parametrize("number", [9, 100, -1])
def test_numbers_without_a_vector_are_no_other_words(number, variables):
    got = logits(variables, X.at[0, 1].set(number))
    assert np.all(np.isnan(got[0])) and np.all(np.isfinite(got[1]))


def test_vectors_that_are_not_given_are_missed():
    started = quick(lambda key: SMALL.init(key, X)["constants"])(jax.random.key(0))
    assert np.all(np.isnan(started["vectors"]))


def test_vectors_are_not_trained(variables):
    assert set(variables) == {"params", "constants"}
    assert not any("vectors" in path for path in flat(variables["params"]))


@pytest.mark.parametrize("x", [jnp.ones((2, 4)), jnp.ones(4, int), jnp.ones((1, 1, 4))])
def test_what_is_no_text_is_refused(x, variables):
    with pytest.raises(ValueError, match=r"takes texts as integers of .* not \w+ of"):
        SMALL.apply(variables, x)


def test_weights_are_gates_apart(variables):
    """By their names and by what is computed, each with its own fan."""
    params = variables["params"]

    def fn(params, x):
        return SMALL.apply({**variables, "params": params}, x)

    net = wr.trace_network(fn, params, X)
    by_name = {layer.path: layer for layer in wr.weight_layers(params)}
    by_trace = {layer.path: layer for layer in net.layers}
    assert by_name.keys() == by_trace.keys() and len(by_name) == 4 + 4 + 3
    for path, layer in by_trace.items():
        assert (layer.fan_in, layer.fan_out) == by_name[path].shape
        rows = 5 if "_x" in path else 4
        assert layer.fan_in == rows
        assert layer.calls == (X.shape[1] if "_h" in path else 1)


def test_layers_alone_compute_in_bfloat16(variables):
    """What the cells remember, the shares of words and logits are float32."""
    model = SMALL.clone(dtype=jnp.bfloat16)
    narrow = quick(models.logits, static_argnums=0)(model, variables, X)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, logits(variables, X), atol=0.03)
    program = str(jax.make_jaxpr(model.apply)(variables, X))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", program)
    assert len(products) == 6 and set(products) == {"bf16"}
    (carried,) = re.findall(r":(\w+)\[2,4\] = add", program)
    assert carried == "f32"  # what the cells remember
