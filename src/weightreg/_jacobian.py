"""Gradients of a network by its input, and what its weights bound them by."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from weightreg._layers import (
    LayerOrder,
    chain_norms,
    chain_of,
    stack_of,
)
from weightreg._norms import Axes, norm_of, parse_norm
from weightreg._numbers import check_count
from weightreg._reach import compute_dtype
from weightreg._scaled import Scaled, cumulative_product
from weightreg._trees import show_path
from weightreg._weights import Dims, Mask, WeightLayer

_FROBENIUS = (2.0, 2.0)
_BOUNDS = ("frobenius", "spectral")


def input_gradient_norms(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    batch_size: int | None = None,
) -> jax.Array:
    r"""Norms of the gradients of a network's outputs by its input.

    .. math::
      \Big\| \frac{\partial f_j(x_i)}{\partial x_i} \Big\|_2
      \qquad \text{for every example } i \text{ and output } j

    Whether ``f`` gives logits, probabilities or a loss is the caller's choice; the
    network should be in inference mode. All gradients of an example are computed in one
    pass: forward where it has fewer inputs than outputs, else backward. The result can
    be differentiated again, to be a penalty in training; the derivative of a norm at a
    gradient of 0 is 0.

    Args:
      f: From one example, and what ``args`` hold for it, to one floating array of any
        shape. It must not know about the batch.
      x: The examples, a floating array ``(batch, ...)``.
      *args: Further arguments of ``f``, such as labels: arrays, or trees of arrays, of
        the same first axis. Nothing is differentiated by them.
      batch_size: How many examples to take at once: less memory, more time. ``None``
        takes all. Each holds its whole Jacobian.

    Returns:
      The norms, ``(batch, *outputs)`` for an output of shape ``outputs``, hence
      ``(batch,)`` for a scalar, in float32 at least. Squares are not formed: a norm is
      infinite or 0 only where it is out of range itself.

    Raises:
      ValueError: ``x`` has no axis, ``args`` has a leaf with another first axis, or
        ``batch_size`` is below 1.
      TypeError: ``x`` is no floating-point array, ``f`` does not return one, or
        ``batch_size`` is no integer.

    References:
      Liu, Cui, Chan, Improve Generalization and Robustness of Neural Networks via
      Weight Scale Shifting Invariant Regularizations, 2020, eqs. 14, 15.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> x = jnp.ones((3, 2))
      >>> wr.input_gradient_norms(lambda x: x @ kernel, x)
      Array([[5., 1.],
             [5., 1.],
             [5., 1.]], dtype=float32)
      >>> labels = jnp.array([0, 1, 1])
      >>> wr.input_gradient_norms(lambda x, y: (x @ kernel)[y], x, labels)
      Array([5., 1., 1.], dtype=float32)
    """
    x = _examples(x, args)

    def norms(example: jax.Array, *rest: Any) -> jax.Array:
        jacobian = _jacobian(f, example, rest)
        inputs = tuple(range(jacobian.ndim - example.ndim, jacobian.ndim))
        size = norm_of(jacobian, _FROBENIUS, Axes(inputs, ()))
        return jnp.squeeze(size.value(), inputs)

    return _map(norms, (x, *args), batch_size)


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

    It holds, but for rounding, for chains of

    - dense layers and convolutions, with biases, any stride, dilation or groups, and
      padding by zeros (or circular padding of images at least as large as the window);
    - elementwise activations whose slope is at most 1: ReLU, leaky ReLU, tanh, not GELU
      or swish;
    - flattening, dropout in inference mode, max pooling whose windows do not overlap,
      and average pooling that counts padding in (Flax's default). Where windows of
      max pooling overlap, the bound has to be multiplied by the square root of the
      number of windows that one input is in.

    It does not hold with branches that are added or concatenated, attention, or
    normalization, nor for what follows the last layer, such as a softmax.

    Args:
      params: Any tree of parameters.
      layers: The layers in order, as in `shift_scales`. Only which is the last one
        matters. With ``None`` it is the last of `weight_layers`, by names: ``down``
        comes before ``up``. It is an error if anything but weights and their biases is
        there, or layers in that order do not fit together.
      norm: ``"frobenius"``, or ``"spectral"``, which is never larger but takes a
        singular value decomposition of every layer's kernel matrix.
      mask: Which leaves are weights, as in `weight_mask`.
      dims: What their axes mean, as in `weight_layers`. Where a weight has several
        input axes, all but the last are taken for a window.

    Returns:
      The bounds, ``(outputs,)``, or of the shape of the last layer's output axes if
      there are several; in float32 at least. The product is not formed in one float: a
      bound is infinite or 0 only where it is out of range itself.

    Raises:
      ValueError: ``norm`` is neither; there is no layer; or as in `shift_scales`, but
        for factors.
      TypeError: ``layers`` is of another type.

    References:
      Liu, Cui, Chan, 2020, eq. 15 and appendix A.3, which takes the norm of a ReLU
      layer's diagonal of zeros and ones for its size; it is 1 at most.

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
    norms = chain_norms(params, chain.layers, parse_norm("norm", norm))
    windows = np.concatenate([_window_roots(layer) for layer in chain.layers])
    return _bound(norms, windows, _unit_norms(params, chain.layers[-1]))


@jax.jit
def _bound(norms: Scaled, factors: jax.Array, units: Scaled) -> jax.Array:
    """The units' norms times all norms but the last, each with a factor of its own."""
    fractions = norms.fraction * factors.astype(norms.fraction.dtype)
    # In the place of the last layer, which may be the last of a stack, a one.
    others = Scaled(fractions.at[-1].set(1), norms.exponent.at[-1].set(0))
    product = cumulative_product(others)
    fraction = units.fraction * product.fraction[-1]
    return Scaled(fraction, units.exponent + product.exponent[-1]).value()


