"""Equivalent networks: scale that is shifted between layers."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from weightreg._core._arguments import each, is_real, replaced
from weightreg._core._chain import Chain, LayerOrder, chain_norms, chain_of, stack_of
from weightreg._core._norms import (
    FROBENIUS,
    Scaled,
    cumulative_product,
    need_of,
    or_one,
    scaled,
    times_power,
)
from weightreg._core._weights import Dims, Mask, WeightLayer, check_whole, layers_for


def shift_scales(
    params: Any,
    factors: Sequence[Any] | jax.typing.ArrayLike,
    layers: LayerOrder = None,
    *,
    mask: Mask = None,
    dims: Dims = None,
) -> Any:
    r"""Shifts scale between layers, which keeps the function of the network.

    .. math::
      W_l \leftarrow \gamma_l W_l, \qquad
      b_l \leftarrow \gamma_1 \cdots \gamma_l \, b_l, \qquad
      \prod_l \gamma_l = 1, \quad \gamma_l > 0

    The function stays the same, but for rounding, where the layers are a chain and all
    that is between them is positively homogeneous, :math:`\phi(a h) = a \phi(h)`, as
    ReLU, leaky ReLU, max and average pooling, and flattening are. Normalization, tanh
    and GELU are not, and a network that adds branches is no chain.

    Args:
      params: Any tree of parameters.
      factors: One :math:`\gamma_l` a layer, as a sequence or an array ``(layers,)``,
        whose values are not checked where they are traced. A leaf that stacks layers
        (``nn.scan``) has one entry, a number for each or an array of the stack's shape.
      layers: The layers in the order in which the network calls them, each a
        `WeightLayer`, the path of a weight (``"['Dense_0']['kernel']"`` or
        ``"Dense_0/kernel"``) or that of its module (``"Dense_0"``). They must be a
        stretch of the chain without gaps. All leaves but their weights and the ``bias``
        beside each stay as they are. ``None`` means all weights in the order of
        `weight_layers`, which goes by the numbers in names (``Dense_2`` before
        ``Dense_10``). Names without numbers are an error where there are biases, and so
        are other floating leaves. A
        `Network` that `trace_network` has read stands for all its layers, in order.
        With it, here or for ``dims``, what lies between the layers is checked.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one, and must be the leading ones.

    Returns:
      The parameters of the equivalent network, of the same structure and dtypes.
      Products are formed in float32 at least and rounded once. They are infinite or 0
      only where they are out of range themselves.

    Raises:
      ValueError: There is not one factor a layer; a factor is not positive and finite,
        or of another shape; their product is not 1 within the rounding of factors, or
        of their logarithms, to float32; a name in ``layers`` does not stand for one
        weight, or a layer is there twice; axes that stack layers are not the leading
        ones; a bias does not have its layer's units; ``layers`` is ``None``, and there
        are other floating leaves, or there are biases and the layers have no numbers
        or do not fit together in that order; a leaf that is no bias belongs to a layer,
        as LoRA's factors and the scales of weight normalization do; the traced network
        is no chain, is not positively homogeneous between layers, or calls one several
        times; or ``mask`` or ``dims`` does not match the parameters.
      TypeError: ``factors`` or ``layers`` is of another type.

    References:
      Liu, Cui, Chan, Improve Generalization and Robustness of Neural Networks via
      Weight Scale Shifting Invariant Regularizations, 2020, eq. 5, which does not say
      what becomes of biases.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {
      ...     "Dense_0": {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)},
      ...     "Dense_1": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)},
      ... }
      >>> shifted = wr.shift_scales(params, [4.0, 0.25])
      >>> shifted["Dense_0"]
      {'bias': Array([4., 4.], dtype=float32),
       'kernel': Array([[4., 4.]], dtype=float32)}
      >>> shifted["Dense_1"]
      {'bias': Array([1.], dtype=float32),
       'kernel': Array([[0.25],
              [0.25]], dtype=float32)}
    """
    chain = chain_of(params, layers, mask, dims)
    _check_scalable("shift_scales", chain)
    entries = _entries(factors, chain.layers)
    if not entries:
        return params
    return _rescale(params, chain, _numbers(entries, chain))


def balance_scales(
    params: Any, layers: LayerOrder = None, *, mask: Mask = None, dims: Dims = None
) -> Any:
    r"""The equivalent network whose weight decay is lowest: all norms are equal.

    The network is that which `shift_scales` makes with the factors

    .. math::
      \gamma_l = \Big( \prod_k \|W_k\|_F \Big)^{1/L} \Big/ \|W_l\|_F

    They take :math:`\sum_l \|W_l\|_F^2` to its minimum over all shifts,
    `minimum_weight_decay`, and every norm to :math:`(\prod_k \|W_k\|_F)^{1/L}`. With a
    layer of zeros no shift attains that minimum, which is 0, and the parameters are
    returned as they are.

    Args:
      params: Any tree of parameters.
      layers: The layers to balance in the order in which the network calls them, each a
        `WeightLayer`, the path of a weight or that of its module (``"Dense_0"``). All
        leaves but their weights and the ``bias`` beside each stay as they are. ``None``
        means all weights in the order of `weight_layers`. A `Network` that
        `trace_network` has read stands for all its layers, in order. With it, here or
        for ``dims``, what lies between the layers is checked.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one, and must be the leading ones.

    Returns:
      The parameters of the equivalent network, of the same structure and dtypes.

    Raises:
      ValueError: A name in ``layers`` does not stand for one weight, or a layer is
        there twice; axes that stack layers are not the leading ones; a bias does not
        have its layer's units; ``layers`` is ``None``, and there are other floating
        leaves, or there are biases and the layers have no numbers in their names or do
        not fit together in that order; a leaf that is no bias belongs to a layer; the
        traced network is no chain, is not positively homogeneous
        between layers, or calls one several times; or ``mask`` or ``dims`` does not
        match the parameters.
      TypeError: ``layers`` is of another type.

    References:
      Liu, Cui, Chan, 2020, eq. 10 and appendix A.1.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"a": jnp.array([[8.0]]), "b": jnp.array([[2.0]])}
      >>> wr.balance_scales(params)
      {'a': Array([[4.]], dtype=float32), 'b': Array([[4.]], dtype=float32)}
    """
    chain = chain_of(params, layers, mask, dims)
    _check_scalable("balance_scales", chain)
    if not chain.layers:
        return params
    factors = _balancing_factors(chain_norms(params, chain.layers, FROBENIUS))
    return _rescale(params, chain, factors)


def minimum_weight_decay(
    params: Any, *, mask: Mask = None, dims: Dims = None
) -> jax.Array:
    r"""The lowest weight decay of any network that shifts of scale make of this one.

    .. math::
      \min_{\prod_l \gamma_l = 1} \sum_{l=1}^L \|\gamma_l W_l\|_F^2
        = L \Big( \prod_{l=1}^L \|W_l\|_F^2 \Big)^{1/L}

    Here weight decay is :math:`\sum_l \|W_l\|_F^2`, without a factor of one half and
    without biases. `balance_scales` gives the network that has it, and says of a traced
    one whether there is such a network. Neither the order of layers nor what else is in
    ``params`` matters here.

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one.

    Returns:
      A scalar that can be differentiated, in float32 at least. It and its derivative
      are right where it is in range, however far out of it the product of norms is. It
      is 0 without weights. It is also 0 with a layer of zeros, where its derivative,
      which has no value for two layers or more, is taken for 0.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters, or these have a
        hole where a weight may be.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array.

    References:
      Liu, Cui, Chan, 2020, eq. 9 and appendix A.1.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"a": jnp.array([[8.0]]), "b": jnp.array([[2.0]])}
      >>> print(wr.minimum_weight_decay(params))  # 4^2 + 4^2, now 8^2 + 2^2
      32.0
    """
    layers = layers_for("minimum_weight_decay", params, mask, dims, need_of(FROBENIUS))
    if not layers:
        return jnp.zeros([], jnp.float32)
    around = "Give the function all parameters, as eqx.combine joins them."
    check_whole("minimum_weight_decay", params, mask, dims, around)
    return _minimum(chain_norms(params, layers, FROBENIUS))


def _check_scalable(caller: str, chain: Chain) -> None:
    """Refuses layers of a traced network between which no scale can be shifted."""
    if chain.net is None:
        return
    for layer in chain.layers:
        if reason := chain.net.fixed[layer.path]:
            raise ValueError(f"{caller} cannot rescale {layer.path}: {reason}.")
    for layer, following in itertools.pairwise(chain.layers):
        reason = chain.net.links.get(
            (layer.path, following.path),
            "the second is not called on the results of the first alone, or the first "
            "feeds others",
        )
        if reason:
            raise ValueError(
                f"{caller} cannot shift scale between {layer.path} and "
                f"{following.path}: {reason}. Name a stretch of layers that is a chain "
                "in layers=."
            )


@jax.jit
def _minimum(norms: Scaled) -> jax.Array:
    """The sum of squares of norms that shifts have made equal."""
    mean = _geometric_mean(norms)
    value = times_power(norms.fraction.size * mean.fraction**2, 2 * mean.exponent)
    return jnp.where(jnp.any(norms.fraction == 0), 0, value)


@jax.jit
def _balancing_factors(norms: Scaled) -> Scaled:
    """The factors that make norms equal, or ones if a norm is 0."""
    mean = _geometric_mean(norms)
    zero = jnp.any(norms.fraction == 0)
    fraction = jnp.where(zero, 0.5, mean.fraction / or_one(norms.fraction))
    exponent = jnp.where(zero, 1, mean.exponent - norms.exponent)
    # The rounding of the mean is the same in all factors and adds up in their product.
    # The last factor is divided by that product, which makes it 1.
    product = cumulative_product(Scaled(fraction, exponent))
    return Scaled(
        fraction.at[-1].divide(product.fraction[-1]),
        exponent.at[-1].add(-product.exponent[-1]),
    )


def _geometric_mean(norms: Scaled) -> Scaled:
    """The geometric mean of numbers, where fractions of 0 are taken for 1.

    Exponents are summed as integers, since float32 would lose digits of a large sum.
    """
    count = max(norms.fraction.size, 1)
    total = jnp.sum(norms.exponent, dtype=jnp.int32)
    whole = total // count
    rest = (total - whole * count).astype(norms.fraction.dtype)
    logs = jnp.log2(or_one(norms.fraction))
    return Scaled(jnp.exp2((rest + jnp.sum(logs)) / count), whole)


def _rescale(params: Any, chain: Chain, factors: Scaled) -> Any:
    """Multiplies weights by their factors, and biases by the products up to theirs."""
    own, until = _steps(factors, chain.dtype)
    factors_of, first = {}, 0
    for layer, bias in zip(chain.layers, chain.biases, strict=True):
        stack = stack_of(layer)
        factors_of[layer.index] = own, first, stack
        if bias is not None:
            factors_of[bias] = until, first, stack
        first += math.prod(stack)
    shifted = {i: _times(x, *factors_of[i]) for i, x in each(params, factors_of)}
    return replaced(params, shifted, params)


@functools.partial(jax.jit, static_argnums=1)
def _steps(factors: Scaled, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Each factor, and each product up to it, as three steps to multiply by in turn.

    The three are all at least 1 or all at most 1, so that a number leaves the range of
    the dtype on the way only if the result does. Both shapes are ``(3, layers)``.
    """
    factors = Scaled(factors.fraction.astype(dtype), factors.exponent).normal()
    # No step may be infinite. Past this limit any number but 0 is out of range anyway.
    limit = 2 * (jnp.finfo(dtype).maxexp - 2)

    def steps(x: Scaled) -> jax.Array:
        up = x.exponent > 0
        fraction = jnp.where(up, 2 * x.fraction, x.fraction)
        power = jnp.clip(x.exponent - up.astype(jnp.int32), -limit, limit)
        half = power // 2
        one = jnp.ones_like(fraction)
        halves = jnp.ldexp(one, half), jnp.ldexp(one, power - half)
        return jnp.stack([fraction, *halves])

    # Without the barrier XLA computes the steps anew in the code of every leaf.
    return lax.optimization_barrier(
        (steps(factors), steps(cumulative_product(factors)))
    )


