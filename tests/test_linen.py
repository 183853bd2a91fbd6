"""The linen module against the function, by hand, under transforms and in training."""

import dataclasses
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
import weightreg.linen
import weightreg.nnx
from weightreg._weissi._parseval import convex_sum
from weightreg.linen import ConvexSum, EquivalentNorm

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
H, R, G = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(3, 6, 4)))


def with_logits(*logits):
    return {"params": {"convex_logits": jnp.array(logits)}}


def test_it_starts_at_the_mean_of_the_branches():
    variables = quick.jit(ConvexSum().init)(KEY, H, R)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == {
        "params": {"convex_logits": ((2,), jnp.float32)}
    }
    got = quick.jit(ConvexSum().apply)(variables, H, R)
    np.testing.assert_allclose(got, (H + R) / 2, rtol=1e-6)


@pytest.mark.parametrize("initial", [0.1, 0.9, 1e-6])
def test_it_starts_where_it_is_told(initial):
    got, _ = ConvexSum(initial).init_with_output(KEY, H, R)
    np.testing.assert_allclose(got, initial * H + (1 - initial) * R, atol=1e-6)


def test_it_is_the_function_and_its_derivative():
    variables = with_logits(0.7, -0.4)
    loss = lambda v, h, r: jnp.sum(G * ConvexSum().apply(v, h, r))  # noqa: E731
    got = ConvexSum().apply(variables, H, R)
    expected = convex_sum(H, R, variables["params"]["convex_logits"])
    np.testing.assert_array_equal(got, expected)
    a = 1 / (1 + math.exp(-1.1))
    by_logits, by_h, by_r = quick.jit(jax.grad(loss, (0, 1, 2)))(variables, H, R)
    slope = a * (1 - a) * jnp.sum(G * (H - R))
    by_logits = by_logits["params"]["convex_logits"]
    np.testing.assert_allclose(by_logits, [slope, -slope], rtol=1e-4)
    np.testing.assert_allclose(by_h, a * G, rtol=1e-5)
    np.testing.assert_allclose(by_r, (1 - a) * G, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "dtype", "param_dtype", "expected"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", None, "bfloat16", "float32"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float16", "float32", "float16"),
        ("int32", None, "float32", "float32"),
    ],
)
def test_dtypes_are_those_of_a_dense_layer(inputs, dtype, param_dtype, expected):
    kwargs = {"dtype": dtype, "param_dtype": param_dtype}
    h, r = (10 * H).astype(inputs), (10 * R).astype(inputs)
    got, variables = ConvexSum(0.3, **kwargs).init_with_output(KEY, h, r)
    dense, dense_variables = nn.Dense(4, **kwargs).init_with_output(KEY, h)
    assert got.dtype == dense.dtype == expected
    dtypes = {leaf.dtype for leaf in jax.tree.leaves([variables, dense_variables])}
    assert dtypes == {jnp.dtype(param_dtype)}
    model = weightreg.nnx.ConvexSum(0.3, **kwargs)
    np.testing.assert_array_equal(model(h, r), got)
    assert model(h, r).dtype == expected


def test_logits_are_not_rounded_with_the_inputs():
    """1 and 1.001 are one number in bfloat16."""
    for layer in (ConvexSum(dtype=jnp.bfloat16), weightreg.nnx.ConvexSum):
        if isinstance(layer, nn.Module):
            run = lambda h, r: layer.apply(with_logits(1.001, 1.0), h, r)  # noqa: B023, E731
        else:
            run = layer(dtype=jnp.bfloat16)
            run.convex_logits[...] = jnp.array([1.001, 1.0])
        far = run(jnp.bfloat16(2**14), jnp.bfloat16(-(2**14)))
        np.testing.assert_allclose(far, 2**14 * 0.0005, rtol=0.01)


