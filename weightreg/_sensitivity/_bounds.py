"""What the weights of a network bound its sensitivity to its input by."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from weightreg._core._chain import LayerOrder, chain_norms, chain_of, stack_of
from weightreg._core._network import Network
from weightreg._core._norms import (
    FROBENIUS,
    Axes,
    Scaled,
    cumulative_product,
    need_of,
    norm_of,
    or_one,
    parse_norm,
)
from weightreg._core._weights import Dims, Mask, WeightLayer, layers_for

_BOUNDS = ("frobenius", "spectral")


def input_gradient_bound(
    params: Any,
    layers: LayerOrder = None,
    *,
    norm: str = "frobenius",
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""What the weights of a network bound its input gradients by.

    .. math::
      \Big\| \frac{\partial f_j(x)}{\partial x} \Big\|_2
        \le \|w_{L,j}\|_2 \prod_{l<L} \sqrt{k_l} \, \|W_l\|
      \qquad \text{at every input } x

    with :math:`w_{L,j}` all that feeds output ``j`` and :math:`k_l` the size of a
    convolution's window, 1 for a dense layer: one input reaches up to :math:`k_l`
    window positions, so that the norm of a convolution may be that much larger than
    the norm of its kernel. (The last layer does not need it: an output at one position
    sees one window.) With strides it may be far from tight. The paper's constant is 1.

    The bound holds, but for rounding, for chains of

    - dense layers and convolutions, with biases, any stride, dilation or groups, and
      padding by zeros (or circular padding of images at least as large as the window,
      which a traced network is not seen to have, and is refused with);
    - elementwise activations whose slope is at most 1: ReLU, leaky ReLU, tanh, not GELU
      or swish;
    - flattening, dropout in inference mode, max pooling whose windows do not overlap,
      and average pooling that counts padding in (Flax's default). Where windows of
      max pooling overlap, the bound has to be multiplied by the square root of the
      number of windows that one input is in.

    It does not hold with branches that are added or concatenated, attention, or
    normalization, nor for what follows the last layer, such as a softmax.

    The norms are in full precision on any device. The bound is that of the network in
    exact arithmetic: the outputs of one that runs in TF32 (JAX's default on a GPU) or
    bfloat16 are rounded, and for inputs close together the roundings may differ by more
    than the bound times the distance.

    Args:
      params: Any tree of parameters.
      layers: The layers in the order in which the network calls them: `WeightLayer`
        objects, or paths of weights (``"Dense_0/kernel"``) or of their modules
        (``"Dense_0"``). Only which is the last one matters. ``None`` means all weights
        in the order of `weight_layers`, which goes by names: ``down`` comes before
        ``up``. Then nothing but weights and their biases may be there. A `Network` that
        `trace_network` has read stands for all its layers. With it, here or for
        ``dims``, what lies between the layers is checked, and layers count as often as
        they are called.
      norm: ``"frobenius"``, or ``"spectral"``, which is never larger but takes a
        singular value decomposition of every layer's kernel matrix.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one. Where a weight has several input
        axes, all but the last are taken for a window, unless the network was traced.

    Returns:
      The bounds, ``(outputs,)``, or of the shape of the last layer's output axes if
      there are several, in float32 at least. A bound is infinite or 0 only where it is
      out of range itself.

    Raises:
      ValueError: ``norm`` is neither; there is no weight; ``mask`` or ``dims`` does not
        match the parameters; a name in ``layers`` stands for no weight or for several,
        or twice for one; stack axes are not the leading ones; a bias does not have its
        layer's units; or ``layers`` is ``None`` and a floating leaf is neither a weight
        nor a ``bias`` beside one, or layers do not fit together in their order; or a
        traced network is no chain of its layers and functions that enlarge no distance.
      TypeError: ``layers`` is of another type.

    References:
      Liu, Cui, Chan, Improve Generalization and Robustness of Neural Networks via
      Weight Scale Shifting Invariant Regularizations, 2020, eq. 15 and appendix A.3,
      which takes the norm of a ReLU layer's diagonal of zeros and ones for its size. It
      is 1 at most.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> last = jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> params = {"first": jnp.array([[2.0, 0.0]]), "last": last}
      >>> wr.input_gradient_bound(params)  # 2 * 5 and 2 * 1
      Array([10.,  2.], dtype=float32)
    """
    if not isinstance(norm, str) or norm not in _BOUNDS:
        raise ValueError(f"norm must be one of {_BOUNDS}, not {norm!r}.")
    chain = chain_of(params, layers, mask, dims, ordered=True)
    if not chain.layers:
        raise ValueError("params must have one weight at least, but has none.")
    if chain.net is not None:
        _check_bounded("input_gradient_bound", chain.net, chain.layers)
    norms = chain_norms(params, chain.layers, parse_norm("norm", norm))
    windows = np.concatenate([_window_roots(layer) for layer in chain.layers])
    calls = _calls(chain.layers)
    units = _unit_norms(params, chain.layers[-1])
    return _bound(_picked(norms, calls), windows[calls], units)


