"""Which leaves are weights, and the fans and axes of those that are."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from jax.nn.initializers import variance_scaling
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
from weightreg._core._weights import layers_for

pytestmark = quick.everything

KEY = jax.random.key(0)


def init(module, *inputs):
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def weights(params, **kwargs):
    """Paths of the weights, by the mask."""
    flags = jax.tree_util.tree_leaves_with_path(wr.weight_mask(params, **kwargs))
    return [jax.tree_util.keystr(p, simple=True, separator=".") for p, f in flags if f]


def paths(params, **kwargs):
    return [layer.path for layer in wr.weight_layers(params, **kwargs)]


class Everything(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = x.reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(2)(x) + nn.Embed(5, 2)(jnp.zeros(1, jnp.int32))


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda module, x, _: (nn.LayerNorm()(nn.Dense(4)(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(self, x, None)[0]


class NnxEverything(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)]
        )
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs)
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.embed = nnx.Embed(5, 2, rngs=rngs)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key):
            return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

        self.stack = stack(jax.random.split(KEY, 3))


def test_linen_weights():
    """The attention's biases are (heads, head_dim) and yet no weights."""
    params = init(Everything(), jnp.ones((1, 4, 4, 3)))
    attention = "MultiHeadDotProductAttention_0"
    assert params[attention]["query"]["bias"].ndim == 2
    assert weights(params) == [
        "Conv_0.kernel",
        "Dense_0.kernel",
        "Embed_0.embedding",
        *(f"{attention}.{name}.kernel" for name in ("key", "out", "query", "value")),
    ]


def test_scanned_weights_but_not_their_stacked_biases():
    params = init(Stacked(), jnp.ones((1, 4)))
    assert {x.ndim for x in jax.tree.leaves(params)} == {2, 3}
    assert weights(params) == ["Dense_0.kernel"]
    dims = lambda p: jax.tree.map(lambda x: Dims(1, 2) if x.ndim == 3 else None, p)  # noqa: E731
    (layer,) = wr.weight_layers(params, dims=dims)
    assert layer.stack_axes == (0,)
    assert (layer.fan_in, layer.fan_out, layer.window) == (4, 4, 1)


def test_nnx_weights():
    model = nnx.eval_shape(lambda: NnxEverything(nnx.Rngs(0)))
    expected = [
        *(f"attention.{name}.kernel" for name in ("key", "out", "query", "value")),
        "conv.kernel",
        "dense.kernel",
        "embed.embedding",
        "stack.kernel",
    ]
    state = nnx.state(model, nnx.Param)
    assert weights(state) == [f"{name}.value" for name in expected]
    assert weights(nnx.to_pure_dict(state)) == expected
    mask = {k: False for k in state if k != "attention"} | {"attention": True}
    mask["attention"] = {k: k == "value" for k in state["attention"]}
    found = [p for p in weights(state, mask=mask) if p.endswith("kernel.value")]
    assert found == ["attention.value.kernel.value"]


def test_equinox_weights_and_their_axes():
    model = eqx.filter_eval_shape(eqx.nn.MLP, 3, 5, 4, 1, key=KEY)
    assert weights(model) == ["layers.0.weight", "layers.1.weight"]
    arrays = eqx.filter(model, lambda leaf: hasattr(leaf, "shape"))
    dims = lambda p: jax.tree.map(lambda x: Dims(1, 0) if x.ndim == 2 else None, p)  # noqa: E731
    first, last = wr.weight_layers(arrays, dims=dims)
    assert (first.fan_in, first.fan_out, last.fan_in, last.fan_out) == (3, 4, 4, 5)
    assert (first.input_axes, first.output_axes) == ((1,), (0,))
    conv = eqx.nn.Conv2d(3, 8, (5, 2), key=KEY)
    kernel = lambda p: jax.tree.map(  # noqa: E731
        lambda x: Dims((2, 3, 1), 0) if x.shape[0] == 8 and x.shape[1] == 3 else None, p
    )
    (layer,) = wr.weight_layers(eqx.filter(conv, eqx.is_array), dims=kernel)
    assert (layer.fan_in, layer.fan_out, layer.window) == (30, 80, 10)


