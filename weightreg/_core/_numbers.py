"""Numbers that users pass: real, traced or scheduled, and their checks."""

import math
import operator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

Number: TypeAlias = jax.typing.ArrayLike | optax.Schedule
"""A number, an array, a traced array, or a schedule of the step count."""


def is_real(value: Any) -> bool:
    """Whether something is a real number or an array of such, traced or not."""
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError):
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_scalar(
    name: str, value: Any, low: float, high: float, kind: str = "a scalar"
) -> None:
    """Refuses what is no real scalar, or is known not to be in ``[low, high]``.

    No infinite number is accepted, whatever ``high`` is.
    """
    if not is_real(value) or np.shape(value) != ():
        raise TypeError(f"{name} must be {kind}, not {value!r}.")
    if isinstance(value, Tracer):
        return
    known = float(np.asarray(value))  # in NumPy: under jit all of JAX is traced
    if not (low <= known <= high and known < math.inf):
        ends = f"in [{low}, {high}]"
        allowed = f"at least {low} and finite" if math.isinf(high) else ends
        raise ValueError(f"{name} must be {allowed}, but is {value}.")


def check_count(name: str, value: Any, least: int) -> int:
    """An integer, which has to be known before tracing."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}.") from None
    if count < least:
        raise ValueError(f"{name} must be {least} or more, but is {count}.")
    return count


def at(
    name: str, number: Number, count: jax.Array, shape: tuple[int, ...]
) -> jax.typing.ArrayLike:
    """The value of a number or schedule at a step, to be broadcast to ``shape``."""
    if not callable(number):
        return number
    value = number(count)
    if not is_real(value):
        raise TypeError(f"{name} must be a schedule of numbers, but gives {value!r}.")
    check_shape(name, jnp.shape(value), shape)
    return value


def check_shape(where: str, shape: tuple[int, ...], leaf: tuple[int, ...]) -> None:
    """Refuses a shape that does not broadcast to a leaf's."""
    try:
        fits = np.broadcast_shapes(shape, leaf) == leaf
    except ValueError:
        fits = False
    if not fits:
        broadcast = f" or broadcast to the leaf's shape {leaf}" if leaf else ""
        raise ValueError(f"{where} must be a scalar{broadcast}, but has shape {shape}.")


def floats(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """An array, which has to be one of floats."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating dtype, not {array.dtype}.")
    return array
