"""Sensitivity of a network to its input: gradients, Jacobians, and their mean."""

import functools
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

from weightreg._core._arguments import check_count, show_path
from weightreg._core._norms import FROBENIUS, Axes, norm_of
from weightreg._sensitivity._batches import map_batches
from weightreg._sensitivity._example import Estimate, norms, projected, squared


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

    Whether ``f`` gives logits, probabilities or a loss is the caller's choice. The
    network should be in inference mode. All gradients of an example are computed in one
    pass, forward where it has fewer inputs than outputs, else backward. The result can
    be differentiated again, to be a penalty in training. The derivative of a norm at a
    gradient of 0 is 0.

    Products inside of ``f`` have the precision that ``f`` gives them. By JAX's default
    a GPU rounds float32 factors to TF32, which leaves some three digits, and a TPU to
    bfloat16; call this within ``jax.default_matmul_precision("highest")`` for all.

    Args:
      f: Function of one example, and of what ``args`` hold for it, to one floating
        array of any shape. It must not know about the batch.
      x: The examples, a floating array ``(batch, ...)``.
      *args: Further arguments of ``f``, such as labels: arrays, or trees of arrays, of
        the same first axis. Nothing is differentiated by them.
      batch_size: How many examples to take at once, as in `jacobian_norms`. ``None``
        takes all. Outside of ``jax.jit`` each call that takes batches compiles anew;
        wrap what you call repeatedly.

    Returns:
      The norms, ``(batch, *outputs)`` for an output of shape ``outputs``, in float32 at
      least. A norm is infinite or 0 only where it is out of range itself.

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
    return map_batches(functools.partial(norms, f), (x, *args), batch_size)


@overload
def jacobian_norms(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: None = None,
    key: None = None,
    batch_size: int | None = None,
) -> jax.Array: ...


@overload
def jacobian_norms(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: int,
    key: jax.Array,
    batch_size: int | None = None,
) -> Estimate: ...


def jacobian_norms(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: int | None = None,
    key: jax.Array | None = None,
    batch_size: int | None = None,
) -> jax.Array | Estimate:
    r"""Squared Frobenius norms of a network's input-output Jacobian, one per example.

    .. math::
      \Big\| \frac{\partial f(x_i)}{\partial x_i} \Big\|_F^2
        = \mathbb E_v \Big\| \frac{\partial \, v^\top f(x_i)}{\partial x_i} \Big\|_2^2,
      \qquad v \sim \mathcal N(0, I)

    The norms are exact, in the cheaper of forward and reverse mode; or, with
    ``probes``, the mean over that many random ``v``, of one backward pass each.

    It matters what ``f`` gives: logits, `probabilities` of them, or the probability of
    the label, `label_probability`, which the paper's derivation takes. The network
    should be in inference mode. The result can be differentiated, to be a penalty in
    training.

    Products inside of ``f`` have the precision that ``f`` gives them. By JAX's default
    a GPU rounds float32 factors to TF32, which leaves some three digits, and a TPU to
    bfloat16; call this within ``jax.default_matmul_precision("highest")`` for all.

    Where devices split the examples, each of them takes its part of every batch, of one
    example at least, and no example moves. An explicit mesh is known; with ``Auto``
    axes the devices have to be 2, 4, 8, ..., and no more than ``batch_size``, or else
    examples are gathered. Outside of ``jax.jit`` each call that takes batches compiles
    anew; wrap what you call repeatedly.

    Args:
      f: Function of one example, and of what ``args`` hold for it, to one floating
        array of any shape. It must not know about the batch.
      x: The examples, a floating array ``(batch, ...)``.
      *args: Further arguments of ``f``, such as labels: arrays, or trees of arrays, of
        the same first axis. Nothing is differentiated by them.
      probes: Number of random projections, 2 or more. ``None`` gives the exact norms.
      key: Key of ``jax.random``, to be given with ``probes``. Every example has its own
        ``v``. Inside of ``shard_map`` give every device its own key.
      batch_size: How many examples to take at once, or up to half of that fewer. Fewer
        take less memory and more time, since each holds its whole Jacobian or its
        projections, which a derivative of the result computes again. ``None`` takes
        all.

    Returns:
      The squared norms ``(batch,)`` in float32 at least, or with ``probes`` an
      `Estimate` of two such arrays.

    Raises:
      ValueError: ``x`` has no axis, ``args`` has a leaf with another first axis,
        ``batch_size`` is below 1 or ``probes`` below 2, or only one of ``probes`` and
        ``key`` is given.
      TypeError: ``x`` is no floating-point array, ``f`` does not return one, or
        ``probes`` or ``batch_size`` is no integer.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eqs. 2, 18.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> x = jnp.ones((3, 2))
      >>> wr.jacobian_norms(lambda x: x @ kernel, x)
      Array([26., 26., 26.], dtype=float32)
      >>> key = jax.random.key(0)
      >>> found = wr.jacobian_norms(lambda x: x @ kernel, x, probes=1000, key=key)
      >>> bool(jnp.all(jnp.abs(found.mean - 26) < 4 * found.standard_error))
      True
    """
    x = _examples(x, args)
    if (probes is None) != (key is None):
        raise ValueError("probes and key must be given together, or neither.")
    if probes is None or key is None:
        return map_batches(functools.partial(squared, f), (x, *args), batch_size)
    count = check_count("probes", probes, 2)
    keys = jax.random.split(key, x.shape[0])
    projections = functools.partial(projected, f, count)
    return map_batches(projections, (x, keys, *args), batch_size)


