"""The nnx module against linen's, by hand, under transforms and in training."""

import math
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
import weightreg.linen
import weightreg.nnx
from weightreg.nnx import ConvexSum, EquivalentNorm

RNG = np.random.default_rng(0)
H, R, G = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(3, 6, 4)))


def with_logits(*logits):
    layer = ConvexSum()
    layer.convex_logits[...] = jnp.array(logits)
    return layer


def test_it_starts_at_the_mean_of_the_branches():
    layer = ConvexSum()
    assert isinstance(layer.convex_logits, nnx.Param)
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == {"convex_logits"}
    assert layer.convex_logits[...].shape == (2,)
    assert layer.convex_logits[...].dtype == jnp.float32
    np.testing.assert_allclose(layer(H, R), (H + R) / 2, rtol=1e-6)


@pytest.mark.parametrize("initial", [0.1, 0.9, 1e-6])
def test_it_starts_where_it_is_told(initial):
    expected = initial * H + (1 - initial) * R
    np.testing.assert_allclose(ConvexSum(initial)(H, R), expected, atol=1e-6)
    abstract = nnx.eval_shape(lambda: ConvexSum(initial))
    assert abstract.convex_logits.shape == (2,)


@pytest.mark.parametrize("logits", [(0.0, 0.0), (0.7, -0.4), (-3.0, 8.0), (1e30, 0.0)])
def test_linen_and_nnx_give_the_same_numbers(logits):
    variables = {"params": {"convex_logits": jnp.array(logits)}}
    linen = weightreg.linen.ConvexSum()
    expected = linen.apply(variables, H, R)
    np.testing.assert_array_equal(with_logits(*logits)(H, R), expected)
    loss = lambda layer: jnp.sum(G * layer(H, R))  # noqa: E731
    got = nnx.grad(loss)(with_logits(*logits))["convex_logits"][...]
    of = lambda v: jnp.sum(G * linen.apply(v, H, R))  # noqa: E731
    expected = jax.grad(of)(variables)["params"]["convex_logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    from_linen = weightreg.linen.ConvexSum(0.3).init(jax.random.key(0), H, R)
    start = from_linen["params"]["convex_logits"]
    np.testing.assert_array_equal(ConvexSum(0.3).convex_logits[...], start)


def test_the_derivative_by_hand():
    @nnx.jit
    @nnx.grad
    def grad(layer):
        return jnp.sum(G * layer(H, R))

    a = 1 / (1 + math.exp(-1.1))
    slope = a * (1 - a) * jnp.sum(G * (H - R))
    got = grad(with_logits(0.7, -0.4))["convex_logits"][...]
    np.testing.assert_allclose(got, [slope, -slope], rtol=1e-4)


def test_jit_split_merge_and_clone():
    layer = with_logits(0.7, -0.4)
    expected = layer(H, R)
    np.testing.assert_allclose(nnx.jit(lambda m: m(H, R))(layer), expected, rtol=1e-6)
    definition, state = nnx.split(layer)
    np.testing.assert_array_equal(nnx.merge(definition, state)(H, R), expected)
    run = jax.jit(lambda state: nnx.merge(definition, state)(H, R))
    np.testing.assert_allclose(run(state), expected, rtol=1e-6)
    np.testing.assert_array_equal(nnx.clone(layer)(H, R), expected)


def test_the_dtype_may_be_told():
    layer = ConvexSum(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert layer.convex_logits[...].dtype == jnp.float16
    assert layer(H, R).dtype == jnp.bfloat16
    assert ConvexSum()(H.astype(jnp.bfloat16), R.astype(jnp.bfloat16)).dtype == H.dtype


class Block(nnx.Module):
    def __init__(self, key):
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(key))
        self.sum = ConvexSum(0.75)

    def __call__(self, h):
        return self.sum(h, nnx.relu(self.dense(h)))


def stacked():
    keys = jax.random.split(jax.random.key(0), 3)
    return nnx.vmap(Block, in_axes=0, out_axes=0)(keys)


@quick.everything
def test_under_vmap_the_logits_are_stacked_and_still_no_weight():
    state = nnx.state(stacked(), nnx.Param)
    logits = state["sum"]["convex_logits"][...]
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 0], 0.75, rtol=1e-6)
    expected = {
        "dense": {"bias": False, "kernel": True},
        "sum": {"convex_logits": False},
    }
    assert nnx.to_pure_dict(wr.weight_mask(state)) == expected
    assert wr.weight_mask(nnx.to_pure_dict(state)) == expected
    assert [layer.shape for layer in wr.weight_layers(state)] == [(3, 4, 4)]


