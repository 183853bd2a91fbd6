"""Input gradients, and what weights bound them by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax import lax
from mlps import normal, norms_of, random_mlp, relu_mlp

from weightreg import input_gradient_bound, input_gradient_norms

pytestmark = quick.everything


@pytest.mark.parametrize("widths", [(5, 7, 3), (3, 7, 8)], ids=["backward", "forward"])
def test_norms_agree_with_central_differences(widths):
    """In float64 NumPy, at points that are off the kinks of ReLU."""
    rng = np.random.default_rng(0)
    params, x = random_mlp(rng, widths), rng.normal(size=(6, widths[0]))
    wide = jax.tree.map(np.float64, params)

    def f(x):
        hidden = np.maximum(x @ wide[0]["kernel"] + wide[0]["bias"], 0)
        return hidden @ wide[1]["kernel"] + wide[1]["bias"]

    steps = 1e-6 * np.eye(widths[0])
    jacobian = (f(x[:, None] + steps) - f(x[:, None] - steps)) / 2e-6
    expected = np.sqrt(np.sum(jacobian**2, axis=1))
    found = norms_of(lambda x: relu_mlp(params, x), np.float32(x))
    assert found.shape == (6, widths[-1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_any_shape_of_inputs_and_outputs():
    kernel = normal(0, 2, 3, 4, 5)
    x = normal(1, 6, 2, 3)
    f = lambda x: jnp.tensordot(x, kernel, 2)  # noqa: E731
    expected = np.broadcast_to(
        jnp.linalg.norm(kernel.reshape(6, 4, 5), axis=0), (6, 4, 5)
    )
    np.testing.assert_allclose(norms_of(f, x), expected, rtol=1e-6)
    few = lambda x: f(x)[:2, :2]  # noqa: E731
    np.testing.assert_allclose(norms_of(few, x), expected[:, :2, :2], rtol=1e-6)
    scalar = norms_of(lambda x: f(x)[1, 2], x)
    np.testing.assert_allclose(scalar, expected[:, 1, 2], rtol=1e-6)
    of_scalars = norms_of(jnp.sin, x[:, 0, 0])
    np.testing.assert_allclose(of_scalars, abs(jnp.cos(x[:, 0, 0])), rtol=1e-6)
    assert norms_of(f, x[:0]).shape == (0, 4, 5)
    assert norms_of(lambda x: x[:0], x).shape == (6, 0, 3)
    nothing = norms_of(lambda x: jnp.sum(x) + jnp.ones(2), x[:, :0])
    np.testing.assert_array_equal(nothing, np.zeros((6, 2)))


def test_further_arguments_go_with_their_example():
    """The input gradients of a loss, which attacks and eq. 14 are about."""
    kernel, x = normal(0, 5, 3), normal(1, 4, 5)
    y = jnp.array([0, 2, 1, 2])
    more = {"weight": jnp.arange(1.0, 5.0), "nothing": None}

    def loss(x, y, more):
        return -more["weight"] * jax.nn.log_softmax(x @ kernel)[y]

    p = np.float64(jax.nn.softmax(x @ kernel))
    residual = np.eye(3)[y] - p
    expected = np.arange(1, 5) * np.linalg.norm(residual @ np.float64(kernel).T, axis=1)
    for batch_size in (None, 3):
        found = norms_of(loss, x, y, more, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, np.int64(8), 100])
def test_batch_size_does_not_matter(batch_size):
    params = random_mlp(np.random.default_rng(0), (4, 6, 3))
    x = normal(1, 7, 4)
    f = lambda x: relu_mlp(params, x)  # noqa: E731
    np.testing.assert_allclose(
        norms_of(f, x, batch_size=batch_size),
        norms_of(f, x),
        rtol=1e-6,
    )


def test_batch_size_bounds_what_is_computed_at_once():
    f = functools.partial(input_gradient_norms, jnp.sin, batch_size=4)
    loops = [
        e
        for e in jax.make_jaxpr(f)(jnp.ones((8, 3))).eqns
        if e.primitive.name == "scan"
    ]
    assert [loop.params["length"] for loop in loops] == [2]


def test_the_mode_is_the_cheaper_one():
    """Each of these functions can be differentiated in one mode only."""

    @jax.custom_vjp
    def backward(x):
        return x[:2] * 3

    backward.defvjp(
        lambda x: (backward(x), None), lambda _, g: (jnp.pad(3 * g, (0, 1)),)
    )

    def forward(x):
        n = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + x), (0, x))[
            1
        ]
        return jnp.concatenate([n, n])

    x = normal(0, 2, 3)
    np.testing.assert_allclose(norms_of(backward, x), np.full((2, 2), 3.0))
    np.testing.assert_allclose(norms_of(forward, x), np.full((2, 6), 4.0))


@pytest.mark.parametrize("outputs", [2, 6], ids=["backward", "forward"])
def test_modes_agree(outputs):
    params = random_mlp(np.random.default_rng(0), (4, 9, outputs))
    x = normal(1, 7, 4)
    f = lambda x: relu_mlp(params, x)  # noqa: E731
    for differentiate in (jax.jacfwd, jax.jacrev):
        expected = jnp.linalg.norm(quick.jit(jax.vmap(differentiate(f)))(x), axis=-1)
        np.testing.assert_allclose(norms_of(f, x), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e-19, 1e19, 1e30])
@pytest.mark.parametrize("outputs", [2, 6], ids=["backward", "forward"])
def test_norms_whose_squares_are_out_of_range(scale, outputs):
    kernel = normal(0, 4, outputs) * scale
    found = norms_of(lambda x: x @ kernel, normal(1, 3, 4))
    expected = np.linalg.norm(np.float64(kernel), axis=0)
    np.testing.assert_allclose(found, np.tile(expected, (3, 1)), rtol=1e-6)
    x = normal(1, 1, 4)
    penalty = lambda k: input_gradient_norms(lambda x: x @ k, x).sum()  # noqa: E731
    gradient = quick.jit(jax.grad(penalty))(kernel)
    np.testing.assert_allclose(gradient, np.float64(kernel) / expected, rtol=1e-5)


def test_a_penalty_on_input_gradients_can_be_trained():
    """Double backpropagation, compiled and over several networks at once."""
    params = random_mlp(np.random.default_rng(0), (4, 6, 3))
    x, y = normal(1, 5, 4), jnp.array([0, 1, 2, 0, 1])

    def penalty(params, x):
        loss = lambda x, y: -jax.nn.log_softmax(relu_mlp(params, x))[y]  # noqa: E731
        return jnp.mean(input_gradient_norms(loss, x, y) ** 2)

    def plain(params, x):
        loss = lambda x, y: -jax.nn.log_softmax(relu_mlp(params, x))[y]  # noqa: E731
        return jnp.mean(jnp.sum(jax.vmap(jax.grad(loss))(x, y) ** 2, axis=1))

    found = quick.jit(jax.value_and_grad(penalty))(params, x)
    expected = quick.jit(jax.value_and_grad(plain))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    mapped = quick.jit(jax.vmap(penalty, in_axes=(0, None)))(several, x)
    np.testing.assert_allclose(mapped[0], found[0], rtol=1e-5)


def test_a_gradient_of_zero_has_a_derivative():
    x = jnp.ones((2, 3))
    f = lambda k: input_gradient_norms(lambda x: x @ k, x).sum()  # noqa: E731
    value, gradient = quick.jit(jax.value_and_grad(f))(jnp.zeros((3, 2)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(True):
        kernel = jnp.asarray([[3.0, 0, 1, 0], [4, 1, 0, 0]], dtype)
        for outputs in (1, 4):
            x = jnp.ones((2, 2), dtype)
            found = norms_of(lambda x: x @ kernel[:, :outputs], x)  # noqa: B023
            assert found.dtype == expected
            np.testing.assert_array_equal(found[0], [5, 1, 1, 0][:outputs])
            # The wider of input and output, though gradients have the input's.
            widened = lambda x: (x @ kernel[:, :outputs]).astype(jnp.float64)  # noqa: B023, E731
            assert norms_of(widened, x).dtype == jnp.float64
        params = {"a": kernel.T, "b": kernel}
        assert input_gradient_bound(params).dtype == expected


@pytest.mark.parametrize(
    ("f", "x", "args", "kwargs", "error", "message"),
    [
        (jnp.sum, jnp.ones(()), (), {}, ValueError, "x must have a first axis"),
        (jnp.sum, jnp.arange(3), (), {}, TypeError, "x must be .* of dtype int32"),
        (jnp.sum, jnp.ones(3, complex), (), {}, TypeError, "of dtype complex64"),
        (jnp.sum, [1.0], (), {}, TypeError, "of type list"),
        (jnp.argmax, jnp.ones((2, 3)), (), {}, TypeError, "f must return one.*int32"),
        (lambda x: (x, x), jnp.ones((2, 3)), (), {}, TypeError, "f must return one"),
        (lambda x: None, jnp.ones((2, 3)), (), {}, TypeError, "returns None"),
        (
            lambda x, y: x.sum(),
            jnp.ones((2, 3)),
            ({"y": jnp.ones(3)},),
            {},
            ValueError,
            r"args\[0\]\['y'\] must .* 2 examples, but has shape \(3,\)",
        ),
        (
            lambda x, y: x.sum(),
            jnp.ones((2, 3)),
            (1.0,),
            {},
            ValueError,
            r"args\[0\] must have the first axis of x.* has shape \(\)",
        ),
        (jnp.sum, jnp.ones(3), (), {"batch_size": 0}, ValueError, "be 1 or more"),
        (jnp.sum, jnp.ones(3), (), {"batch_size": 1.5}, TypeError, "an integer"),
        (jnp.sum, jnp.ones(3), (), {"batch_size": True}, TypeError, "an integer"),
    ],
)
def test_errors_of_norms(f, x, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        input_gradient_norms(f, x, *args, **kwargs)


# Bounds.
