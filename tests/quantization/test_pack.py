"""Packed weights: layout, exact round trips, and networks that run on them."""

import dataclasses
import math

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick
from flax import nnx
from flax.core import FrozenDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
from weightreg._core._arguments import is_box

DTYPES = [jnp.dtype(d) for d in ("bfloat16", "float16", "float32", "float64")]
QUANTIZERS = {"binary": wr.binarize, "ternary": wr.ternarize}
PLANES = {"binary": 1, "ternary": 2}


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def weights(shape, dtype=jnp.float32, seed=0):
    w = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(np.asarray(w, np.float64), dtype)


def bits_by_hand(w, volume, levels):
    """Bytes of one layer, (inputs, units), from the definition, bit by bit."""
    planes = [w < 0]
    if levels == "ternary":
        planes = [abs(w) > volume / 2, w < -volume / 2]
    inputs, units = w.shape
    rows = np.zeros((len(planes), units, -(-inputs // 8)), np.uint8)
    for k, i, u in np.ndindex(len(planes), inputs, units):
        rows[k, u, i // 8] += planes[k][i, u] << (7 - i % 8)
    return rows


@settings(deadline=None, max_examples=25)
@example(shape=(0, 2, 3), stacked=1, dtype=DTYPES[2], levels="ternary", volume=0.1)
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=4).map(tuple),
    stacked=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from(list(QUANTIZERS)),
    volume=st.sampled_from([0.1, 1.0, 1e-3]),
)
def test_round_trips_and_layout(shape, stacked, dtype, levels, volume):
    """For every shape, stack, dtype and number of levels."""
    with jax.enable_x64(dtype == np.float64):
        params = {"w": weights(shape, dtype), "bias": weights((3,), dtype)}
        stacked = min(stacked, len(shape) - 2)
        own, own_sizes = tuple(range(stacked, len(shape))), shape[stacked:]
        dims = {"w": Dims(own[:-1], own[-1]), "bias": None}
        packed = wr.pack(params, volume, levels, dims=dims)
        same_bits(packed["bias"], params["bias"])
        quantized = QUANTIZERS[levels](params, volume, dims=dims)
        same_bits(wr.unpack(packed)["w"], quantized["w"])
        again = wr.pack(wr.unpack(packed), volume, levels, dims=dims)
        same_bits(again["w"].bits, packed["w"].bits)
        stack, size = shape[:stacked], math.prod(own_sizes[:-1])
        bits, scale = packed["w"].bits, packed["w"].scale
        assert bits.shape == (*stack, PLANES[levels], shape[-1], -(-size // 8))
        assert scale.shape == stack and scale.dtype == dtype
        rounded = float(jnp.asarray(volume, dtype))
        flat = np.asarray(params["w"], np.float64)
        flat = flat.reshape(math.prod(stack), size, shape[-1])
        expected = [bits_by_hand(w, rounded, levels) for w in flat]
        np.testing.assert_array_equal(bits, np.reshape(expected, bits.shape))


ROWS = {  # Which axes number the units, by the name of a leaf or of its module.
    "kernel": ((9, 5), {}, (1,)),
    "anything": ((9, 5), {}, (1,)),
    "weight": ((5, 9), {"bias": jnp.ones(5)}, (0,)),
    "query": ((9, 2, 4), {"bias": jnp.ones((2, 4))}, (1, 2)),
    "out": ((2, 4, 6), {"bias": jnp.ones(6)}, (2,)),
    "Conv_0": ((3, 3, 2, 5), {}, (3,)),
    "unknown": ((3, 4, 2, 3, 5), {}, (4,)),
    "vector": ((5,), {}, ()),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_for_each_unit_as_far_as_they_are_known(name):
    shape, beside, units = ROWS[name]
    own = "weight" if name == "weight" else "kernel"
    params = {name: {own: weights(shape), **beside}}
    mask = {name: {key: key == own for key in params[name]}}
    packed = wr.pack(params, 0.5, "binary", mask=mask)[name][own]
    assert packed.input_axes == tuple(a for a in range(len(shape)) if a not in units)
    assert packed.bits.shape[1] == math.prod(shape[a] for a in units)
    same_bits(wr.unpack(packed), wr.binarize(params[name][own], 0.5, mask=True))


def test_a_bit_or_two_for_each_weight():
    """Counted on all that is stored: 32 and 16 times less than float32."""
    params = {
        "a": weights((256, 64)),
        "b": weights((3, 3, 16, 32)),
        "c": weights((1, 1)),
    }
    for levels, fewer in (("binary", 32), ("ternary", 16)):
        packed = wr.pack(params, 0.5, levels)
        for name in "ab":
            assert params[name].nbytes == fewer * packed[name].bits.nbytes
            assert packed[name].scale.nbytes == 4
        assert packed["c"].bits.nbytes == PLANES[levels]


def test_a_scale_for_every_stacked_layer():
    w = weights((4, 3, 5))
    volume = jnp.array([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1)
    for order in ((0, 1, 2), (1, 0, 2), (1, 2, 0)):  # where the layers are
        at = order.index(0)
        own = [order.index(1), order.index(2)]
        moved = jnp.transpose(w, order)
        scales = jnp.transpose(volume, order)
        dims = Dims(*own)
        for levels, quantize in QUANTIZERS.items():
            packed = wr.pack({"w": moved}, {"w": scales}, levels, dims={"w": dims})["w"]
            assert packed.stack_axes == (at,) and packed.shape == (3, 5)
            np.testing.assert_allclose(packed.scale, [0.1, 0.2, 0.3, 0.4])
            whole = quantize({"w": moved}, {"w": scales})["w"]
            same_bits(wr.unpack(packed), whole)
            for i, layer in enumerate(jnp.moveaxis(whole, at, 0)):
                one = jax.tree.map(lambda x, i=i: x[i], packed)
                same_bits(wr.unpack(one), layer)
    both = wr.pack({"w": w}, 0.5, "binary", dims={"w": Dims(1, 2)})
    assert both["w"].scale.shape == (4,)
    assert wr.pack({"w": w}, 0.5, "binary")["w"].scale.shape == ()


def test_two_stacks_of_which_a_loop_takes_one():
    w = weights((2, 3, 4, 5))  # networks, inputs, layers, units
    dims = {"w": Dims(1, 3)}
    packed = wr.pack({"w": w}, 0.5, "ternary", dims=dims)
    whole = wr.ternarize({"w": w}, 0.5)["w"]
    assert packed["w"].stack_axes == (0, 2) and packed["w"].bits.shape[:2] == (2, 4)
    _, out = jax.lax.scan(lambda c, p: (c, wr.unpack(p)), None, packed)
    same_bits(out["w"], whole)
    same_bits(jax.vmap(wr.unpack)(packed)["w"], whole)
    more = jax.tree.map(lambda x: jnp.stack([x, x, x]), packed)
    same_bits(wr.unpack(more)["w"], jnp.stack([whole] * 3))


def test_populations():
    """``vmap`` over packing, with a volume each, and over unpacking."""
    w, volumes = weights((3, 4, 5)), jnp.array([0.1, 0.5, 2.0])
    packed = jax.jit(jax.vmap(lambda w, v: wr.pack({"w": w}, v, "ternary")))(w, volumes)
    got = jax.jit(jax.vmap(wr.unpack))(packed)["w"]
    same_bits(got, jax.vmap(lambda w, v: wr.ternarize({"w": w}, v))(w, volumes)["w"])


def test_a_layer_that_is_no_number_stays_none():
    for levels in QUANTIZERS:
        packed = wr.pack({"w": jnp.array([[0.1, jnp.nan, -3.0]])}, 0.5, levels)
        assert jnp.isnan(packed["w"].scale)
        assert jnp.all(jnp.isnan(wr.unpack(packed)["w"]))
        stacked = jnp.array([[[jnp.nan]], [[1.0]]])
        dims = {"w": Dims(1, 2)}
        got = wr.unpack(wr.pack({"w": stacked}, 0.5, levels, dims=dims))["w"]
        np.testing.assert_array_equal(got, [[[np.nan]], [[0.5]]])


class Network(eqx.Module):
    """A tree that is no dict, with a hole and leaves that are no arrays."""

    layers: list
    hole: None = None
    activation: object = eqx.field(static=True, default=jax.nn.relu)


def test_any_tree():
    w, b = weights((3, 4)), weights((4,))
    trees = [
        {"w": w, "bias": b},
        FrozenDict({"a": {"w": w}}),
        Network([eqx.nn.Linear(3, 4, key=jax.random.key(0))]),
        nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param),
        [w, (b, None)],
        w,
        {},
        None,
    ]
    for tree in trees:
        packed = jax.jit(lambda p: wr.pack(p, 0.5, "binary"))(tree)
        got = jax.jit(wr.unpack)(packed)
        expected = wr.binarize(tree, 0.5)
        # What was packed comes back without the variable around it, in an nnx.State.
        leaves, values = jax.tree.leaves(got), jax.tree.leaves(expected)
        chex.assert_trees_all_equal(leaves, values)
        bare = jax.tree.map(lambda x: x[...], got, is_leaf=is_box)
        plain = jax.tree.map(lambda x: x[...], expected, is_leaf=is_box)
        assert jax.tree.structure(bare) == jax.tree.structure(plain)
        kinds = [
            wr.PackedWeight if np.ndim(leaf) > 1 else jax.Array
            for leaf in jax.tree.leaves(tree)
        ]
        is_packed = lambda x: isinstance(x, wr.PackedWeight)  # noqa: E731
        leaves = jax.tree.leaves(packed, is_leaf=is_packed)
        assert all(map(isinstance, leaves, kinds)) and len(leaves) == len(kinds)


class Convolutional(nn.Module):
    """With normalization, biases and a dense layer that is a call of a method."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        x = nn.relu(nn.LayerNorm()(nn.Conv(7, (3, 3), strides=2)(x)))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("dtype", "batch", "levels"),
    [
        ("float32", 1, "binary"),
        ("bfloat16", 33, "ternary"),
    ],
)
def test_the_logits_of_the_quantized_network_bit_for_bit(dtype, batch, levels):
    model = Convolutional()
    x = weights((batch, 12, 12, 2), dtype)
    params = quick.jit(model.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    rule = wr.he_volume(0.5)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    expected = run(QUANTIZERS[levels](params, rule), x)
    packed = wr.pack(params, rule, levels)
    same_bits(jax.jit(lambda p, x: run(wr.unpack(p), x))(packed, x), expected)
    assert jnp.abs(expected - run(params, x)).max() > 0.01


def test_nnx_networks_run_from_bits():
    model = nnx.Sequential(
        nnx.Linear(6, 9, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(9, 3, rngs=nnx.Rngs(1))
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    packed, x = wr.pack(params, 0.5, "ternary"), weights((4, 6))
    run = jax.jit(lambda p, x: nnx.merge(graph, p, rest)(x))
    got = jax.jit(lambda p, x: nnx.merge(graph, wr.unpack(p), rest)(x))(packed, x)
    same_bits(got, run(wr.ternarize(params, 0.5), x))


def deep(layers, x, after):
    for layer in layers:
        w = wr.unpack(layer, after=x)["w"] if after else wr.unpack(layer)["w"]
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other plans on a GPU")
def test_one_layer_at_a_time_is_held():
    """By what XLA plans: arguments are bits, and one kernel or all are temporary."""
    layers = [wr.pack({"w": weights((128, 128))}, 0.1, "binary") for _ in range(8)]
    x, kernel = weights((4, 128)), 128 * 128 * 4
    held = {}
    for after in (False, True):
        step = jax.jit(lambda p, x, after=after: deep(p, x, after)).lower(layers, x)
        plan = step.compile().memory_analysis()
        assert plan.argument_size_in_bytes < 8 * kernel / 32 + x.nbytes + 1000
        held[after] = plan.temp_size_in_bytes / kernel
    assert held[True] < 1.25 and held[False] > 7.9


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other plans on a GPU")
def test_all_inputs_come_first_and_so_in_batches():
    """A layer may have others beside what the layer before has made."""
    layers = [wr.pack({"w": weights((64, 64))}, 0.1, "binary") for _ in range(6)]

    def network(layers, early, x):
        for layer in layers:
            x = jnp.tanh(x @ wr.unpack(layer, after=(early, 1.0, x))["w"] + early)
        return x

    mapped = jax.vmap(network, in_axes=(None, None, 0))
    for f, x in ((network, weights((4, 64))), (mapped, weights((5, 4, 64)))):
        plan = jax.jit(f).lower(layers, weights((64,)), x).compile().memory_analysis()
        assert plan.temp_size_in_bytes < 1.9 * 64 * 64 * 4


def test_what_comes_first_changes_nothing():
    layers = [wr.pack({"w": weights((8, 8), seed=i)}, 0.1, "ternary") for i in range(3)]
    x = weights((4, 8))
    plain = jax.jit(lambda p, x: deep(p, x, False))
    tied = jax.jit(lambda p, x: deep(p, x, True))
    for value in (0.0, jnp.nan, jnp.inf, -1e30, 1.0):
        some = x.at[0, 0].set(value)
        same_bits(tied(layers, some), plain(layers, some))
    gradients = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(layers, x) ** 2)))(x)
        for f in (plain, tied)
    )
    chex.assert_trees_all_equal(*gradients)
    one_by_one = jax.vmap(lambda x: tied(layers, x))
    np.testing.assert_allclose(one_by_one(x), plain(layers, x), rtol=1e-6)
    for other in (x, [jnp.zeros(4, int), x], (1.0, jnp.zeros((0, 3)), x)):
        got = jax.jit(lambda p, a: wr.unpack(p, after=a))(layers[0], other)
        chex.assert_trees_all_equal(got, wr.unpack(layers[0]))
    # Examples do not get a kernel each.
    shapes = [str(e.outvars) for e in jax.make_jaxpr(one_by_one)(x).eqns]
    assert not any("4,8,8" in shape for shape in shapes)
    packed = layers[0]
    for other in (jnp.zeros((0, 3)), jnp.arange(3), jnp.ones(3, jnp.bfloat16), 1.0):
        got = jax.jit(lambda p, a: wr.unpack(p, after=a))(packed, other)
        chex.assert_trees_all_equal(got, wr.unpack(packed))
    for dtype in ("bfloat16", "float16"):
        narrow = wr.pack({"w": weights((3, 3), dtype)}, 0.1, "binary")
        got = jax.jit(lambda p, a: wr.unpack(p, after=a))(narrow, x)
        same_bits(got["w"], wr.unpack(narrow)["w"])
    with pytest.raises(TypeError, match=r"after.*'x'"):
        wr.unpack(packed, after="x")


@pytest.mark.parametrize("after", [None, jnp.ones(3)])
def test_scales_have_derivatives(after):
    packed = wr.pack(jnp.array([[0.3, 0.1, -0.4, 0.4, 0.3]]), 0.5, "ternary")

    def total(scale, after):
        return wr.unpack(dataclasses.replace(packed, scale=scale), after=after).sum()

    assert jax.jit(jax.grad(total))(packed.scale, after) == 2.0  # three up, one down


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharding(axis_type, cpu_mesh):
    """Of layers that are packed, and of the bits of those that are unpacked."""
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, NamedSharding(mesh, PartitionSpec(*spec))
    )
    w, dims = weights((4, 8, 16)), {"w": Dims(1, 2)}
    plain = wr.pack({"w": w}, 0.5, "ternary", dims=dims)
    expected = wr.unpack(plain)["w"]
    pack = jax.jit(lambda w: wr.pack({"w": w}, 0.5, "ternary", dims=dims))
    for spec in (("x", "y"), ("y", None, "x")):
        got = pack(place(w, *spec))
        same_bits(got["w"].bits, plain["w"].bits)
        same_bits(jax.jit(wr.unpack)(got)["w"], expected)
        x = place(jnp.ones((8, 2, 4)), "x")
        each = jax.jit(lambda p, x: jax.vmap(lambda x: wr.unpack(p, after=x))(x))
        assert each(plain, x)["w"].shape == (8, 4, 8, 16)
    odd = weights((4, 7, 8))
    plain = wr.pack({"w": odd}, 0.5, "ternary", dims=dims)
    expected = wr.unpack(plain)["w"]
    for spec in (("x",), ("y", None, "x")):
        bits = place(plain["w"].bits, *spec)
        assert bits.addressable_shards[0].data.nbytes < bits.nbytes
        split = {"w": dataclasses.replace(plain["w"], bits=bits)}
        same_bits(jax.jit(wr.unpack)(split)["w"], expected)
        x = place(jnp.ones((8, 4)), "x")
        tied = jax.jit(lambda p, x: wr.unpack(p, after=x))(split, x)
        same_bits(tied["w"], expected)


def test_inside_shard_map(cpu_mesh):
    mesh = cpu_mesh((4,), ("x",))
    w, dims = weights((4, 5, 3)), {"w": Dims(1, 2)}
    packed = wr.pack({"w": w}, 0.5, "binary", dims=dims)
    layers = PartitionSpec("x")
    go = jax.shard_map(wr.unpack, mesh=mesh, in_specs=layers, out_specs=layers)
    same_bits(jax.jit(go)(packed)["w"], wr.unpack(packed)["w"])


def test_checkpoints(tmp_path):
    params = {"Dense_0": {"kernel": weights((5, 7)), "bias": weights((7,))}}
    packed = wr.pack(params, 0.5, "ternary")
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", packed)
        saver.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, packed)
        got = saver.restore(tmp_path / "step", abstract)
    chex.assert_trees_all_equal(got, packed)
    assert jax.tree.structure(got) == jax.tree.structure(packed)


def test_in_a_loop_nothing_changes_and_nothing_waits():
    packed = wr.pack({"w": weights((6, 6))}, 0.2, "binary")
    step = jax.jit(lambda x, p: (x @ wr.unpack(p)["w"], None)[0])
    x = weights((2, 6))
    step(x, packed)
    with jax.transfer_guard("disallow"):
        step(x, packed)
    scanned, _ = jax.lax.scan(lambda x, _: (step(x, packed), None), x, length=2)
    np.testing.assert_allclose(scanned, step(step(x, packed), packed), rtol=1e-6)


P = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
WRONG = {
    "levels": (lambda: wr.pack(P, 0.5, "octal"), ValueError, "levels.*'octal'"),
    "levels as a number": (lambda: wr.pack(P, 0.5, 2), ValueError, "levels.*2"),
    "twice": (
        lambda: wr.pack(wr.pack(P, 0.5, "binary"), 0.5, "binary"),
        ValueError,
        r"packed at \['layer'\]\['kernel'\]",
    ),
    "several scales": (
        lambda: wr.pack(P, jnp.ones(3), "binary", mask=MASK),
        ValueError,
        r"\['layer'\]\['kernel'\] must be one number.*\(1, 3\).*\(2, 3\).*dims",
    ),
    "negative": (lambda: wr.pack(P, -1, "binary"), ValueError, "volume.*-1"),
    "infinite": (lambda: wr.pack(P, np.inf, "binary"), ValueError, "kernel.*finite"),
    "schedule": (
        lambda: wr.pack(P, optax.linear_schedule(1, 0.5, 9), "binary"),
        TypeError,
        "kernel.*schedule",
    ),
    "dtype": (
        lambda: wr.pack({"w": jnp.ones((2, 2), jnp.float8_e5m2)}, 0.5, "binary"),
        TypeError,
        r"pack cannot handle \['w'\].*float8",
    ),
}
MASK = {"layer": {"kernel": True, "bias": False}}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_what_a_mask_leaves_out_is_kept():
    params = {"a": weights((2, 3)), "b": weights((2, 3)), "c": weights((3,))}
    packed = wr.pack(params, 0.5, "binary", mask={"a": True, "b": False, "c": True})
    same_bits(packed["b"], params["b"])
    assert packed["c"].bits.shape == (1, 1, 1)  # a vector may be one, if asked for
    got = wr.unpack(packed)
    same_bits(got["c"], wr.binarize(params, 0.5, mask=True)["c"])


def test_a_packed_tree_may_be_cast():
    packed = wr.pack({"w": weights((4, 5))}, 0.1, "ternary")
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, packed
    )
    assert narrow["w"].dtype == jnp.bfloat16
    got = wr.unpack(narrow)["w"]
    same_bits(got, wr.unpack(packed)["w"].astype(jnp.bfloat16))


def test_bfloat16_scales_are_rounded_once():
    params = {"w": weights((4, 4), jnp.bfloat16)}
    packed = jax.jit(lambda p, v: wr.pack(p, v, "binary"))(params, jnp.float32(0.1))
    assert packed["w"].scale == ml_dtypes.bfloat16(0.1)
