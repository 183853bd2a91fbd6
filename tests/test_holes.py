"""What needs all layers refuses parameters in which some are missing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything

HOLE = optax.MaskedNode()
DENSE = {"kernel": 2 * jnp.eye(3), "bias": jnp.ones(3)}
PARAMS = {"a": DENSE, "b": {"kernel": 3 * jnp.eye(3), "bias": jnp.ones(3)}}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
LABELS = {"a": "slow", "b": "fast"}
# What needs all layers, as a function of parameters.
WHOLE = {
    "lipschitz_volume": lambda p, **kw: wr.lipschitz_volume(4.0)(p, **kw),
    "weissi": lambda p, **kw: wr.weissi(1.0, 1.0, **kw)(p),
    "add_weissi": lambda p, **kw: wr.add_weissi(1.0, 1.0, **kw).init(p),
    "add_weissi's update": lambda p, **kw: wr.add_weissi(1.0, 1.0, **kw).update(
        p, wr.add_weissi(0.0, 1.0, **kw).init(p), p
    ),
    "weight_energy": lambda p, **kw: wr.weight_energy(p, **kw),
    "minimum_weight_decay": lambda p, **kw: wr.minimum_weight_decay(p, **kw),
}
# What is a sum over layers, or concerns each layer alone.
PARTS = {
    "he_volume": lambda p: wr.he_volume(0.5)(p),
    "add_weissi's complexity": lambda p: wr.add_weissi(0.0, 1.0).init(p),
    "weissi with log": lambda p: wr.weissi(1.0, 1.0, log=True)(p),
    "log_weight_energy": wr.log_weight_energy,
    "layer_complexity": wr.layer_complexity,
}
whole = pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)


@whole
@pytest.mark.parametrize(
    ("hole", "where"),
    [
        ({"kernel": HOLE, "bias": jnp.ones(3)}, r"\['b'\]\['kernel'\]"),
        (HOLE, r"\['b'\]"),
        ({"mine": HOLE}, r"\['b'\]\['mine'\]"),
        ({"w": None}, r"\['b'\]\['w'\]"),
        ([{"embedding": None}], r"\['b'\]\[0\]\['embedding'\]"),
    ],
)
def test_holes_where_weights_may_be_are_refused(call, hole, where):
    with pytest.raises(ValueError, match=f"all layers.* hole at {where}, .* mask="):
        call({"a": DENSE, "b": hole})


@whole
@pytest.mark.parametrize(
    ("hole", "said"),
    [
        ({"bias": HOLE, "scale": HOLE}, {}),
        ({"bias": None, "act": None}, {}),
        (None, {}),
        ({"mine": HOLE}, {"mask": {"a": {"kernel": True, "bias": False}, "b": False}}),
        ({"w": None}, {"mask": lambda p: {"a": wr.weight_mask(DENSE), "b": False}}),
        (HOLE, {"mask": {"a": wr.weight_mask(DENSE), "b": {"x": False, "y": False}}}),
        ({"x": HOLE}, {"dims": {"a": {"kernel": Dims(0, 1), "bias": None}, "b": None}}),
    ],
)
def test_holes_that_are_no_weights_are_not(call, hole, said):
    call({"a": DENSE, "b": hole}, **said)


@whole
@pytest.mark.parametrize(
    ("hole", "said"),
    [
        ({"mine": None}, {"mask": lambda p: True}),
        ({"mine": None}, {"dims": lambda p: Dims(0, 1)}),
        ({"bias": HOLE}, {"mask": {"a": True, "b": {"bias": True}}}),
        (HOLE, {"mask": {"a": True, "b": {"x": True, "y": False}}}),
        # A mask or dims that are made from what is there say nothing of holes.
        ({"mine": HOLE}, {"mask": wr.weight_mask}),
        (
            {"w": None},
            {
                "dims": lambda p: jax.tree.map(
                    lambda x: Dims(0, 1) if x.ndim else None, p
                )
            },
        ),
    ],
)
def test_holes_that_are_said_to_be_weights_are_refused(call, hole, said):
    with pytest.raises(ValueError, match=r"hole at \['b'\]"):
        call({"a": {"kernel": DENSE["kernel"]}, "b": hole}, **said)


@whole
def test_a_traced_network_knows_its_weights(call):
    def fn(params, x):
        for layer in params.values():
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x

    net = wr.trace_network(fn, PARAMS, jnp.ones((1, 3)))
    call({**PARAMS, "b": {**PARAMS["b"], "bias": HOLE}, "bb": HOLE}, dims=net)
    for hole in (HOLE, None, {**PARAMS["b"], "kernel": None}):
        with pytest.raises(ValueError, match=r"hole at \['b'\]"):
            call({"a": DENSE, "b": hole}, dims=net)


class Pair(eqx.Module):
    """Two weights, the path of one of which begins like that of the other."""

    out: jax.Array
    out2: jax.Array


@whole
def test_a_traced_network_tells_names_that_begin_alike_apart(call):
    both = Pair(jnp.ones(3), jnp.eye(3))
    net = wr.trace_network(lambda p, x: x @ p.out2 + p.out, both, jnp.ones((1, 3)))
    call(Pair(HOLE, jnp.eye(3)), dims=net)


@pytest.mark.parametrize("call", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("hole", [HOLE, {"kernel": None}])
def test_sums_over_layers_are_right_by_parts(call, hole):
    call({"a": DENSE, "b": hole})


def test_the_logarithm_adds_up_over_groups():
    link = lambda: wr.add_weissi(0.5, 0.25, log=True)  # noqa: E731
    groups = optax.partition({"slow": link(), "fast": link()}, LABELS)
    got, _ = groups.update(ZERO, groups.init(PARAMS), PARAMS)
    expected, _ = link().update(ZERO, link().init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "link",
    [
        lambda: wr.add_weissi(1e-3, 0.0),
        lambda: wr.volumized(optax.adam(0.1), wr.lipschitz_volume(4.0), 0.0),
        lambda: optax.chain(optax.sgd(1.0), wr.volumize(wr.lipschitz_volume(4.0), 0.0)),
    ],
)
def test_groups_go_inside(link):
    groups = optax.partition({"slow": link(), "fast": link()}, LABELS)
    with pytest.raises(
        ValueError, match=r"hole at \['[ab]'\], .* around the partition"
    ):
        groups.init(PARAMS)
    with pytest.raises(ValueError, match=r"hole at \['a'\], .* around the partition"):
        optax.masked(link(), {"a": False, "b": True}).init(PARAMS)
    biases = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    optax.masked(link(), biases).init(PARAMS)  # holes that are called so
    optax.masked(link(), jax.tree.map(lambda p: p.ndim == 1, PARAMS)).init(PARAMS)


def test_a_group_alone_may_be_meant():
    only = {"a": {"kernel": True, "bias": False}, "b": False}
    tx = optax.masked(wr.add_weissi(0.5, 0.0, mask=only), {"a": True, "b": False})
    got, _ = tx.update(ZERO, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(got["a"]["kernel"], PARAMS["a"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(got["b"]["kernel"], 0)


def test_a_frozen_backbone_counts_where_the_rule_is_around():
    parts = {"slow": optax.set_to_zero(), "fast": optax.adam(0.1)}
    tx = wr.volumized(
        optax.partition(parts, LABELS),
        wr.lipschitz_volume(4.0),
        0.0,
        mask={"a": False, "b": {"kernel": True, "bias": False}},
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates["a"])
    link = optax.chain(wr.add_weissi(0.5, 0.0), optax.partition(parts, LABELS))
    updates, _ = link.update(ZERO, link.init(PARAMS), PARAMS)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates["a"])
    assert jnp.all(jnp.diag(updates["b"]["kernel"]) < 0)


class Norms(eqx.Module):
    """A network with holes that are no weights."""

    layers: list
    norm: eqx.nn.LayerNorm
    act: object = jax.nn.relu

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(3, 3, use_bias=False, key=key) for _ in range(2)]
        self.norm = eqx.nn.LayerNorm(3, use_weight=False)


@whole
def test_equinox_modules(call):
    model = Norms(jax.random.key(0))
    params = eqx.partition(model, eqx.is_inexact_array)[0]
    call(params)
    head = eqx.tree_at(lambda m: m.layers[0].weight, model, replace=None)
    head = eqx.filter(head, eqx.is_inexact_array)
    with pytest.raises(ValueError, match=r"hole at \.layers\[0\]\.weight.*eqx"):
        call(head)
    said = jax.tree.map(lambda _: True, params)
    said = eqx.tree_at(lambda m: m.layers[0].weight, said, replace=False)
    said = eqx.tree_at(lambda m: m.norm.bias, said, replace=False)
    call(head, mask=said)


@whole
def test_nothing_is_refused_where_there_are_no_weights(call):
    for params in (HOLE, {"a": HOLE, "b": None}, {"kernel": HOLE, "b": jnp.ones(3)}):
        call(params)


def test_a_tree_that_lacks_weights_of_its_network_is_refused():
    """As ``nnx.state(model, filter)`` makes it, which leaves no holes."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    net = wr.trace_network(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 2)))
    part = {"b": params["b"]}
    for method in (wr.weissi(1.0, 0.0, dims=net), wr.lipschitz_volume(dims=net)):
        with pytest.raises(ValueError, match=r"lack \['a'\], a weight of the traced"):
            method(part)
        assert method(params) is not None
    assert float(wr.weissi(1.0, 0.0, dims=net, mask=True)(part)) == pytest.approx(6)
    assert float(wr.weissi(0.0, 1.0, dims=net)(part)) == pytest.approx(6**0.5)