def test_training_learns_the_balance():
    """Towards 0.8 of one branch, by Adam under volumization, which leaves it alone."""
    target = 0.8 * H + 0.2 * R
    tx = wr.volumized_adam(0.05, volume=0.01, alpha=0.0)
    loss = lambda v: jnp.mean((ConvexSum().apply(v, H, R) - target) ** 2)  # noqa: E731

    def step(carry, _):
        variables, state = carry
        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    variables = ConvexSum().init(KEY, H, R)
    (variables, _), _ = jax.lax.scan(step, (variables, tx.init(variables)), length=300)
    a, b = jax.nn.softmax(variables["params"]["convex_logits"])
    np.testing.assert_allclose([a, b], [0.8, 0.2], atol=1e-3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return ConvexSum(0.75)(h, nn.relu(nn.Dense(4)(h))), None


class Network(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, h):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return blocks()(h, None)[0]


@quick.everything
def test_under_scan_the_logits_are_stacked_and_still_no_weight():
    params = Network().init(KEY, H)["params"]
    (block,) = params.values()
    logits = block["ConvexSum_0"]["convex_logits"]
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 0], 0.75, rtol=1e-6)

    mask = wr.weight_mask(params)
    (flags,) = mask.values()
    assert flags == {
        "ConvexSum_0": {"convex_logits": False},
        "Dense_0": {"bias": False, "kernel": True},
    }
    (layer,) = wr.weight_layers(params)
    assert layer.shape == (3, 4, 4)

    dims = lambda p: jax.tree.map(lambda w: Dims(1, 2) if w else None, mask)  # noqa: E731
    tx = wr.volumized_sgd(0.1, volume=0.1, alpha=0.0, dims=dims)
    grads = jax.grad(lambda p: jnp.sum(Network().apply({"params": p}, H) ** 2))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    (update,), (grad,) = updates.values(), grads.values()
    expected = -0.1 * grad["ConvexSum_0"]["convex_logits"]
    assert np.all(expected != 0)
    got = update["ConvexSum_0"]["convex_logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@quick.everything
@pytest.mark.usefixtures("full_precision")
def test_scanned_blocks_equal_a_loop():
    params = Network().init(KEY, H)["params"]
    (block,) = params.values()
    spread = jnp.array([[1.0, 0.0], [-2.0, 0.5], [0.0, 0.0]])
    block["ConvexSum_0"]["convex_logits"] = spread
    h = np.asarray(H, np.float64)
    for i in range(3):
        dense = jax.tree.map(lambda x, i=i: np.asarray(x[i], float), block["Dense_0"])
        r = np.maximum(h @ dense["kernel"] + dense["bias"], 0)
        a = 1 / (1 + math.exp(spread[i, 1] - spread[i, 0]))
        h = a * h + (1 - a) * r
    got = Network().apply({"params": params}, H)
    np.testing.assert_allclose(got, h, rtol=1e-4, atol=1e-5)


@quick.everything
def test_lifted_vmap_and_remat():
    mapped = nn.vmap(
        ConvexSum, variable_axes={"params": 0}, split_rngs={"params": True}
    )()
    variables = mapped.init(KEY, H, R)
    assert variables["params"]["convex_logits"].shape == (6, 2)
    assert not wr.weight_mask(variables)["params"]["convex_logits"]
    np.testing.assert_allclose(mapped.apply(variables, H, R), (H + R) / 2, rtol=1e-6)
    variables = with_logits(0.7, -0.4)
    got = nn.remat(ConvexSum)().apply(variables, H, R)
    np.testing.assert_allclose(got, ConvexSum().apply(variables, H, R), rtol=1e-6)


def test_errors():
    with pytest.raises(
        ValueError, match=r"residual must have the shape of h, \(6, 4\)"
    ):
        ConvexSum().init(KEY, H, R[:1])
    with pytest.raises(ValueError, match="initial must be between 0 and 1, but is 1"):
        ConvexSum(1.0).init(KEY, H, R)
    with pytest.raises(TypeError, match="initial must be a number, not 'x'"):
        ConvexSum("x").init(KEY, H, R)
    with pytest.raises(ValueError, match="Dtype must be inexact"):
        ConvexSum(dtype=jnp.int32).init(KEY, H, R)


class WithStatistics(nn.Module):
    """Convolution, batch statistics, dropout and a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)
LEARN = wr.equivalent_norm(learn=True)


@pytest.mark.parametrize("learn", [False, True])
def test_the_network_runs_on_mapped_weights_and_stores_others(learn):
    enc = wr.equivalent_norm("layer", alpha=2.0, learn=learn)
    ours, plain = EquivalentNorm(WithStatistics(), enc), WithStatistics()
    variables = ours.init(KEY, IMAGES)
    bare = nn.Sequential([WithStatistics()]).init(KEY, IMAGES)  # as deep as ours
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(variables["params"]["module"]) == shapes(bare["params"]["layers_0"])
    assert ("log_alpha" in variables["params"]) == learn
    kernel = variables["params"]["module"]["Dense_0"]["kernel"]
    assert abs(float(jnp.sum(kernel**2)) - 2.0) > 0.1  # as initialized, not as mapped

    folded = ours.fold(variables)
    by_hand = wr.equivalent_norm("layer", alpha=2.0)(variables["params"]["module"])
    chex.assert_trees_all_close(folded["params"], by_hand, rtol=1e-6)
    settings = {"mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    for train in (False, True):
        got, stats = ours.apply(variables, IMAGES, train, **settings)
        settings["rngs"] = {"dropout": KEY}
        if not train:
            want, _ = plain.apply(folded, IMAGES, train, **settings)
            np.testing.assert_array_equal(got, want)
        inner = nn.Sequential([plain])  # the same path, hence the same dropout
        same = {k: {"layers_0": v} for k, v in folded.items()}
        assert list(stats) == ["batch_stats"]
        want = inner.apply(same, IMAGES, train, **settings)[1]["batch_stats"]
        chex.assert_trees_all_equal(stats["batch_stats"]["module"], want["layers_0"])


@quick.everything
def test_gradients_flow_through_the_map():
    ours = EquivalentNorm(WithStatistics(), LEARN)
    variables = ours.init(KEY, IMAGES)
    stats = {"batch_stats": variables["batch_stats"]}

    def loss(params):
        return jnp.sum(jnp.sin(ours.apply({"params": params, **stats}, IMAGES)))

    def by_hand(params):
        enc = wr.equivalent_norm(alpha=jnp.exp(params["log_alpha"]))
        plain = {"params": enc(params["module"])}
        plain["batch_stats"] = stats["batch_stats"]["module"]
        return jnp.sum(jnp.sin(WithStatistics().apply(plain, IMAGES)))

    got, want = (quick.jit(jax.grad(f))(variables["params"]) for f in (loss, by_hand))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert got["log_alpha"] != 0


def apply_init(module, *args):
    return module.apply(module.init(KEY, *args), *args)


@quick.everything
@pytest.mark.usefixtures("full_precision")
def test_layers_in_a_network_are_wrapped_one_by_one():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(EquivalentNorm(nn.Dense(4))(x))
            x = EquivalentNorm(nn.Dense(5), LEARN, name="b")(x)
            return nn.Dense(2)(x)

    x = IMAGES[:, 0].reshape(5, 12)
    variables = Outer().init(KEY, x)
    params = variables["params"]
    leaves = jax.tree.leaves(params)
    shapes = sorted(leaf.shape for leaf in leaves if leaf.ndim == 2)
    assert shapes == [(4, 5), (5, 2), (12, 4)]
    assert set(params["b"]) == {"log_alpha"}

    def loss(log_alpha):
        """In float64 NumPy, where biases are zeros."""
        first, second, last = (
            np.asarray(params[f"Dense_{i}"]["kernel"], np.float64) for i in range(3)
        )
        hidden = np.maximum(x @ eq_22(first), 0) @ eq_22(second)
        return np.sum((math.exp(log_alpha / 2) * hidden @ last) ** 2)

    def eq_22(kernel):
        centred = kernel - kernel.mean(0)
        return centred / np.linalg.norm(centred, axis=0) / math.sqrt(kernel.shape[1])

    value, grads = jax.value_and_grad(lambda v: jnp.sum(Outer().apply(v, x) ** 2))(
        variables
    )
    chex.assert_tree_all_finite(grads)
    np.testing.assert_allclose(value, loss(0.0), rtol=1e-5)
    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert slope > 0.01  # and not what rounding left
    np.testing.assert_allclose(grads["params"]["b"]["log_alpha"], slope, rtol=1e-4)


@quick.everything
@pytest.mark.parametrize("norm", [wr.equivalent_norm(), LEARN])
def test_lifted_transformations_around(norm):
    x = IMAGES[:, 0, 0]
    stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    many = nn.vmap(EquivalentNorm, in_axes=0, **stacked)(nn.Dense(3), norm)
    assert apply_init(many, x[:, None]).shape == (5, 1, 3)
    for lift in (nn.jit, nn.remat):
        ours, lifted = EquivalentNorm, lift(EquivalentNorm)
        variables = lifted(nn.Dense(3), norm).init(KEY, x)
        out = lifted(nn.Dense(3), norm).apply(variables, x)
        want = ours(nn.Dense(3), norm).apply(variables, x)
        np.testing.assert_allclose(out, want, rtol=1e-6)
        inside = [EquivalentNorm(nn.Dense(3), norm), nn.relu]
        assert apply_init(lift(nn.Sequential)(inside), x).shape == (5, 3)
    nested = nn.Sequential([EquivalentNorm(nn.Dense(3), norm), nn.Dense(2)])
    assert apply_init(EquivalentNorm(nested), x).shape == (5, 2)
    once, twice = (
        EquivalentNorm(nn.Dense(3)),
        EquivalentNorm(EquivalentNorm(nn.Dense(3))),
    )
    variables = once.init(KEY, x)
    again = {"params": {"module": variables["params"]}}
    want = once.apply(variables, x)
    np.testing.assert_allclose(twice.apply(again, x), want, rtol=1e-5, atol=1e-6)


def test_initialization_runs_the_module_once_and_keeps_its_names():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("count", "calls", lambda: jnp.zeros(()))
            calls.value += 1
            heat = self.param("log_alpha", nn.initializers.constant(2.0), ())
            return nn.WeightNorm(nn.Dense(3))(x) * heat

    x = IMAGES[:, 0, 0]
    ours = EquivalentNorm(Inner())
    variables = ours.init(KEY, x)
    assert variables["count"]["module"]["calls"] == 1
    out, state = ours.apply(variables, x, mutable=["count"])
    assert state["count"]["module"]["calls"] == 2
    folded = ours.fold(variables)
    assert folded["params"]["log_alpha"] == 2
    kernel = folded["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(jnp.sum(kernel**2), 1.0, rtol=1e-5)
    want, _ = Inner().apply(folded, x, mutable=["count"])
    np.testing.assert_array_equal(out, want)


def test_what_cannot_be_wrapped_or_folded_is_refused():
    with pytest.raises(TypeError, match=r"module must be a flax\.linen.*, not"):
        EquivalentNorm(nn.relu)
    with pytest.raises(TypeError, match="what equivalent_norm returns, not 'unit'"):
        EquivalentNorm(nn.Dense(3), "unit")
    ours = EquivalentNorm(nn.Dense(3))
    variables = ours.init(KEY, IMAGES)
    with pytest.raises(ValueError, match="variables must be all that init returned"):
        ours.fold(variables["params"])


ZEROS, ONES = nn.initializers.zeros, nn.initializers.ones


@quick.everything
@pytest.mark.parametrize(
    ("init", "scope", "center", "warns"),
    [
        (ZEROS, "unit", True, True),
        (ZEROS, "unit", False, True),
        (ZEROS, "layer", False, True),
        (ONES, "unit", True, True),
        (ONES, "layer", True, True),
        (ONES, "unit", False, False),
        # One unit is 0, or all are constant and differ: a layer is not 0.
        (lambda key, shape, _: jnp.eye(*shape)[:, ::-1], "unit", True, False),
        (
            lambda key, shape, _: jnp.arange(3.0) + jnp.zeros(shape),
            "layer",
            True,
            False,
        ),
        (lambda key, shape, _: jnp.arange(3.0) + jnp.zeros(shape), "unit", True, True),
    ],
)
def test_layers_that_start_at_zero_are_warned_of(init, scope, center, warns):
    norm = wr.equivalent_norm(scope, center)
    net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3, kernel_init=init)])
    model, x = EquivalentNorm(net, norm), jnp.ones((1, 2))
    if not warns:
        model.init(KEY, x)
        return
    with pytest.warns(UserWarning, match="will never learn") as caught:
        variables = model.init(KEY, x)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "['layers_2']['kernel']. " in message and "layers_0" not in message
    assert "kernel_init=" in message and "mask= of equivalent_norm" in message
    # Which is right: the gradient is 0, where it is not for the other layer's map.
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)
    assert not np.any(grads["params"]["module"]["layers_2"]["kernel"])
    model.apply(variables, x)  # warns no more


@quick.everything
def test_zeros_are_warned_of_only_where_they_are_known_and_mapped():
    dense, x = nn.Dense(3, kernel_init=ZEROS), jnp.ones((1, 2))
    jax.jit(EquivalentNorm(dense).init)(KEY, x)
    jax.eval_shape(EquivalentNorm(dense).init, KEY, x)
    EquivalentNorm(
        dense, wr.equivalent_norm(mask={"kernel": False, "bias": False})
    ).init(KEY, x)
    EquivalentNorm(nn.LayerNorm()).init(KEY, x)  # which has no weights
    inside = nn.Sequential([nn.Dense(4), EquivalentNorm(dense)])
    with pytest.warns(UserWarning, match=r": \['kernel'\]\. "):
        inside.init(KEY, x)
    # One layer of a stack is enough.
    init = lambda key, shape, _: jnp.eye(*shape) * jax.random.randint(key, (), 0, 2)  # noqa: E731
    stack = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(
        3, kernel_init=init
    )
    dims = {"bias": None, "kernel": Dims(1, 2)}
    model = EquivalentNorm(stack, wr.equivalent_norm(dims=dims))
    with pytest.warns(UserWarning, match=r"\['kernel'\]"):
        kernel = model.init(KEY, jnp.ones((6, 2)))["params"]["module"]["kernel"]
    assert np.any(kernel) and not np.all(np.any(kernel, (1, 2)))


def test_training_under_jit_and_scan():
    ours = EquivalentNorm(nn.Dense(2))
    x = IMAGES[:, 0, 0]
    params = ours.init(KEY, x)["params"]
    tx = optax.chain(wr.add_shifted_l2(1e-4, 1e-3), optax.sgd(0.1))

    @quick.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss = lambda p: jnp.mean((ours.apply({"params": p}, x) - 1) ** 2)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, 50)

    (end, _), losses = train(params)
    assert losses[-1] < 0.5 * losses[0]
    folded = ours.fold({"params": end})["params"]["kernel"]
    np.testing.assert_allclose(jnp.sum(folded**2), 1.0, rtol=1e-5)


@quick.everything
def test_scanned_layers_are_mapped_one_by_one():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(4)(x)), None

    stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3)()
    dims = {"Dense_0": {"kernel": Dims(1, 2), "bias": None}}
    ours = EquivalentNorm(stack, wr.equivalent_norm(dims=dims))
    x = jax.random.normal(KEY, (2, 4))
    variables = ours.init(KEY, x, None)
    folded = ours.fold(variables)["params"]["Dense_0"]
    sums = jnp.sum(folded["kernel"] ** 2, (1, 2))
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    h = x
    for i in range(3):
        h = jnp.tanh(h @ folded["kernel"][i] + folded["bias"][i])
    assert jnp.max(jnp.abs(h)) > 0.01  # and not what rounding left
    np.testing.assert_allclose(ours.apply(variables, x, None)[0], h, rtol=1e-4)


class Own(nn.Module):
    """Its own weight beside a layer, shared layers, and what is noted on the way."""

    @nn.compact
    def __call__(self, x):
        own = self.param("own", nn.initializers.normal(), (8, 8))
        shared = nn.Dense(8)
        y = shared(nn.tanh(shared(x @ own)))
        self.sow("intermediates", "y", y)
        return nn.Dropout(0.5, deterministic=False)(y)


class Normalized(nn.Module):
    """With variables that change in a call, and layers made in ``setup``."""

    def setup(self):
        self.first, self.norm = nn.Dense(8), nn.BatchNorm(use_running_average=False)

    def __call__(self, x):
        return self.norm(self.first(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(8)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=3, **axes)()(x, None)[0]


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(8)(x)


def stacks(params):
    """Of scanned layers."""
    return jax.tree.map(lambda x: Dims(1, 2) if x.ndim == 3 else None, params)


def from_bits(model, variables, *args, **kwargs):
    with nn.intercept_methods(weightreg.linen.unpack_layers):
        return model.apply(variables, *args, **kwargs)


PACKED = {
    "own": (Own(), {"mutable": ["intermediates"], "rngs": {"dropout": KEY}}, None),
    "normalized": (Normalized(), {"mutable": ["batch_stats"]}, None),
    "scanned": (Scanned(), {}, stacks),
    "rematerialized": (Rematerialized(), {}, None),
    "attention": (nn.MultiHeadDotProductAttention(2), {}, None),
    "recurrent": (nn.RNN(nn.LSTMCell(8)), {}, None),
    "convolutions": (nn.Sequential([nn.Conv(4, (3,)), nn.relu, nn.Dense(3)]), {}, None),
}


@pytest.mark.parametrize("name", PACKED)
def test_networks_run_layer_by_layer_from_bits(name):
    model, given, dims = PACKED[name]
    x = jnp.asarray(RNG.normal(size=(2, 4, 8)), jnp.float32)
    variables = quick.jit(model.init)({"params": KEY, "dropout": KEY}, x)
    packed = wr.pack(variables["params"], 0.3, "ternary", dims=dims)
    run = jax.jit(lambda v, x: from_bits(model, v, x, **given))
    plain = jax.jit(lambda v, x: model.apply(v, x, **given))
    got = run({**variables, "params": packed}, x)
    expected = plain({**variables, "params": wr.unpack(packed)}, x)
    chex.assert_trees_all_equal(got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(run(variables, x), plain(variables, x))  # not packed


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other plans on a GPU")
@pytest.mark.parametrize("given", ["one input", "several"])
def test_one_layer_of_a_network_is_held_at_a_time(given):
    model = nn.Sequential([nn.Dense(128) for _ in range(6)])
    model = Conditional() if given == "several" else model
    x = jnp.ones((4, 128))
    packed = wr.pack(quick.jit(model.init)(KEY, x)["params"], 0.1, "binary")
    run = jax.jit(lambda p, x: from_bits(model, {"params": p}, x))
    held = run.lower(packed, x).compile().memory_analysis().temp_size_in_bytes
    assert held < 1.2 * 128 * 128 * 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other plans on a GPU")
def test_dense_layers_multiply_with_bits_unless_they_were_told_how():
    """Of which no layer of 1024 units makes a kernel; the others give the same bits."""
    x = jnp.asarray(RNG.normal(size=(2, 64)), jnp.float32)
    plain = {"features": 1024}
    for layer, multiplies in (
        (nn.Dense(**plain), True),
        (nn.Dense(**plain, use_bias=False, dtype=jnp.bfloat16), True),
        (nn.DenseGeneral((8, 128)), True),
        (nn.Dense(**plain, precision="highest"), False),
        (nn.Dense(**plain, dot_general=jax.lax.dot_general), False),
        (nn.Dense(**plain, dot_general_cls=lambda: jax.lax.dot_general), False),
        (nn.DenseGeneral(1024, batch_dims=0), False),
    ):
        params = layer.init(KEY, x)["params"]
        packed = wr.pack(params, 0.3, "binary", dims=traced(layer, params, x))
        run = jax.jit(lambda p, layer=layer: from_bits(layer, {"params": p}, x))
        apply = jax.jit(lambda p, layer=layer: layer.apply({"params": p}, x))
        got, expected = run(packed), apply(wr.unpack(packed))
        assert got.dtype == expected.dtype
        held = run.lower(packed).compile().memory_analysis().temp_size_in_bytes
        kernel = params["kernel"].size * got.dtype.itemsize
        assert (held < kernel) == multiplies
        if multiplies:
            error = float(jnp.finfo(got.dtype).eps) * jnp.abs(expected).max()
            np.testing.assert_allclose(got, expected, atol=4 * error)
        else:
            np.testing.assert_array_equal(got, expected)


class Conditioned(nn.Module):
    """What comes first is known from the start."""

    @nn.compact
    def __call__(self, condition, x):
        kernel = self.param("kernel", nn.initializers.normal(), (128, 128))
        return nn.tanh(x @ kernel + condition)


class Conditional(nn.Module):
    @nn.compact
    def __call__(self, x):
        condition = x[0]
        for _ in range(6):
            x = Conditioned()(condition, x)
        return x


def test_what_cannot_run_from_bits_says_so():
    embedding, tokens = nn.Embed(5, 8), jnp.arange(3)
    packed = wr.pack({"embedding": jnp.ones((5, 8))}, 0.3, "binary")
    with pytest.raises(ValueError, match=r"Embed at ''.*\(embedding\) in setup.*mask"):
        from_bits(embedding, {"params": packed}, tokens)
    mapped = EquivalentNorm(nn.Dense(8))
    variables = quick.jit(mapped.init)(KEY, H)
    packed = wr.pack(variables["params"], 0.3, "binary")
    with pytest.raises(ValueError, match=r"packed at \['kernel'\]"):
        from_bits(mapped, {"params": packed}, H)
    folded = mapped.fold(variables)["params"]
    got = from_bits(nn.Dense(8), {"params": wr.pack(folded, 0.3, "binary")}, H)
    expected = nn.Dense(8).apply({"params": wr.binarize(folded, 0.3)}, H)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


class Stacked(nn.Module):
    """Layers that a lifted transformation takes from a stack of parameters."""

    lift: str = "scan"
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.lift == "scan":
            return nn.scan(Layer, length=3, **axes)(name="stack")(x, None)[0]
        mapped = nn.vmap(nn.Dense, **axes)
        return mapped(8, name="stack")(x)


def around(model, x):
    """Runs a network inside of other transformations of Flax."""

    class Around(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = self.is_initializing()
            same = nn.map_variables(
                lambda m, x: m(x), "params", init=init, mutable=init
            )
            return same(nn.jit(nn.remat(type(model)))(model.lift, name="in"), x)

    return Around()


def traced(model, params, x):
    return wr.trace_network(lambda p, x: model.apply({"params": p}, x), params, x)


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_stacks_run_from_bits_if_they_were_packed_layer_by_layer(lift):
    x = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    for model in (Stacked(lift), around(Stacked(lift), x)):
        params = quick.jit(model.init)(KEY, x)["params"]
        whole = jax.tree.map(lambda w: Dims((0, 1), 2) if w.ndim == 3 else None, params)
        whole = wr.pack(params, 0.3, "ternary", dims=whole)
        refused = r"ternary weights.* of shape \(3, 8, 8\).*axis 0.*dims="
        with pytest.raises(ValueError, match=refused):
            from_bits(model, {"params": whole}, x)
        packed = wr.pack(params, 0.3, "ternary", dims=traced(model, params, x))
        got = jax.jit(lambda p, model=model: from_bits(model, {"params": p}, x))(packed)
        expected = model.apply({"params": wr.unpack(packed)}, x)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        by_bias = wr.pack(params, 0.3, "ternary")  # whose shape tells of the stack
        assert (
            jax.tree.structure(by_bias) == jax.tree.structure(packed) or lift == "vmap"
        )
        from_bits(model, {"params": by_bias}, x)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_stacks_along_another_axis_are_refused(lift, axis):
    model, x = Stacked(lift, axis), jnp.ones((3, 8))
    params = quick.jit(model.init)(KEY, x)["params"]
    own = (0, 2) if axis == 1 else (0, 1)
    dims = jax.tree.map(lambda w: Dims(*own) if w.ndim == 3 else None, params)
    packed = wr.pack(params, 0.3, "binary", dims=dims)
    words = rf"\(8, 8\), stacked along \({axis % 3},\).*axis {axis}.*axis 0 of"
    with pytest.raises(ValueError, match=words):
        from_bits(model, {"params": packed}, x)
    expected = model.apply({"params": wr.binarize(params, 0.3, dims=dims)}, x)
    got = model.apply({"params": wr.unpack(packed)}, x)
    np.testing.assert_array_equal(got, expected)


def test_a_scan_in_a_scan_takes_its_stacks_one_after_the_other():
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    rows = nn.scan(nn.scan(Layer, length=3, **axes), length=2, **axes)
    model, x = rows(), jnp.ones((2, 8))
    params = quick.jit(model.init)(KEY, x, None)["params"]
    dims = jax.tree.map(lambda w: Dims(2, 3) if w.ndim == 4 else None, params)
    packed = wr.pack(params, 0.3, "binary", dims=dims)
    got = from_bits(model, {"params": packed}, x, None)[0]
    expected = model.apply({"params": wr.unpack(packed)}, x, None)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    dims = jax.tree.map(lambda w: Dims((1, 2), 3) if w.ndim == 4 else None, params)
    outer = wr.pack(params, 0.3, "binary", dims=dims)
    with pytest.raises(ValueError, match=r"layers of shape \(3, 8, 8\).*dims="):
        from_bits(model, {"params": outer}, x, None)


def test_bits_that_were_cut_are_refused_by_the_layer_they_are_in():
    model, x = nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((2, 8))
    packed = wr.pack(quick.jit(model.init)(KEY, x)["params"], 0.3, "binary")
    kernel = packed["layers_1"]["kernel"]
    packed["layers_1"]["kernel"] = dataclasses.replace(kernel, bits=kernel.bits[0])
    words = r"'kernel' of Dense at 'layers_1'.*\(8, 1\).*have \(1, 8, 1\).*dims="
    with pytest.raises(ValueError, match=words):
        from_bits(model, {"params": packed}, x)


def test_scanned_layers_in_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8, kernel_init=init)(x)), None

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    named = {nn.PARTITION_NAME: "layers"}
    model = nn.scan(Boxed, length=3, metadata_params=named, **axes)()
    x = jnp.ones((2, 8))
    params = quick.jit(model.init)(KEY, x, None)["params"]
    is_kernel = lambda w: Dims(1, 2) if w.ndim == 3 else None  # noqa: E731
    packed = wr.pack(params, 0.3, "binary", dims=jax.tree.map(is_kernel, params))
    got = from_bits(model, {"params": packed}, x, None)[0]
    expected = model.apply({"params": wr.unpack(packed)}, x, None)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
