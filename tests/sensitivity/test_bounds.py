"""What the norms of weights bound the sensitivity to inputs by."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from mlps import normal, norms_of, random_mlp, relu_mlp
from optax.contrib import MuonDimensionNumbers as Dims

from weightreg import input_gradient_bound, input_gradient_norms

pytestmark = quick.everything

KEY = jax.random.key(0)


NORMS = ["frobenius", "spectral"]


class Cnn(nn.Module):
    """A convolution with its options, pooling, another convolution, an output."""

    kernel_size: tuple = (3, 3)
    strides: int | tuple = 1
    padding: str = "SAME"
    kernel_dilation: int = 1
    feature_group_count: int = 1
    pool: str = "none"
    activation: str = "relu"
    head: str = "dense"

    @nn.compact
    def __call__(self, x):
        act = {"relu": nn.relu, "tanh": nn.tanh, "linear": lambda x: x}[self.activation]
        names = ["kernel_size", "strides", "padding", "kernel_dilation"]
        options = {name: getattr(self, name) for name in names}
        groups = self.feature_group_count
        conv = nn.Conv(4, feature_group_count=groups, name="layer_1", **options)
        pools = {
            "max": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
            "avg": lambda x: nn.avg_pool(x, (3, 2), (1, 1), "SAME"),
            "none": lambda x: x,
        }
        x = pools[self.pool](act(conv(x)))
        if self.head == "conv":
            return nn.Conv(3, (2, 2), name="layer_2")(x)
        x = act(nn.Conv(4, (2, 2), padding="CIRCULAR", name="layer_2")(x))
        x = act(nn.Dense(5, name="layer_9")(x.reshape(-1)))
        return nn.Dense(3, name="layer_10")(x)


CNNS = [
    Cnn(),
    Cnn(padding="VALID", pool="max", activation="tanh"),
    Cnn(strides=2, pool="avg", activation="linear"),
    Cnn(kernel_size=(2, 3), strides=(1, 2), padding="CIRCULAR", pool="max"),
    Cnn(kernel_dilation=2, padding="VALID", head="conv"),
    Cnn(feature_group_count=2, pool="avg", activation="linear", head="conv"),
    Cnn(kernel_size=(1, 1), padding="CIRCULAR", pool="avg"),
]


MLPS = [(3, 2), (1, 1, 1), (2, 4, 4, 4), (3, 4, 2)]


KINDS = st.sampled_from(["normal", "positive", "constant"])


def draw_params(shapes, rng, kind):
    """Weights of a kind: those of one sign and of rank 1 come nearest to the bound."""

    def draw(x):
        w = rng.normal(size=x.shape)
        if kind == "positive":
            w = np.abs(w)
        elif kind == "constant":
            w = np.ones_like(w)
        return jnp.asarray(w * 10 ** rng.uniform(-2, 2), jnp.float32)

    return jax.tree.map(draw, shapes)


def check_bounds(norms, params):
    """All norms are within the bounds, which are in order."""
    frobenius, spectral = (input_gradient_bound(params, norm=n) for n in NORMS)
    assert frobenius.shape == norms.shape[-1:]
    assert np.all(spectral <= frobenius * (1 + 1e-5))
    assert np.all(norms <= spectral * (1 + 1e-5)), (norms / spectral).max()


@quick.jit  # compiled once for all examples of one shape
def mlp_norms(params, x):
    return input_gradient_norms(functools.partial(relu_mlp, params), x)


@functools.partial(quick.jit, static_argnums=0)
def cnn_norms(module, params, x):
    return input_gradient_norms(lambda x: module.apply({"params": params}, x), x)


@settings(max_examples=60, deadline=None)
@given(widths=st.sampled_from(MLPS), kind=KINDS, seed=st.integers(0, 10**6))
def test_mlps_are_within_their_bounds(widths, kind, seed):
    rng = np.random.default_rng(seed)
    params = draw_params(random_mlp(rng, widths), rng, kind)
    x = jnp.asarray(rng.normal(size=(20, widths[0])), jnp.float32)
    check_bounds(mlp_norms(params, x), params)


@pytest.mark.parametrize("module", CNNS, ids=range(len(CNNS)))
@settings(max_examples=10, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 10**6))
def test_cnns_are_within_their_bounds(module, kind, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(4, 7, 6, 2)), jnp.float32)
    shapes = jax.eval_shape(module.init, KEY, x[0])["params"]
    params = draw_params(shapes, rng, kind)
    check_bounds(cnn_norms(module, params, x), params)


@pytest.mark.parametrize("norm", NORMS)
def test_one_linear_layer_attains_its_bound(norm):
    kernel = normal(0, 5, 3)
    norms = norms_of(lambda x: x @ kernel + 1, normal(1, 2, 5))
    bound = input_gradient_bound({"kernel": kernel, "bias": jnp.ones(3)}, norm=norm)
    np.testing.assert_allclose(norms, [bound] * 2, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_chains_of_aligned_rank_one_layers_attain_their_bound(norm):
    rng = np.random.default_rng(0)
    units = [np.abs(rng.normal(size=n)) for n in (4, 6, 3, 5)]
    units = [u / np.linalg.norm(u) for u in units]
    params = [
        {
            "kernel": jnp.asarray(s * np.outer(a, b), jnp.float32),
            "bias": jnp.ones(len(b)),
        }
        for s, a, b in zip([2.0, 0.3, 70.0], units[:-1], units[1:], strict=True)
    ]
    x = jnp.abs(normal(1, 3, 4))
    norms = norms_of(lambda x: relu_mlp(params, x), x)
    bound = input_gradient_bound(params, norm=norm)
    np.testing.assert_allclose(norms, [bound] * 3, rtol=1e-5)
    np.testing.assert_allclose(bound, 42 * units[-1], rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_need_the_root_of_the_window(norm):
    """Of a constant convolution with circular padding: here the bound is attained."""
    module = nn.Sequential(
        [nn.Conv(1, (3, 3), padding="CIRCULAR"), jnp.ravel, nn.Dense(1)]
    )
    x = jnp.ones((2, 6, 6, 1))
    shapes = jax.eval_shape(module.init, KEY, x[0])["params"]
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
    norms = norms_of(lambda x: module.apply({"params": params}, x), x)
    bound = input_gradient_bound(params, ["layers_0", "layers_2"], norm=norm)
    np.testing.assert_allclose(bound, [np.sqrt(36) * 3 * 3], rtol=1e-6)
    np.testing.assert_allclose(norms, [bound] * 2, rtol=1e-6)


def test_overlapping_max_pooling_needs_a_root_too():
    def f(x):  # each of nine windows sees the one large pixel
        pooled = nn.max_pool(x[..., None], (3, 3), (1, 1), "SAME")
        return pooled.ravel() @ kernel

    kernel = jnp.zeros((25, 1)).at[jnp.array([6, 7, 8, 11, 12, 13, 16, 17, 18])].set(1)
    x = jnp.zeros((1, 5, 5)).at[0, 2, 2].set(1)
    bound = input_gradient_bound({"kernel": kernel})
    np.testing.assert_allclose(bound, [3.0])
    np.testing.assert_allclose(norms_of(f, x), [bound * 3], rtol=1e-6)


def test_which_layer_is_the_last():
    params = {
        f"Dense_{i}": {"kernel": normal(i, 2, 2 if i < 10 else 3), "bias": jnp.ones(2)}
        for i in range(10)
    } | {"Dense_10": {"kernel": normal(10, 2, 3)}}
    bound = input_gradient_bound(params)
    size = lambda w: np.linalg.norm(np.float64(w))  # noqa: E731
    others = np.prod([size(params[f"Dense_{i}"]["kernel"]) for i in range(10)])
    last = np.float64(params["Dense_10"]["kernel"])
    np.testing.assert_allclose(bound, others * np.linalg.norm(last, axis=0), rtol=1e-5)
    names = [f"Dense_{i}" for i in (10, *range(10))]
    bound = input_gradient_bound(params, names)
    ninth = np.float64(params["Dense_9"]["kernel"])
    expected = others / size(ninth) * size(last) * np.linalg.norm(ninth, axis=0)
    np.testing.assert_allclose(bound, expected, rtol=1e-5)
    few = input_gradient_bound(params, ["Dense_2/kernel", "Dense_9"])
    second = size(params["Dense_2"]["kernel"])
    np.testing.assert_allclose(few, second * np.linalg.norm(ninth, axis=0), rtol=1e-5)


def test_stacked_layers_and_several_output_axes():
    params = {
        "a": {"kernel": normal(0, 3, 2, 4, 4), "bias": jnp.ones((3, 2, 4))},
        "b": {"kernel": normal(1, 4, 2, 3), "bias": jnp.ones((2, 3))},
    }
    dims = {
        "a": {"kernel": Dims(2, 3), "bias": None},
        "b": {"kernel": Dims(0, (1, 2)), "bias": None},
    }
    first, last = (np.float64(params[k]["kernel"]) for k in "ab")
    for norm, order in (("frobenius", None), ("spectral", 2)):
        norms = np.linalg.norm(first, order, axis=(2, 3))
        bound = input_gradient_bound(params, norm=norm, dims=dims)
        assert bound.shape == (2, 3)
        expected = np.prod(norms) * np.linalg.norm(last, axis=0)
        np.testing.assert_allclose(bound, expected, rtol=1e-5)
        # The last layer of a stack that comes last.
        bound = input_gradient_bound(params, ["b", "a"], norm=norm, dims=dims)
        flat = np.linalg.norm(last.reshape(4, 6), order)
        expected = (
            flat * np.prod(norms.ravel()[:-1]) * np.linalg.norm(first[2, 1], axis=0)
        )
        np.testing.assert_allclose(bound, expected, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_products_that_are_out_of_range(norm):
    """Only of the bound itself can that be seen."""
    scale = jnp.asarray([1e30, 1e30, 1e30, 1e-30, 1e-30, 1e-30])[:, None, None]
    params = {"a": scale * jnp.ones((6, 1, 1)), "b": jnp.array([[1e30, 1e-30, 2e38]])}
    dims = {"a": Dims(1, 2), "b": Dims(0, 1)}
    np.testing.assert_allclose(
        input_gradient_bound(params, norm=norm, dims=dims), params["b"][0], rtol=1e-6
    )
    larger = params | {"a": 10 ** (1 / 6) * params["a"]}
    bound = input_gradient_bound(larger, norm=norm, dims=dims)
    np.testing.assert_allclose(bound, [1e31, 1e-29, np.inf], rtol=1e-5)
    zero = params | {"a": params["a"].at[0].set(0)}
    np.testing.assert_array_equal(
        input_gradient_bound(zero, norm=norm, dims=dims), np.zeros(3)
    )
    many = {"a": jnp.tile(scale, (200, 1, 1)), "b": params["b"]}
    bound = input_gradient_bound(many, norm=norm, dims=dims)
    np.testing.assert_allclose(bound, params["b"][0], rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_can_be_penalties(norm):
    """Of weights whose singular values are equal, too, as orthogonal ones are."""
    params = {"a": jnp.eye(3)[:2] * 2, "b": normal(0, 3, 2)}
    other = jax.tree.map(lambda x: x + 1, params)
    several = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    bound = lambda p: input_gradient_bound(p, norm=norm)  # noqa: E731
    mapped = quick.jit(jax.vmap(bound))(several)
    np.testing.assert_allclose(mapped[0], bound(params), rtol=1e-6)
    np.testing.assert_allclose(mapped[1], bound(other), rtol=1e-6)
    gradient = quick.jit(jax.grad(lambda p: bound(p).sum()))(params)
    units = np.linalg.norm(np.float64(params["b"]), axis=0)
    size = np.linalg.norm(params["a"], 2 if norm == "spectral" else None)
    np.testing.assert_allclose(gradient["b"], size * params["b"] / units, rtol=1e-5)
    if norm == "frobenius":
        expected = units.sum() * params["a"] / size
        np.testing.assert_allclose(gradient["a"], expected, rtol=1e-5)
    else:  # any of the singular vectors' planes is a derivative
        np.testing.assert_allclose(
            np.linalg.norm(gradient["a"]), units.sum(), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("params", "kwargs", "error", "message"),
    [
        ({"a": jnp.ones((2, 2))}, {"norm": "l1"}, ValueError, "norm must be .*'l1'"),
        ({"a": jnp.ones((2, 2))}, {"norm": (2, 2)}, ValueError, "norm must be"),
        ({"bias": jnp.ones(2)}, {"layers": []}, ValueError, "one weight at least"),
        ({}, {}, ValueError, "one weight at least"),
        (
            {"a": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(2)}},
            {},
            ValueError,
            "norm.*scale.*neither a weight nor",
        ),
        ({"a": jnp.ones((2, 2))}, {"layers": ["b"]}, ValueError, "'b'.*none of"),
        ({"a": jnp.ones((2, 2))}, {"layers": "a"}, TypeError, "sequence"),
        (
            {"kernel": jnp.ones((3, 2, 2))},
            {},
            ValueError,
            "dims=",
        ),
    ],
)
def test_errors_of_bounds(params, kwargs, error, message):
    with pytest.raises(error, match=message):
        input_gradient_bound(params, **kwargs)
