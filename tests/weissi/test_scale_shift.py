"""Equivalent networks: same function, other scales, lowest weight decay."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import quick
import scipy.optimize
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
from weightreg._core._weights import weight_layers
from weightreg._weissi._scale_shift import (
    balance_scales,
    minimum_weight_decay,
    shift_scales,
)

pytestmark = quick.everything

KEY = jax.random.key(0)


class Mlp(nn.Module):
    depth: int = 12  # so that Dense_10 and Dense_11 sort before Dense_2

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth - 1):
            x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(x)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Conv(4, (3, 3), name="layer_1")(x))
        x = nn.max_pool(x, (3, 3), (1, 1))
        x = nn.relu(nn.Conv(5, (2, 2), 2, padding="VALID", name="layer_2")(x))
        x = nn.avg_pool(x, (2, 2), padding="SAME")
        x = nn.relu(nn.Dense(6, name="layer_9")(x.reshape(*x.shape[:-3], -1)))
        return nn.Dense(3, use_bias=False, name="layer_10")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    """The order of calls is not that of the names."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="stem")(x))
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2, name="head")(stack(name="block")(x, None)[0])


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        widths = [(6, 5)] + [(5, 5)] * 10 + [(5, 3)]
        self.blocks = nnx.List([nnx.Linear(*w, rngs=rngs) for w in widths])

    def __call__(self, x):
        for block in self.blocks[:-1]:
            x = nnx.relu(block(x))
        return self.blocks[-1](x)


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.dense(x.reshape(*x.shape[:-3], -1))


def scanned_dims(params):
    """Three axes are a stack of kernels, two are a kernel, or a bias in a stack."""
    by_path = lambda path, x: (  # noqa: E731
        None if path[-1].key == "bias" else Dims(x.ndim - 2, x.ndim - 1)
    )
    return jax.tree_util.tree_map_with_path(by_path, params)


def linen(module, shape, dtype):
    shapes = jax.eval_shape(module.init, KEY, jnp.ones(shape))  # init is slow
    params = randomize(shapes["params"], dtype)
    return params, lambda p, x: module.apply({"params": p}, x)


def of_nnx(module, dtype):
    graph, params = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))), nnx.Param)
    return randomize(params, dtype), lambda p, x: nnx.merge(graph, p)(x)


def randomize(params, dtype, seed=0):
    """Random weights, and biases of a size that matters."""
    rng = np.random.default_rng(seed)

    def draw(x):
        fan = np.prod(x.shape[:-1]) if x.ndim > 1 else 4
        return jnp.asarray(rng.normal(size=x.shape) * np.sqrt(2 / fan), dtype)

    return jax.tree.map(draw, params)


# Shape of the inputs, parameters and function, layers of every leaf, and how to say so.
CNN = {"layers": ["conv", "dense"]}
NETWORKS = {
    "linen_mlp": ((7, 6), lambda d: linen(Mlp(), (7, 6), d), [1] * 12, {}),
    "linen_cnn": ((7, 6, 6, 2), lambda d: linen(Cnn(), (7, 6, 6, 2), d), [1] * 4, {}),
    "nnx_mlp": ((7, 6), lambda d: of_nnx(NnxMlp, d), [1] * 12, {}),
    "nnx_cnn": ((7, 6, 6, 2), lambda d: of_nnx(NnxCnn, d), [1] * 2, CNN),
    "scanned": (
        (7, 6),
        lambda d: linen(Scanned(), (7, 6), d),
        [1, 3, 1],
        {"layers": ["stem", "block/dense", "head"], "dims": scanned_dims},
    ),
}


def random_factors(sizes, seed, spread=1.5):
    """Factors whose product is 1, and an array of them for every stack."""
    logs = np.random.default_rng(seed).normal(size=sum(sizes)) * spread
    parts = np.split(np.exp(logs - logs.mean()), np.cumsum(sizes)[:-1])
    return [p if n > 1 else p[0] for p, n in zip(parts, sizes, strict=True)]


