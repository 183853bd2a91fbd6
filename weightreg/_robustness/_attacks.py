r"""Adversarial attacks on a loss: FGSM and PGD, in the L-infinity and the L2 norm.

Both look for an input ``x'`` close to ``x`` on which the loss is high:

.. math::
  \max_{x'} \; \ell(x', y) \quad \text{subject to} \quad
    \|x' - x\|_p \le \epsilon, \quad low \le x' \le high .

They are pure functions of arrays that need nothing but the loss, so that any model in
JAX can be attacked. They may stand inside ``jax.jit``, ``jax.vmap``, ``jax.lax.scan``
and a training step that is differentiated: no gradient flows through them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from weightreg._core._arguments import check_count, check_shape, compute_dtype, is_real
from weightreg._core._norms import p_norm, slope
from weightreg._core._weights import SUPPORTED

Loss = Callable[[jax.Array, Any], jax.Array]
Bounds = tuple[ArrayLike, ArrayLike] | None


def fgsm(
    loss: Loss,
    x: ArrayLike,
    y: Any,
    epsilon: ArrayLike,
    *,
    bounds: Bounds = (0, 1),
    norm: str = "linf",
) -> jax.Array:
    r"""The fast gradient sign method: one step of length ``epsilon`` up the loss.

    .. math::
      x' = \text{clip}\big(x + \epsilon \, d,\; low,\; high\big), \qquad
      d = \begin{cases}
          \text{sign}(g) & \text{for } L_\infty \\
          g / \|g\|_2 & \text{for } L_2 \text{, the fast gradient method}
      \end{cases}, \qquad
      g = \nabla_x \ell(x, y) .

    The result is the end of that step even where the loss is lower there than at ``x``;
    `pgd` keeps the strongest point instead. An entry of ``x`` where the gradient is
    zero or NaN stays as it is, and so does an example whose gradient is zero or NaN.

    * **Budget.** Sums are rounded towards ``x``: ``abs(x' - x) <= epsilon`` holds
      without a tolerance in float32 (float64 for float64 ``x``), to which ``epsilon``
      is rounded. In the L2 norm the rounding of the norm itself remains, a few parts in
      1e7 for float32. Subnormal numbers are rounded to nearest (float16, below 6.1e-5)
      or may count as zero (the other dtypes, where they are beyond any use).
    * **Bounds.** ``x'`` is within the bounds (rounded to ``x``'s dtype) exactly. An
      ``x`` that is not is an error, for which a call outside of ``jax.jit`` reads ``x``
      back to the host. Under ``jax.jit``, where values are not known, with traced
      bounds, and for an ``x`` that is spread over other processes' devices, nothing is
      checked: such an ``x`` is clipped into the bounds first, and that is the point
      from which the attack starts and measures. So is one that is past them by a few
      roundings, 8 times the dtype's ``eps``.
    * **Precision.** Budget and bounds hold on any device. The gradient is that of
      ``loss`` at the precision of its own products, by JAX's default TF32 on a GPU.
    * **Gradients.** None flow through the attack: to differentiation, ``x'`` is a
      constant, also where ``loss`` closes over the parameters that are being trained.

    Args:
      loss: Function ``(x, y) -> (batch,)``. All gradients come from one backward pass
        through ``loss(x, y).sum()``, so that no example may depend on another, and is
        traced, so that it must not change state: batch normalization must run on stored
        statistics, and dropout must be off (``model.eval()`` for nnx).
      x: Clean inputs ``(batch, ...)`` of a floating dtype, which the result keeps.
      y: Anything, or ``None``. It is handed to ``loss`` unchanged.
      epsilon: Size of the ball: a number, or ``(batch,)`` for one per example. It may
        be traced, and then is not checked.
      bounds: ``(low, high)``, each broadcasting against ``x``, or ``None`` for no
        bounds: ``(0, 255)`` for images of that range, and ``((0 - mean) / std,
        (1 - mean) / std)`` for standardized ones.
      norm: ``"linf"`` or ``"l2"``. The L2 norm is over all axes of an example.

    Returns:
      The attacked inputs, of the shape and dtype of ``x``.

    Raises:
      TypeError: ``x``, ``epsilon`` or ``bounds`` is not of the right kind of numbers,
        or ``loss`` does not return an array of floats.
      ValueError: ``norm`` is unknown, ``x`` has no axis, ``epsilon`` is negative, NaN
        or of another shape, ``bounds`` are not a pair, in order and broadcastable, or
        not those of ``x``, or ``loss`` does not return one number per example.

    References:
      Goodfellow et al., `Explaining and Harnessing Adversarial Examples
      <https://arxiv.org/abs/1412.6572>`_, 2015; Miyato et al., `Adversarial Training
      Methods for Semi-Supervised Text Classification
      <https://arxiv.org/abs/1605.07725>`_, 2017 (the L2 step).

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> def loss(x, y):
      ...   return jnp.sum(x * y, axis=-1)
      >>> x = jnp.array([[0.5, 0.5, 0.875]])
      >>> y = jnp.array([[3.0, -0.1, 2.0]])
      >>> wr.fgsm(loss, x, y, 0.25)
      Array([[0.75, 0.25, 1.  ]], dtype=float32)
    """
    geometry = _geometry(norm)
    x, low, high = _domain(x, bounds)
    radius = _length("epsilon", epsilon, x)
    _, gradient = _value_and_gradient(_detached(loss, x, y), x)
    return _displace(x, radius * geometry.ascent(gradient), low, high)


def pgd(
    loss: Loss,
    x: ArrayLike,
    y: Any,
    epsilon: ArrayLike,
    *,
    steps: int | jax.Array,
    key: jax.Array | None = None,
    bounds: Bounds = (0, 1),
    norm: str = "linf",
    step_size: ArrayLike | None = None,
    restarts: int | jax.Array = 1,
) -> jax.Array:
    r"""Projected gradient descent: ``steps`` steps up the loss, keeping the strongest.

    .. math::
      x_{t+1} = \text{clip}\big(x + \Pi_\epsilon(x_t + \eta \, d(x_t) - x),\;
        low,\; high\big)

    with ``d`` the sign of the gradient for L-infinity, or the gradient over its norm
    for L2, and ``\Pi`` the projection onto the ball: ``clip(delta, -epsilon, epsilon)``
    for L-infinity, ``delta * min(1, epsilon / norm(delta))`` for L2. With the clipping
    it is the projection onto ball and bounds for L-infinity. For L2 it gives a point of
    both, though not the nearest, since clipping only moves towards ``x``.

    For each example the result is the point with the highest loss among the clean ``x``
    and all points visited, in all restarts, the first such one if several are equal: it
    is never weaker than ``x``, and at the same ``step_size`` and ``key`` neither more
    steps nor more restarts make it weaker. A NaN loss counts as weaker than any number
    (an infinite one does not), so that a point where the loss is NaN is never the
    result, unless it is ``x`` itself and no other was found.

    Sums are rounded towards ``x``, so that no rounding leaves the ball, and the result
    is within the bounds exactly. An ``x`` that is not is an error outside of
    ``jax.jit``, for which it is read back to the host, and clipped into them first
    inside. No gradient flows through the attack. See `fgsm` for the limits of this.

    A call runs ``restarts * steps`` forward and backward passes and ``restarts + 1``
    forward passes. Outside of ``jax.jit`` each call compiles their loops anew; wrap
    what you call repeatedly.

    Args:
      loss: Function ``(x, y) -> (batch,)``, in which no example may depend on another,
        and which must not change state: batch normalization must run on stored
        statistics, and dropout must be off (``model.eval()`` for nnx).
      x: Clean inputs ``(batch, ...)`` of a floating dtype, which the result keeps.
      y: Anything, or ``None``. It is handed to ``loss`` unchanged.
      epsilon: Size of the ball: a number, or ``(batch,)`` for one per example. It may
        be traced, and then is not checked.
      steps: Number of steps, zero or more. It may be traced.
      key: For a random start, uniform in the ball (L2: by volume) and then clipped into
        the bounds. Without one the attack starts from ``x``. Restart ``i`` draws from
        ``jax.random.fold_in(key, i)``.
      bounds: ``(low, high)``, each broadcasting against ``x``, or ``None`` for no
        bounds: ``(0, 255)`` for images of that range, and ``((0 - mean) / std,
        (1 - mean) / std)`` for standardized ones.
      norm: ``"linf"`` or ``"l2"``. The L2 norm is over all axes of an example.
      step_size: Length of a step in that norm, a number or ``(batch,)``. ``None`` means
        ``2.5 * epsilon / steps``, with which all steps together cross the ball from any
        start, with some to spare.
      restarts: Number of starts, one or more. It may be traced. More than one needs
        ``key``.

    Returns:
      The attacked inputs, of the shape and dtype of ``x``.

    Raises:
      TypeError: ``x``, ``epsilon``, ``step_size`` or ``bounds`` is not of the right
        kind of numbers, ``steps`` or ``restarts`` is no integer, ``key`` is no key, or
        ``loss`` does not return an array of floats.
      ValueError: ``norm`` is unknown, ``x`` has no axis, ``epsilon`` or ``step_size``
        is negative, NaN or of another shape, ``steps`` or ``restarts`` is too small or
        ``restarts`` above one without ``key``, ``bounds`` are not a pair, in order and
        broadcastable, or not those of ``x``, or ``loss`` does not return one number per
        example.

    References:
      Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
      <https://arxiv.org/abs/1706.06083>`_, 2018.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> def loss(x, y):
      ...   return -jnp.sum((x - y) ** 2, axis=-1)
      >>> x = jnp.array([[0.5, 0.5, 0.5]])
      >>> y = jnp.array([[0.0, 0.5, 1.0]])
      >>> wr.pgd(loss, x, y, 0.25, steps=4)
      Array([[0.25, 0.5 , 0.75]], dtype=float32)
    """
    geometry = _geometry(norm)
    steps = check_count("steps", steps, 0, traced=True)
    restarts = check_count("restarts", restarts, 1, traced=True)
    _check_key(key)
    if key is None and (isinstance(restarts, Tracer) or restarts > 1):
        raise ValueError(
            f"restarts must be 1 without a key, but is {restarts}: all would be the "
            "same. Pass key=."
        )
    x, low, high = _domain(x, bounds)
    radius = _length("epsilon", epsilon, x)
    if step_size is None:
        step = jnp.nan_to_num(2.5 * (radius / jnp.maximum(steps, 1)))
    else:
        step = _length("step_size", step_size, x)
    value = _detached(loss, x, y)(x)
    x = _varying_like(x, value, radius, step, low, high, key)
    value = _varying_like(value, x)
    per_example = _detached(loss, x, y)

    # The state is the displacement and not the point: in half precision that adds up
    # steps too small to move the point one by one.
    def project(delta: jax.Array) -> jax.Array:
        delta = geometry.project(jnp.nan_to_num(delta), radius)
        origin = x.astype(delta.dtype)
        return jnp.clip(delta, low - origin, high - origin)

    def start(index: jax.Array) -> jax.Array:
        if key is None:
            return jnp.zeros_like(x, radius.dtype)
        unit = geometry.sample(jax.random.fold_in(key, index), x.shape, radius.dtype)
        return project(radius * unit)

    def ascend(_: jax.Array, state: tuple[jax.Array, _Best]):
        delta, best = state
        point = _displace(x, delta, low, high)
        value, gradient = _value_and_gradient(per_example, point)
        delta = project(delta + step * geometry.ascent(gradient))
        return delta, _stronger(best, point, value)

    def run(index: jax.Array, best: _Best) -> _Best:
        delta, best = lax.fori_loop(0, steps, ascend, (start(index), best))
        point = _displace(x, delta, low, high)
        return _stronger(best, point, per_example(point))

    best = _Best(x, jnp.where(jnp.isnan(value), -jnp.inf, value))
    return lax.fori_loop(0, restarts, run, best).point


class _Best(NamedTuple):
    """The strongest point so far of each example.

    Attributes:
      point: ``(batch, ...)``, in the dtype of the inputs.
      value: ``(batch,)``, the loss there; never NaN.
    """

    point: jax.Array
    value: jax.Array


def _stronger(best: _Best, point: jax.Array, value: jax.Array) -> _Best:
    """The stronger of two points of each example, the first where they are equal."""
    better = value > best.value  # False for a NaN
    return _Best(
        jnp.where(_per_example(better, point), point, best.point),
        jnp.where(better, value, best.value),
    )


class _Geometry(NamedTuple):
    """What an attack asks of a norm; a new norm is one new entry in ``_GEOMETRIES``.

    Attributes:
      ascent: Gradients to the directions of length one that raise the loss most.
      project: Displacements and radius to the nearest displacements in the ball.
      sample: Key, shape and dtype to uniform draws from the ball of radius one.
    """

    ascent: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array, jax.Array], jax.Array]
    sample: Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def _l2_project(delta: jax.Array, radius: jax.Array) -> jax.Array:
    """The nearest displacements in the ball."""
    unit, norm = _polar(delta)
    # In delta * (radius / norm) the quotient can underflow where the product does not.
    return jnp.where(norm <= radius, delta, radius * unit)


def _l2_sample(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Uniform draws from the ball of radius one."""
    direction, length = jax.random.split(key)
    unit, _ = _polar(jax.random.normal(direction, shape, dtype))
    fraction = jax.random.uniform(length, shape[:1], dtype)
    # The volume within a distance r of the centre grows as r to this power.
    dimensions = max(math.prod(shape[1:]), 1)
    return unit * _per_example(fraction ** (1 / dimensions), unit)


