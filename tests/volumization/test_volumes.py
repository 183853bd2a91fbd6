"""The rules that set the walls, the bounds they promise, and what a volume may be."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn.initializers import he_uniform
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

DENSE = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
TREE = {"a": DENSE, "b": {"kernel": jnp.zeros((4, 2))}}


def walls(volume, params=TREE, updates=None, count=0, **kwargs):
    """Where updates of 9 from the origin end up: on the walls."""
    if updates is None:
        updates = jax.tree.map(lambda p: jnp.full_like(p, 9.0), params)
    tx = wr.volumize(volume, 0.0, **kwargs)
    state = tx.init(params)._replace(count=jnp.int32(count))
    # Op by op is slow for shapes that are new, and fast for those that are not.
    step = tx.update if params is TREE else jax.jit(tx.update)
    updates, _ = step(updates, state, params)
    return optax.apply_updates(params, updates)


def kernels(volume, **kwargs):
    """The walls of the two kernels of ``TREE``, each as one number."""
    new = walls(volume, **kwargs)
    np.testing.assert_array_equal(new["a"]["bias"], 9.0)
    both = (new["a"]["kernel"], new["b"]["kernel"])
    assert all(jnp.ptp(kernel) == 0 for kernel in both)
    return [float(kernel[0, 0]) for kernel in both]


# Shape, in and out axes, dims, and (fan_in, fan_out) counted by hand.
KERNELS = {
    "dense": ((8, 6), -2, -1, None, (8, 6)),
    "conv": ((3, 3, 4, 6), -2, -1, None, (36, 54)),
    "query": ((8, 2, 3), 0, (1, 2), Dims(0, (1, 2)), (8, 6)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_he_volume_at_one_is_the_support_of_he_uniform(name):
    shape, in_axis, out_axis, dims, (fan_in, fan_out) = KERNELS[name]
    kernel = jnp.zeros(shape)
    volume = wr.he_volume(1.0, "in", dims=dims)(kernel)
    init = he_uniform(in_axis, out_axis)
    draw = jax.jit(lambda key: jnp.max(jnp.abs(init(key, shape))))
    largest = max(draw(jax.random.key(seed, impl="rbg")) for seed in range(100))
    assert 0.99 * volume < largest <= volume * (1 + 1e-6)
    got = [wr.he_volume(0.5, fan, dims=dims)(kernel) for fan in ("out", "in", "avg")]
    fans = np.array([fan_out, fan_in, (fan_in + fan_out) / 2])
    np.testing.assert_allclose(got, 0.5 * np.sqrt(6 / fans))
    assert wr.he_volume(0.5, dims=dims)(kernel) == got[0]


@pytest.mark.parametrize("rule", [wr.he_volume, wr.lipschitz_volume])
def test_a_rule_takes_numbers_arrays_traced_arrays_and_schedules(rule):
    schedule = optax.linear_schedule(1.0, 3.0, 4)
    expected = [kernels(rule(v)) for v in (1.0, 1.5, 3.0)]
    assert expected[0] < expected[1] < expected[2]
    for count, want in zip((0, 1, 9), expected, strict=True):
        np.testing.assert_allclose(kernels(rule(schedule), count=count), want, 1e-6)
    np.testing.assert_allclose(kernels(rule(np.float32(1.5))), expected[1], 1e-6)
    np.testing.assert_allclose(kernels(rule(jnp.float32(1.5))), expected[1], 1e-6)
    traced = jax.jit(lambda v: walls(rule(v))["b"]["kernel"])(1.5)
    np.testing.assert_allclose(traced, expected[1][1], rtol=1e-6)
    assert kernels(rule(0.0)) == [0.0, 0.0]
    assert kernels(rule(np.inf)) == [9.0, 9.0]


@pytest.mark.parametrize("rule", [wr.he_volume, wr.lipschitz_volume])
def test_mask_and_dims_of_the_rule_come_before_volumizes(rule):
    params = {"w": jnp.zeros((2, 50)), "x": jnp.zeros((50, 2))}
    names = lambda tree: {k for k, v in tree.items() if v is not None}  # noqa: E731
    only = {"w": True, "x": False}
    assert names(rule(1.0, mask=only)(params)) == {"w"}
    turned, straight = Dims(1, 0), Dims(0, 1)
    dims = {"w": turned, "x": None}
    assert names(rule(1.0, dims=dims)(params)) == {"w"}
    fans = lambda d, **k: wr.he_volume(1.0, "in", dims=d, **k)  # noqa: E731
    by_dims = [
        walls(fans(own), params, dims=outer)["w"][0, 0]
        for own, outer in ((turned, straight), (None, turned), (None, straight))
    ]
    np.testing.assert_allclose(by_dims, np.sqrt(6 / np.array([50, 50, 2])), rtol=1e-6)
    new = walls(rule(0.1, mask=lambda p: {"w": True, "x": True}), params, mask=only)
    assert new["w"][0, 0] < 9 == new["x"][0, 0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def conv_matrix(w, image, stride, padding):
    """The convolution of each unit vector."""
    conv = nn.Conv(w.shape[-1], w.shape[:-2], stride, padding, use_bias=False)
    shape = (*image, w.shape[-2])
    basis = jnp.eye(np.prod(shape), dtype=w.dtype).reshape(-1, *shape)
    out = conv.apply({"params": {"kernel": w}}, basis)
    return out.reshape(len(basis), -1)


def conv_norm(w, image, stride=1, padding="SAME"):
    """Largest singular value of a convolution, in float64."""
    with jax.enable_x64(True):
        return np.linalg.norm(np.asarray(conv_matrix(w, image, stride, padding)), 2)


KINDS = ["anywhere", "walls", "one wall"]


def boxed(rng, shape, volume, kind):
    """Weights in the box: anywhere, at random walls, or all at one wall."""
    if kind == "anywhere":
        return rng.uniform(-volume, volume, shape)
    signs = rng.choice([-1.0, 1.0], shape)
    return volume * (signs if kind == "walls" else np.ones(shape))


@quick.everything
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    a=st.integers(1, 12),
    b=st.integers(1, 12),
    bound=st.floats(0.01, 100),
    kind=st.sampled_from(KINDS),
)
def test_dense_layers_keep_the_bound(seed, a, b, bound, kind):
    volume = wr.lipschitz_volume(bound)(jnp.zeros((a, b)))
    w = boxed(np.random.default_rng(seed), (a, b), volume, kind)
    largest = np.linalg.norm(w, 2)
    assert largest <= bound * (1 + 1e-9)
    if kind == "one wall" and a == b:
        np.testing.assert_allclose(largest, bound)


@quick.everything
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(2, 3), (3, 1)])
@pytest.mark.parametrize(
    ("window", "image"),
    [((3,), (7,)), ((4,), (9,)), ((3, 3), (5, 6)), ((2, 4), (6, 5))],
)
def test_convolutions_keep_the_bound(window, image, channels, stride, padding):
    shape = (*window, *channels)
    params = {"Conv_0": {"kernel": jnp.zeros(shape)}}
    volume = wr.lipschitz_volume(2.5)(params)["Conv_0"]["kernel"]
    for kind in KINDS:
        w = boxed(np.random.default_rng(0), shape, volume, kind)
        largest = conv_norm(w, image, stride, padding)
        assert 0 < largest <= 2.5 * (1 + 1e-9)


def test_a_convolution_told_by_dims_keeps_the_bound():
    """Even a one-dimensional one, whose axes might as well be attention's."""
    for window, axes in (((5,), (0, 1)), ((3, 3), (0, 1, np.int64(2)))):
        shape = (*window, 2, 3)
        rule = wr.lipschitz_volume(dims=Dims(axes, np.int64(len(axes))))
        params = {"Conv_0": {"kernel": jnp.zeros(shape)}}
        volumes = rule({"kernel": jnp.zeros(shape)})
        assert volumes == wr.lipschitz_volume()(params)["Conv_0"]


