"""What `trace_network` says beside roles and axes, and how methods go by it."""

import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx

import weightreg as wr
import weightreg.nnx

pytestmark = quick.everything


def ones(*shape):
    return jnp.ones(shape)


def spread(*shape):
    """Numbers that differ, of no special size."""
    return jnp.sin(jnp.arange(math.prod(shape)) + 0.5).reshape(shape)


def read(fn, params, *inputs, **options):
    return wr.trace_network(fn, params, *inputs, **options)


# What lies between layers.


def chain(between):
    """Two dense layers with a function between them."""
    params = {"a": spread(3, 8), "shift": spread(8), "b": spread(8, 2)}
    fn = lambda p, x: between(x @ p["a"] + p["shift"]) @ p["b"]  # noqa: E731
    return fn, params, spread(5, 3)


HOMOGENEOUS = {
    "nothing": lambda h: h,
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "maxout": lambda h: jnp.repeat(h.reshape(-1, 4, 2).max(-1), 2, 1),
    "reshape": lambda h: h.reshape(-1, 2, 4).swapaxes(1, 2).reshape(-1, 8),
    "times two": lambda h: 2 * h,
    "a square's root": lambda h: jnp.sqrt(jnp.square(h)),
    "padding": lambda h: jnp.pad(h, ((0, 0), (1, 1)))[:, 2:],
    "a roll": lambda h: jnp.roll(h, 3, 1),
}
OTHERS = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softmax": jax.nn.softmax,
    "an offset": lambda h: h + 1,
    "relu6": jax.nn.relu6,
    "normalization": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "a residual": lambda h: h + jnp.tanh(h),
    "a gate": lambda h: h * jax.nn.relu(h),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_scale_is_shifted_through_what_is_homogeneous(name):
    fn, params, x = chain(HOMOGENEOUS[name])
    net = read(fn, params, x)
    shifted = wr.shift_scales(params, [4.0, 0.25], net)
    np.testing.assert_allclose(shifted["a"], 4 * params["a"])
    np.testing.assert_allclose(shifted["shift"], 4 * params["shift"])
    np.testing.assert_allclose(fn(shifted, x), fn(params, x), rtol=1e-5, atol=1e-6)
    balanced = wr.balance_scales(params, dims=net)
    np.testing.assert_allclose(fn(balanced, x), fn(params, x), rtol=1e-5, atol=1e-6)
    norms = [jnp.linalg.norm(balanced[k]) for k in "ab"]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_scale_is_not_shifted_through_anything_else(name):
    fn, params, x = chain(OTHERS[name])
    net = read(fn, params, x)
    with pytest.raises(ValueError, match=r"cannot shift scale between \['a'\] and"):
        wr.shift_scales(params, [4.0, 0.25], net)
    with pytest.raises(ValueError, match=r"cannot shift scale between \['a'\] and"):
        wr.balance_scales(params, dims=net)


