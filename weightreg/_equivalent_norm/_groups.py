"""Means and norms of groups of weights: of each unit, or of each layer."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from weightreg._core._arguments import check_boolean
from weightreg._core._mesh import first_of
from weightreg._core._norms import Axes, Scaled, or_one, p_norm, scale_of
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
    """What is known of every group of weights, with ones for its axes.

    Attributes:
      mean: The mean in two parts, for weights that differ by little: the first rounded,
        and what rounding has lost. Both are 0 where weights are not centred.
      size: The norm of the deviations from the mean.
      inverse: One over the norm, or 0 where it is 0.
    """

    mean: tuple[jax.Array, jax.Array]
    size: Scaled
    inverse: jax.Array


def measure(group: tuple[int, ...], center: bool, w: jax.Array) -> Statistics:
    """The statistics of all groups, in two reads of the weights."""
    scale = scale_of(w, group)
    mean = _mean(group, w) if center else (jnp.zeros_like(scale),) * 2
    size = p_norm(w - mean[0], 2, group, scale)
    inverse = jnp.where(size.fraction == 0, 0, scale / or_one(size.fraction))
    return Statistics(mean, size, inverse)


def _mean(group: tuple[int, ...], w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean as a number and what its rounding has lost."""
    # Of weights that are all equal exactly 0 remains.
    first = first_of(w, group)
    rest = jnp.mean(w - first, group, keepdims=True)
    mean = first + rest
    return mean, (first - mean) + rest


def direction(w: jax.Array, s: Statistics) -> jax.Array:
    """The deviations from the mean, of norm 1, or 0 for a group of size 0."""
    return ((w - s.mean[0]) - s.mean[1]) * s.inverse


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalized(
    group: tuple[int, ...], center: bool, w: jax.Array, norm: jax.Array
) -> jax.Array:
    r"""Weights of which every group has a given norm, centred or not.

    .. math::
      \hat W = \nu \, \frac{W - \mu}{\|W - \mu\|}, \qquad
      d \hat W = \frac{\nu}{\|W - \mu\|} \Big( d W - \overline{d W}
        - \hat W \frac{\langle \hat W, d W \rangle}{\nu^2} \Big)
    """
    return norm * direction(w, measure(group, center, w))


@normalized.defjvp
def _normalized_jvp(group, center, primals, tangents):
    # The derivative uses the result, which is kept anyway, and so takes fewer passes.
    (w, norm), (w_dot, norm_dot) = primals, tangents
    s = measure(group, center, w)
    out = norm * direction(w, s)
    w_dot = w_dot * s.inverse
    total = functools.partial(jnp.sum, axis=group, keepdims=True)
    along = total(out * w_dot) * (1 / norm)
    if center:
        w_dot = w_dot - total(w_dot) / math.prod(w.shape[a] for a in group)
    return out, norm * w_dot - out * along + out * (norm_dot / norm)
