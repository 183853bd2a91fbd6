"""Means and norms of groups of weights: of each unit, or of each layer."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weightreg._core._arguments import check_boolean
from weightreg._core._mesh import first_of, is_split
from weightreg._core._norms import Axes, Scaled, exponent_of, or_one, p_norm, scale_of
from weightreg._core._weights import Dims, Mask, WeightLayer, layers_for

SCOPES = ("unit", "layer")


def check_form(scope: Any, center: Any) -> None:
    """Refuses a scope that is none, and a ``center`` that is no boolean."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, not {scope!r}.")
    check_boolean("center", center)


def layers_of(
    caller: str, params: Any, scope: str, center: bool, mask: Mask, dims: Dims
) -> list[WeightLayer]:
    """The weights that have elements. Refuses those that centring would make 0."""
    used = ("stack_axes", "output_axes")[: 1 + (scope == "unit")]
    layers = layers_for(caller, params, mask, dims, operator.attrgetter(*used))
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
    r"""The statistics of all groups, in two reads of the weights.

    The mean is :math:`f + \overline{w - f}` with the first weight ``f``, so that of
    weights that are all equal exactly 0 remains.
    """
    parts = _Parts.of(w, group)
    largest = jnp.max(jnp.abs(parts.w), parts.group, keepdims=True)
    scale = parts.join(scale_of, largest)
    mean = jnp.zeros_like(scale), jnp.zeros_like(scale)
    if center:
        first = first_of(w, group)
        moved = parts.w - parts.expand(first)
        total = parts.join(_sum, _sum(moved, parts.group))
        rest = total / math.prod(w.shape[a] for a in group)
        # Without the barrier these are computed anew where the weights are used, for
        # which an optimizer that writes them in place would have to keep a copy.
        mean = lax.optimization_barrier((first + rest, (first - (first + rest)) + rest))
    moved = parts.w - parts.expand(mean[0])
    sizes = p_norm(moved, 2, parts.group, parts.expand(scale))
    size = Scaled(parts.join(_root_sum, sizes.fraction), 1 - exponent_of(scale))
    inverse = jnp.where(size.fraction == 0, 0, scale / or_one(size.fraction))
    return Statistics(mean, size, inverse)


class _Parts(NamedTuple):
    """Weights of which an axis of the groups is cut in four, if there is one to cut.

    XLA's model of a GPU would rather store numbers than calculate them inside of a sum
    with few results, of which four parts have four times as many. (Where a mesh splits
    that axis over a number of devices that four does not divide, nor it four, XLA
    gathers weights for this.)
    """

    w: jax.Array
    group: tuple[int, ...]
    axis: int | None

    @classmethod
    def of(cls, w: jax.Array, group: tuple[int, ...]) -> "_Parts":
        """The weights, cut along the last axis that can be."""
        whole = [a for a in group if w.shape[a] % 4 == 0 and not is_split(w, a)]
        if not whole or len(group) == w.ndim:  # XLA cuts a sum of everything itself.
            return cls(w, group, None)
        axis = whole[-1]
        shape = (*w.shape[:axis], 4, w.shape[axis] // 4, *w.shape[axis + 1 :])
        return cls(w.reshape(shape), tuple(a + (a >= axis) for a in group), axis)

    def expand(self, x: jax.Array) -> jax.Array:
        """What is the same for all parts, to broadcast against them."""
        return x if self.axis is None else jnp.expand_dims(x, self.axis)

    def join(self, reduce: Callable, x: jax.Array) -> jax.Array:
        """What is known of each part, reduced to what is known of all."""
        # Without the barrier XLA would reduce all at once, as if nothing were cut.
        axes = () if self.axis is None else (self.axis,)
        return jnp.squeeze(reduce(lax.optimization_barrier(x), axes), axes)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axes, keepdims=True)


def _root_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The norm of numbers of size one, with a derivative of 0 at 0."""
    square = _sum(x * x, axes)
    return jnp.where(square == 0, 0, jnp.sqrt(or_one(square)))


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
