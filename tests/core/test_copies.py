"""Rules and what describes networks are values: copies of them are equal."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import weightreg as wr
import weightreg.nnx

PARAMS = {"kernel": jnp.arange(12.0).reshape(3, 4) - 5, "bias": jnp.ones(4)}
DIMS = {"kernel": optax.contrib.MuonDimensionNumbers((0,), (1,)), "bias": None}
MASK = {"kernel": True, "bias": False}


def traced(size=3):
    """Of a linen network."""
    net = nn.Sequential([nn.Dense(size), nn.relu, nn.Dense(2)])
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 4)))
    return wr.trace_network(net.apply, params, jnp.ones((1, 4)))


def traced_nnx():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return weightreg.nnx.trace_network(model, jnp.ones((1, 3)))


VALUES = {
    "he_volume": lambda: wr.he_volume(0.5, "in", mask=MASK),
    "he_volume, dims": lambda: wr.he_volume(0.5, dims=DIMS),
    "he_volume, network": lambda: wr.he_volume(0.5, dims=traced()),
    "lipschitz_volume": lambda: wr.lipschitz_volume(2.0, dims=DIMS),
    "equivalent_norm": lambda: wr.equivalent_norm(),
    "equivalent_norm, told": lambda: wr.equivalent_norm(
        "layer", False, jnp.float32(2.0), learn=True, dims=traced_nnx()
    ),
    "max_mahalanobis": lambda: wr.max_mahalanobis(3, 4),
    "WeightLayer": lambda: wr.weight_layers(PARAMS)[0],
    "Network": traced,
    "Network, nnx": traced_nnx,
    "PackedWeight": lambda: wr.pack(PARAMS, 0.5, "ternary")["kernel"],
}


@pytest.mark.parametrize("name", VALUES)
def test_copies_are_equal(name):
    value = VALUES[name]()
    for made in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert type(made) is type(value)
        assert made is not value
        assert made == value
        assert all(made != VALUES[other]() for other in VALUES if other != name)


def test_what_differs_is_not_equal():
    assert traced() == traced() != traced(size=5)
    assert hash(traced()) == hash(traced())
    packed = wr.pack(PARAMS, 0.5, "ternary")["kernel"]
    others = [
        wr.pack({**PARAMS, "kernel": -PARAMS["kernel"]}, 0.5, "ternary")["kernel"],
        wr.pack(PARAMS, 0.25, "ternary")["kernel"],
        wr.pack(PARAMS, 0.5, "binary")["kernel"],
        wr.pack(jax.tree.map(jnp.bfloat16, PARAMS), 0.5, "ternary")["kernel"],
        None,
    ]
    assert all(packed != other for other in others)
    shapes = jax.eval_shape(lambda: packed)
    assert shapes == jax.eval_shape(lambda: packed)


def test_a_copied_rule_does_what_the_rule_does():
    rule = pickle.loads(pickle.dumps(wr.he_volume(0.5, dims=DIMS)))
    assert rule(PARAMS) == wr.he_volume(0.5)(PARAMS)
    packed = pickle.loads(pickle.dumps(wr.pack(PARAMS, 0.5, "binary")))
    unpacked = wr.unpack(packed)["kernel"]
    assert jnp.array_equal(unpacked, wr.binarize(PARAMS, 0.5)["kernel"])