@pytest.mark.usefixtures("full_precision")
def test_scanned_blocks_equal_a_loop():
    blocks = stacked()
    spread = jnp.array([[1.0, 0.0], [-2.0, 0.5], [0.0, 0.0]])
    blocks.sum.convex_logits[...] = spread

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(h, block):
        return block(h)

    h = np.asarray(H, np.float64)
    for i in range(3):
        kernel, bias = blocks.dense.kernel[i], blocks.dense.bias[i]
        r = np.maximum(h @ np.asarray(kernel, float) + np.asarray(bias, float), 0)
        a = 1 / (1 + math.exp(spread[i, 1] - spread[i, 0]))
        h = a * h + (1 - a) * r
    np.testing.assert_allclose(forward(H, blocks), h, rtol=1e-4, atol=1e-5)


@quick.everything
def test_training_learns_the_balance():
    """Towards 0.8 of one branch, by Adam under volumization, which leaves it alone."""
    target = 0.8 * H + 0.2 * R
    layer = ConvexSum()
    tx = wr.volumized_adam(0.05, volume=0.01, alpha=0.0)
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda layer: jnp.mean((layer(H, R) - target) ** 2)
        )(layer)
        optimizer.update(layer, grads)
        return loss

    losses = [step(layer, optimizer) for _ in range(200)]
    assert losses[-1] < 1e-3 * losses[0]
    a, b = jax.nn.softmax(layer.convex_logits[...])
    np.testing.assert_allclose([a, b], [0.8, 0.2], atol=5e-3)


@quick.everything
def test_training_a_stack_leaves_the_box_to_the_weights():
    blocks = stacked()
    tx = optax.chain(optax.sgd(0.01), wr.volumize(0.1, 0.0))
    optimizer = nnx.Optimizer(blocks, tx, wrt=nnx.Param)
    before = blocks.sum.convex_logits[...]
    grads = nnx.grad(lambda b: jnp.sum(nnx.vmap(lambda b: b(H))(b) ** 2))(blocks)
    optimizer.update(blocks, grads)
    moved = blocks.sum.convex_logits[...] - before
    by_hand = -0.01 * grads["sum"]["convex_logits"][...]
    np.testing.assert_allclose(moved, by_hand, rtol=1e-4, atol=1e-6)
    assert np.abs(blocks.sum.convex_logits[...]).max() > 0.3
    assert np.abs(blocks.dense.kernel[...]).max() <= np.float32(0.1)


def test_errors():
    with pytest.raises(
        ValueError, match=r"residual must have the shape of h, \(6, 4\)"
    ):
        ConvexSum()(H, R[:1])
    with pytest.raises(ValueError, match="initial must be between 0 and 1, but is 0"):
        ConvexSum(0)
    with pytest.raises(TypeError, match="initial must be a number, not None"):
        ConvexSum(None)
    with pytest.raises(ValueError, match="Dtype must be inexact"):
        ConvexSum(dtype=jnp.int32)(H, R)


def test_flax_is_imported_by_these_two_files_only():
    """And they are called as its packages without being in their way."""
    code = """
import sys, weightreg
assert not any(name.split(".")[0] == "flax" for name in sys.modules), "flax"
import weightreg.nnx, weightreg.linen
from flax import linen, nnx
assert issubclass(weightreg.nnx.ConvexSum, nnx.Module)
assert issubclass(weightreg.linen.ConvexSum, linen.Module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Network(nnx.Module):
    """Convolution, batch statistics, dropout and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(144, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.dense(self.drop(x.reshape(x.shape[0], -1)))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)