def test_equinox_trees_are_trees_though_modules_can_be_called():
    arrays = eqx.filter(eqx.nn.MLP(3, 5, 4, 1, key=KEY), eqx.is_inexact_array)
    mask = wr.weight_mask(arrays)
    assert weights(arrays, mask=mask) == weights(arrays)
    dims = jax.tree.map(lambda is_weight: Dims(1, 0) if is_weight else None, mask)
    assert [x.fan_in for x in wr.weight_layers(arrays, dims=dims)] == [3, 4]
    wr.volumize(wr.he_volume(1.0)(arrays), 0.0).init(arrays)


def test_partial_functions_are_functions_though_they_are_trees():
    partial = jax.tree_util.Partial
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    dims = partial(lambda axis, p: {"kernel": Dims(axis, 0), "bias": None}, 1)
    (layer,) = wr.weight_layers(params, mask=partial(wr.weight_mask), dims=dims)
    assert (layer.path, layer.fan_in) == ("['kernel']", 3)
    volume = partial(lambda v, p: jax.tree.map(lambda _: v, p), 0.5)
    tx = wr.volumize(volume, 0.0)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"] + 1, 0.5)


def test_only_real_floating_point_arrays_are_weights():
    params = {
        "bf16": jnp.ones((2, 2), jnp.bfloat16),
        "bool": jnp.ones((2, 2), bool),
        "complex": jnp.ones((2, 2), jnp.complex64),
        "function": jnp.tanh,
        "int": jnp.ones((2, 2), int),
        "int8": jnp.ones((2, 2), jnp.int8),
        "key": jax.random.split(KEY, (2, 2)),
        "masked": optax.MaskedNode(),
        "none": None,
        "numpy": np.ones((2, 2)),
        "scalar": jnp.float32(1.0),
        "shape": jax.ShapeDtypeStruct((2, 2), jnp.float16),
        "text": "kernel",
        "vector": jnp.ones(2),
        "zero": jnp.ones((0, 2)),
    }
    assert weights(params) == ["bf16", "numpy", "shape", "zero"]
    mask = wr.weight_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert paths(params) == ["['bf16']", "['numpy']", "['shape']", "['zero']"]


@pytest.mark.parametrize("params", [{}, (), None, {"a": None}, 1.0, optax.MaskedNode()])
def test_trees_without_weights(params):
    mask = wr.weight_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert not any(jax.tree.leaves(mask))
    assert wr.weight_layers(params) == ()


def test_a_bare_array_is_a_tree():
    assert wr.weight_mask(jnp.ones((2, 3))) is True
    (layer,) = wr.weight_layers(jnp.ones((2, 3)))
    assert (layer.path, layer.index, layer.shape) == ("(the whole tree)", 0, (2, 3))


@pytest.mark.parametrize("parent", ["bias", "scale"])
def test_names_of_modules_do_not_matter(parent):
    params = {parent: {"kernel": jnp.ones((2, 2)), parent: jnp.ones((2, 2))}}
    assert weights(params) == [f"{parent}.kernel"]


MODES = ["fan_in", "fan_out", "fan_avg"]
# Shape, then in, out and batch axis of jax.nn.initializers, then dims if needed.
KERNELS = {
    "dense": ((30, 70), -2, -1, (), None),
    "conv1d": ((5, 6, 70), -2, -1, (), None),
    "conv2d": ((3, 5, 7, 20), -2, -1, (), None),
    "conv3d": ((2, 3, 2, 7, 20), -2, -1, (), None),
    "query": ((30, 4, 6), 0, (1, 2), (), Dims(0, (1, 2))),
    "out": ((4, 6, 30), (0, 1), 2, (), Dims((-3, -2), -1)),
    "scanned": ((3, 30, 70), 1, 2, (0,), Dims(1, 2)),
    "scanned query": ((3, 30, 4, 6), 1, (2, 3), (0,), Dims(-3, (2, -1))),
    "scanned conv": ((4, 3, 5, 7, 20), 3, 4, (0,), Dims((1, 2, 3), 4)),
    "equinox": ((70, 30), 1, 0, (), Dims(1, 0)),
    "equinox conv": ((20, 7, 3, 5), 1, 0, (), Dims((-2, 3, 1), (0,))),
}