@functools.partial(jax.jit, static_argnums=3)  # Equal shapes share a trace.
def _times(
    x: jax.Array, steps: jax.Array, first: int, stack: tuple[int, ...]
) -> jax.Array:
    """A leaf times its own steps, which start at ``first``, one for each layer."""
    own = lax.dynamic_slice_in_dim(steps, first, math.prod(stack), axis=1)
    own = own.reshape(len(steps), *stack, *(1,) * (x.ndim - len(stack)))
    wide = x.astype(steps.dtype)
    for step in own:
        wide *= step
    return wide.astype(x.dtype)


def _entries(factors: Any, layers: tuple[WeightLayer, ...]) -> list[Any]:
    """Checks the factors and lists them: a number or an array of the stack's shape."""
    if isinstance(factors, np.ndarray | jax.Array):
        if factors.ndim != 1:
            raise ValueError(
                f"factors must have shape ({len(layers)},), not {factors.shape}."
            )
        factors = factors if isinstance(factors, Tracer) else np.asarray(factors)
    elif isinstance(factors, str) or not isinstance(factors, Sequence):
        raise TypeError(
            f"factors must be a sequence of numbers or an array, not {factors!r}."
        )
    entries = list(factors)
    if len(entries) != len(layers):
        raise ValueError(
            f"factors must have one entry for each of {len(layers)} layers, but has "
            f"{len(entries)}. The layers: "
            f"{', '.join(layer.path for layer in layers) or 'none'}."
        )
    for entry, layer in zip(entries, layers, strict=True):
        _check_factor(entry, layer)
    if not any(isinstance(entry, Tracer) for entry in entries):
        _check_product(entries, layers)
    return entries


