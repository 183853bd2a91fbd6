"""LaProp, and the three volumized optimizers of the paper."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from weightreg._core._arguments import Number, show_path
from weightreg._core._weights import SUPPORTED, Dims, Mask
from weightreg._volumization._volumized import volumized


class ScaleByLapropState(NamedTuple):
    """State of `scale_by_laprop`.

    Attributes:
      count: Steps taken; int32 scalar.
      mu: Exponential average of the normalized gradients (``m`` below).
      nu: Exponential average of the squared gradients (``n`` below), in float32 or
        the parameter's dtype, whichever is wider.
    """

    count: jax.typing.ArrayLike
    mu: optax.Updates
    nu: optax.Updates


def scale_by_laprop(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-15,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Rescales updates by LaProp, which normalizes first and averages then.

    .. math::
      n_t &= \beta_2 n_{t-1} + (1 - \beta_2) g_t^2 \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1)
             \frac{g_t}{\sqrt{n_t / (1 - \beta_2^t)} + \epsilon} \\
      u_t &= m_t / (1 - \beta_1^t)

    Arithmetic is in float32 at least, and so is ``nu``: squares of usual gradients
    underflow in float16, and in bfloat16 their average stands still.

    Args:
      b1: Decay of ``m``.
      b2: Decay of ``n``.
      eps: Added to the denominator. Where both are 0 the update is 0.
      mu_dtype: Dtype of ``m``, by default the parameter's.

    Returns:
      A transformation of gradients. Updates keep the gradients' dtype.

    Raises:
      TypeError: A parameter is a float of 8 bits.

    References:
      Ziyin, Wang, Ueda, LaProp: Separating Momentum and Adaptivity in Adam,
      arXiv:2002.04839, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> tx = wr.scale_by_laprop()
      >>> grads = jnp.array([1e-3, -20.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates.round(4)  # the first step is the sign
      Array([ 1., -1.], dtype=float32)
    """

    def init_fn(params):
        _check_dtypes(params)
        nu = jax.tree.map(
            lambda p: jnp.zeros_like(p, _real(jnp.result_type(p))), params
        )
        mu = jax.tree.map(
            lambda p: jnp.zeros_like(p, mu_dtype or jnp.result_type(p)), params
        )
        return ScaleByLapropState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update_fn(updates, state, params=None):
        del params
        updates = jax.tree.map(jnp.asarray, updates)
        # Trees of other shapes would broadcast without a word.
        chex.assert_trees_all_equal_shapes(updates, state.mu, state.nu)
        count = optax.safe_increment(state.count)
        rates = (b1, 1 - b1, b2, 1 - b2)  # in Python, where 1 - 0.999 is exact

        leaves, treedef = jax.tree.flatten(updates)
        mu, nu = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        corrections = {
            dtype: [_bias_correction(b, count, dtype) for b in (b1, b2)]
            for dtype in {n.dtype for n in nu}
        }
        steps = [
            _laprop_step(g, m, n, rates, corrections[n.dtype], eps)
            for g, m, n in zip(leaves, mu, nu, strict=True)
        ]
        u, mu, nu = (treedef.unflatten([s[i] for s in steps]) for i in range(3))
        return u, ScaleByLapropState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _check_dtypes(params: Any) -> None:
    """Refuses floats of 8 bits, for which there is no arithmetic."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        is_float = jnp.issubdtype(dtype, jnp.floating)
        if is_float and dtype not in map(jnp.dtype, SUPPORTED):
            raise TypeError(
                f"laprop cannot handle {show_path(path)} of dtype {dtype}, only floats "
                "of 16 bits or more. Leave it out with optax.masked, or keep it in one "
                "of these, as by leaf.astype(jnp.bfloat16)."
            )


def laprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-15,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The LaProp optimizer: `scale_by_laprop` times ``-learning_rate``.

    Args:
      learning_rate: A number, a traced scalar or a schedule; its authors use 4e-4.
      b1: Decay of the average of normalized gradients.
      b2: Decay of the average of squared gradients.
      eps: Added to the denominator. Where both are 0 the update is 0.
      mu_dtype: Dtype of the average of normalized gradients, by default the
        parameter's.

    Returns:
      An optimizer.

    References:
      Ziyin, Wang, Ueda, LaProp: Separating Momentum and Adaptivity in Adam,
      arXiv:2002.04839, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> tx = wr.laprop(0.1)
      >>> grads = jnp.array([1e-3, -20.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> [f"{u:.4f}" for u in updates]
      ['-0.1000', '0.1000']
    """
    return optax.chain(
        scale_by_laprop(b1, b2, eps, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


def volumized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    volume: Any,
    alpha: Number,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Volumized SGD: `volumized` around ``optax.sgd``.

    .. math::
      m \leftarrow \mu m + g, \qquad \hat w \leftarrow w - \lambda m

    and then, where :math:`|\hat w| > V`, weight and momentum are pulled back as
    `volumized` says. The gradient is not dampened.

    Args:
      learning_rate: :math:`\lambda`, a number, a traced scalar or a schedule.
      momentum: :math:`\mu`, in [0, 1); 0 is plain SGD.
      volume: The wall ``V >= 0``: a number, schedule or traced array, a tree of these
        (or a prefix), or a function of the parameters such as `he_volume`.
      alpha: The share of an excess that stays, in [-1, 1]; may be a schedule or traced.
      nesterov: Whether the step looks ahead by Nesterov's rule, as ``optax.sgd`` does.
      accumulator_dtype: Dtype of the momentum, by default the parameter's.
      mask: Which leaves to volumize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      An optimizer that needs ``params``.

    Raises:
      ValueError: A number is out of its range, a tree or the updates do not match the
        parameters, a rule meets a leaf without fans, or ``params`` are not passed.
      TypeError: A number is none, or a weight is no float of 16, 32 or 64 bits.

    References:
      Ziyin et al., Volumization, 2020, Algorithm 2.

    Example:
      >>> import weightreg as wr
      >>> tx = wr.volumized_sgd(0.1, volume=wr.he_volume(0.5), alpha=0.99)
    """
    sgd = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return volumized(sgd, volume, alpha, mask=mask, dims=dims)


def volumized_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    volume: Any,
    alpha: Number,
    nesterov: bool = False,
    mu_dtype: Any | None = None,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Volumized Adam: `volumized` around ``optax.adam``.

    .. math::
      n \leftarrow \beta_2 n + (1 - \beta_2) g^2, \quad
      m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
      \hat w \leftarrow w - \lambda
        \frac{m / (1 - \beta_1^t)}{\sqrt{n / (1 - \beta_2^t)} + \epsilon}

    and then, where :math:`|\hat w| > V`, weight and momentum are pulled back as
    `volumized` says.

    Args:
      learning_rate: :math:`\lambda`, a number, a traced scalar or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the denominator.
      eps_root: Added under the root. If it is positive, derivatives with respect to
        hyperparameters are finite also where gradients are 0.
      volume: The wall ``V >= 0``: a number, schedule or traced array, a tree of these
        (or a prefix), or a function of the parameters such as `he_volume`.
      alpha: The share of an excess that stays, in [-1, 1]; may be a schedule or traced.
      nesterov: Whether the step looks ahead by Nesterov's rule, as ``optax.adam``
        does.
      mu_dtype: Dtype of the first moment, by default the parameter's.
      mask: Which leaves to volumize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      An optimizer that needs ``params``.

    Raises:
      ValueError: A number is out of its range, a tree or the updates do not match the
        parameters, a rule meets a leaf without fans, or ``params`` are not passed.
      TypeError: A number is none, or a weight is no float of 16, 32 or 64 bits.

    References:
      Ziyin et al., Volumization, 2020, Algorithm 3, whose update line is garbled and
      taken to be Adam's.

    Example:
      >>> import weightreg as wr
      >>> tx = wr.volumized_adam(1e-3, volume=wr.he_volume(0.5), alpha=0.99)
    """
    adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return volumized(adam, volume, alpha, mask=mask, dims=dims)


def volumized_laprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-15,
    *,
    volume: Any,
    alpha: Number,
    mu_dtype: jax.typing.DTypeLike | None = None,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Volumized LaProp: `volumized` around `laprop`, which the paper recommends.

    The step is `scale_by_laprop`'s times ``-learning_rate``, and then, where
    :math:`|\hat w| > V`, weight and momentum are pulled back as `volumized` says.

    Args:
      learning_rate: A number, a traced scalar or a schedule.
      b1: Decay of the average of normalized gradients.
      b2: Decay of the average of squared gradients.
      eps: Added to the denominator. Where both are 0 the update is 0.
      volume: The wall ``V >= 0``: a number, schedule or traced array, a tree of these
        (or a prefix), or a function of the parameters such as `he_volume`.
      alpha: The share of an excess that stays, in [-1, 1]; may be a schedule or traced.
      mu_dtype: Dtype of the average of normalized gradients, by default the
        parameter's.
      mask: Which leaves to volumize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      An optimizer that needs ``params``.

    Raises:
      ValueError: A number is out of its range, a tree or the updates do not match the
        parameters, a rule meets a leaf without fans, or ``params`` are not passed.
      TypeError: A number is none, or a weight is no float of 16, 32 or 64 bits.

    References:
      Ziyin et al., Volumization, 2020, Algorithm 4.

    Example:
      >>> import weightreg as wr
      >>> tx = wr.volumized_laprop(4e-4, volume=wr.he_volume(0.5), alpha=0.99)
    """
    optimizer = laprop(learning_rate, b1, b2, eps, mu_dtype=mu_dtype)
    return volumized(optimizer, volume, alpha, mask=mask, dims=dims)


@jax.jit  # Equal shapes share a trace.
def _laprop_step(g, mu, nu, rates, corrections, eps):
    """Makes one leaf's update, and its new ``mu`` and ``nu``."""
    b1, c1, b2, c2 = rates
    wide = jnp.promote_types(g.dtype, nu.dtype)
    g_wide, mu_wide = g.astype(wide), mu.astype(wide)
    nu_new = (b2 * nu + c2 * jnp.real(g_wide * jnp.conj(g_wide))).astype(nu.dtype)
    # The root has no derivative at 0, which one by a hyperparameter would ask for.
    root = jnp.sqrt(jnp.where(nu_new == 0, 1, nu_new) / corrections[1])
    scale = jnp.where(nu_new == 0, 0, root) + eps
    normal = jnp.where(scale == 0, 0, g_wide / jnp.where(scale == 0, 1, scale))
    mu_new = (b1 * mu_wide + c1 * normal).astype(wide)
    u = mu_new / corrections[0]
    return u.astype(g.dtype), mu_new.astype(mu.dtype), nu_new


def _bias_correction(decay: Any, count: Any, dtype) -> jax.Array:
    """``1 - decay**count``, without the cancellation that 1 - 0.999 would suffer."""
    # Below a half nothing cancels, and at 0 the logarithm has no derivative.
    distance = jnp.asarray(1 - decay, dtype)
    far = 1 - jnp.asarray(decay, dtype) ** count
    near = -jnp.expm1(count * jnp.log1p(-jnp.minimum(distance, 0.5)))
    return jnp.where(distance > 0.5, far, near)


def _real(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of squared magnitudes, of 32 bits at least."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = jnp.finfo(dtype).dtype
    return jnp.promote_types(dtype, jnp.float32)
