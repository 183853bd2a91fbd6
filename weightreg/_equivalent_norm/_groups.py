"""Means and norms of groups of weights: of each unit, or of each layer."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weightreg._core._arguments import check_boolean
from weightreg._core._norms import Axes, exponent_of, halve, or_one
from weightreg._core._weights import Dims, Mask, WeightLayer, weight_layers

SCOPES = ("unit", "layer")


def check_form(scope: Any, center: Any) -> None:
    """Refuses a scope that is none, and a ``center`` that is no boolean."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, not {scope!r}.")
    check_boolean("center", center)


def layers_of(
    params: Any, scope: str, center: bool, mask: Mask, dims: Dims
) -> list[WeightLayer]:
    """The weights that have elements. Refuses those that centring would make 0."""
    layers = weight_layers(params, mask=mask, dims=dims)
    layers = [layer for layer in layers if math.prod(layer.shape)]
    for layer in layers:
        units = math.prod(layer.shape[a] for a in layer.output_axes)
        count = layer.fan_in * (units if scope == "layer" else 1)
        if center and count == 1:
            what = "input a unit" if scope == "unit" else "element a layer"
            raise ValueError(
                f"{layer.path} of shape {layer.shape} has one {what}, of which nothing "
                "is left without its mean: leave it out with mask=, or take "
                "center=False."
            )
    return layers


def group_of(axes: Axes, scope: str) -> tuple[int, ...]:
    """The axes over which norms and means are taken."""
    return axes.inputs if scope == "unit" else axes.inputs + axes.outputs


class Statistics(NamedTuple):
    """The statistics of the weights times ``half * rest``, with ones for groups' axes.

    The mean is in two parts, for weights that differ by little: ``shift`` is one of the
    weights, or 0, and ``mean`` is the rest. ``size`` is the norm of the deviations.
    """

    half: jax.Array
    rest: jax.Array
    shift: jax.Array
    mean: jax.Array
    size: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalized(
    group: tuple[int, ...], center: bool, w: jax.Array, norm: jax.Array
) -> jax.Array:
    """The weights, centred or not, scaled so that every group has norm ``norm``."""
    return direction(w, measure(group, center, w), norm)


@normalized.defjvp
def _normalized_jvp(group, center, primals, tangents):
    # The derivative uses the result, which is kept anyway, and so takes fewer passes.
    (w, norm), (w_dot, norm_dot) = primals, tangents
    s = measure(group, center, w)
    out = direction(w, s, norm)
    total = functools.partial(jnp.sum, axis=group, keepdims=True)
    count = math.prod(w.shape[a] for a in group)
    per_size = jnp.where(s.size == 0, 0, 1 / or_one(s.size))
    scaled_dot = w_dot * s.half * s.rest
    along = total(out * scaled_dot) * (per_size / norm)
    across = scaled_dot - total(scaled_dot) / count if center else scaled_dot
    return out, across * (norm * per_size) - out * along + out * (norm_dot / norm)


def direction(w: jax.Array, s: Statistics, norm: Any = 1.0) -> jax.Array:
    """The weights without their means, of a given norm, or 0 for a group of size 0."""
    deviation = w * s.half * s.rest - s.shift - s.mean
    return deviation * jnp.where(s.size == 0, 0, norm / or_one(s.size))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def measure(group: tuple[int, ...], center: bool, w: jax.Array) -> Statistics:
    """The statistics of all groups, with derivatives in closed form."""
    total = functools.partial(jnp.sum, axis=group, keepdims=True)
    count = math.prod(w.shape[a] for a in group)
    info = jnp.finfo(w.dtype)
    squares = total(w * w)
    mean = total(w) / count if center else jnp.zeros_like(squares)
    spread = squares - count * mean * mean
    one, zero = jnp.ones_like(squares), jnp.zeros_like(squares)

    def in_one_pass() -> Statistics:
        return Statistics(one, one, zero, mean, jnp.sqrt(spread))

    def carefully() -> Statistics:
        largest = jnp.max(jnp.abs(w), group, keepdims=True)
        half, rest = halve(exponent_of(or_one(largest)), w.dtype)
        scaled = w * half * rest
        # Where all weights are equal, exactly 0 remains.
        shift = jnp.max(scaled, group, keepdims=True) if center else zero
        moved = scaled - shift
        mean = total(moved) / count if center else zero
        size = jnp.sqrt(total((moved - mean) ** 2))
        return Statistics(half, rest, shift, mean, size)

    # One pass is exact enough if sums of squares are in range and not much of them
    # cancels. A GPU would have to wait for the host to know whether that is so.
    ordinary = (squares < jnp.inf) & (2 * spread > squares)
    ordinary = jnp.all(ordinary & (squares > 2.0 ** (info.minexp // 2)))
    return lax.platform_dependent(
        cpu=lambda: lax.cond(ordinary, in_one_pass, carefully), default=carefully
    )


@measure.defjvp
def _measure_jvp(group, center, primals, tangents):
    (w,), (w_dot,) = primals, tangents
    s = measure(group, center, w)
    total = functools.partial(jnp.sum, axis=group, keepdims=True)
    count = math.prod(w.shape[a] for a in group)
    scaled_dot = w_dot * s.half * s.rest
    zero = jnp.zeros_like(s.mean)
    mean_dot = total(scaled_dot) / count if center else zero
    size_dot = total(direction(w, s) * scaled_dot)
    return s, Statistics(zero, zero, zero, mean_dot, size_dot)
