"""Epsilon-shifted L2: weight decay for weights whose norm does not matter."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from weightreg._core._arguments import (
    CountState,
    Number,
    at,
    check_params,
    check_scalar,
    check_scheduled,
    compute_dtype,
    each,
    each_with_update,
    replaced,
)
from weightreg._core._norms import Axes
from weightreg._core._weights import Dims, Mask
from weightreg._equivalent_norm._groups import (
    check_form,
    group_of,
    layers_of,
    measure,
    normalized,
)


def shifted_l2(
    strength: jax.typing.ArrayLike,
    epsilon: jax.typing.ArrayLike,
    *,
    scope: str = "unit",
    center: bool = True,
    mask: Mask = None,
    dims: Dims = None,
) -> Callable[[Any], jax.Array]:
    r"""The epsilon-shifted L2 penalty, to be added to a loss.

    .. math::
      \frac \lambda 2 \sum_j (\|W_j\| - \epsilon)^2
      \qquad \text{or, centred,} \qquad
      \frac \lambda 2 \sum_j k \big( (\sigma_j - \epsilon)^2 + \mu_j^2 \big)

    Here :math:`W_j` are the ``k`` weights that feed unit ``j``, :math:`\mu_j` is their
    mean and :math:`\sigma_j` their standard deviation, with the divisor ``k``. Where a
    normalization follows, as under `equivalent_norm`, nothing but weight decay acts on
    the norm of weights, and takes it down to 0, where steps are of any size. This
    penalty has its minimum at :math:`\epsilon` instead.

    A unit whose weights are all 0, or all equal where they are centred, has no
    direction in which to grow. Its gradient is that of plain L2.

    Args:
      strength: ``lambda >= 0``, which may be traced. The authors take 1e-4.
      epsilon: A norm, or, centred, a standard deviation, of 0 or more, which may be
        traced. The authors take 1e-3, centred. With 0 the penalty is plain L2.
      scope: What sums, means and norms are taken over, ``"unit"`` or ``"layer"``.
      center: Whether the deviation from the mean is shifted, and not the norm.
      mask: Which leaves to penalize: a tree of booleans, or a function of the
        parameters that makes one. By default `weight_mask` decides and leaves out
        biases and normalization scales, as `left_out` lists.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one.

    Returns:
      A function from parameters to a scalar, in float32 at least.

    Raises:
      ValueError: A number is negative, infinite or NaN, or ``scope`` is neither. On a
        call, ``mask`` or ``dims`` does not match the parameters, or a weight that is to
        be centred has one input a unit (one element, with ``scope="layer"``).
      TypeError: A number is no scalar, or ``center`` no boolean.

    References:
      Li, Chen, Xia, Yang, `Understanding the Disharmony between Weight Normalization
      Family and Weight Decay <https://arxiv.org/abs/1911.05920>`_, 2019. The centred
      form is that of its first author's code.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> penalty = wr.shifted_l2(0.5, epsilon=1.0, center=False)
      >>> print(penalty({"kernel": jnp.array([[3.0], [4.0]])}))  # 0.25 * (5 - 1)^2
      4.0
    """
    check_form(scope, center)
    for name, value in (("strength", strength), ("epsilon", epsilon)):
        check_scalar(name, value, 0, math.inf)

    def penalty(params: Any) -> jax.Array:
        layers = layers_of("shifted_l2", params, scope, center, mask, dims)
        axes = {x.index: Axes.of(x) for x in layers}
        total = jnp.zeros([], jnp.float32)
        for i, w in each(params, axes):
            aim = jnp.asarray(epsilon, compute_dtype(w.dtype))
            total += _value(w, aim, scope, center, axes[i])
        return 0.5 * jnp.asarray(strength, total.dtype) * total

    return penalty


def add_shifted_l2(
    strength: Number,
    epsilon: Number,
    *,
    scope: str = "unit",
    center: bool = True,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `shifted_l2` to the updates, in closed form.

    .. math::
      u_j \leftarrow u_j + \lambda \Big( W_j - \epsilon \frac{W_j}{\|W_j\|} \Big)
      \qquad \text{or, centred,} \qquad
      u_j \leftarrow u_j + \lambda \Big( W_j - \epsilon
        \frac{W_j - \mu_j}{\sigma_j} \Big)

    Before the optimizer it is a penalty in the loss, as L2 is; between an optimizer's
    direction and its learning rate it is decoupled, as weight decay is in AdamW.

    .. warning::
      After the learning rate, as in ``optax.chain(optax.sgd(0.1),
      wr.add_shifted_l2(...))``, the sign is wrong, since updates are by then what is
      added to the weights.

    Args:
      strength: ``lambda >= 0``: a number, a traced scalar or a schedule of the step
        count. The authors take 1e-4.
      epsilon: A norm, or, centred, a standard deviation, 0 or more: a number, a traced
        scalar or a schedule of the step count. The authors take 1e-3, centred.
      scope: What sums, means and norms are taken over, ``"unit"`` or ``"layer"``.
      center: Whether the deviation from the mean is shifted, and not the norm.
      mask: Which leaves to penalize, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, and the gradient
      is computed in float32 at least. Inside of ``jax.shard_map`` the weights must be
      whole.

    Raises:
      ValueError: A number is negative, infinite or NaN, ``scope`` is neither, ``mask``
        or ``dims`` does not match the parameters, or a weight that is to be centred has
        one input a unit (one element, with ``scope="layer"``). In ``update``,
        ``params`` is not passed, or ``updates`` does not fit it.
      TypeError: A number is neither a scalar nor a schedule, or ``center`` no boolean.

    References:
      Li, Chen, Xia, Yang, 2019, and the code of its first author.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> link = wr.add_shifted_l2(0.5, epsilon=1.0, center=False)
      >>> tx = optax.chain(link, optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.ones(1)}
      >>> grads = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"]  # -0.5 (1 - 1 / 5) W
      Array([[-1.2],
             [-1.6]], dtype=float32)
    """
    check_form(scope, center)
    for name, value in (("strength", strength), ("epsilon", epsilon)):
        check_scheduled(name, value, 0, math.inf)

    def init_fn(params):
        layers_of("add_shifted_l2", params, scope, center, mask, dims)
        return CountState.zero()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        layers = layers_of("add_shifted_l2", params, scope, center, mask, dims)
        axes = {x.index: Axes.of(x) for x in layers}
        lam = at("strength", strength, state.count)
        aim = at("epsilon", epsilon, state.count)
        added = {
            i: (u + _gradient(w, lam, aim, scope, center, axes[i])).astype(u.dtype)
            for i, w, u in each_with_update(params, updates, axes)
        }
        return replaced(updates, added, params), state.next()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # Equal shapes share a trace.
