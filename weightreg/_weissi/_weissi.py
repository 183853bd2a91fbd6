"""WEISSI: a penalty that shifting scale between layers cannot lower."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from weightreg._core._arguments import (
    Number,
    at,
    check_count,
    check_params,
    each_with_update,
    replaced,
)
from weightreg._core._norms import Norm
from weightreg._core._weights import Dims, Mask
from weightreg._weissi._exponents import Weights
from weightreg._weissi._penalty import (
    Form,
    Hyper,
    iterate_all,
    measure_all,
    penalty_gradients,
    penalty_value,
    start_vectors,
)


class AddWeissiState(NamedTuple):
    """State of `add_weissi`.

    Attributes:
      count: Steps taken, for schedules; int32 scalar.
      vectors: Estimates of the right singular vectors: a tree like the parameters, with
        an array ``(*stack, *outputs)`` for every weight and ``optax.MaskedNode`` for
        other leaves; empty without a spectral norm.
    """

    count: jax.typing.ArrayLike
    vectors: Any


def weissi(
    energy: jax.typing.ArrayLike,
    complexity: jax.typing.ArrayLike,
    *,
    log: bool = False,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> Callable[[Any], jax.Array]:
    r"""The weight-scale-shift-invariant penalty, to be added to a loss.

    .. math::
      R(W) = \lambda_e \prod_l \eta(W_l)^{n_l}
        + \lambda_c \sum_l \frac{g(W_l)}{\eta(W_l)}

    or, with ``log=True``, :math:`\lambda_e \sum_l n_l \ln \eta(W_l)` in the place of
    the product. With equal exponents neither term changes when layers are scaled by
    factors whose product is 1, which leaves the function of a ReLU network as it is
    and by which weight decay can be lowered for nothing.

    Value and gradient are right wherever they are in the range of the dtype, however
    far out of it the product, its factors, or squares of weights are; beyond that they
    are infinite, or 0. A layer of zeros, as Fixup makes them, gives 0: the product is 0
    and so is its gradient, the layer's complexity is 0, and the sum of logarithms
    leaves the layer out (where it would be minus infinity).

    .. warning::
      The sum of logarithms is not bounded from below: it has no minimum other than a
      layer of zeros, and its gradient grows as norms fall.

    Args:
      energy: ``lambda_e >= 0``; may be traced. The paper takes 1e-6 for two or three
        layers and 1e-24 to 1e-31 for sixteen to twenty-eight: the product grows with
        depth.
      complexity: ``lambda_c >= 0``; may be traced. The paper takes 1e-5 or 3e-5.
      log: Whether to penalize the logarithm of the product, without ``lambda_e``
        having to know its size.
      norm: ``eta``: ``"frobenius"``, ``"l1"``, ``"spectral"``, or ``(p, q)`` with p
        within a unit and q across units, from 1 to infinity. A spectral norm is that of
        the kernel matrix and is computed exactly, by a singular value decomposition of
        every layer: `add_weissi` has a cheaper way.
      complexity_norm: ``g``, likewise.
      exponents: ``n_l >= 0``: a number; a tree that matches the parameters or a prefix
        of them; or a function of the parameters that makes one, as `cnn_exponents`
        does.
      mask: Which leaves to penalize: a tree of booleans, or a function of the
        parameters that makes one. By default all weights, as `weight_mask` says.
      dims: What the axes of the weights mean: see `weight_layers`. Stacked layers count
        one by one. Only mixed ``(p, q)``, the spectral norm, `cnn_exponents` and stacks
        depend on it.

    Returns:
      A function from parameters to a scalar, in float32 at least. Its derivative is in
      closed form, that of `add_weissi`. Without any weight the product is 1 and
      the sums are 0. Inside of ``jax.shard_map`` the weights must be whole: the norm
      of a shard is not the norm of its layer.

    Raises:
      ValueError: A strength or an exponent is negative or NaN, a norm is none, or trees
        do not match.
      TypeError: A strength is no scalar; schedules are for `add_weissi`.

    References:
      Liu, Cui, Chan, Improve Generalization and Robustness of Neural Networks via
      Weight Scale Shifting Invariant Regularizations, 2020, eq. 13, and section 5 for
      the CNN form and the logarithm.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> penalty = wr.weissi(energy=0.01, complexity=0.1)
      >>> params = {"a": jnp.full((2, 2), 2.0), "b": jnp.array([[3.0], [4.0]])}
      >>> print(f"{penalty(params):.5f}")  # 0.01 * 16 * 25 + 0.1 * (8 / 4 + 7 / 5)
      4.34000
      >>> shifted = {"a": params["a"] * 1e9, "b": params["b"] / 1e9}
      >>> print(f"{penalty(shifted):.5f}")
      4.34000
    """
    strengths = {"energy": energy, "complexity": complexity}
    for name, value in strengths.items():
        if callable(value):
            raise TypeError(
                f"{name} must be a scalar: a penalty has no step count for a schedule. "
                "add_weissi has one."
            )
    form = Form.parse(energy, complexity, log, norm, complexity_norm)

    def penalty(params: Any) -> jax.Array:
        weights = Weights.of(params, exponents, mask, dims)
        return penalty_value(form, energy, complexity, weights)

    return penalty


def add_weissi(
    energy: Number,
    complexity: Number,
    *,
    log: bool = False,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    exponents: Any = 2,
    iterations: int | None = 1,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `weissi` to the updates, in closed form.

    .. math::
      u_l \leftarrow u_l + n_l \, \lambda_e \prod_k \eta(W_k)^{n_k}
        \frac{\nabla \eta(W_l)}{\eta(W_l)}
      + \frac{\lambda_c}{\eta(W_l)} \Big( \nabla g(W_l)
        - \frac{g(W_l)}{\eta(W_l)} \nabla \eta(W_l) \Big)

    and with ``log=True`` the first term is
    :math:`n_l \lambda_e \nabla \eta(W_l) / \eta(W_l)`. For the default norms,
    :math:`\nabla \eta = W / \|W\|_2` and :math:`\nabla g = \mathrm{sgn}(W)`.

    Where it stands in a chain decides what it is:

    - *Before the optimizer*, it is a penalty in the loss, as L2 is:
      ``optax.chain(wr.add_weissi(1e-6, 1e-5), optax.adam(1e-3))``. The optimizer takes
      the sum for the gradient, and Adam divides both by the same root.
    - *Between the optimizer's direction and its learning rate*, it is decoupled, as
      weight decay is in AdamW: ``optax.chain(optax.scale_by_adam(),
      wr.add_weissi(1e-6, 1e-5), optax.scale_by_learning_rate(1e-3))``.

    .. warning::
      After the learning rate, as in ``optax.chain(optax.adam(1e-3),
      wr.add_weissi(...))``, the sign is wrong: updates are by then what is added to
      the weights.

    Args:
      energy: ``lambda_e >= 0``: a number, a traced scalar or a schedule of the steps.
      complexity: ``lambda_c >= 0``, likewise.
      log: As in `weissi`.
      norm: As in `weissi`.
      complexity_norm: As in `weissi`.
      exponents: As in `weissi`.
      iterations: Power iterations a step for a spectral norm, from vectors that the
        state carries from step to step. Their estimate is at most the norm and follows
        it while weights change slowly. ``None`` computes it exactly.
      mask: As in `weissi`.
      dims: As in `weissi`.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype; the gradient is
      computed in float32 at least.

    Raises:
      ValueError: As in `weissi`; ``iterations`` is below 1; or in ``update``,
        ``params`` is not passed, or ``updates`` do not fit it.
      TypeError: As in `weissi`, or ``iterations`` is neither an integer nor ``None``.

    References:
      Liu, Cui, Chan, 2020, section 5 (the gradient of the energy, for Frobenius norms).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(wr.add_weissi(energy=0.5, complexity=0.0), optax.sgd(0.1))
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.ones(1)}
      >>> grads = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"]  # -0.1 times the gradient of the squared norm, halved
      Array([[-0.3],
             [-0.4]], dtype=float32)
    """
    form = Form.parse(energy, complexity, log, norm, complexity_norm)
    if isinstance(iterations, Tracer):
        if form.is_spectral():
            raise TypeError(
                "iterations must be known before tracing. Under "
                "optax.inject_hyperparams pass static_args='iterations'."
            )
    elif iterations is not None:
        iterations = check_count("iterations", iterations, 1)

    def init_fn(params):
        weights = Weights.of(params, exponents, mask, dims)
        iterates = iterations is not None and form.is_spectral()
        vectors: Any = ()
        if iterates:
            vectors = weights.tree(params, start_vectors(form, weights))
        return AddWeissiState(count=jnp.zeros([], jnp.int32), vectors=vectors)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        weights = Weights.of(params, exponents, mask, dims)
        vectors = state.vectors
        if iterations is not None and form.is_spectral():
            found = weights.pick(params, vectors)
            sizes, found = iterate_all(form, weights, found, iterations)
            vectors = weights.tree(params, found)
        else:
            sizes = measure_all(form, weights.axes(), weights.arrays())
        hyper = Hyper.of(
            at("energy", energy, state.count),
            at("complexity", complexity, state.count),
            weights,
        )
        indices = weights.indices()
        gradients = penalty_gradients(form, hyper, sizes)
        by_index = dict(zip(indices, gradients, strict=True))
        added = {
            i: (u + by_index[i]).astype(u.dtype)
            for i, _, u in each_with_update(params, updates, indices)
        }
        count = optax.safe_increment(state.count)
        return replaced(updates, added, params), AddWeissiState(count, vectors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def weight_energy(
    params: Any,
    *,
    norm: Norm = "frobenius",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The product of all layers' norms, :math:`\prod_l \eta(W_l)^{n_l}`.

    Infinite where it is out of the dtype's range; its logarithm, `log_weight_energy`,
    hardly ever is. All else is as in `weissi`.

    Args:
      params: Any tree of parameters.
      norm: As in `weissi`.
      exponents: As in `weissi`.
      mask: As in `weissi`.
      dims: As in `weissi`.

    Returns:
      A scalar, in float32 at least.

    References:
      Liu, Cui, Chan, 2020, eq. 13, its first term.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> print(wr.weight_energy({"a": jnp.full((2, 2), 2.0), "b": jnp.ones((3, 3))}))
      144.0
    """
    form = Form.parse(1.0, 0.0, False, norm, "l1")
    return penalty_value(form, 1.0, 0.0, Weights.of(params, exponents, mask, dims))


def log_weight_energy(
    params: Any,
    *,
    norm: Norm = "frobenius",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The natural logarithm of `weight_energy`, :math:`\sum_l n_l \ln \eta(W_l)`.

    It is minus infinity where a layer with a positive exponent is zero. Its gradient is
    then that of the other layers, and 0 for the layer of zeros.

    Args:
      params: Any tree of parameters.
      norm: As in `weissi`.
      exponents: As in `weissi`.
      mask: As in `weissi`.
      dims: As in `weissi`.

    Returns:
      A scalar, in float32 at least.

    References:
      Liu, Cui, Chan, 2020, section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> deep = [jnp.full((10, 10), 1e3)] * 50
      >>> print(f"{wr.log_weight_energy(deep) / jnp.log(10):.3f}")  # of 1e4^100
      400.000
    """
    form = Form.parse(1.0, 0.0, True, norm, "l1")._replace(log_of_zero=True)
    return penalty_value(form, 1.0, 0.0, Weights.of(params, exponents, mask, dims))


def layer_complexity(
    params: Any,
    *,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The sum of the layers' complexities, :math:`\sum_l g(W_l / \eta(W_l))`.

    With the default norms a layer of ``k`` weights has a complexity from 1, for one
    weight that is not 0, to the root of ``k``, for weights of one size; a layer of
    zeros has 0.

    Args:
      params: Any tree of parameters.
      norm: As in `weissi`.
      complexity_norm: As in `weissi`.
      mask: As in `weissi`.
      dims: As in `weissi`.

    Returns:
      A scalar, in float32 at least.

    References:
      Liu, Cui, Chan, 2020, eq. 13, its second term.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"dense": jnp.ones((2, 2)), "sparse": jnp.eye(1, 9)}
      >>> print(wr.layer_complexity(params))  # 2 + 1
      3.0
    """
    form = Form.parse(0.0, 1.0, False, norm, complexity_norm)
    return penalty_value(form, 0.0, 1.0, Weights.of(params, 2, mask, dims))