def decay(params, **kwargs):
    leaves = jax.tree.leaves(params)
    layers = weight_layers(params, **kwargs)
    return sum(float(np.sum(np.float64(leaves[x.index]) ** 2)) for x in layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_shifts_keep_the_function(name):
    """In float64, where nothing but a wrong factor could show."""
    shape, make, stacks, kwargs = NETWORKS[name]
    with jax.enable_x64(True):
        params, apply = make(jnp.float64)
        apply = quick.jit(apply)
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
        expected = apply(params, x)
        assert jnp.std(expected) > 1e-3
        for seed in range(3):
            factors = random_factors(stacks, seed)
            shifted = shift_scales(params, factors, **kwargs)
            chex.assert_trees_all_equal_shapes_and_dtypes(shifted, params)
            np.testing.assert_allclose(apply(shifted, x), expected, rtol=1e-11)
            balanced = balance_scales(shifted, **kwargs)
            np.testing.assert_allclose(apply(balanced, x), expected, rtol=1e-11)
            np.testing.assert_allclose(
                decay(balanced, dims=kwargs.get("dims")),
                minimum_weight_decay(params, dims=kwargs.get("dims")),
                rtol=1e-12,
            )


@pytest.mark.parametrize("name", ["linen_mlp", "linen_cnn", "scanned"])
def test_float32_shifts_agree_with_a_float64_reference(name):
    shape, make, stacks, kwargs = NETWORKS[name]
    x = np.random.default_rng(1).normal(size=shape)
    params, apply = make(jnp.float32)
    factors = random_factors(stacks, 0)
    shifted = shift_scales(params, factors, **kwargs)
    balanced = balance_scales(shifted, **kwargs)
    with jax.enable_x64(True):
        apply = quick.jit(apply)
        wide = lambda p: jax.tree.map(lambda a: np.asarray(a, np.float64), p)  # noqa: E731
        expected = apply(wide(params), x)
        for other in (shifted, balanced):
            np.testing.assert_allclose(
                apply(wide(other), x), expected, atol=1e-5 * np.abs(expected).max()
            )


def test_layers_are_ordered_as_people_number_them():
    params = {
        f"Dense_{i}": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
        for i in range(12)
    }
    powers = np.array([1, 3, -2, 5, 0, 2, -4, 1, 6, -3, 2, 0])
    powers[-1] = -powers.sum()
    shifted = shift_scales(params, 2.0**powers)
    for i in range(12):
        assert shifted[f"Dense_{i}"]["kernel"] == 2.0 ** powers[i]
        assert shifted[f"Dense_{i}"]["bias"] == 2.0 ** powers[: i + 1].sum()
    backwards = [f"Dense_{i}" for i in range(11, -1, -1)]
    shifted = shift_scales(params, 2.0 ** powers[::-1], backwards)
    assert shifted["Dense_11"]["bias"] == 2.0 ** powers[-1]
    assert shifted["Dense_2"]["bias"] == 2.0 ** powers[2:].sum()


def test_an_order_by_names_that_does_not_fit_is_refused():
    """Else biases of hidden, input, output would be scaled as if called so."""
    layer = lambda i, o: {"kernel": jnp.ones((i, o)), "bias": jnp.ones(o)}  # noqa: E731
    params = {"input": layer(3, 8), "hidden": layer(8, 5), "output": layer(5, 2)}
    with pytest.raises(ValueError, match=r"layers must say .*\['input'\]\['kernel'\]"):
        wr.balance_scales(params)
    order = ["input", "hidden", "output"]
    before, after = params, wr.balance_scales(params, order)
    x = np.ones((1, 3))
    for name in order:
        x = x @ np.asarray(before[name]["kernel"]) + np.asarray(before[name]["bias"])
    y = np.ones((1, 3))
    for name in order:
        y = y @ np.asarray(after[name]["kernel"]) + np.asarray(after[name]["bias"])
    np.testing.assert_allclose(x, y, rtol=1e-5)
    without = {name: {"kernel": leaf["kernel"]} for name, leaf in params.items()}
    wr.balance_scales(without)  # without biases the order does not matter
    with pytest.raises(ValueError, match="layers must say"):
        wr.input_gradient_bound(without)
    assert wr.input_gradient_bound(without, order).shape == (2,)


def test_every_way_to_name_layers():
    params = {
        "encoder": {
            "Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            "Dense_1": {"kernel": jnp.ones((2, 2))},
        },
        "head": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)},
    }
    with pytest.raises(ValueError, match="which have no numbers: name them in order"):
        shift_scales(params, [2.0, 4.0, 0.125])
    names = ["encoder/Dense_0", "encoder/Dense_1", "head"]
    expected = shift_scales(params, [2.0, 4.0, 0.125], names)
    first, second, third = weight_layers(params)
    for layers in (
        [first, second, third],
        ("encoder/Dense_0/kernel", second, "head/kernel"),
        ["['encoder']['Dense_0']['kernel']", second.path, third.path],
    ):
        jax.tree.map(
            np.testing.assert_array_equal,
            shift_scales(params, [2.0, 4.0, 0.125], layers),
            expected,
        )
    state, _ = of_nnx(NnxMlp, jnp.float32)
    names = [f"blocks/{i}" for i in range(12)]
    twice = shift_scales(state, [2.0, 0.5] * 6, names)
    both = shift_scales(state, [2.0, 0.5] * 6)
    jax.tree.map(np.testing.assert_array_equal, twice, both)
    np.testing.assert_array_equal(
        twice["blocks"][0]["kernel"][...], 2 * state["blocks"][0]["kernel"][...]
    )