def _polar(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Directions and norms ``(batch, 1, ...)``; the direction of a zero is zero."""
    axes = tuple(range(1, vectors.ndim))
    norm = p_norm(vectors, 2, axes)
    return slope(vectors, norm, 2, axes), norm.value()


_GEOMETRIES = {
    "linf": _Geometry(
        ascent=jnp.sign,
        project=lambda delta, radius: jnp.clip(delta, -radius, radius),
        sample=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1),
    ),
    "l2": _Geometry(lambda gradient: _polar(gradient)[0], _l2_project, _l2_sample),
}


def _geometry(norm: str) -> _Geometry:
    """The geometry of a norm, whose name is checked."""
    if norm not in list(_GEOMETRIES):  # a list does not hash what it is asked for
        raise ValueError(f"norm must be one of {tuple(_GEOMETRIES)}, not {norm!r}.")
    return _GEOMETRIES[norm]


def _displace(
    x: jax.Array, delta: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """``x + delta`` within the bounds in ``x``'s dtype, rounded towards ``x``."""
    info = jnp.finfo(x.dtype)
    origin = x.astype(delta.dtype)
    total = origin + delta
    # XLA may keep the excess precision of an intermediate in half precision through an
    # astype, but not through this.
    nearest = lax.reduce_precision(total, info.nexp, info.nmant)
    # That may be past x + delta, or infinite. One of the two differences is exact (that
    # from the larger summand, Dekker 1971), and the other, rounding being monotone, is
    # never wrong when it finds the total beyond.
    beyond = jnp.where(
        delta > 0,
        (nearest - origin > delta) | (nearest - delta > origin),
        (nearest - origin < delta) | (nearest - delta < origin),
    )
    # Here astype serves, since reduce_precision rounds subnormal numbers to zero.
    total = total.astype(x.dtype)
    return jnp.clip(jnp.where(beyond, jnp.nextafter(total, x), total), low, high)


def _varying_like(x: jax.Array, *others: ArrayLike | None) -> jax.Array:
    """``x``, made to vary inside of ``jax.shard_map`` over the axes the others do.

    A loop cannot start from an input that all devices share if what it carries comes to
    depend on parameters that they do not.
    """
    for other in jax.tree.leaves(others):
        if jnp.issubdtype(jnp.result_type(other), jax.dtypes.prng_key):
            other = jax.random.key_data(other)
        x = jnp.where(jnp.any(other != other), x, x)  # XLA removes this.
    return x


def _per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values of shape ``()`` or ``(batch,)``, with axes added to meet ``like``."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _detached(loss: Loss, x: jax.Array, y: Any) -> Callable[[jax.Array], jax.Array]:
    """``x -> loss(x, y)``, a constant to any differentiation around the attack."""

    def per_example(points: jax.Array) -> jax.Array:
        value = loss(points, y)
        is_array = isinstance(value, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(value.dtype, jnp.floating):
            found = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"loss must return an array of floats, not {found}.")
        if value.shape != points.shape[:1]:
            raise ValueError(
                f"loss must return one number per example, of shape {points.shape[:1]}"
                f", but returns shape {value.shape}. Do not reduce it over the batch."
            )
        return jnp.asarray(value)

    # With stop_gradient on the result alone the loops would still be differentiated by
    # the parameters inside `loss`, at several times the cost, to no use.
    try:
        closed, captured = jax.closure_convert(per_example, x)
    except Exception as error:
        # The classes are Flax's, which may not be installed or imported.
        if type(error).__name__ in ("TraceContextError", "ModifyScopeVariableError"):
            error.add_note(
                "An attack traces loss, which must not change state: call model.eval() "
                "first with nnx, and let linen's batch normalization run on stored "
                "statistics (use_running_average=True)."
            )
        raise
    captured = lax.stop_gradient(captured)
    return lambda points: closed(points, *captured)


def _value_and_gradient(
    per_example: Callable[[jax.Array], jax.Array], points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses, and their gradients without NaN or infinities."""
    value, pullback = jax.vjp(per_example, points)
    (gradient,) = pullback(jnp.ones_like(value))
    return value, jnp.nan_to_num(gradient.astype(compute_dtype(points.dtype)))


def _domain(x: ArrayLike, bounds: Bounds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x`` clipped into its bounds, the low ones and the high ones, all checked."""
    array = _numbers("x", x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"x must be of a floating dtype, not {array.dtype}. Scale it first, for "
            "example by x.astype(jnp.float32) / 255."
        )
    if array.dtype not in map(jnp.dtype, SUPPORTED):
        raise TypeError(
            f"x must be in floats of 16 bits or more, not {array.dtype}: cast it, for "
            "example by x.astype(jnp.bfloat16)."
        )
    if array.ndim == 0:
        raise ValueError("x must have shape (batch, ...), but is a scalar.")
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    array = lax.stop_gradient(jnp.asarray(array, dtype))
    if bounds is None:
        bounds = (-np.inf, np.inf)
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"bounds must be (low, high) or None, not {bounds!r}.")
    low, high = (_bound(bound, array) for bound in bounds)
    known = not any(isinstance(bound, Tracer) for bound in bounds)
    if known and not np.all(np.asarray(bounds[0]) <= np.asarray(bounds[1])):
        raise ValueError(f"bounds must be in order, low <= high, but are {bounds}.")
    if known:
        _check_inside(x, bounds, dtype)
    return jnp.clip(array, low, high), low, high


def _check_inside(x: ArrayLike, bounds: Any, dtype: DTypeLike) -> None:
    """Refuses inputs outside of their bounds, where the values of both are known.

    What is standardized on a device is past bounds that are standardized in Python by
    some roundings, which is allowed.
    """
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    # In NumPy, since what JAX calculates under jit has no values.
    values = np.asarray(x)
    low, high = (np.asarray(bound).astype(np.float64) for bound in bounds)
    sizes = (np.where(np.isinf(b), 0, np.abs(b)) for b in (low, high))
    slack = 8 * float(jnp.finfo(dtype).eps) * np.maximum(*sizes)
    if np.any((values < low - slack) | (values > high + slack)):
        known = values[~np.isnan(values)].astype(np.float64)
        found = f"{known.min():.4g} to {known.max():.4g}"
        raise ValueError(
            f"x must be within bounds={bounds}, but has values from {found}. Pass the "
            "bounds that x has: bounds=(0, 255), or bounds=((0 - mean) / std, (1 - "
            "mean) / std) for standardized images, or bounds=None for no bounds."
        )


def _bound(bound: ArrayLike, x: jax.Array) -> jax.Array:
    """One of the bounds in the dtype of ``x``, and in its shape unless a scalar."""
    array = _numbers("bounds", bound)
    check_shape("bounds", array.shape, x.shape)
    cast = _cast(array, x.dtype)
    return jnp.broadcast_to(cast, x.shape) if array.ndim else cast


def _length(name: str, value: ArrayLike, x: jax.Array) -> jax.Array:
    """A length, checked, with the axes to meet ``x`` and no larger than finite."""
    array = _numbers(name, value)
    if array.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"{name} must be a number, or one per example, of shape {x.shape[:1]}, but "
            f"has shape {array.shape}."
        )
    if not isinstance(array, Tracer) and not np.all(np.asarray(array) >= 0):
        raise ValueError(f"{name} must be 0 or more, but is {value}.")
    dtype = compute_dtype(x.dtype)
    # An infinite length times a zero gradient would be NaN.
    largest = jnp.minimum(_cast(array, dtype), float(jnp.finfo(dtype).max))
    return _per_example(largest, x)


def _check_key(key: Any) -> None:
    """Refuses what is neither a key of ``jax.random``, typed or raw, nor ``None``."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and len(shape or ()) == 1
    if key is not None and not (shape == () if typed else raw):
        found = repr(key) if dtype is None else f"{dtype} of shape {shape}"
        raise TypeError(f"key must be one key of jax.random, not {found}.")


def _numbers(name: str, value: ArrayLike) -> jax.Array | np.ndarray:
    """An array, which has to be one of real numbers."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not is_real(array):
        kind = type(value).__name__ if array.dtype == object else array.dtype
        raise TypeError(f"{name} must be real numbers, not {kind}.")
    return array


def _cast(array: jax.Array | np.ndarray, dtype: DTypeLike) -> jax.Array:
    """A constant of another dtype, infinite where a number is too large for it."""
    with np.errstate(over="ignore"):
        return lax.stop_gradient(jnp.asarray(array).astype(dtype))