@pytest.mark.parametrize("name", KERNELS)
def test_fans_are_those_of_jax_initializers(name):
    """Samples of ``variance_scaling(1, mode)`` fill the interval to sqrt(3 / fan)."""
    shape, in_axis, out_axis, batch, dims = KERNELS[name]
    module = "Conv_0" if name.startswith("conv") else "layer"
    kernel = {module: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}}
    dims = None if dims is None else {module: {"kernel": dims, "bias": None}}
    (layer,) = wr.weight_layers(kernel, dims=dims)

    @jax.jit
    def largest(key):
        axes = (in_axis, out_axis, batch)
        scalings = [variance_scaling(1.0, mode, "uniform", *axes) for mode in MODES]
        return jnp.array([jnp.max(jnp.abs(s(key, shape))) for s in scalings])

    keys = [jax.random.key(seed, impl="rbg") for seed in range(40)]  # fast to compile
    got = np.max([largest(key) for key in keys], axis=0)
    fans = np.array([layer.fan_in, layer.fan_out, (layer.fan_in + layer.fan_out) / 2])
    walls = np.sqrt(3 / fans)
    assert np.all(0.998 * walls < got)
    assert np.all(got <= walls * (1 + 1e-6))


def test_roles_of_axes_and_windows():
    rows = {
        "conv": (None, (0, 1, 2), (3,), (), 9, (3, 3, 5, 7)),
        "query": (Dims(0, (1, 2)), (0,), (1, 2), (), 1, (5, 2, 3)),
        "out": (Dims((-3, -2), -1), (0, 1), (2,), (), 1, (2, 3, 5)),
        "scanned": (Dims((2,), (1,)), (2,), (1,), (0, 3), 1, (4, 5, 6, 2)),
        "equinox": (Dims([2, 3, 1], 0), (2, 3, 1), (0,), (), 6, (7, 5, 3, 2)),
    }
    params = {name: jnp.ones(row[-1]) for name, row in rows.items()}
    for name, (dims, inputs, outputs, stack, window, _) in rows.items():
        (layer,) = wr.weight_layers(params[name], dims=dims)
        assert layer.input_axes == inputs
        assert layer.output_axes == outputs
        assert layer.stack_axes == stack
        assert layer.window == window


@pytest.mark.parametrize("as_function", [False, True])
def test_what_muon_takes_for_its_axes_is_taken_here(as_function):
    params = {
        "Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))},
        "stack": {"kernel": jnp.ones((5, 4, 3))},
    }
    dims = {
        "Dense_0": {"kernel": Dims(), "bias": None},
        "query": {"kernel": Dims(-3, (-2, -1)), "bias": None},
        "stack": Dims((1,), 2),
    }
    given = (lambda _: dims) if as_function else dims
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=given)
    muon_state, _ = muon.init(params).inner_states["muon"].inner_state[:2]
    by_muon = jax.tree_util.tree_leaves_with_path(muon_state.mu)
    assert paths(params, dims=given) == [jax.tree_util.keystr(p) for p, _ in by_muon]
    assert [x.fan_out for x in wr.weight_layers(params, dims=given)] == [3, 6, 3]


