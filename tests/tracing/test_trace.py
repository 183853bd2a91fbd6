"""What `trace_network` says beside roles and axes, and how methods go by it."""

import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import weightreg as wr
import weightreg.nnx


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


def test_muon_takes_the_dims():
    params = {"w": spread(2, 3, 5), "b": spread(2, 5), "v": spread(5, 4)}

    def fn(p, x):
        h, _ = jax.lax.scan(
            lambda h, w: (jnp.pad(h @ w[0] + w[1], 0)[:, :3], None), x, (p["w"], p["b"])
        )
        return jnp.pad(h, ((0, 0), (0, 2))) @ p["v"]

    net = read(fn, params, ones(1, 3))
    assert net.layers[0].stack_axes == (0,)
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=net.dims)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_equinox_modules_are_trees_of_parameters():
    model = eqx.nn.MLP(3, 2, 8, depth=1, key=jax.random.key(0))
    net = read(lambda m, x: jax.vmap(m)(x), model, ones(4, 3))
    arrays = eqx.filter(model, eqx.is_array)
    volumes = wr.he_volume(0.5, dims=net)(arrays)
    np.testing.assert_allclose(volumes.layers[0].weight, 0.5 * math.sqrt(6 / 8))
    assert wr.weight_mask(model, dims=net).layers[0].weight