BOUNDED = {
    **{name: HOMOGENEOUS[name] for name in ("nothing", "relu", "leaky relu", "abs")},
    **{name: HOMOGENEOUS[name] for name in ("reshape",)},
    "padding": lambda h: jnp.pad(h, ((0, 0), (1, 1)))[:, 1:-1],
    "a maximum of multiples": lambda h: jnp.maximum(h, 0.1 * h),
    "tanh": jnp.tanh,
    "sine": jnp.sin,
    "sigmoid": jax.nn.sigmoid,
    "relu6": jax.nn.relu6,
    "a smaller multiple": lambda h: -0.5 * h,
}
UNBOUNDED = {
    "times two": HOMOGENEOUS["times two"],
    "gelu": jax.nn.gelu,
    "exp": jnp.exp,
    "normalization": OTHERS["normalization"],
    "a residual": OTHERS["a residual"],
    "a sum": lambda h: jnp.tile(h.sum(-1, keepdims=True), 8),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_hold_where_distances_do_not_grow(name):
    fn, params, x = chain(BOUNDED[name])
    net = read(fn, params, x)
    bound = wr.input_gradient_bound(params, net)
    gradients = jax.vmap(jax.jacrev(lambda x: fn(params, x[None])[0]))(x)
    assert jnp.all(jnp.linalg.norm(gradients, axis=-1) <= bound * (1 + 1e-5))
    norms = [jnp.linalg.norm(params["a"]), jnp.linalg.norm(params["b"], axis=0)]
    np.testing.assert_allclose(bound, norms[0] * norms[1], rtol=1e-5)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_bounds_are_refused_where_distances_may_grow(name):
    fn, params, x = chain(UNBOUNDED[name])
    net = read(fn, params, x)
    with pytest.raises(ValueError, match="does not hold for the traced network: "):
        wr.input_gradient_bound(params, net)
    with pytest.raises(ValueError, match="does not hold for the traced network: "):
        wr.gbr_bounds(params, dims=net)


def test_what_follows_the_last_layer_and_precedes_the_first_counts_for_bounds():
    params = {"a": spread(3, 3), "b": spread(3, 3)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    x = ones(1, 3)
    for outer in (
        lambda p, x: jax.nn.softmax(fn(p, x)),
        lambda p, x: fn(p, 3 * x),
        lambda p, x: fn(p, x) + x,
        lambda p, x: fn(p, x).sum(),
    ):
        with pytest.raises(ValueError, match="does not hold"):
            wr.input_gradient_bound(params, read(outer, params, x))


def test_repeated_calls_count_for_bounds():
    params = {"w": 0.5 * spread(3, 3)}
    twice = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"])  # noqa: E731
    loop = lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"]), x)  # noqa: E731
    norm = jnp.linalg.norm(params["w"])
    for fn in (twice, loop):
        net = read(fn, params, ones(1, 3))
        assert net.layers[0].calls == 2
        bound = wr.input_gradient_bound(params, net)
        columns = jnp.linalg.norm(params["w"], axis=0)
        np.testing.assert_allclose(bound, norm * columns, rtol=1e-6)
        gbr = wr.gbr_bounds(params, dims=net)
        np.testing.assert_allclose(gbr.log_product, 4 * jnp.log(norm), rtol=1e-5)
        with pytest.raises(ValueError, match="it is called 2 times"):
            wr.balance_scales(params, net)
        volume = wr.lipschitz_volume(0.25, dims=net)(params)
        np.testing.assert_allclose(volume["w"], 0.5 / 3, rtol=1e-6)


def test_an_unknown_number_of_calls_is_refused():
    params = {"w": spread(3, 3)}
    again = lambda p, x: jax.lax.while_loop(  # noqa: E731
        lambda h: h.sum() < 3, lambda h: jnp.tanh(h @ p["w"]), x
    )
    net = read(again, params, ones(1, 3))
    assert net.layers[0].calls is None
    for method in (
        lambda: wr.input_gradient_bound(params, net),
        lambda: wr.lipschitz_volume(dims=net)(params),
        lambda: wr.shift_scales(params, [1.0], net),
    ):
        with pytest.raises(ValueError, match=r"called|come together \(while\)"):
            method()


class Scanned(nn.Module):
    """A dense layer for each of four rounds of a scan, and one more after them."""

    residual: bool = False

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            residual: bool

            @nn.compact
            def __call__(self, x, _):
                h = nn.relu(nn.Dense(3)(x))
                return x + h if self.residual else h, None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, **axes, length=4)(self.residual, name="blocks")(x, None)
        return nn.Dense(2, name="out")(x)


def scanned(residual):
    model, x = Scanned(residual), spread(5, 3)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    return fn, params, x, read(fn, params, x)


def test_scale_is_shifted_between_scanned_layers():
    fn, params, x, net = scanned(residual=False)
    assert [layer.stack_axes for layer in net.layers] == [(0,), ()]
    balanced = wr.balance_scales(params, net)
    np.testing.assert_allclose(fn(balanced, x), fn(params, x), rtol=1e-5, atol=1e-6)
    assert jnp.any(balanced["out"]["kernel"] != params["out"]["kernel"])
    gradients = jax.vmap(jax.jacrev(lambda x: fn(params, x[None])[0]))(x)
    bound = wr.input_gradient_bound(params, net)
    assert jnp.all(jnp.linalg.norm(gradients, axis=-1) <= bound * (1 + 1e-5))


def test_scale_is_not_shifted_between_scanned_residual_blocks():
    _, params, _, net = scanned(residual=True)
    with pytest.raises(ValueError, match="its stacked layers are not called one on"):
        wr.balance_scales(params, net)


def test_between_names_primitives_of_chains_only():
    p = {k: spread(3, 3) for k in "abcd"}

    def fn(p, x):
        x = jax.nn.relu(x @ p["a"]) @ p["b"]
        return (x + jnp.tanh(x) @ p["c"]) @ p["d"]

    net = read(fn, p, ones(2, 3))
    assert [layer.path for layer in net.layers] == [f"['{k}']" for k in "abcd"]
    # b feeds both branches, and d is fed by their sum.
    assert net.between == (("max",), None, None)


def test_a_stretch_of_a_network_may_be_shifted():
    p = {k: spread(3, 3) for k in "abc"}
    fn = lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    net, x = read(fn, p, ones(2, 3)), spread(2, 3)
    shifted = wr.shift_scales(p, [2.0, 0.5], ["a", "b"], dims=net)
    np.testing.assert_allclose(fn(shifted, x), fn(p, x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"between \['b'\] and \['c'\]: what lies"):
        wr.shift_scales(p, [2.0, 0.5], ["b", "c"], dims=net)
    with pytest.raises(ValueError, match=r"between \['a'\] and \['c'\]: the second is"):
        wr.shift_scales(p, [2.0, 0.5], ["a", "c"], dims=net)
    with pytest.raises(ValueError, match="leave dims= out"):
        wr.shift_scales(p, [1.0, 1.0, 1.0], net, dims=net.dims)


# What is left open, and stack=.

ENSEMBLE = {"w": spread(4, 3, 5), "b": spread(4, 5), "v": spread(4, 5, 2)}


def members(p, x):
    """Members of an ensemble, which share their input."""
    one = lambda p: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]  # noqa: E731
    return jax.vmap(one)(p)


def test_members_that_share_an_input_are_left_open():
    net = read(members, ENSEMBLE, ones(2, 3))
    first, second = net.layers
    assert (first.output_axes, first.stack_axes) == ((0, 2), ())
    assert (second.output_axes, second.stack_axes) == ((2,), (0,))
    assert net.open == (
        "['w']: axis 0 of its units might stack layers that share an input. If so, say "
        """stack={"['w']": 0}.""",
    )
    assert str(net).endswith(f"Open: {net.open[0]}")


@pytest.mark.parametrize("stack", [0, {"['w']": 0}, {"w": [0]}, {"w": -3}, {"w": (0,)}])
def test_a_stack_may_be_said(stack):
    net = read(members, ENSEMBLE, ones(2, 3), stack=stack)
    first = net.layers[0]
    assert (first.output_axes, first.stack_axes, net.open) == ((2,), (0,), ())
    assert first.fan_out == 5
    assert first.bias == "['b']"


def test_a_stack_may_be_said_of_a_module():
    net = read(
        lambda p, x: members(p["m"], x), {"m": ENSEMBLE}, ones(2, 3), stack={"m": 0}
    )
    assert [layer.stack_axes for layer in net.layers] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("stack", "error", "message"),
    [
        ({"u": 0}, ValueError, r"stack has an entry 'u', which is the path of no"),
        ({"w": 3}, ValueError, r"stack\['w'\] is 3, but \['w'\] of shape \(4, 3, 5\)"),
        ({"w": 1}, ValueError, r"leaves \['w'\] of shape \(4, 3, 5\) without inputs"),
        ({"w": 0.5}, TypeError, r"stack\['w'\] must be an axis or several, not 0.5"),
        ({"w": "0"}, TypeError, r"stack\['w'\] must be an axis or several, not '0'"),
        ({0: 0}, TypeError, "stack must have paths for keys, not 0"),
        ("w", TypeError, "stack must be an axis or several, not 'w'"),
        (True, TypeError, "stack must be an axis or several, not True"),
        (7, ValueError, "stack is 7, an axis that no parameter has"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(stack, error, message):
    with pytest.raises(error, match=message):
        read(members, ENSEMBLE, ones(2, 3), stack=stack)


def test_merged_experts_and_summed_slices_are_left_open():
    w, x = spread(4, 3, 5), ones(2, 3)
    gates = ones(2, 4)
    mixed = read(lambda w, x, g: jnp.einsum("be,bi,eio->bo", g, x, w), w, x, gates)
    assert mixed.layers[0].input_axes == (0, 1)
    assert "might stack layers that are mixed" in mixed.open[0]
    sliced = read(lambda w, x: sum(x @ w[k] for k in range(4)), w, x)
    assert (sliced.layers[0].input_axes, sliced.layers[0].calls) == ((0, 1), 1)
    assert "whose results are summed" in sliced.open[0]
    stacked = read(lambda w, x: sum(x @ w[k] for k in range(4)), w, x, stack=0)
    assert (stacked.layers[0].stack_axes, stacked.open) == ((0,), ())


# Calling it.


def test_shapes_will_do_and_nothing_runs():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    net = read(lambda p, x: x @ p, shape(3, 2), shape(4, 3))
    assert (net.layers[0].path, net.layers[0].input_shape) == (
        "(the whole tree)",
        (4, 3),
    )


def test_static_arguments_and_trees_of_inputs_go_through():
    def fn(p, batch, flag, *, train):
        assert flag is True and train is False
        return batch["x"] @ p["w"] if batch["kind"] == "dense" else None

    batch = {"x": ones(2, 3), "kind": "dense", "mask": None}
    net = read(fn, {"w": ones(3, 2)}, batch, True, train=False)
    assert net.roles == {"['w']": "weight"}


def test_a_network_without_inputs_is_refused():
    with pytest.raises(ValueError, match="inputs must hold an array"):
        read(lambda p: ones(2, 3) @ p, ones(3, 2))
    with pytest.raises(ValueError, match="inputs must hold an array"):
        weightreg.nnx.trace_network(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), train=True)
    with pytest.raises(TypeError, match="model must be a module of nnx"):
        weightreg.nnx.trace_network(ones(3), ones(3))


class Trained(nnx.Module):
    """What changes in training: statistics, and counts of random numbers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x))))) * scale


@pytest.mark.parametrize("train", [True, False])
def test_nnx_modules_are_traced_in_their_mode(train):
    model = Trained(nnx.Rngs(0))
    model.train() if train else model.eval()
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    net = weightreg.nnx.trace_network(model, ones(4, 3), scale=2.0)
    paths = [layer.path for layer in net.layers]
    assert paths == ["['first']['kernel']", "['last']['kernel']"]
    assert [layer.bias for layer in net.layers] == [
        "['first']['bias']",
        "['last']['bias']",
    ]
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    tx = wr.volumized(optax.adam(0.1), wr.he_volume(1e-3), 0.0, dims=net)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: m(spread(4, 3)).sum())(model)
    optimizer.update(model, grads)
    volume = 1e-3 * math.sqrt(6 / 5)
    assert jnp.max(jnp.abs(model.first.kernel[...])) <= volume * (1 + 1e-6)
    assert jnp.max(jnp.abs(model.norm.bias[...])) > volume


# Methods take it for dims.


def test_a_network_of_other_parameters_is_refused():
    net = read(lambda p, x: x @ p["w"], {"w": ones(3, 2)}, ones(1, 3))
    with pytest.raises(ValueError, match=r"without a parameter \['u'\]"):
        wr.weight_layers({"u": ones(3, 2)}, dims=net)
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), but here it has shape"):
        wr.weissi(1e-3, 1e-3, dims=net)({"w": ones(4, 2)})
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), but here it has shape"):
        wr.pack({"w": ones(4, 2)}, 0.5, "binary", dims=net)


def test_a_mask_makes_no_weight_of_what_is_none():
    params = {"w": ones(3, 2), "b": ones(2, 2)}
    fn = lambda p, x: jnp.stack([x @ p["w"]] * 2, 1) + p["b"]  # noqa: E731
    net = read(fn, params, ones(1, 3))
    assert wr.weight_mask(params, dims=net) == {"w": True, "b": False}
    assert wr.left_out(params, dims=net) == {"['b']": "traced as bias"}
    assert wr.weight_mask(params, dims=net, mask=True) == {"w": True, "b": True}
    with pytest.raises(ValueError, match=r"mask calls \['b'\] a weight, but dims is a"):
        wr.weight_layers(params, dims=net, mask=True)


def test_holes_in_the_parameters_are_passed_over():
    params = {"w": spread(3, 2), "v": spread(2, 2)}
    net = read(lambda p, x: x @ p["w"] @ p["v"], params, ones(1, 3))
    tx = wr.volumize(wr.he_volume(0.1), alpha=0.0, dims=net)
    tx = optax.masked(tx, {"w": True, "v": False})
    updates, _ = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jnp.max(jnp.abs(new["w"])) <= 0.1 * math.sqrt(3) * (1 + 1e-6)
    np.testing.assert_allclose(new["v"], 2 * params["v"])


def test_cnn_exponents_go_by_what_is_a_convolution():
    """A convolution along one axis and a dense layer of heads have three axes each."""
    model = nn.Sequential([nn.Conv(4, (3,)), nn.DenseGeneral((2, 2))])
    x = ones(1, 5, 3)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    net = read(lambda p, x: model.apply({"params": p}, x), params, x)
    powers = wr.cnn_exponents(params, dims=net)
    assert powers["layers_0"]["kernel"] == 2 and powers["layers_1"]["kernel"] == 1
    params = jax.tree.map(lambda p: spread(*p.shape), params)
    by_rule = wr.weissi(1e-3, 1e-3, exponents=wr.cnn_exponents, dims=net)
    by_tree = wr.weissi(1e-3, 1e-3, exponents=powers, dims=net)
    np.testing.assert_array_equal(by_rule(params), by_tree(params))


@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_convolutions_become_orthonormal_group_by_group(groups):
    model, x = nn.Conv(6, (3, 3), feature_group_count=groups), ones(1, 5, 5, 6)
    params = model.init(jax.random.key(0), x)["params"]
    net = read(lambda p, x: model.apply({"params": p}, x), params, x)
    (layer,) = net.layers
    assert (layer.groups, layer.fan_in) == (groups, 9 * 6 // groups)
    assert layer.fan_out == 9 * 6 // groups
    tx = wr.parseval(0.4, dims=net)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    kernel = np.asarray(params["kernel"], np.float64)
    wanted = np.empty_like(kernel)
    size = 6 // groups
    for k in range(groups):
        own = np.s_[..., k * size : (k + 1) * size]
        w = kernel[own].reshape(-1, size).T
        wanted[own] = (1.4 * w - 0.4 * w @ w.T @ w).T.reshape(kernel[own].shape)
    new = params["kernel"] + updates["kernel"]
    np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-6)


@quick.bits
def test_filters_of_grouped_convolutions_are_packed_with_a_scale_each():
    model, x = nn.Conv(6, (3, 3), feature_group_count=6), ones(1, 5, 5, 6)
    params = {"kernel": spread(3, 3, 1, 6), "bias": ones(6)}
    net = read(lambda p, x: model.apply({"params": p}, x), params, x)
    volume = {"kernel": jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6), "bias": None}
    packed = wr.pack(params, volume, "binary", dims=net)
    assert packed["kernel"].scale.shape == (6,)
    wanted = wr.binarize(params, volume, dims=net)["kernel"]
    np.testing.assert_array_equal(wr.unpack(packed)["kernel"], wanted)
    together = wr.pack(params, wr.he_volume(0.5), "binary", dims=net)["kernel"]
    np.testing.assert_allclose(together.scale, 0.5 * math.sqrt(6 / 9), rtol=1e-6)
    with pytest.raises(ValueError, match="must be one number for each layer"):
        wr.pack(params, volume, "binary")


def test_muon_takes_the_dims():
    params = {"w": spread(2, 3, 5), "b": spread(2, 5), "v": spread(5, 4)}

    def fn(p, x):
        h, _ = jax.lax.scan(
            lambda h, w: (jnp.pad(h @ w[0] + w[1], 0)[:, :3], None), x, (p["w"], p["b"])
        )
        return jnp.pad(h, ((0, 0), (0, 2))) @ p["v"]

    net = read(fn, params, ones(1, 3))
    assert net.layers[0].stack_axes == (0,)
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=lambda _: net.dims)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_equinox_modules_are_trees_of_parameters():
    model = eqx.nn.MLP(3, 2, 8, depth=1, key=jax.random.key(0))
    net = read(lambda m, x: jax.vmap(m)(x), model, ones(4, 3))
    arrays = eqx.filter(model, eqx.is_array)
    volumes = wr.he_volume(0.5, dims=net)(arrays)
    np.testing.assert_allclose(volumes.layers[0].weight, 0.5 * math.sqrt(6 / 8))
    assert wr.weight_mask(model, dims=net).layers[0].weight


# Readings that are easy to get wrong.


def test_layers_side_by_side_are_passed_once():
    """A bound below 1 is the same for members of an ensemble as for one of them."""
    net = read(members, ENSEMBLE, ones(2, 3), stack=0)
    assert [layer.passes for layer in net.layers] == [1, 1]
    volumes = wr.lipschitz_volume(0.25, dims=net)(ENSEMBLE)
    np.testing.assert_allclose(volumes["w"], 0.5 / 5, rtol=1e-6)
    *_, net = scanned(residual=False)
    assert [layer.passes for layer in net.layers] == [4, 1]


@pytest.mark.parametrize(
    ("fn", "calls"),
    [
        (lambda w, i: w[i], 1),
        (lambda w, i: w[3 - i], 1),
        (lambda w, i: w[i - 4], 1),
        (lambda w, i: w[i + 1], 4),
        (lambda w, i: w[i // 2], 4),
        (lambda w, i: w[i % 2], 4),
        (lambda w, i: w[jnp.minimum(i, 1)], 4),
    ],
)
def test_slices_that_rounds_share_are_called_again(fn, calls):
    step = lambda w: lambda i, h: jnp.tanh(h @ fn(w, i))  # noqa: E731
    net = read(
        lambda w, x: jax.lax.fori_loop(0, 4, step(w), x), ones(4, 3, 3), ones(2, 3)
    )
    (layer,) = net.layers
    assert (layer.stack_axes, layer.calls, layer.passes) == ((0,), calls, 4)


@pytest.mark.parametrize(
    "slices",
    [
        lambda w: jnp.repeat(w, 2, 0),
        lambda w: jnp.concatenate([w, w]),
        lambda w: w[np.array([0, 1, 1, 0])],
    ],
)
def test_slices_that_are_there_twice_are_called_again(slices):
    fn = lambda w, x: jax.lax.scan(lambda h, w: (h @ w, None), x, slices(w))[0]  # noqa: E731
    (layer,) = read(fn, ones(2, 3, 3), ones(2, 3)).layers
    assert (layer.stack_axes, layer.calls) == ((0,), 4)


def test_unrolled_layers_that_are_stacked_for_a_scan_are_called_once():
    fn = lambda p, x: jax.lax.scan(  # noqa: E731
        lambda h, w: (jax.nn.relu(h @ w[0] + w[1]), None),
        x,
        (jnp.stack([p["w"], p["v"]]), jnp.stack([p["b"], p["c"]])),
    )[0]
    params = {"w": ones(3, 3), "v": ones(3, 3), "b": ones(3), "c": ones(3)}
    net = read(fn, params, ones(2, 3))
    assert [(x.path, x.calls, x.input_axes) for x in net.layers] == [
        ("['v']", 1, (0,)),
        ("['w']", 1, (0,)),
    ]


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.lax.scan(block, x, (p["w"], p["b"]), reverse=True)[0],
        lambda p, x: jax.lax.scan(block, x, (p["w"][::-1], p["b"][::-1]))[0],
        lambda p, x: jax.lax.scan(block, x, (p["w"], p["b"][::-1]))[0],
        lambda p, x: one(one(x, p, 1, 1), p, 0, 0),
        lambda p, x: one(one(x, p, 0, 1), p, 1, 0),
        lambda p, x: one(one(x, p, 0, 0), p, 1, 1) + one(x, p, 0, 0),
        lambda p, x: one(one(x, {**p, "b": p["b"][:1]}, 0, 0), p, 1, 0),
        lambda p, x: jax.lax.scan(tapped, x, (p["w"], p["b"])),
        lambda p, x: rounds(p, x, jnp.arange(2)[::-1], lambda k: k),
        lambda p, x: rounds(p, x, np.array([1, 0]), lambda k: k),
        lambda p, x: rounds(p, x, jnp.arange(2), lambda k: k + 1),
        lambda p, x: rounds(p, x, jnp.arange(2), lambda k: 1 - k),
        lambda p, x: jax.lax.scan(block, x, (p["w"][:1], p["b"][:1]))[0],
    ],
)
def test_stacks_that_are_called_otherwise_are_not_rescaled(fn):
    """In another order, crossed with their biases, skipped over, or read on the way."""
    params = {"w": ones(2, 3, 3), "b": ones(2, 3)}
    net = read(fn, params, ones(2, 3))
    assert net.layers[0].stack_axes == (0,)
    with pytest.raises(ValueError, match=r"cannot rescale \['w'\]"):
        wr.shift_scales(params, [np.array([2.0, 0.5])], net)


def one(x, p, k, j):
    """One of two stacked layers."""
    return jax.nn.relu(x @ p["w"][k] + p["b"][j])


def block(x, layer):
    return jax.nn.relu(x @ layer[0] + layer[1]), None


def rounds(p, x, order, of):
    """Stacked layers in an order, with biases that may be those of others."""
    return jax.lax.scan(lambda x, k: (one(x, p, k, of(k)), None), x, order)[0]


def tapped(x, layer):
    return block(x, layer)[0], x.sum()


OTHERWISE_USED = {
    "two biases": lambda p, x: jax.nn.relu(x @ p["w"] + p["b"] + p["c"]) @ p["v"],
    "one bias twice": lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"] + p["b"],
    "a penalty": lambda p, x: (jax.nn.relu(x @ p["w"]) @ p["v"], (p["w"] ** 2).sum()),
    "a norm": lambda p, x: jax.nn.relu(x @ p["w"] / jnp.sum(p["w"] ** 2)) @ p["v"],
    "an inverse": lambda p, x: jax.nn.relu(x @ (1 / p["w"])) @ p["v"],
    "an integer": lambda p, x: jax.nn.relu(x @ p["w"].astype(int)) @ p["v"],
}


@pytest.mark.parametrize("name", OTHERWISE_USED)
def test_layers_with_another_use_are_not_rescaled(name):
    params = {
        "w": ones(3, 3),
        "v": ones(3, 3),
        "b": ones(3),
        "c": ones(3),
        "d": ones(4),
    }
    net = read(OTHERWISE_USED[name], params, ones(2, 3))
    with pytest.raises(ValueError, match=r"cannot rescale \['w'\]: "):
        wr.shift_scales(params, [2.0, 0.5], net)


ENLARGED = {
    "ten times": lambda p, x: x @ (10 * p) @ p,
    "a constant": lambda p, x: x @ (p * np.arange(3.0)),
    "repeated": lambda p, x: x @ jnp.repeat(p, 2, 1),
    "exp": lambda p, x: x @ jnp.exp(p),
    "several results": lambda p, x: (x @ p, x @ p),
    "rows twice": lambda p, x: x @ p[jnp.array([0, 0, 1])],
    "several places": lambda p, x: jnp.stack([x, x], 1) @ p,
    "all rounds": lambda p, x: jax.lax.scan(lambda h, _: (h, h @ p), x, None, 3)[1],
    "a loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: 3 * h, x @ p),
}


@pytest.mark.parametrize("name", ENLARGED)
def test_what_enlarges_a_weight_or_a_result_has_no_bound(name):
    net = read(ENLARGED[name], ones(3, 3), ones(2, 3))
    with pytest.raises(ValueError, match="does not hold for the traced network: "):
        wr.gbr_bounds(ones(3, 3), dims=net)


def rejoined(w, axis, out):
    return jnp.stack([jnp.take(w, k, axis) for k in range(w.shape[axis])], out)


READINGS = {
    "noise": (
        lambda p, x, k: x @ (p + jax.random.normal(k, (3, 4))),
        (ones(2, 3), jax.random.PRNGKey(0)),
        ((0,), (1,), ()),
    ),
    "a factor of the data": (
        lambda p, x: x @ (p / jnp.linalg.norm(x)),
        (ones(2, 3),),
        ((0,), (1,), ()),
    ),
    "rows joined": (
        lambda p, x: x @ rejoined(p, 0, 0),
        (ones(2, 3),),
        ((0,), (1,), ()),
    ),
    "columns joined": (
        lambda p, x: x @ rejoined(p, 1, 1),
        (ones(2, 3),),
        ((0,), (1,), ()),
    ),
    "halves joined": (
        lambda p, x: x @ jnp.concatenate([p[:1], p[1:]]),
        (ones(2, 3),),
        ((0,), (1,), ()),
    ),
    "a branch for each example": (
        lambda p, x: jax.vmap(
            lambda x: jax.lax.cond(x[0] > 0, lambda x: x @ p, lambda x: 2 * (x @ p), x)
        )(x),
        (ones(2, 3),),
        ((0,), (1,), ()),
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_weights_are_read_through_what_moves_them(name):
    fn, inputs, axes = READINGS[name]
    (layer,) = read(fn, ones(3, 4), *inputs).layers
    assert (layer.input_axes, layer.output_axes, layer.stack_axes) == axes


@pytest.mark.parametrize("count", [1, 2])
def test_experts_are_stacked_however_many_are_chosen(count):
    def fn(p, x):
        gates, chosen = jax.lax.top_k(x @ p["gate"], count)
        h = jnp.einsum("bi,bkio->bko", x, p["w"][chosen]) + p["b"][chosen]
        return jnp.einsum("bk,bko->bo", gates, h)

    params = {"gate": ones(3, 4), "w": ones(4, 3, 5), "b": ones(4, 5)}
    net = read(fn, params, ones(2, 3))
    assert net.roles["['b']"] == "bias"
    gate, experts = net.layers
    assert (gate.input_axes, gate.output_axes) == ((0,), (1,))
    assert (experts.input_axes, experts.output_axes, experts.stack_axes) == (
        (1,),
        (2,),
        (0,),
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_kernels_for_each_example_have_no_groups(batch):
    """`jax.vmap` merges examples into the groups of a convolution."""
    conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    fn = lambda w, x, s: jax.vmap(lambda x, s: conv(x, w * s[:, None]))(x, s)  # noqa: E731
    net = read(fn, ones(3, 3, 4, 6), ones(batch, 8, 8, 4), ones(batch, 4))
    (layer,) = net.layers
    assert (layer.groups, layer.fan_in, layer.fan_out) == (1, 36, 54)


ROLES = {
    "resized": (lambda p, x: x + jax.image.resize(p, (2, 3), "bilinear"), "bias"),
    "a list of rows": (lambda p, x: x[:, None] + p[jnp.array([[0, 1]])], "bias"),
    "a diagonal": (lambda p, x: x @ jnp.diag(p[0]), "other (dot_general)"),
    "noise of an input": (lambda p, x, e: x @ (p + e), "bias"),
    "rows after dropout": (
        lambda p, x, k: (p * jax.random.bernoulli(k, 0.5, p.shape))[
            x[:, 0].astype(int)
        ],
        "embedding",
    ),
    "sorted": (lambda p, x: x + jnp.sort(p, 1)[:1, :3], "other (sort)"),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_what_is_no_weight(name):
    fn, role = ROLES[name]
    more = {
        "noise of an input": [ones(3, 3)],
        "rows after dropout": [jax.random.key(0)],
    }
    net = read(fn, ones(3, 3), ones(2, 3), *more.get(name, []))
    assert net.roles == {"(the whole tree)": role}
    assert bool(net.open) == (name == "noise of an input")


def test_boxes_are_those_of_the_weight_that_is_made_from_a_leaf():
    w = ones(4, 4)
    volume = lambda fn: wr.lipschitz_volume(dims=read(fn, w, ones(2, 4)))(w)  # noqa: E731
    np.testing.assert_allclose(volume(lambda w, x: x @ (3 * w)), 1 / 12)
    for fn in (
        lambda w, x: x @ jnp.tile(w, (1, 2)),
        lambda w, x: x @ (w / jnp.linalg.norm(w)),
    ):
        with pytest.raises(ValueError, match="lipschitz_volume cannot bound the layer"):
            volume(fn)


def test_summed_slices_may_all_see_the_same_input():
    fn = lambda w, x: sum(jnp.roll(x, k, 0) @ w[k] for k in range(3))  # noqa: E731
    w = ones(3, 4, 12)
    net = read(fn, w, ones(6, 4))
    assert net.layers[0].reach == 3
    np.testing.assert_allclose(wr.lipschitz_volume(dims=net)(w), 3**-0.5 / 12)


def test_causal_convolutions_are_chains():
    convolution = lambda: nn.Conv(4, (3,), padding="CAUSAL")  # noqa: E731
    flat = lambda h: h.reshape(len(h), -1)  # noqa: E731
    layers = [convolution(), nn.relu, convolution(), nn.relu, flat, nn.Dense(2)]
    model, x = nn.Sequential(layers), ones(1, 5, 3)
    params = model.init(jax.random.key(0), x)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    net = read(fn, params, x)
    balanced = wr.balance_scales(params, net)
    np.testing.assert_allclose(fn(balanced, x), fn(params, x), rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isfinite(wr.input_gradient_bound(params, net)))