def test_layers_come_as_people_number_them():
    kernel = {"kernel": jnp.ones((2, 2))}
    params = {f"Dense_{i}": kernel for i in (0, 1, 2, 10, 11, 100)}
    assert paths(params) == [f"['Dense_{i}']['kernel']" for i in (0, 1, 2, 10, 11, 100)]
    index = [layer.index for layer in wr.weight_layers(params)]
    assert index == [0, 1, 5, 2, 4, 3]  # as JAX sorts them
    inner = {"b_10": kernel, "b_9": {"a10b2": kernel, "a10b10": kernel}, "10": kernel}
    nested = {"block2": inner, "block10": kernel}
    names = [re.findall(r"'(\w+)'", path)[:-1] for path in paths(nested)]
    assert [".".join(n) for n in names] == [
        "block2.10",
        "block2.b_9.a10b2",
        "block2.b_9.a10b10",
        "block2.b_10",
        "block10",
    ]
    many = [kernel] * 12
    assert paths(many) == [f"[{i}]['kernel']" for i in range(12)]
    state = nnx.State({i: kernel for i in range(12)})
    assert paths(state) == [f"[{i}]['kernel']" for i in range(12)]


def test_shapes_are_enough():
    shapes = init(Everything(), jnp.ones((1, 4, 4, 3)))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    assert wr.weight_layers(shapes) == wr.weight_layers(params)
    traced = []
    jax.jit(lambda p: traced.append(wr.weight_layers(p)))(params)
    assert traced == [wr.weight_layers(params)]


PARAMS = {
    "a": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
    "b": {"kernel": jnp.ones((3, 3))},
    "n": jnp.ones((2, 2), int),
}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (False, []),
        ({"a": True, "b": False, "n": False}, ["a.bias", "a.kernel"]),
        ({"a": {"bias": False, "kernel": False}, "b": np.True_, "n": False},
         ["b.kernel"]),
        (lambda p: {k: k == "a" for k in p}, ["a.bias", "a.kernel"]),
    ],
)  # fmt: skip
def test_mask_takes_the_place_of_the_rule(mask, expected):
    assert weights(PARAMS, mask=mask) == expected
    assert all(type(flag) is bool for flag in jax.tree.leaves(wr.weight_mask(PARAMS)))


def test_dims_take_the_place_of_the_rule_and_mask_of_both():
    dims = {"a": {"bias": None, "kernel": Dims(1, 0)}, "b": None, "n": None}
    assert weights(PARAMS, dims=dims) == ["a.kernel"]
    mask = {"a": False, "b": True, "n": False}
    assert paths(PARAMS, mask=mask, dims=dims) == ["['b']['kernel']"]
    mask = {"a": {"bias": False, "kernel": True}, "b": True, "n": False}
    first, second = wr.weight_layers(PARAMS, mask=mask, dims=dims)
    assert (first.input_axes, second.input_axes) == ((1,), (0,))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (1, TypeError, r"booleans.*1 at \['a'\]\['bias'\]"),
        ({"a": True, "b": None, "n": False}, TypeError, r"booleans.*None at \['b'\]"),
        ({"a": "no", "b": True, "n": False}, TypeError, r"booleans.*'no'"),
        (True, TypeError, r"\['n'\].*int32"),
        ({"a": True, "n": False}, ValueError, r"mask.*\['b'\]\['kernel'\]"),
        (lambda p: {**p, "x": True}, ValueError, r"mask.*\['x'\]"),
    ],
)
def test_wrong_masks(mask, error, message):
    with pytest.raises(error, match=message):
        wr.weight_mask(PARAMS, mask=mask)


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        (Dims(0, 0), ValueError, r"\['k'\].*2 axes"),
        (Dims(0, -2), ValueError, r"\['k'\].*none of them twice"),
        (Dims((0, 1), 1), ValueError, r"\['k'\]"),
        (Dims(0, 2), ValueError, r"\['k'\].*2 axes"),
        (Dims(-3, 1), ValueError, r"\['k'\]"),
        (Dims((), 1), ValueError, r"\['k'\]"),
        ({"k": (0, 1)}, ValueError, r"no entry for \['k'\]"),
        ({"k": 0}, TypeError, "MuonDimensionNumbers.*0"),
        ({"k": True}, TypeError, "MuonDimensionNumbers.*True"),
        ({"x": Dims()}, ValueError, r"dims.*\['k'\]"),
    ],
)
def test_wrong_dims(dims, error, message):
    with pytest.raises(error, match=message):
        wr.weight_layers({"k": jnp.ones((2, 3))}, dims=dims)