def params_of(module):
    """Copies of the parameters, by path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {path: np.array(leaf[...]) for path, leaf in flat}


def make(**kwargs):
    return EquivalentNorm(Network(nnx.Rngs(0)), wr.equivalent_norm(**kwargs))


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


@quick.everything
@pytest.mark.parametrize("learn", [False, True])
def test_no_call_touches_the_stored_parameters(learn):
    model = make(learn=learn)
    bare = {
        ("module", *path): leaf
        for path, leaf in params_of(Network(nnx.Rngs(0))).items()
    }
    before = params_of(model)
    assert set(before) == set(bare) | ({("log_alpha",)} if learn else set())
    for path, leaf in bare.items():
        np.testing.assert_array_equal(before[path], leaf)
    for call in (
        lambda model, x: model(x),
        nnx.jit(loss),
        nnx.grad(loss),
        nnx.jit(nnx.value_and_grad(loss)),
        nnx.remat(lambda model, x: model(x)),
    ):
        for _ in range(2):
            call(model, IMAGES)
            chex.assert_trees_all_equal(params_of(model), before)
    model.eval()
    jax.grad(lambda x: jnp.sum(model(x)))(IMAGES)  # the model from outside
    jax.jit(lambda x: jax.vmap(lambda one: model(one[None]))(x))(IMAGES)
    chex.assert_trees_all_equal(params_of(model), before)


def test_flax_overwrites_what_it_normalizes():
    """google/flax issue 5576: a projection, where a reparametrization is meant."""
    plain = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = nnx.WeightNorm(plain, use_scale=False, rngs=nnx.Rngs(0))
    stored = np.array(plain.kernel[...])
    model(jnp.ones((1, 4)))
    if np.array_equal(plain.kernel[...], stored):
        pytest.skip("flax has mended issue 5576: WeightNorm keeps its parameters")
    ours = EquivalentNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    ours(jnp.ones((1, 4)))
    np.testing.assert_array_equal(ours.module.kernel[...], stored)


def test_all_else_that_a_call_changes_is_kept():
    model, plain = make(), make().fold()
    want = [plain(IMAGES) for _ in range(3)]
    got = [model(IMAGES) for _ in range(2)]
    got.append(nnx.jit(lambda m, x: m(x))(model, IMAGES))
    for ours, theirs in zip(
        got, want, strict=True
    ):  # other units are dropped each time
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not np.allclose(got[0], got[1])
    for name in ("mean", "var"):
        ours = getattr(model.module.norm, name)[...]
        np.testing.assert_allclose(ours, getattr(plain.norm, name)[...], rtol=1e-5)
    assert model.module.drop.rngs.count[...] == 3


def test_a_folded_module_is_a_copy():
    model = make()
    folded = model.fold()
    folded(IMAGES)
    assert jnp.any(folded.norm.mean[...] != 0) and folded.drop.rngs.count[...] == 1
    inside = model.module
    assert jnp.all(inside.norm.mean[...] == 0) and inside.drop.rngs.count[...] == 0


def test_what_a_call_creates_is_kept():
    class Sowing(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            if not hasattr(self, "calls"):
                self.calls = nnx.BatchStat(jnp.zeros(()))
            self.calls[...] += 1
            y = self.dense(x)
            self.sow(nnx.Intermediate, "y", y)
            return y

    model = EquivalentNorm(Sowing())
    for count in (1, 2):
        out, found = nnx.capture(model, nnx.Intermediate)(jnp.ones((1, 4)))
        np.testing.assert_array_equal(jax.tree.leaves(found)[0], out)
        assert model.module.calls[...] == count


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"module must be a flax\.nnx.*Module, not"):
        EquivalentNorm(jnp.tanh)
    with pytest.raises(TypeError, match="what equivalent_norm returns, not 'unit'"):
        EquivalentNorm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "unit")


def test_layers_that_start_at_zero_are_warned_of():
    def net(init=nnx.initializers.zeros):
        rngs = nnx.Rngs(0)
        head = nnx.Linear(4, 3, kernel_init=init, rngs=rngs)
        return nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.relu, head)

    with pytest.warns(UserWarning, match="will never learn") as caught:
        model = EquivalentNorm(net())
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "['layers'][2]['kernel']" in message and "[0]" not in message
    assert "kernel_init=" in message and "mask= of equivalent_norm" in message
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
    assert not np.any(grads["module"]["layers"][2]["kernel"][...])
    # Not where the weights are others, are left out, or are not known.
    ones = nnx.initializers.ones
    EquivalentNorm(net(ones), wr.equivalent_norm(center=False))
    with pytest.warns(UserWarning, match="or all equal within each layer"):
        EquivalentNorm(net(ones), wr.equivalent_norm("layer"))
    mask = {"layers": {0: {"kernel": True, "bias": False}, 2: False}}
    EquivalentNorm(net(), wr.equivalent_norm(mask=mask))
    nnx.eval_shape(lambda: EquivalentNorm(net()))
    nnx.jit(lambda: EquivalentNorm(net()))()
    EquivalentNorm(nnx.eval_shape(net))  # of shapes alone


def test_the_folded_module_gives_the_same_bits():
    model = make(scope="layer", center=False)
    model.eval()
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(run(model, IMAGES), run(model.fold(), IMAGES))
    kernel = model.fold().dense.kernel[...]
    np.testing.assert_allclose(jnp.sum(kernel**2), 1.0, rtol=1e-5)


def test_gradients_flow_through_the_map_to_what_is_stored():
    model = make(learn=True)
    model.eval()
    graph, params, rest = nnx.split(model.module, nnx.Param, ...)

    def by_hand(params, log_alpha):
        enc = wr.equivalent_norm(alpha=jnp.exp(log_alpha))
        return loss(nnx.merge(graph, enc(params), rest), IMAGES)

    want = jax.grad(by_hand, argnums=(0, 1))(params, model.log_alpha[...])
    got = nnx.grad(loss)(model, IMAGES)
    np.testing.assert_allclose(got["log_alpha"][...], want[1], rtol=1e-4)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(got["module"]), nnx.to_pure_dict(want[0]), rtol=1e-4, atol=1e-6
    )


@quick.everything
def test_an_optimizer_trains_it():
    model = make(learn=True)
    tx = optax.chain(wr.add_shifted_l2(1e-4, 1e-3), optax.sgd(0.05))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        mean = lambda m: jnp.mean((m(IMAGES) - 1) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(mean)(model)
        optimizer.update(model, grads)
        return value

    before = params_of(model)
    values = [float(step(model, optimizer)) for _ in range(30)]
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])
    moved = params_of(model)
    # Batch normalization takes away the bias before it, which only rounding moves.
    del moved["module", "conv", "bias"]
    assert all(np.abs(leaf - before[p]).max() > 1e-3 for p, leaf in moved.items())


def test_scanned_layers():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = EquivalentNorm(nnx.Linear(4, 4, rngs=rngs))

        def __call__(self, x):
            return jnp.tanh(self.dense(x))

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return Layer(rngs)

    layers = stack(nnx.Rngs(0))
    before = params_of(layers)
    run = nnx.scan(
        lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    h = x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    kernels = before["dense", "module", "kernel"]
    for kernel in kernels:
        h = jnp.tanh(h @ wr.equivalent_norm()(jnp.asarray(kernel)))
    np.testing.assert_allclose(run(x, layers), h, rtol=1e-4, atol=1e-6)
    nnx.jit(run)(x, layers)
    chex.assert_trees_all_equal(params_of(layers), before)


@quick.everything
def test_saved_and_restored_by_orbax(tmp_path):
    model, other = make(learn=True), make(learn=True, alpha=3.0)
    model(IMAGES)
    other.module.dense.kernel[...] += 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", nnx.state(other))
    nnx.update(other, restored)
    chex.assert_trees_all_equal(params_of(other), params_of(model))
    for each in (model, other):
        each.eval()
    np.testing.assert_array_equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", [lambda s: s, nnx.as_pure, nnx.to_pure_dict])
def test_networks_take_what_was_unpacked_of_their_state(kind):
    """As variables, as arrays and as a dict, whole and in a module that is there."""
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(4, 3, rngs=nnx.Rngs(1)),
    )
    graph, params = nnx.split(model)
    expected = nnx.merge(graph, wr.binarize(params, 0.5))(IMAGES)
    packed = wr.pack(kind(nnx.state(model, nnx.Param)), 0.5, "binary")
    assert isinstance(packed["layers"][2]["kernel"], wr.PackedWeight)
    merged = nnx.merge(graph, wr.unpack(packed))
    nnx.update(model, wr.unpack(packed))
    for got in (merged, model):
        kernel = got.layers[2].kernel
        assert isinstance(kernel, nnx.Param) and kernel.shape == (4, 3)
        np.testing.assert_array_equal(got(IMAGES), expected)
    run = jax.jit(lambda p, x: nnx.merge(graph, wr.unpack(p))(x))
    np.testing.assert_allclose(run(packed, IMAGES), expected, rtol=1e-5, atol=1e-6)


class Mixed(nnx.Module):
    """Layers of many kinds, one of them shared, statistics, and what is noted."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.wide = nnx.Linear(4, 1024, rngs=rngs)
        self.general = nnx.LinearGeneral(1024, (2, 4), rngs=rngs)
        self.told = nnx.Linear(8, 8, precision="highest", rngs=rngs)
        self.shared = self.told
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.own = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        x = self.norm(self.conv(x)).mean((1, 2))
        x = self.general(nnx.relu(self.wide(x))).reshape(len(x), 8)
        x = self.shared(nnx.tanh(self.told(x)))
        self.noted = nnx.Intermediate(x)
        return self.attention(x[None])[0] @ self.own[...]


