"""The axes of a trace are those along which NumPy gets the layer's result.

Data is contracted with the leaf as stored over `input_axes`, in their order; what is
left of the leaf are `output_axes`, in theirs, and the leaf at `bias` is added.
"""

import math

import flax.linen as nn
import jax
import numpy as np
import quick
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import weightreg as wr

pytestmark = quick.everything

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 99)
# Examples are small from the start, and each compiles, so failures are not shrunk.
examples = settings(
    max_examples=10, derandomize=True, deadline=None, phases=[Phase.generate]
)


def shapes(least, most):
    return st.lists(SIZES, min_size=least, max_size=most).map(tuple)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(module, data, seed):
    """Trace a module, and have its parameters by their paths and its result."""
    params = jax.eval_shape(module.init, jax.random.key(0), data)["params"]
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([normal(seed + i, v.shape) for i, v in enumerate(leaves)])
    apply = lambda params, data: module.apply({"params": params}, data)  # noqa: E731
    net = wr.trace_network(apply, params, data)
    paths = jax.tree_util.tree_leaves_with_path(params)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    return net, leaves, np.asarray(quick.jit(apply)(params, data))


def contract(data, axes, layer, leaves):
    """Apply a layer to the axes of data that meet its input axes one by one."""
    kernel = leaves[layer.path]
    assert layer.shape == kernel.shape
    assert layer.output_axes == tuple(sorted(layer.output_axes))
    assert layer.fan_in == math.prod(data.shape[axis] for axis in axes)
    seen = {*layer.input_axes, *layer.output_axes, *layer.stack_axes}
    assert seen == set(range(kernel.ndim))
    return np.tensordot(data, kernel, (axes, layer.input_axes))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@examples
@given(shapes(1, 4), SIZES, st.booleans(), SEEDS)
def test_dense(shape, features, use_bias, seed):
    data = normal(seed, shape)
    net, leaves, expected = run(nn.Dense(features, use_bias=use_bias), data, seed)
    (layer,) = net.layers
    assert (layer.bias is not None) == use_bias
    bias = leaves[layer.bias] if use_bias else 0
    close(contract(data, [-1], layer, leaves) + bias, expected)


@examples
@given(shapes(2, 4), shapes(1, 3), st.data())
def test_dense_general(shape, features, draw):
    axes = st.sets(st.integers(0, len(shape) - 1), min_size=1).map(sorted)
    axes = draw.draw(axes)
    data = normal(0, shape)
    net, leaves, expected = run(nn.DenseGeneral(features, axis=axes), data, 1)
    (layer,) = net.layers
    close(contract(data, axes, layer, leaves) + leaves[layer.bias], expected)


@examples
@given(st.integers(1, 2), shapes(2, 3), shapes(1, 2), SEEDS)
def test_dense_general_with_batch_dims(batch, shape, features, seed):
    """Every member of the stack is a layer, which has its own data and its own bias."""
    data = normal(seed, (*(2, 3)[:batch], *shape))
    module = nn.DenseGeneral(features, axis=-1, batch_dims=range(batch))
    net, leaves, expected = run(module, data, seed)
    (layer,) = net.layers
    assert layer.stack_axes == tuple(range(batch))
    kernel, bias = leaves[layer.path], leaves[layer.bias]
    axes = [axis - batch for axis in layer.input_axes]
    for i in np.ndindex(data.shape[:batch]):
        close(np.tensordot(data[i], kernel[i], ([-1], axes)) + bias[i], expected[i])


@st.composite
def equations(draw):
    """Draw an equation of data and kernel, and the sizes of its letters.

    Letters of data only are a, b, ..., those that are contracted p, q, ... and units
    x, y, ...; each of the three terms has its own order of them.
    """
    kept, summed, units = (
        letters[: draw(st.integers(least, len(letters)))]
        for letters, least in (("ab", 0), ("pq", 1), ("xyz", 1))
    )
    terms = [
        "".join(draw(st.permutations(term)))
        for term in (kept + summed, summed + units, kept + units)
    ]
    sizes = {letter: draw(SIZES) for letter in kept + summed + units}
    return terms, sizes


@examples
@given(equations(), SEEDS)
def test_einsum(equation, seed):
    (of_data, of_kernel, of_result), sizes = equation
    data = normal(seed, [sizes[letter] for letter in of_data])
    shape = tuple(sizes[letter] for letter in of_kernel)
    module = nn.Einsum(shape, f"{of_data},{of_kernel}->{of_result}")
    net, leaves, expected = run(module, data, seed)
    (layer,) = net.layers
    axes = [of_data.index(of_kernel[axis]) for axis in layer.input_axes]
    got = contract(data, axes, layer, leaves)
    left = [letter for letter in of_data if letter not in of_kernel]
    left += [of_kernel[axis] for axis in layer.output_axes]
    got = got.transpose([left.index(letter) for letter in of_result])
    bias = leaves[layer.bias]
    axes = [i for i, letter in enumerate(of_result) if letter not in of_kernel]
    close(got + np.expand_dims(bias, axes), expected)


@examples
@given(shapes(2, 3), SIZES, SIZES, st.sampled_from(["query", "key", "value"]))
def test_projections_of_attention(shape, heads, width, name):
    """Attention that is skipped has two projections, one into heads and one out."""

    def skip(query, key, value):
        return {"query": query, "key": key, "value": value}[name]

    module = nn.MultiHeadDotProductAttention(
        heads, qkv_features=heads * width, out_features=5, attention_fn=skip
    )
    data = normal(0, shape)
    net, leaves, expected = run(module, data, 1)
    projection, out = net.layers
    assert projection.path == f"['{name}']['kernel']"
    assert sum(role == "unused" for role in net.roles.values()) == 4
    got = contract(data, [-1], projection, leaves) + leaves[projection.bias]
    assert got.shape[-2:] == (heads, width)
    close(contract(got, [-2, -1], out, leaves) + leaves[out.bias], expected)


@examples
@given(shapes(1, 3), SIZES, SIZES, SEEDS)
def test_a_convolution_whose_window_is_the_image(window, channels, features, seed):
    """The window's axes come first and in order, as in the data."""
    data = normal(seed, (2, *window, channels))
    module = nn.Conv(features, window, padding="VALID")
    net, leaves, expected = run(module, data, seed)
    (layer,) = net.layers
    assert layer.convolves and layer.window == math.prod(window)
    axes = range(1, len(window) + 2)
    got = contract(data, list(axes), layer, leaves) + leaves[layer.bias]
    close(got, expected.reshape(2, features))