class GbrBounds(NamedTuple):
    """Logarithms of two bounds on the generalization-bound regularizer.

    Attributes:
      log_product: The logarithm of the product of squared norms.
      log_mean_power: The logarithm of their mean to the power of their number.
    """

    log_product: jax.Array
    log_mean_power: jax.Array


def gbr_bounds(params: Any, *, mask: Mask = None, dims: Dims = None) -> GbrBounds:
    r"""What the norms of the weights bound `gbr` by, in logarithms.

    .. math::
      \mathrm{GBR} \le \prod_{l=1}^L \|W_l\|_F^2
        \le \Big( \frac 1 L \sum_{l=1}^L \|W_l\|_F^2 \Big)^L

    The first bound holds for chains of dense layers with biases, between elementwise
    activations whose slope is at most 1 (ReLU, tanh), with ``f`` the logits or their
    probabilities (of which trace the logits). It is an equality for one linear layer.
    It does not hold for convolutions, whose operator has a larger norm than their
    kernel, nor with normalization or branches, where it is the paper's analogy. The
    second, between
    means, is an equality where all norms are equal, as `equivalent_norm` makes them.

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one. Of a traced network layers count
        as often as they are called, and what lies between them is checked.

    Returns:
      Two scalars that can be differentiated, in float32 at least. They are minus
      infinity where a layer (for the second, every one) is zero, and 0 without layers.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters; or a traced
        network is no chain of dense layers and functions that enlarge no distance.
      TypeError: ``mask`` holds something other than booleans, or is true for a leaf
        that is no floating-point array.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eq. 17.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"a": jnp.array([[8.0]]), "b": jnp.array([[2.0]])}
      >>> bounds = wr.gbr_bounds(params)
      >>> print(jnp.exp(bounds.log_product))  # 8^2 2^2
      256.0
      >>> print(jnp.exp(bounds.log_mean_power))  # 34^2
      1156.0
    """
    layers = layers_for("gbr_bounds", params, mask, dims, need_of(FROBENIUS))
    if isinstance(dims, Network):
        _check_bounded("gbr_bounds", dims, layers)
        _check_dense(layers)
    if not layers:
        return GbrBounds(jnp.zeros([]), jnp.zeros([]))
    norms = chain_norms(params, layers, FROBENIUS)
    return _gbr_bounds(_picked(norms, _calls(layers)))


def _check_bounded(caller: str, net: Network, layers: Sequence[WeightLayer]) -> None:
    """Refuses a traced network that the norms of its layers do not bound."""
    left_out = {layer.path for layer in net.layers} - {layer.path for layer in layers}
    reason = net.unbounded
    if not reason and left_out:
        reason = f"mask or layers leave out {', '.join(sorted(left_out))}"
    if not reason and layers and layers[-1].path != net.layers[-1].path:
        reason = f"the last layer is {net.layers[-1].path}, not {layers[-1].path}"
    if reason:
        raise ValueError(
            f"{caller} does not hold for the traced network: {reason}. (dims=net.dims "
            "gives the formula's value all the same, without a check of what it means.)"
        )