def test_the_root_of_the_window_is_needed_and_nearly_enough():
    """Where the kernel matrix is square, the bound is sharp for large images."""
    shape = (3, 3, 1, 9)
    volume = wr.lipschitz_volume()({"kernel": jnp.zeros(shape)})["kernel"]
    np.testing.assert_allclose(volume, 1 / (9 * 3))
    largest = conv_norm(np.full(shape, volume), (16, 16))
    assert 0.9 < largest <= 1
    assert conv_norm(np.full(shape, 1 / 9), (16, 16)) > 2.5  # without the root


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(6, (2, 2), strides=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 16, 12):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


@quick.everything
@pytest.mark.parametrize(
    ("net", "shape"), [(Perceptron(), (10,)), (Convolutional(), (8, 8, 2))]
)
def test_networks_keep_the_bound(net, shape):
    """Volumized to the walls, biases free; near and far pairs, and the Jacobian."""
    rng, bound = np.random.default_rng(0), 3.0
    x = jnp.asarray(rng.uniform(size=(40, *shape)), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    near, ones = rng.normal(size=x.shape) * 1e-2, np.full(x.shape, 1e-2)
    moved = jnp.asarray([x + near, x + ones, x[::-1]], jnp.float32)
    size = lambda d: jnp.linalg.norm(d.reshape(*d.shape[:2], -1), axis=2)  # noqa: E731

    @jax.jit
    def steepest(far):
        at_walls = walls(wr.lipschitz_volume(bound), params, far)
        f = lambda x: net.apply(at_walls, x)  # noqa: E731
        ratios = size(jax.vmap(f)(moved) - f(x)) / size(moved - x)
        jacobians = jax.vmap(jax.jacrev(lambda x: f(x[None])[0]))(x[:9])
        slopes = jnp.linalg.norm(jacobians.reshape(9, 3, -1), 2, axis=(1, 2))
        return at_walls, jnp.nanmax(ratios), jnp.max(slopes)

    for kind in ("walls", "one wall"):
        far = jax.tree.map(lambda p: jnp.float32(boxed(rng, p.shape, 9, kind)), params)  # noqa: B023
        at_walls, ratio, slope = steepest(far)
        for name, layer in at_walls["params"].items():
            assert jnp.max(jnp.abs(layer["kernel"])) < 1, name
            np.testing.assert_array_equal(jnp.abs(layer["bias"]), 9.0)
        assert 0 < ratio <= bound
        assert 0 < slope <= bound * (1 + 1e-6)
    if isinstance(net, Perceptron):
        assert slope > 0.2 * bound  # all weights at one wall: hardly anything cancels


def test_stacked_layers_count_one_by_one():
    rule = wr.lipschitz_volume(16.0, dims={"scan": Dims(1, 2), "last": Dims()})
    params = {"scan": jnp.zeros((3, 8, 8)), "last": jnp.zeros((8, 4))}
    volume = rule(params)
    assert volume == {"scan": pytest.approx(0.25), "last": pytest.approx(0.25)}
    product = np.eye(8)
    for _ in range(3):
        product = product @ np.full((8, 8), volume["scan"])
    product = product @ np.full((8, 4), volume["last"])
    norms = [np.linalg.norm(product, 2), 16 / np.sqrt(2)]
    np.testing.assert_allclose(*norms)


@pytest.mark.parametrize("array", [np.float64, np.asarray, jnp.float32, jnp.asarray])
def test_scalars_of_any_kind(array):
    assert kernels(array(0.5)) == [0.5, 0.5]
    assert kernels({"a": array(0.5), "b": 2}) == [0.5, 2.0]


def test_traced_volumes():
    top = jax.jit(lambda v: walls(v)["b"]["kernel"])(0.5)
    np.testing.assert_array_equal(top, 0.5)
    inside = jax.jit(lambda v: walls({"a": 1.0, "b": v})["b"]["kernel"])(0.25)
    np.testing.assert_array_equal(inside, 0.25)


def test_trees_prefixes_and_functions():
    full = {"a": {"kernel": 0.5, "bias": None}, "b": {"kernel": 2.0}}
    assert kernels(full) == [0.5, 2.0]
    assert kernels({"a": 0.5, "b": 2.0}) == [0.5, 2.0]
    assert kernels(lambda p: {k: 1.0 + len(v) for k, v in p.items()}) == [3.0, 2.0]
    largest = lambda p: jax.tree.map(lambda x: jnp.max(x) / x.size, p)  # noqa: E731
    ones = jax.tree.map(jnp.ones_like, TREE)
    assert walls(largest, ones)["b"]["kernel"][0, 0] == 0.125
    assert walls(lambda w: jnp.max(w) / 2, jnp.full((2, 2), 3.0))[0, 0] == 1.5


@pytest.mark.parametrize(
    "schedule",
    [
        lambda count: 1.0 / (count + 1),
        optax.exponential_decay(1.0, 1, 0.5),
        lambda count: jnp.array([1.0, 0.5])[count],
        optax.join_schedules([optax.constant_schedule(v) for v in (1, 0.5)], [1]),
        optax.piecewise_constant_schedule(1.0, {1: 0.5}),
    ],
)
def test_schedules_at_the_top_and_inside_a_tree(schedule):
    assert kernels(schedule) == [1.0, 1.0]
    assert kernels(schedule, count=1) == [0.5, 0.5]
    assert kernels({"a": schedule, "b": 3.0}, count=1) == [0.5, 3.0]
    bare = walls(schedule, jnp.zeros((2, 2)), count=1)
    np.testing.assert_array_equal(bare, 0.5)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1), (1, 1), (2, 3)])