def test_a_vector_has_no_fans():
    mask = {"a": True, "b": False, "n": False}
    assert wr.weight_mask(PARAMS, mask=mask)["a"]["bias"]
    with pytest.raises(ValueError, match=r"\['a'\]\['bias'\].*\(3,\).*mask="):
        wr.weight_layers(PARAMS, mask=mask)
    with pytest.raises(TypeError, match=r"\['n'\].*int32"):
        wr.weight_mask(PARAMS, dims=lambda p: jax.tree.map(lambda _: Dims(), p))


def test_the_mask_serves_optax():
    params = {**PARAMS, "n": None}
    decay = optax.add_decayed_weights(0.5, mask=wr.weight_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    masked = optax.masked(optax.scale(-1.0), wr.weight_mask(params))
    updates, _ = masked.update(updates, masked.init(params), params)
    np.testing.assert_array_equal(updates["a"]["kernel"], -0.5)
    np.testing.assert_array_equal(updates["b"]["kernel"], -0.5)
    np.testing.assert_array_equal(updates["a"]["bias"], 0.0)
    seen = []
    look = optax.stateless(lambda updates, _: seen.append(weights(updates)) or updates)
    inside = optax.masked(look, {"a": True, "b": False, "n": False})
    inside.update(params, inside.init(params), params)
    assert seen == [["a.kernel"]]


def test_left_out_gives_a_reason_for_every_leaf_that_is_no_weight():
    params = {
        "attention": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones(4)},
        "position": jnp.ones(7),
        "count": jnp.zeros((2, 2), jnp.int32),
        "signal": jnp.zeros((2, 2), jnp.complex64),
        "hole": None,
    }
    reasons = wr.left_out(params)
    assert reasons == {
        "['attention']['bias']": "called 'bias'",
        "['count']": "not real and floating, but of dtype int32",
        "['norm']['scale']": "called 'scale'",
        "['position']": "of shape (7,), where a weight has two or more axes",
        "['signal']": "not real and floating, but of dtype complex64",
    }
    paths = jax.tree_util.tree_leaves_with_path(wr.weight_mask(params))
    assert {jax.tree_util.keystr(p) for p, weight in paths if not weight} == {*reasons}
    dims = {"attention": {"kernel": Dims(0, (1, 2)), "bias": None}, "norm": None}
    dims |= {"position": None, "count": None, "signal": None}
    assert set(wr.left_out(params, dims=dims).values()) == {"dims is None"}
    assert wr.left_out(params, mask=wr.weight_mask) == dict.fromkeys(
        reasons, "mask is false"
    )
    assert wr.left_out({}) == wr.left_out(None) == {}
    with pytest.raises(TypeError, match="static_args='mask'"):
        wr.left_out(jnp.array(3))


def test_floats_of_8_bits_are_listed_but_refused_where_numbers_are_needed():
    layer = {"kernel": jnp.ones((2, 3), jnp.float8_e4m3fn), "bias": jnp.ones(3)}
    params = {"a": layer, "b": jnp.ones((3, 2), jnp.bfloat16)}
    assert paths(params) == ["['a']['kernel']", "['b']"]
    assert wr.weight_mask(params)["a"]["kernel"]
    message = r"(?s)weissi cannot handle \['a'\]\['kernel'\] of dtype float8_e4m3fn"
    for hint in (".*bfloat16, float16, float32, float64", ".*mask=", ".*astype"):
        with pytest.raises(TypeError, match=message + hint):
            layers_for("weissi", params, None, None)
    (layer,) = layers_for("weissi", params, {"a": False, "b": True}, None)
    assert layer == wr.weight_layers(params)[1]