def _examples(x: Any, args: tuple[Any, ...]) -> jax.Array:
    """The examples, after a check that ``args`` has as many."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = f"type {type(x).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(f"x must be a floating-point array, but is of {what}.")
    if x.ndim == 0:
        raise ValueError("x must have a first axis of examples, but is a scalar.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"args{show_path(path)} has shape {jnp.shape(leaf)}: expected the "
                f"first axis of x, {x.shape[0]} examples."
            )
    return jnp.asarray(x)


def _jacobian(
    f: Callable[..., jax.Array], example: jax.Array, args: tuple[Any, ...]
) -> jax.Array:
    """One example's ``(*outputs, *inputs)``, in the cheaper mode."""
    out = jax.eval_shape(f, example, *args)
    is_array = isinstance(out, jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"f must return one floating-point array, but returns {out}.")
    differentiate = jax.jacfwd if example.size < out.size else jax.jacrev
    dtype = compute_dtype(example.dtype, out.dtype)
    return differentiate(f)(example, *args).astype(dtype)


def _map(f: Callable[..., Any], xs: tuple[Any, ...], batch_size: int | None) -> Any:
    """``vmap``, of ``batch_size`` examples at a time."""
    if batch_size is None:
        return jax.vmap(f)(*xs)
    size = check_count("batch_size", batch_size, 1)
    return jax.lax.map(lambda x: f(*x), xs, batch_size=size)


def _window_roots(layer: WeightLayer) -> np.ndarray:
    """The root of the window's size, for every layer of a stack."""
    # With dims, two input axes may be attention's or a window: assume a window.
    window = math.prod(layer.shape[a] for a in layer.input_axes[:-1])
    return np.full(math.prod(stack_of(layer)), math.sqrt(window))


def _unit_norms(params: Any, layer: WeightLayer) -> Scaled:
    """The norm of all that feeds each unit, of the last layer where it is a stack."""
    weight = jnp.asarray(jax.tree.leaves(params)[layer.index])
    size = norm_of(weight, _FROBENIUS, Axes(layer.input_axes, ()))
    units = tuple(layer.shape[a] for a in sorted(layer.output_axes))
    shape = (math.prod(stack_of(layer)), *units)
    return Scaled(size.fraction.reshape(shape)[-1], size.exponent.reshape(shape)[-1])