def test_arrays_that_broadcast(shape):
    volume = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    new = walls({"a": {"kernel": volume, "bias": None}, "b": 1.0})["a"]["kernel"]
    np.testing.assert_array_equal(new, np.broadcast_to(volume, (2, 3)))


def test_layers_of_size_zero():
    params = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((3, 0)), "c": jnp.ones((2, 2))}
    for rule in (wr.lipschitz_volume(), *map(wr.he_volume, [1.0] * 3, ["in", "out"])):
        volume = rule(params)
        assert all(v > 0 for v in volume.values())
        assert jax.tree.map(jnp.shape, walls(rule, params)) == {
            "a": (0, 3), "b": (3, 0), "c": (2, 2)
        }  # fmt: skip
    assert wr.he_volume(1.0)({}) == {}
    assert wr.lipschitz_volume(2.0)({"a": None, "b": jnp.ones(3)})["b"] is None


@pytest.mark.parametrize("make", [
    lambda v: wr.he_volume(v), lambda v: wr.lipschitz_volume(v),
    lambda v: wr.volumize({"a": v, "b": 1.0}, 0.5).init(TREE),
    lambda v: wr.volumize(lambda _: {"a": v, "b": 1.0}, 0.5).init(TREE),
])  # fmt: skip
def test_volumes_that_no_box_has(make):
    for wrong in (-1, -0.1, np.nan, jnp.float32(-1.0), -np.inf):
        with pytest.raises(ValueError, match="at least 0"):
            make(wrong)
    for wrong in (True, np.bool_(False), "0.5", 1j, object(), jnp.ones(2, bool)):
        with pytest.raises(TypeError, match="must be a number"):
            make(wrong)