def test_what_belongs_to_a_weight_and_is_no_bias_is_refused():
    """Factors of LoRA, beside a kernel or below it, and scales of weight norms."""
    ones = jnp.ones
    low = {"lora_a": ones((3, 2)), "lora_b": ones((2, 4))}
    last = {"kernel": ones((4, 2))}
    normed = nn.Sequential([nn.WeightNorm(nn.Dense(4)), nn.relu, nn.Dense(2)])
    params = normed.init(jax.random.key(0), ones((1, 3)))["params"]
    for tree, names in (
        ({"l0": {"kernel": ones((3, 4)), **low}, "l1": last}, ["l0/kernel", "l1"]),
        ({"l0": {"kernel": ones((3, 4)), "lora": low}, "l1": last}, ["l0", "l1"]),
        (params, ["layers_0/layer_instance", "layers_2"]),
    ):
        with pytest.raises(ValueError, match=r"\(?.* is beside .* and not its bias"):
            balance_scales(tree, names)


def test_biases_called_b_are_shifted_as_well():
    """Haiku calls them so, and writers of plain functions, with a number."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (5, 8), "b1": (8,), "w2": (8, 2), "b2": (2,)}
    flat = {name: jnp.asarray(rng.normal(size=n)) for name, n in shapes.items()}
    haiku = {f"linear_{i}": {n: flat[f"{n}{i}"] for n in "wb"} for i in (1, 2)}
    x = jnp.asarray(rng.normal(size=(4, 5)))

    def net(p, x):
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    for params, named in ((flat, ["w1", "w2"]), (haiku, ["linear_1", "linear_2"])):
        for layers in (None, named):
            shifted = shift_scales(params, [4.0, 0.25], layers)
            if params is haiku:
                shifted = {
                    f"{n}{i}": shifted[f"linear_{i}"][n] for n in "wb" for i in (1, 2)
                }
            np.testing.assert_allclose(net(shifted, x), net(flat, x), rtol=1e-4)
            np.testing.assert_array_equal(shifted["b1"], 4 * flat["b1"])


def test_a_bias_that_tells_of_a_stack_is_shifted_with_it():
    shifted = shift_scales(SCAN, [np.array([4.0, 0.5, 0.5])])
    np.testing.assert_array_equal(shifted["bias"][:, 0], [4.0, 2.0, 1.0])
    np.testing.assert_array_equal(shifted["kernel"][:, 0, 0], [4.0, 0.5, 0.5])


def test_a_layer_brings_its_own_axes():
    params = {
        "a": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))},
        "b": {"kernel": jnp.ones((4, 1))},
    }
    dims = {"a": {"kernel": Dims(1, 2), "bias": None}, "b": {"kernel": Dims(0, 1)}}
    layers = weight_layers(params, dims=dims)
    factors = [np.array([4.0, 0.5]), 0.5]
    shifted = shift_scales(params, factors, layers)
    np.testing.assert_array_equal(shifted["a"]["bias"][:, 0], [4.0, 2.0])
    mask = {"a": {"kernel": True, "bias": False}, "b": True}
    shift_scales(params, factors, layers, mask=mask)  # The bias tells the same axes.
    params["a"]["kernel"] = params["a"]["kernel"].swapaxes(1, 2)
    with pytest.raises(ValueError, match=r"layers\[0\] is not a weight of these"):
        shift_scales(params, factors, layers, mask=mask)


def test_a_weight_called_bias_is_a_layer_if_the_mask_says_so():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 2))}
    mask = {"kernel": True, "bias": True}
    shifted = shift_scales(params, [2.0, 0.5], ["kernel", "bias"], mask=mask)
    np.testing.assert_array_equal(shifted["kernel"], 2)
    np.testing.assert_array_equal(shifted["bias"], 0.5)


@pytest.mark.usefixtures("full_precision")
def test_a_stretch_of_the_chain_leaves_the_rest_alone():
    shape, make, *_ = NETWORKS["linen_mlp"]
    params, apply = make(jnp.float32)
    names = ["Dense_3", "Dense_4", "Dense_5"]
    for shifted in (
        shift_scales(params, [3.0, 0.25, 4 / 3], names),
        balance_scales(params, names),
    ):
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(apply(shifted, x), apply(params, x), rtol=2e-4)
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), shifted, params)
        assert {k for k, v in changed.items() if any(v.values())} == set(names)


def test_stacked_layers_take_one_number_or_one_each():
    params = {
        "a": {"kernel": jnp.ones((2, 2, 1, 1)), "bias": jnp.ones((2, 2, 1))},
        "b": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)},
    }
    dims = {
        "a": {"kernel": Dims(2, 3), "bias": None},
        "b": {"kernel": Dims(0, 1), "bias": None},
    }
    same = shift_scales(params, [2.0, 1 / 16], dims=dims)
    np.testing.assert_array_equal(same["a"]["kernel"].ravel(), [2, 2, 2, 2])
    np.testing.assert_array_equal(same["a"]["bias"].ravel(), [2, 4, 8, 16])
    each = np.array([[2.0, 4.0], [8.0, 0.5]])
    shifted = shift_scales(params, [each, 1 / 32], dims=dims)
    np.testing.assert_array_equal(shifted["a"]["kernel"].reshape(2, 2), each)
    np.testing.assert_array_equal(shifted["a"]["bias"].ravel(), [2, 8, 64, 32])
    assert shifted["b"]["kernel"] == 1 / 32 and shifted["b"]["bias"] == 1


@pytest.mark.usefixtures("full_precision")
def test_equinox():
    model = eqx.filter_jit(eqx.nn.MLP)(3, 2, 5, 2, key=KEY)
    is_kernel = lambda x: eqx.is_array(x) and x.ndim == 2  # noqa: E731
    dims = jax.tree.map(lambda x: Dims(1, 0) if is_kernel(x) else None, model)
    x, call = jnp.ones(3), eqx.filter_jit(lambda model, x: model(x))
    shifted = shift_scales(model, [3.0, 0.25, 4 / 3], dims=dims)
    names = ["layers/0", ".layers[1].weight", "layers/2/weight"]
    balanced = balance_scales(shifted, names, dims=dims)
    for new in (shifted, balanced):
        assert new.activation is model.activation
        np.testing.assert_allclose(call(new, x), call(model, x), rtol=1e-5)
    expected = minimum_weight_decay(model, dims=dims)
    np.testing.assert_allclose(decay(balanced, dims=dims), expected, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    norms=st.lists(st.floats(-30, 30), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
)
def test_no_shift_gets_below_the_minimum(norms, seed, spread):
    rng = np.random.default_rng(seed)
    directions = [rng.normal(size=(2, 3)) for _ in norms]
    params = {
        str(i): jnp.asarray(d / np.linalg.norm(d) * 10.0**n, jnp.float32)
        for i, (n, d) in enumerate(zip(norms, directions, strict=True))
    }
    logs = np.log([np.linalg.norm(np.float64(p)) for p in params.values()])
    expected = len(norms) * np.exp(2 * logs.mean())
    minimum = minimum_weight_decay(params)
    if 1.2e-38 < expected < 3.4e38:
        np.testing.assert_allclose(minimum, expected, rtol=1e-5)
    else:
        assert minimum == (np.inf if expected > 1 else 0)
    balanced = balance_scales(params)
    np.testing.assert_allclose(
        [np.linalg.norm(np.float64(p)) for p in balanced.values()],
        np.exp(logs.mean()),
        rtol=1e-6,
    )
    np.testing.assert_allclose(decay(balanced), expected, rtol=1e-6)
    shift = random_factors([1] * len(norms), seed, spread)
    shifted = shift_scales(balanced, shift)
    assert decay(shifted) >= expected * (1 - 1e-6)
    again = balance_scales(shifted)
    for a, b in zip(again.values(), balanced.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6)


def test_the_minimum_is_what_a_minimizer_finds():
    """Eq. 9, without its proof."""
    shapes = [(2, 3), (3, 3), (3, 1)]
    scales = [0.1, 3.0, 0.7]
    rng = np.random.default_rng(0)
    params = {
        str(i): jnp.asarray(s * rng.normal(size=shape), jnp.float32)
        for i, (s, shape) in enumerate(zip(scales, shapes, strict=True))
    }
    squares = np.array([np.sum(np.float64(p) ** 2) for p in params.values()])

    def shifted_decay(free):
        logs = np.append(free, -np.sum(free))
        return np.sum(np.exp(2 * logs) * squares)

    found = scipy.optimize.minimize(shifted_decay, np.zeros(2), tol=1e-12)
    np.testing.assert_allclose(minimum_weight_decay(params), found.fun, rtol=1e-6)
    best = np.exp(np.append(found.x, -np.sum(found.x)))
    balanced = balance_scales(params)
    for p, b, factor in zip(params.values(), balanced.values(), best, strict=True):
        np.testing.assert_allclose(b, factor * p, rtol=1e-4)


@quick.bits
def test_extreme_factors_and_weights():
    tiny, huge = jnp.full((1, 2), 1e-30), jnp.full((2, 1), 1e30)
    params = {"a": {"kernel": tiny, "bias": jnp.zeros(2)}, "b": {"kernel": huge}}
    shifted = shift_scales(params, [1e35, 1e-35])
    np.testing.assert_allclose(shifted["a"]["kernel"], 1e5, rtol=1e-6)
    np.testing.assert_allclose(shifted["b"]["kernel"], 1e-5, rtol=1e-6)
    back = shift_scales(shifted, jnp.array([1e-35, 1e35]))
    np.testing.assert_allclose(back["a"]["kernel"], tiny, rtol=1e-6)
    np.testing.assert_allclose(back["b"]["kernel"], huge, rtol=1e-6)
    # Factors that are in the range of no float32, and zeros that stay zeros.
    beyond = shift_scales(params, [1e60, 1e-60])
    np.testing.assert_allclose(beyond["a"]["kernel"], 1e30, rtol=1e-6)
    np.testing.assert_allclose(beyond["b"]["kernel"], 1e-30, rtol=1e-6)
    zeros = shift_scales(params, [1e200, 1e-200])
    np.testing.assert_array_equal(zeros["a"]["bias"], 0)
    np.testing.assert_array_equal(zeros["a"]["kernel"], np.inf)
    # The smallest and the largest weights, by factors that come near to 1.
    for w, factor in ((1.2e-38, 1.5), (3.3e38, 0.99), (1.2e-38, 3e38), (3.3e38, 1e-38)):
        edge = {"a": jnp.full((1, 1), w), "b": jnp.ones((1, 1))}
        new = shift_scales(edge, [factor, 1 / factor])
        np.testing.assert_allclose(new["a"], w * factor, rtol=1e-6)


def test_a_thousand_layers():
    """Products of norms and of factors are far out of range; nothing else is."""
    rng = np.random.default_rng(0)
    exponents = rng.permutation([-15.0, 15.0] * 500)
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(10.0**e * rng.normal(size=(2, 2)), jnp.float32),
            "bias": jnp.zeros(2),
        }
        for i, e in enumerate(exponents)
    }
    logs = np.array(
        [np.log(np.linalg.norm(np.float64(p["kernel"]))) for p in params.values()]
    )
    expected = 1000 * np.exp(2 * logs.mean())
    np.testing.assert_allclose(minimum_weight_decay(params), expected, rtol=1e-6)
    balanced = balance_scales(params)
    kernels = [np.float64(p["kernel"]) for p in balanced.values()]
    norms = [np.linalg.norm(k) for k in kernels]
    np.testing.assert_allclose(norms[:-1], np.exp(logs.mean()), rtol=1e-6)
    # The last layer makes up for the rounding of all others.
    np.testing.assert_allclose(np.sum(np.log(norms)), logs.sum(), atol=2e-5)
    assert all(np.all(p["bias"] == 0) for p in balanced.values())


def test_a_thousand_layers_of_one_scan_can_be_differentiated():
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.permutation([-15.0, 15.0] * 500)[:, None, None]
    kernel = jnp.asarray(scale * rng.normal(size=(1000, 2, 3)), jnp.float32)
    params, dims = {"kernel": kernel}, {"kernel": Dims(1, 2)}
    value, gradient = quick.jit(
        jax.value_and_grad(lambda p: minimum_weight_decay(p, dims=dims))
    )(params)
    wide = np.float64(kernel)
    squares = np.sum(wide**2, (1, 2), keepdims=True)
    expected = 1000 * np.exp(np.log(squares).mean())
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(
        gradient["kernel"], 2 / 1000 * expected * wide / squares, rtol=1e-5
    )


def test_a_layer_of_zeros():
    params = {
        "a1": {"kernel": jnp.array([[1.7, 2.3]]), "bias": jnp.array([0.1, 0.3])},
        "a2": {"kernel": jnp.zeros((2, 1)), "bias": jnp.array([0.7])},
        **{f"a{3 + i}": {"kernel": jnp.array([[1e9 + i]])} for i in range(4)},
    }
    for fn in (balance_scales, quick.jit(balance_scales)):
        jax.tree.map(np.testing.assert_array_equal, fn(params), params)
    value, gradient = quick.jit(jax.value_and_grad(minimum_weight_decay))(params)
    assert value == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)
    total = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(balance_scales(p)))  # noqa: E731
    assert all(
        jnp.all(jnp.isfinite(g))
        for g in jax.tree.leaves(quick.jit(jax.grad(total))(params))
    )


def test_the_minimum_has_the_gradient_of_its_formula():
    params = randomize(
        [jnp.ones((3, 4)), jnp.ones((4, 4)), jnp.ones((4, 2))], "float32"
    )
    params[1] *= 1e12
    gradients = quick.jit(jax.grad(minimum_weight_decay))(params)
    squares = [np.sum(np.float64(p) ** 2) for p in params]
    value = 3 * np.prod(squares) ** (1 / 3)
    for p, g, s in zip(params, gradients, squares, strict=True):
        np.testing.assert_allclose(g, 2 / 3 * value * p / s, rtol=1e-5)
    # One layer: nothing can be shifted, and it is weight decay itself.
    value, gradient = jax.value_and_grad(minimum_weight_decay)(params[:1])
    np.testing.assert_allclose(value, squares[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[0], 2 * params[0], rtol=1e-5)


def test_no_weights():
    for empty in ({}, {"steps": jnp.arange(3)}):
        assert minimum_weight_decay(empty) == 0
        assert balance_scales(empty) == empty
        assert shift_scales(empty, []) == empty
    assert minimum_weight_decay({"bias": jnp.ones(3)}).dtype == jnp.float32


@quick.bits
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_dtypes_are_rounded_once(dtype):
    rng = np.random.default_rng(0)
    dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    a, b = (rng.normal(size=(40, 40)).astype(dtype) for _ in range(2))
    factors = np.float32([3.3, 1 / 3.3])
    shifted = shift_scales({"a": jnp.asarray(a), "b": jnp.asarray(b)}, factors)
    for old, new, factor in zip((a, b), shifted.values(), factors, strict=True):
        expected = (old.astype(np.float32) * factor).astype(dtype)
        assert new.dtype == dtype
        np.testing.assert_array_equal(np.float32(new), np.float32(expected))
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b * 4)}
    balanced = balance_scales(params)
    assert {x.dtype for x in balanced.values()} == {np.dtype(dtype)}
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        decay(balanced), minimum_weight_decay(params), rtol=tolerance
    )


@quick.bits
def test_mixed_dtypes_lose_nothing():
    with jax.enable_x64(True):
        bias = np.random.default_rng(0).normal(size=4)
        params = {
            "a": {"kernel": jnp.ones((3, 4), jnp.float32), "bias": jnp.asarray(bias)},
            "b": {"kernel": jnp.ones((4, 1), jnp.bfloat16)},
        }
        factors = [1 / 3, 3.0]
        shifted = shift_scales(params, factors)
        np.testing.assert_allclose(shifted["a"]["bias"], bias / 3, rtol=1e-15)
        assert shifted["b"]["kernel"].dtype == jnp.bfloat16
        assert minimum_weight_decay(params).dtype == jnp.float32
        balanced = balance_scales(params)
        # Factors are as exact as the weights, which are in float32.
        assert balanced["a"]["bias"].dtype == jnp.float64


def test_all_else_is_kept():
    params = {
        "kernel": jnp.ones((2, 2)),
        "count": jnp.arange(3),
        "name": "relu",
        "act": jax.nn.relu,
        "none": None,
        "hole": optax.MaskedNode(),
        "numpy": {"kernel": np.ones((2, 1), np.float32)},
    }
    shifted = shift_scales(params, [2.0, 0.5])
    assert jax.tree.structure(shifted) == jax.tree.structure(params)
    for key in ("count", "name", "act"):
        assert shifted[key] is params[key]
    np.testing.assert_array_equal(shifted["numpy"]["kernel"], 0.5)


def test_transformations_of_jax():
    params = {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "b": jnp.ones((3, 1)),
    }
    factors = jnp.array([4.0, 0.25])
    expected = shift_scales(params, factors)
    compiled = quick.jit(shift_scales)(params, factors)
    jax.tree.map(np.testing.assert_array_equal, compiled, expected)
    listed = quick.jit(lambda p, c: shift_scales(p, [c, 1 / c]))(params, 4.0)
    jax.tree.map(np.testing.assert_array_equal, listed, expected)
    several = jnp.stack([factors, factors[::-1]])
    mapped = quick.jit(jax.vmap(shift_scales, in_axes=(None, 0)))(params, several)
    assert mapped["a"]["bias"].shape == (2, 3)
    np.testing.assert_array_equal(mapped["a"]["bias"][:, 0], [4, 0.25])
    both = quick.jit(jax.vmap(balance_scales))(mapped)
    np.testing.assert_allclose(
        both["a"]["kernel"][0], both["a"]["kernel"][1], rtol=1e-6
    )

    def total(logs):  # 6 c + 3 c + 3 / c
        shifted = shift_scales(params, jnp.exp(logs))
        return sum(map(jnp.sum, jax.tree.leaves(shifted)))

    np.testing.assert_allclose(
        quick.jit(jax.grad(total))(jnp.log(factors)), [9 * 4, 3 * 0.25], rtol=1e-6
    )
    bias = lambda p: shift_scales(p, factors)["a"]["bias"].sum()  # noqa: E731
    by_params = quick.jit(jax.grad(bias))(params)
    np.testing.assert_array_equal(by_params["a"]["bias"], 4)
    # A shift does not change what can be reached by shifting.
    decays = quick.jit(jax.vmap(minimum_weight_decay))(mapped)
    np.testing.assert_allclose(decays, minimum_weight_decay(params), rtol=1e-6)
    through = lambda f: minimum_weight_decay(shift_scales(params, f))  # noqa: E731
    by_shift = quick.jit(jax.grad(through))(factors)
    np.testing.assert_allclose(by_shift[0] * 4, by_shift[1] / 4, rtol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_kept(axis_type, cpu_mesh):
    """Of stacks that are split too, whose norms are needed on every device."""
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    specs = {
        "a": {"kernel": PartitionSpec("x", None, "y"), "bias": PartitionSpec("x", "y")},
        "b": {"kernel": PartitionSpec("y", "x")},
    }
    params = {
        "a": {"kernel": jnp.ones((4, 2, 8)), "bias": jnp.ones((4, 8))},
        "b": {"kernel": jnp.full((8, 4), 2.0)},
    }
    dims = scanned_dims(params)
    shift = functools.partial(shift_scales, factors=[2.0, 1 / 16], dims=dims)
    balance = functools.partial(balance_scales, dims=dims)
    expected = shift(params), balance(params), minimum_weight_decay(params, dims=dims)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        split = jax.tree.map(put, params, specs)
        shifted, balanced = quick.jit(shift)(split), quick.jit(balance)(split)
        decay = quick.jit(functools.partial(minimum_weight_decay, dims=dims))(split)
        for new in jax.tree.leaves((shifted, balanced)):
            assert not new.sharding.is_fully_replicated
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        (shifted, balanced, decay),
        expected,
    )


def dense(n=2, **more):
    layers = {
        f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        for i in range(n)
    }
    return layers | more


SCAN = {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    ("params", "factors", "kwargs", "error", "message"),
    [
        (dense(), [2.0, 1.0], {}, ValueError, "product 1.*theirs is 0.693"),
        (dense(), [2.0, 0.50001], {}, ValueError, "product 1"),
        (dense(), [-1.0, -1.0], {}, ValueError, "positive.*-1.0 for.*Dense_0"),
        (dense(), [0.0, 1.0], {}, ValueError, "positive"),
        (dense(), [np.nan, 1.0], {}, ValueError, "positive"),
        (dense(), [np.inf, 1.0], {}, ValueError, "positive"),
        (dense(), [1.0], {}, ValueError, "2 layers, but has 1.*Dense_1"),
        (dense(), jnp.ones((2, 1)), {}, ValueError, r"shape \(2,\), not \(2, 1\)"),
        (dense(), jnp.ones(()), {}, ValueError, r"shape \(2,\), not \(\)"),
        (dense(), 1.0, {}, TypeError, "sequence of numbers or an array, not 1.0"),
        (dense(), ["1", 1.0], {}, TypeError, "numbers, but is '1' for.*Dense_0"),
        (dense(), [True, 1.0], {}, TypeError, "numbers, but is True"),
        (dense(), [np.ones(2), 1.0], {}, ValueError, r"shape \(2,\) for.*a number\."),
        (
            dense(scan=SCAN),
            [1.0, 1.0, np.ones(2)],
            {"layers": ["Dense_0", "Dense_1", "scan"], "dims": "scan"},
            ValueError,
            r"shape \(2,\) for.*scan.*number or shape \(3,\)",
        ),
        (dense(), [1.0, 1.0], {"layers": "Dense_0"}, TypeError, "not 'Dense_0'"),
        (dense(), [1.0], {"layers": [0]}, TypeError, r"layers\[0\] must be .* not 0"),
        (
            dense(),
            [1.0],
            {"layers": ["Dense_2"]},
            ValueError,
            r"layers\[0\] is 'Dense_2'.*none of.*Dense_0.*Dense_1",
        ),
        (dense(), [1.0], {"layers": ["Dense_0/bias"]}, ValueError, "none of"),
        (dense(), [1.0], {"layers": ["kernel"]}, ValueError, "none of"),
        (
            dense(cell={"i": jnp.ones((2, 2)), "h": jnp.ones((2, 2))}),
            [1.0],
            {"layers": ["cell"]},
            ValueError,
            r"stands for \['cell'\]\['h'\], \['cell'\]\['i'\]",
        ),
        (
            dense(),
            [1.0] * 2,
            {"layers": ["Dense_0", "Dense_0/kernel"]},
            ValueError,
            r"layers\[1\] repeats .*Dense_0",
        ),
        (
            dense(),
            [1.0],
            {"layers": weight_layers({"other": jnp.ones((2, 2))})},
            ValueError,
            r"layers\[0\] is not a weight of these parameters",
        ),
        (
            dense(),
            [1.0],
            {"layers": weight_layers({"Dense_0": {"kernel": jnp.ones((2, 3))}})},
            ValueError,
            r"not a weight of these parameters",
        ),
        (
            dense(LayerNorm_0={"scale": jnp.ones(2)}),
            [1.0, 1.0],
            {},
            ValueError,
            "LayerNorm_0.*scale.*neither a weight nor",
        ),
        (dense(norm={"bias": jnp.ones(2)}), [1.0, 1.0], {}, ValueError, "norm.*bias"),
        (dense(gain=0.5), [1.0, 1.0], {}, ValueError, "gain.*neither"),
        (dense(z=jnp.ones(2, "complex64")), [1.0, 1.0], {}, ValueError, "z.*neither"),
        (
            dense(),
            [1.0],
            {"mask": {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": False}},
            ValueError,
            "Dense_1.*neither",
        ),
        (
            {"i": jnp.ones((2, 2)), "h": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            [1.0, 1.0],
            {},
            ValueError,
            "bias.*might be the bias of several",
        ),
        (
            {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "gain": jnp.ones(3)}},
            [1.0],
            {"layers": ["a"]},
            ValueError,
            r"\['a'\]\['gain'\] is beside \['a'\]\['w'\] and not.*trace_network",
        ),
        (
            {"kernel": jnp.ones((2, 3, 2)), "bias": jnp.ones((2, 3))},
            [1.0],
            {"dims": {"kernel": Dims(0, 2), "bias": None}},
            ValueError,
            r"\(2, 3, 2\) stacks layers along its axes \(1,\): expected its leading",
        ),
        (
            {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((2, 3))},
            [1.0],
            {"dims": {"kernel": Dims(1, 2), "bias": None}},
            ValueError,
            r"bias.*has shape \(2, 3\).*expected \(3, 2\)",
        ),
    ],
)
def test_errors(params, factors, kwargs, error, message):
    if kwargs.get("dims") == "scan":
        kwargs = kwargs | {"dims": scanned_dims(params)}
    with pytest.raises(error, match=f"(?s){message}"):
        shift_scales(params, factors, **kwargs)


def test_balancing_refuses_what_shifting_does():
    norm = dense(LayerNorm_0={"scale": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"LayerNorm_0.*scale.*neither a weight nor"):
        balance_scales(norm)
    with pytest.raises(ValueError, match="repeats"):
        balance_scales(norm, ["Dense_0", "Dense_0"])
    balance_scales(norm, ["Dense_0", "Dense_1"])


@pytest.mark.parametrize(
    "factors",
    [
        np.float32([3, 1 / 3]),
        [np.float32(0.1), np.float32(10)],
        np.exp(np.float32([83.3, -83.3])),
        jnp.array([3.3, 1 / 3.3], jnp.bfloat16),
        [3, 1 / 3],
        [np.float64(1e200), 1e-200],
    ],
    ids=str,
)
def test_rounding_of_factors_is_no_error(factors):
    shift_scales(dense(), factors)
