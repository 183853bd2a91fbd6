"""What is measured of one example."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weightreg._core._arguments import compute_dtype
from weightreg._core._norms import FROBENIUS, Axes, Scaled, norm_of, or_one

Network = Callable[..., jax.Array]


def norms(f: Network, example: jax.Array, *args: Any) -> jax.Array:
    """The norm of the gradient of every output."""
    jacobian = _jacobian(f, example, args)
    inputs = tuple(range(jacobian.ndim - example.ndim, jacobian.ndim))
    size = norm_of(jacobian, FROBENIUS, Axes(inputs, ()))
    return jnp.squeeze(size.value(), inputs)


def squared(f: Network, example: jax.Array, *args: Any) -> jax.Array:
    """The squared norm of the Jacobian."""
    return _square(_jacobian(f, example, args))


class Estimate(NamedTuple):
    """What random projections say about a mean.

    Attributes:
      mean: An unbiased estimate of it.
      standard_error: The standard deviation of that estimate, itself estimated.
    """

    mean: jax.Array
    standard_error: jax.Array


def projected(
    f: Network, probes: int, example: jax.Array, key: jax.Array, *args: Any
) -> Estimate:
    """What the gradients of random sums of the outputs say about the squared norm."""
    squares = _projections(f, probes, example, key, args)
    # Their variance is in range only after division by one of them.
    largest = or_one(lax.stop_gradient(jnp.max(squares)))
    error = jnp.std(squares / largest, ddof=1) / math.sqrt(probes)
    return Estimate(jnp.mean(squares), largest * error)


def _check_output(out: Any) -> None:
    """Refuses what is not one array of floats, or the shape and dtype of one."""
    is_array = isinstance(out, jax.ShapeDtypeStruct | jax.Array)
    if not is_array or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"f must return one floating-point array, but returns {out}.")


def _jacobian(f: Network, example: jax.Array, args: tuple[Any, ...]) -> jax.Array:
    """The Jacobian ``(*outputs, *inputs)`` of one example, in the cheaper mode."""
    out = jax.eval_shape(f, example, *args)
    _check_output(out)
    differentiate = jax.jacfwd if example.size < out.size else jax.jacrev
    dtype = compute_dtype(example.dtype, out.dtype)
    return differentiate(f)(example, *args).astype(dtype)


def _projections(
    f: Network, probes: int, example: jax.Array, key: jax.Array, args: tuple[Any, ...]
) -> jax.Array:
    """Squared norms ``(probes,)`` of gradients of random sums of the outputs."""
    out, pullback = jax.vjp(lambda x: f(x, *args), example)
    _check_output(out)
    # As one vector, the same numbers take a tenth of the time to compile.
    normal = jax.random.normal(key, (probes * out.size,), compute_dtype(out.dtype))
    # They are made short, for a random sum of gradients may be out of float16's range.
    shrink = 2.0 ** -math.ceil(math.log2(4 * math.sqrt(max(out.size, 1))))
    # Inside of shard_map this 0 makes them vary between devices as the output does.
    zero = jnp.where(out == out, 0, 0).astype(out.dtype)

    def square(vector: jax.Array) -> jax.Array:
        (gradient,) = pullback((shrink * vector).astype(out.dtype) + zero)
        return _square(gradient.astype(compute_dtype(gradient.dtype)) / shrink)

    return jax.vmap(square)(normal.reshape(probes, *out.shape))


@jax.custom_jvp
def _square(x: jax.Array) -> jax.Array:
    """A squared Frobenius norm, infinite or 0 only where it is out of range."""
    size = norm_of(x, FROBENIUS, Axes(tuple(range(x.ndim)), ()))
    return Scaled(size.fraction**2, 2 * size.exponent).value().reshape(())


@_square.defjvp
def _square_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    # A norm has no derivative at 0, but its square has.
    return _square(x), 2 * jnp.sum(x * x_dot)
