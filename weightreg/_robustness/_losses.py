"""Losses that weight regularization is compared with, in the style of Optax's.

They return one value an example, in float32 at least: 16 bits would be lost in the sum
over a batch. The reduction is left to the user.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from weightreg._core._arguments import (
    check_count,
    check_scalar,
    compute_dtype,
    floats,
    is_real,
)


def generalized_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, q: ArrayLike = 0.7, *, axis: int = -1
) -> jax.Array:
    r"""The generalized cross-entropy, between cross-entropy and absolute error.

    .. math::
      L_q = \frac{1 - p_y^q}{q}, \qquad p = \mathrm{softmax}(z)

    for logits :math:`z` and label :math:`y`. The smaller a label's probability, the
    less its example counts: the gradient is that of cross-entropy times :math:`p_y^q`,
    which makes labels that are wrong easier to leave unlearnt. At ``q = 1`` the loss is
    half the absolute error between ``p`` and the one-hot label, and the limit ``q = 0``
    is cross-entropy. Values and derivatives, by ``q`` as well, are exact to rounding
    all the way there, and for logits of any size.

    Args:
      logits: Unnormalized log-probabilities of a floating dtype, ``(..., classes)``.
        ``-inf`` takes a class out; where that is the label's, the loss is ``1 / q``.
      labels: Integers ``(...)``, of the shape of ``logits`` without ``axis``.
      q: A number in [0, 1], 0.7 in the paper, or a traced scalar, which is not checked.
      axis: The axis of ``logits`` that numbers the classes.

    Returns:
      The loss of each example, of the shape of ``labels``, in float32, or float64 for
      float64 logits. A label outside of ``[0, classes)`` gives NaN, and no label means
      "ignore".

    Raises:
      TypeError: ``logits`` are no floats, ``labels`` no integers, ``q`` no scalar.
      ValueError: ``q`` is outside [0, 1], ``logits`` have no such ``axis``, or
        ``labels`` another shape.

    References:
      Zhang, Sabuncu, `Generalized Cross Entropy Loss for Training Deep Neural Networks
      with Noisy Labels <https://arxiv.org/abs/1805.07836>`_, 2018, section 3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
      >>> losses = wr.generalized_cross_entropy(logits, jnp.array([0, 1]), q=0.5)
      >>> print(losses.round(4))  # 2 (1 - sqrt(p))
      [1.     0.2679]
    """
    logits = floats("logits", logits)
    check_scalar("q", q, 0, 1)
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"axis must be one of the {logits.ndim} axes of logits, which have shape "
            f"{logits.shape}, but is {axis}."
        )
    axis %= logits.ndim
    labels = _labels(labels, logits.shape[:axis] + logits.shape[axis + 1 :])
    return _generalized(logits, labels, q, axis)


@dataclasses.dataclass(frozen=True)
class MaxMahalanobis:
    """The loss that `max_mahalanobis` returns.

    Two of the same numbers are equal, and the same static argument of ``jax.jit``.

    Attributes:
      classes: Number of classes.
      features: Number of features.
      norm: Norm of every centre.
      centers: The centres ``(classes, features)``, a read-only float64 NumPy array.
    """

    classes: int
    features: int
    norm: float
    centers: np.ndarray = dataclasses.field(repr=False, compare=False)

    def __call__(self, z: ArrayLike, labels: ArrayLike) -> jax.Array:
        """Half the squared distance of each feature vector to its label's centre.

        Args:
          z: Features of a floating dtype, ``(..., features)``.
          labels: Integers ``(...)``.

        Returns:
          The loss of each example, of the shape of ``labels``, in float32, or float64
          for float64 features. A label outside of ``[0, classes)`` gives NaN.

        Raises:
          TypeError: ``z`` are no floats, or ``labels`` no integers.
          ValueError: The last axis of ``z`` is not ``features``, or ``labels`` have
            another shape than the rest.
        """
        z = self._features(z)
        labels = _labels(labels, z.shape[:-1])
        chosen = _one_hot(labels, self.classes, -1)
        centers = jnp.asarray(self.centers, z.dtype)
        center = _matmul(chosen.astype(z.dtype), centers)
        loss = 0.5 * jnp.sum((z - center) ** 2, axis=-1)
        return jnp.where(chosen.any(-1), loss, jnp.nan)

    def logits(self, z: ArrayLike) -> jax.Array:
        r"""Logits whose largest is that of the nearest centre.

        .. math::
          \langle z, \mu_k \rangle =
            -\tfrac 1 2 \|z - \mu_k\|^2 + \tfrac 1 2 \|z\|^2 + \tfrac 1 2 C^2

        All centres have the same norm, so that argmax and softmax are those of
        :math:`-\frac 1 2 \|z - \mu_k\|^2`, the classifier of the paper. This form is
        one matrix product without what the classes have in common, which for features
        far from all centres would round their differences away.

        Args:
          z: Features of a floating dtype, ``(..., features)``.

        Returns:
          Logits ``(..., classes)``, in float32, or float64 for float64 features.

        Raises:
          TypeError: ``z`` are no floats.
          ValueError: The last axis of ``z`` is not ``features``.
        """
        z = self._features(z)
        return _matmul(z, jnp.asarray(self.centers.T, z.dtype))

    def _features(self, z: ArrayLike) -> jax.Array:
        """Features of a checked shape, in the dtype to compute in."""
        z = floats("z", z)
        if z.ndim == 0 or z.shape[-1] != self.features:
            raise ValueError(
                f"z must have shape (..., {self.features}), but has {z.shape}."
            )
        return z.astype(compute_dtype(z.dtype))


def max_mahalanobis(classes: int, features: int, norm: float = 10.0) -> MaxMahalanobis:
    r"""The Max-Mahalanobis centre loss: features are drawn to fixed, distant centres.

    .. math::
      L = \tfrac 1 2 \|z - \mu_y\|^2

    for the features ``z``, the output of a network without its last linear layer and
    softmax. The centres are the corners of a regular simplex, as far from each other
    as ``L`` vectors of one norm can be: :math:`\|\mu_i\| = C` and
    :math:`\langle \mu_i, \mu_j \rangle = -C^2 / (L - 1)`. Before they are scaled,

    .. math::
      \mu_1 = e_1, \qquad
      \mu_i(j) = -\frac{1 / (L - 1) + \langle \mu_i, \mu_j \rangle}{\mu_j(j)}
        \quad (j < i), \qquad
      \mu_i(i) = \sqrt{1 - \|\mu_i\|^2}

    with zeros elsewhere. They use the first ``classes - 1`` features, and the rest are
    drawn to 0. Nothing is random.

    Args:
      classes: Number of classes ``L``, 2 or more.
      features: Number of features, ``classes - 1`` or more.
      norm: Norm ``C`` of the centres, positive, 10 in the paper.

    Returns:
      A function ``loss(z, labels) -> (batch,)`` with the centres as ``loss.centers``
      and a classifier ``loss.logits(z) -> (batch, classes)``.

    Raises:
      TypeError: ``classes`` or ``features`` is no integer, or ``norm`` no number that
        is known before tracing.
      ValueError: ``classes`` is below 2, ``features`` below ``classes - 1``, or
        ``norm`` not positive and finite.

    References:
      Pang, Xu, Dong, Du, Chen, Zhu, `Rethinking Softmax Cross-Entropy Loss for
      Adversarial Robustness <https://arxiv.org/abs/1905.10626>`_, 2020. The centres
      are from Pang, Du, Zhu, `Max-Mahalanobis Linear Discriminant Analysis Networks
      <https://arxiv.org/abs/1802.09308>`_, 2018, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> loss = wr.max_mahalanobis(classes=2, features=3, norm=2.0)
      >>> loss.centers
      array([[ 2.,  0.,  0.],
             [-2.,  0.,  0.]])
      >>> z = jnp.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
      >>> loss(z, jnp.array([0, 1]))
      Array([0., 5.], dtype=float32)
      >>> loss.logits(z).argmax(-1)
      Array([0, 0], dtype=int32)
    """
    classes = check_count("classes", classes, 2)
    features = check_count("features", features, classes - 1)
    if isinstance(norm, Tracer) or not is_real(norm) or np.shape(norm) != ():
        raise TypeError(f"norm must be a number known before tracing, not {norm!r}.")
    norm = float(norm)
    if not 0 < norm < math.inf:
        raise ValueError(f"norm must be positive and finite, but is {norm}.")
    centers = norm * _simplex(classes, features)
    centers.setflags(write=False)
    return MaxMahalanobis(classes, features, norm, centers)


@functools.partial(jax.jit, static_argnums=3)  # or else each operation by itself
def _generalized(logits, labels, q, axis: int) -> jax.Array:
    """The loss, of arguments that have been checked."""
    logits = logits.astype(compute_dtype(logits.dtype))
    chosen = _one_hot(labels, logits.shape[axis], axis)
    # A gather would neither mark wrong labels nor keep explicit shardings.
    log_p = jnp.where(chosen, jax.nn.log_softmax(logits, axis), 0).sum(axis)
    loss = _lost_power(log_p, jnp.asarray(q, logits.dtype))
    return jnp.where(chosen.any(axis), loss, jnp.nan)


def _lost_power(log_p: jax.Array, q: jax.Array) -> jax.Array:
    """``(1 - p**q) / q``, and ``-log p`` at ``q = 0``.

    With ``x = q log p`` it is ``-log p (exp(x) - 1) / x``. Its series is summed where
    the closed form would divide by 0 or its derivative by ``q`` cancel.
    """
    finite = jnp.maximum(log_p, jnp.finfo(log_p.dtype).min)  # infinity times 0 is NaN
    x = q * finite
    near = x > -0.5
    x_near = jnp.where(near, x, 0)
    tail = jnp.zeros_like(x)
    for k in reversed(range(16)):  # enough for float64
        tail = tail * x_near + 1 / math.factorial(k + 2)
    series = -log_p - finite * x_near * tail
    closed = -jnp.expm1(jnp.where(near, -1, x)) / jnp.where(near, 1, q)
    return jnp.where(near, series, closed)


def _simplex(classes: int, features: int) -> np.ndarray:
    """The centres of norm 1 in float64, whose inner products are checked."""
    # The last centre has no axis of its own: what is left of its norm is rounding.
    means = np.zeros((classes, classes - 1))
    for j in range(classes - 1):
        own = means[j, :j]
        means[j, j] = math.sqrt(1 - own @ own)
        products = means[j + 1 :, :j] @ own
        means[j + 1 :, j] = -(1 / (classes - 1) + products) / means[j, j]
    expected = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(expected, 1)
    error = np.abs(means @ means.T - expected).max()
    if not error < 1e-12 * classes:
        raise ArithmeticError(
            f"inner products of the {classes} centres, which should be 1 and "
            f"{-1 / (classes - 1)}, are off by {error}."
        )
    return np.pad(means, ((0, 0), (0, features - classes + 1)))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in full precision, even where hardware has faster ones for float32."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _one_hot(labels: jax.Array, classes: int, axis: int) -> jax.Array:
    """Booleans, which are all false for a label that is no class."""
    labels = jnp.expand_dims(labels, axis)
    others = tuple(a for a in range(labels.ndim) if a != axis % labels.ndim)
    return labels == jnp.expand_dims(jnp.arange(classes), others)


def _labels(value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Labels, which have to be integers ``shape``, one for each example."""
    labels = jnp.asarray(value)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be of an integer dtype, not {labels.dtype}.")
    if labels.shape != shape:
        raise ValueError(
            f"labels must have shape {shape}, one label an example, but have "
            f"{labels.shape}."
        )
    return labels