@overload
def gbr(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: None = None,
    key: None = None,
    batch_size: int | None = 100,
) -> jax.Array: ...


@overload
def gbr(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: int,
    key: jax.Array,
    batch_size: int | None = 100,
) -> Estimate: ...


def gbr(
    f: Callable[..., jax.Array],
    x: jax.typing.ArrayLike,
    *args: Any,
    probes: int | None = None,
    key: jax.Array | None = None,
    batch_size: int | None = 100,
) -> jax.Array | Estimate:
    r"""The generalization-bound regularizer of a network on a data set.

    .. math::
      \frac 1 n \sum_{i=1}^n \Big\| \frac{\partial f(x_i)}{\partial x_i} \Big\|_F^2

    This is the mean of what `jacobian_norms` gives, a batch at a time, with as many
    digits as the products inside of ``f``. Outside of ``jax.jit`` each call with more
    examples than ``batch_size`` compiles anew; wrap what you call repeatedly.

    Args:
      f: Function of one example, and of what ``args`` hold for it, to one floating
        array of any shape. It must not know about the batch.
      x: The examples, a floating array ``(batch, ...)`` of one example or more.
      *args: Further arguments of ``f``, such as labels: arrays, or trees of arrays, of
        the same first axis. Nothing is differentiated by them.
      probes: Number of random projections per example, 2 or more. With many examples 2
        will do. ``None`` gives the exact norms.
      key: Key of ``jax.random``, to be given with ``probes``. Inside of ``shard_map``
        give every device its own key.
      batch_size: How many examples to take at once, as in `jacobian_norms`. ``None``
        takes all.

    Returns:
      A scalar, in float32 at least, or with ``probes`` an `Estimate`, whose error is
      that of the projections alone, not that of having these examples and no others.

    Raises:
      ValueError: ``x`` has no axis or no example, ``args`` has a leaf with another
        first axis, ``batch_size`` is below 1 or ``probes`` below 2, or only one of
        ``probes`` and ``key`` is given.
      TypeError: ``x`` is no floating-point array, ``f`` does not return one, or
        ``probes`` or ``batch_size`` is no integer.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eq. 18.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> print(wr.gbr(lambda x: x @ kernel, jnp.ones((64, 2)), batch_size=16))
      26.0
    """
    if jnp.ndim(x) and not jnp.shape(x)[0]:
        raise ValueError("x must have one example at least, but has none.")
    projections: Any = {"probes": probes, "key": key}
    found: Any = jacobian_norms(f, x, *args, batch_size=batch_size, **projections)
    if probes is None:
        return jnp.mean(found)
    means, errors = found
    error = norm_of(errors, FROBENIUS, Axes((0,), ())).value().reshape(())
    return Estimate(jnp.mean(means), error / errors.size)


def probabilities(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The softmax of a network's logits, over their last axis.

    Args:
      f: Function of one example, and further arguments, to logits ``(..., classes)``.

    Returns:
      A function of the same arguments to probabilities, for `jacobian_norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.probabilities(lambda x: x * jnp.ones(4))(2.0)
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    return lambda *args: jax.nn.softmax(f(*args))


def label_probability(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The probability of an example's label.

    Args:
      f: Function of one example, and further arguments, to logits ``(classes,)``.

    Returns:
      A function ``(x, label, *args)`` to a probability, for `jacobian_norms`:
      ``wr.gbr(wr.label_probability(model), x, labels)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> print(wr.label_probability(lambda x: x * jnp.ones(4))(2.0, 3))
      0.25
    """
    return lambda x, label, *args: jax.nn.softmax(f(x, *args))[label]


def _examples(x: Any, args: tuple[Any, ...]) -> jax.Array:
    """The examples, checked, as is that ``args`` have as many."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = f"type {type(x).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(f"x must be a floating-point array, but is of {what}.")
    if x.ndim == 0:
        raise ValueError("x must have a first axis of examples, but is a scalar.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"args{show_path(path)} must have the first axis of x, {x.shape[0]} "
                f"examples, but has shape {jnp.shape(leaf)}."
            )
    return jnp.asarray(x)