@pytest.mark.parametrize("fan", ["fan_out", "", None, 1])
def test_unknown_fan(fan):
    with pytest.raises(ValueError, match="fan must be one of"):
        wr.he_volume(1.0, fan)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ({"a": None, "b": 1.0}, r"\['a'\]\['kernel'\] is missing.*\(2, 3\).*mask="),
        ({"a": {"bias": 1.0}, "b": 1.0}, r"no entry for \['a'\]\['kernel'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"an entry at \['c'\]"),
        ({"a": 1.0, "b": [1.0]}, r"no entry for \['b'\]\['kernel'\]"),
        ({"a": np.ones(2), "b": 1.0}, r"\['a'\]\['kernel'\].*\(2, 3\).*\(2,\)"),
        ({"a": np.ones((5, 2, 3)), "b": 1.0}, r"\['a'\].*\(5, 2, 3\)"),
        (np.ones((2, 3)), r"\['b'\]\['kernel'\].*\(4, 2\).*\(2, 3\)"),
        (lambda p: {"a": 1.0}, r"no entry for \['b'\]\['kernel'\]"),
        (wr.he_volume(1.0, mask={"a": True, "b": False}), r"\['a'\]\['bias'\]"),
        (wr.lipschitz_volume(mask={"a": False, "b": True}), r"\['a'\].*is missing"),
    ],
)
def test_volumes_that_do_not_fit_name_the_leaf(volume, message):
    for tx in (wr.volumize(volume, 0.5), wr.volumized_adam(1, volume=volume, alpha=1)):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            tx.init(TREE)