def _check_factor(factor: Any, layer: WeightLayer) -> None:
    """Refuses what is no positive and finite number, or not of the stack's shape."""
    if not is_real(factor):
        raise TypeError(f"factors must be numbers, but is {factor!r} for {layer.path}.")
    stack = stack_of(layer)
    if jnp.shape(factor) not in ((), stack):
        raise ValueError(
            f"factors has an entry of shape {jnp.shape(factor)} for {layer.path}: "
            f"expected a number{f' or shape {stack}' if stack else ''}."
        )
    if isinstance(factor, Tracer):
        return
    known = np.asarray(factor, np.float64)
    if not np.all((known > 0) & (known < np.inf)):
        raise ValueError(
            f"factors must be positive and finite, but is {factor} for {layer.path}."
        )


def _check_product(factors: list[Any], layers: tuple[WeightLayer, ...]) -> None:
    """Refuses factors whose product is not 1, though it could be in their dtype."""
    logs = np.log(_vector(factors, layers, np, np.float64))
    # Python's floats and float64 arrays may hold numbers that were float32 before.
    dtypes = [np.float32, *(getattr(factor, "dtype", np.int32) for factor in factors)]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in floating)
    # A factor may be rounded, and so may a logarithm from which a user has made it.
    if abs(logs.sum()) > 4 * eps * (1 + np.abs(logs)).sum():
        raise ValueError(
            "factors must have the product 1, or the function of the network changes; "
            f"the logarithm of theirs is {logs.sum():.6g}."
        )


def _vector(factors: list[Any], layers: Iterable[WeightLayer], xp: Any, dtype: Any):
    """The factors as a vector of NumPy or JAX, one for each layer of a stack."""
    parts = [
        xp.broadcast_to(xp.asarray(factor, dtype), stack_of(layer)).reshape(-1)
        for factor, layer in zip(factors, layers, strict=True)
    ]
    return xp.concatenate(parts) if parts else xp.zeros(0, dtype)


def _numbers(factors: list[Any], chain: Chain) -> Scaled:
    """The factors of all layers as fractions and powers of two."""
    if any(isinstance(factor, Tracer) for factor in factors):
        return scaled(_vector(factors, chain.layers, jnp, chain.dtype), chain.dtype)
    # NumPy has factors past the range of float32, which JAX without x64 has not.
    return scaled(_vector(factors, chain.layers, np, np.float64), chain.dtype)