@quick.everything
def test_modules_run_from_bits():
    model = Mixed(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    packed = wr.pack(params, 0.3, "ternary")
    small = weightreg.nnx.unpack_layers(model, packed)
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    whole = nnx.merge(graph, wr.unpack(packed), rest, copy=True)
    run = nnx.jit(lambda model, x: model(x))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    near(run(small, IMAGES), run(whole, IMAGES))
    near(small.norm.mean[...], whole.norm.mean[...])  # and so changed the statistics
    near(small.noted[...], whole.noted[...])
    assert isinstance(small.wide, nnx.Linear)
    assert isinstance(small.wide.kernel.get_raw_value(), wr.PackedWeight)
    assert isinstance(model.wide.kernel[...], jax.Array)
    small.eval(), whole.eval()
    graph, state = nnx.split(small)
    pure = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    near(pure(state, IMAGES), whole(IMAGES))
    mapped = jax.vmap(lambda x: pure(state, x[None])[0])
    near(mapped(IMAGES)[:1], pure(state, IMAGES[:1]))


def test_what_was_saved_of_bits_runs(tmp_path):
    model = nnx.Sequential(nnx.Linear(6, 9, rngs=nnx.Rngs(0)), nnx.relu)
    params = nnx.state(model, nnx.Param)
    packed = wr.pack(params, 0.3, "binary")
    small = weightreg.nnx.unpack_layers(model, packed)
    x = jnp.ones((2, 6))
    for tree in (packed, nnx.state(small, nnx.Param)):
        wr.save_packed(tree, tmp_path / "network")
        for like in (params, packed, nnx.state(small, nnx.Param)):
            loaded = wr.load_packed(tmp_path / "network", like=like)
            again = weightreg.nnx.unpack_layers(model, loaded)
            np.testing.assert_array_equal(again(x), small(x))


def test_one_layer_of_a_module_is_held_at_a_time():
    model = nnx.Sequential(*[nnx.Linear(128, 128, rngs=nnx.Rngs(0)) for _ in range(6)])
    packed = wr.pack(nnx.state(model, nnx.Param), 0.1, "binary")
    graph, state = nnx.split(weightreg.nnx.unpack_layers(model, packed))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    held = run.lower(state, jnp.ones((4, 128))).compile().memory_analysis()
    assert held.temp_size_in_bytes < 1.25 * 128 * 128 * 4


def test_scanned_layers_run_from_bits_if_they_were_packed_layer_by_layer():
    layers, h = stacked(), jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
    params = nnx.state(layers, nnx.Param)
    graph, _, rest = nnx.split(layers, nnx.Param, ...)
    run = nnx.jit(
        nnx.scan(lambda h, b: b(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    )
    axes = {"dense": {"bias": None, "kernel": Dims(1, 2)}, "sum": None}
    packed = wr.pack(nnx.to_pure_dict(params), 0.3, "binary", dims=axes)
    small = weightreg.nnx.unpack_layers(layers, nnx.State(packed))
    whole = nnx.merge(graph, nnx.State(wr.unpack(packed)), rest)
    np.testing.assert_allclose(run(h, small), run(h, whole), rtol=1e-5, atol=1e-6)
    axes["dense"]["kernel"] = Dims((0, 1), 2)
    whole = wr.pack(nnx.to_pure_dict(params), 0.3, "binary", dims=axes)
    small = weightreg.nnx.unpack_layers(layers, nnx.State(whole))
    with pytest.raises((ValueError, IndexError)):  # by nnx: a scale has no axis
        run(h, small)


def test_what_cannot_run_from_bits_is_refused():
    model = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    packed = wr.pack(nnx.state(model, nnx.Param), 0.3, "binary")
    other = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"another network.*\(9,\).*\(8,\)"):
        weightreg.nnx.unpack_layers(other, packed)
    bare = nnx.Linear(6, 9, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\['bias'\].*the model has nothing"):
        weightreg.nnx.unpack_layers(bare, packed)
    with pytest.raises(
        TypeError, match="model must be a module of nnx, not custom_jvp"
    ):
        weightreg.nnx.unpack_layers(nnx.relu, packed)