def _value(w, epsilon, scope: str, center: bool, axes: Axes) -> jax.Array:
    """The sum of ``(c_j - e)**2 + k mu_j**2`` with the norms ``c_j`` of deviations."""
    size, aim, mean, count = _prepare(w, epsilon, scope, center, axes)
    return jnp.sum((size - aim) ** 2 + count * mean**2)


@_value.defjvp
def _value_jvp(scope, center, axes, primals, tangents):
    # A gradient may be finite where the sum of squares is not.
    (w, epsilon), (w_dot, epsilon_dot) = primals, tangents
    size, aim, _, _ = _prepare(w, epsilon, scope, center, axes)
    aim_dot = _aim(epsilon_dot, w.shape, scope, center, axes)
    slope = _gradient(w, 2.0, epsilon, scope, center, axes)
    out_dot = jnp.sum(slope * w_dot) - 2 * jnp.sum((size - aim) * aim_dot)
    return _value(w, epsilon, scope, center, axes), out_dot


@functools.partial(jax.jit, static_argnums=(3, 4, 5))  # Equal shapes share a trace.
def _gradient(w, strength, epsilon, scope: str, center: bool, axes: Axes) -> jax.Array:
    r"""The gradient by one leaf, :math:`\lambda (W - e (W - \mu) / \|W - \mu\|)`."""
    w = w.astype(compute_dtype(w.dtype))
    aim = _aim(jnp.asarray(epsilon, w.dtype), w.shape, scope, center, axes)
    direction = normalized(group_of(axes, scope), center, w, jnp.ones([], w.dtype))
    return jnp.asarray(strength, w.dtype) * (w - aim * direction)


def _prepare(w, epsilon, scope: str, center: bool, axes: Axes):
    """Norms of deviations, the norms they should have, means, and weights a group."""
    group = group_of(axes, scope)
    s = measure(group, center, w.astype(compute_dtype(w.dtype)))
    aim = _aim(epsilon, w.shape, scope, center, axes)
    return s.size.value(), aim, sum(s.mean), math.prod(w.shape[a] for a in group)


def _aim(epsilon: jax.Array, shape, scope: str, center: bool, axes: Axes) -> jax.Array:
    """The norm that deviations should have, of which epsilon may be the root mean."""
    count = math.prod(shape[a] for a in group_of(axes, scope))
    return epsilon * (math.sqrt(count) if center else 1.0)