def _check_dense(layers: Sequence[WeightLayer]) -> None:
    """Refuses layers at several places, whose Jacobian repeats their weight."""
    for layer in layers:
        if layer.convolves:
            raise ValueError(
                f"gbr_bounds holds for dense layers, but {layer.path} is a "
                "convolution, whose norm may exceed its kernel's."
            )
    for layer in layers[-1:]:
        if math.prod(layer.input_shape[1:]) > layer.fan_in:
            raise ValueError(
                "gbr_bounds holds for one output a unit, but the last layer "
                f"{layer.path} is applied to an array of shape {layer.input_shape}, at "
                "several places of each example."
            )


def _calls(layers: Sequence[WeightLayer]) -> np.ndarray:
    """The positions of layers among all stacked ones, as often as each is called."""
    positions, first = [], 0
    for layer in layers:
        count = math.prod(stack_of(layer))
        own = np.arange(first, first + count)
        positions.append(np.tile(own, layer.calls or 1))
        first += count
    return np.concatenate(positions)


def _picked(norms: Scaled, positions: np.ndarray) -> Scaled:
    """The norms at some positions, which are all of them once for most networks."""
    if len(positions) == norms.fraction.size:
        return norms
    return Scaled(norms.fraction[positions], norms.exponent[positions])


@jax.jit
def _bound(norms: Scaled, factors: jax.Array, units: Scaled) -> jax.Array:
    """The units' norms times all norms but the last, each with a factor of its own."""
    fractions = norms.fraction * factors.astype(norms.fraction.dtype)
    # A one takes the place of the last layer, which may be the last of a stack.
    others = Scaled(fractions.at[-1].set(1), norms.exponent.at[-1].set(0))
    product = cumulative_product(others)
    fraction = units.fraction * product.fraction[-1]
    return Scaled(fraction, units.exponent + product.exponent[-1]).value()


@jax.jit
def _gbr_bounds(norms: Scaled) -> GbrBounds:
    """Both bounds, for one norm or more."""
    count, zero = norms.fraction.size, norms.fraction == 0
    logs = jnp.sum(jnp.log2(or_one(norms.fraction)))
    exponents = jnp.sum(jnp.where(zero, 0, norms.exponent))  # exact, as integers
    product = 2 * math.log(2) * (logs + exponents)
    low = -(2**20)  # zeros have no say, whatever their exponents are
    largest = jnp.max(jnp.where(zero, low, norms.exponent))
    mean = jnp.sum(norms.at(largest) ** 2) / count
    power = count * (jnp.log(or_one(mean)) + 2 * math.log(2) * largest)
    return GbrBounds(
        product + jnp.where(jnp.any(zero), -jnp.inf, 0),
        power + jnp.where(mean == 0, -jnp.inf, 0),
    )


def _window_roots(layer: WeightLayer) -> np.ndarray:
    """The root of the window's size, for every layer of a stack."""
    return np.full(math.prod(stack_of(layer)), math.sqrt(layer.reach))


def _unit_norms(params: Any, layer: WeightLayer) -> Scaled:
    """The norm of all that feeds each unit, of the last layer where it is a stack."""
    weight = jnp.asarray(jax.tree.leaves(params)[layer.index])
    size = norm_of(weight, FROBENIUS, Axes(layer.input_axes, ()))
    units = tuple(layer.shape[a] for a in sorted(layer.output_axes))
    shape = (math.prod(stack_of(layer)), *units)
    return Scaled(size.fraction.reshape(shape)[-1], size.exponent.reshape(shape)[-1])