@pytest.mark.parametrize("rule", [wr.he_volume(1.0), wr.lipschitz_volume()])
def test_a_vector_that_mask_forces_in_needs_a_number(rule):
    mask = {"a": {"kernel": False, "bias": True}, "b": False}
    with pytest.raises(ValueError, match=r"\['a'\]\['bias'\].*\(3,\).*number"):
        wr.volumize(rule, 0.5, mask=mask).init(TREE)
    new = walls(0.5, mask=mask)
    np.testing.assert_array_equal(new["a"]["bias"], 0.5)
    np.testing.assert_array_equal(new["a"]["kernel"], 9.0)


@pytest.mark.parametrize(
    "wrap", [wr.volumize, lambda *a: wr.volumized(optax.lion(1), *a)]
)
@pytest.mark.parametrize(
    ("alpha", "error"),
    [(-1.5, ValueError), (np.float64(1.001), ValueError), (np.inf, ValueError),
     (jnp.float32("nan"), ValueError), (np.zeros(1), TypeError), ([0.5], TypeError),
     (True, TypeError), (0.5j, TypeError)],
)  # fmt: skip
def test_alpha_outside_its_range(wrap, alpha, error):
    with pytest.raises(error, match="alpha"):
        wrap(0.5, alpha)
    for good in (-1, 1, np.float32(0.5), jnp.float32(0.25), lambda count: 7.0):
        wrap(0.5, good)


@pytest.mark.parametrize("v", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(4, 0), (0, 4)])
def test_layers_without_elements_have_no_wall(v, shape):
    for fan in ("in", "out", "avg"):
        params = {"kernel": jnp.zeros(shape)}
        assert wr.he_volume(v, fan)(params)["kernel"] >= 0
        wr.volumize(wr.he_volume(v, fan), 0.0).init(params)


SCHEDULE = optax.linear_schedule(1.0, 0.5, 10)
MANY = np.ones(3)
RULES = {
    "he": lambda: wr.he_volume(0.5),
    "he, other v": lambda: wr.he_volume(0.25),
    "he, other fan": lambda: wr.he_volume(0.5, "avg"),
    "he, mask": lambda: wr.he_volume(0.5, mask={"a": True, "b": False}),
    "he, other mask": lambda: wr.he_volume(0.5, mask={"a": True, "b": True}),
    "he, dims": lambda: wr.he_volume(0.5, dims=Dims(0, 1)),
    "he, other dims": lambda: wr.he_volume(0.5, dims=Dims(1, 0)),
    "he, array": lambda: wr.he_volume(np.float32(0.75)),
    "he, arrays": lambda: wr.he_volume(MANY),
    "lipschitz": wr.lipschitz_volume,
    "lipschitz, other bound": lambda: wr.lipschitz_volume(0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_equal_arguments_are_equal_and_can_be_pickled(name):
    rule, same = RULES[name](), RULES[name]()
    assert rule == same and hash(rule) == hash(same)
    assert [other for other in RULES if RULES[other]() == rule] == [name]
    copy = pickle.loads(pickle.dumps(rule))
    assert (copy == rule) == (name != "he, arrays")  # which is the same array no more
    if not name.startswith("he, arrays"):
        params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
        assert copy(params) == rule(params)


def test_what_does_not_compare_is_equal_to_itself_only():
    assert wr.he_volume(SCHEDULE) == wr.he_volume(SCHEDULE)
    assert wr.he_volume(SCHEDULE) != wr.he_volume(optax.linear_schedule(1.0, 0.5, 10))
    assert wr.he_volume(np.ones(3)) != wr.he_volume(np.ones(3))
    assert wr.he_volume(0.5) != 0.5 and wr.he_volume(1.0) != wr.lipschitz_volume(1.0)
    compared = []

    @jax.jit
    def trace(x, y):
        rules = [wr.he_volume(x), wr.he_volume(x), wr.he_volume(y), wr.he_volume(0.5)]
        compared.extend(rule == rules[0] for rule in rules)

    trace(0.5, 0.5)
    assert compared == [True, True, False, False]


def test_rules_say_what_they_are():
    assert repr(wr.he_volume(0.5)) == "HeVolume(mask=None, dims=None, v=0.5, fan='out')"
    assert repr(wr.lipschitz_volume()).startswith("LipschitzVolume(")
