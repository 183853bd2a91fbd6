"""Volumization: weights outside a box are pulled to its wall after each step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optax._src.base import NO_PARAMS_MSG  # not public, but the error users know

from weightreg._core._numbers import Number, at, check_scalar
from weightreg._core._trees import leaves_like, show_path
from weightreg._core._weights import Dims, Mask
from weightreg._volumization._moments import map_moments, took_step
from weightreg._volumization._reach import compute_dtype, land, reach, round_to
from weightreg._volumization._volumes import VolumeRule, check_argument, volumes_of


class VolumizeState(NamedTuple):
    """State of `volumize`.

    Attributes:
      count: Steps taken, for schedules; int32 scalar.
    """

    count: jax.typing.ArrayLike


class VolumizedState(NamedTuple):
    """State of `volumized`.

    Attributes:
      count: Steps taken, for schedules; int32 scalar.
      inner_state: State of the wrapped optimizer, first moments damped.
    """

    count: jax.typing.ArrayLike
    inner_state: optax.OptState


def volumize(
    volume: Any, alpha: Number, *, mask: Mask = None, dims: Dims = None
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls weights that leave the box ``[-V, V]`` to its wall.

    With :math:`\hat w = w + u` the weight that the updates propose,

    .. math::
      w \leftarrow \begin{cases}
        \hat w + (1 - \alpha) (V \, \mathrm{sgn}(\hat w) - \hat w)
          & |\hat w| > V \\
        \hat w & \text{otherwise.}
      \end{cases}

    This transformation changes weights only. `volumized` damps the optimizer's
    momentum too, which is the method of the paper.

    ``alpha = 1`` leaves the updates as they are, bit for bit, and so does ``V = inf``.
    (So do traced ones, but XLA may round an optimizer's own arithmetic otherwise where
    it fuses that with what depends on a traced value.) ``0 < alpha < 1`` is a soft
    wall; with ``V = 0`` it is weight decay by ``1 - alpha``, applied after the step and
    not scaled by the learning rate. ``alpha = 0`` is a projection onto the box: after
    ``optax.apply_updates`` every weight satisfies ``abs(w) <= V`` in its own dtype (V
    rounded to that dtype), sitting on the wall wherever some update reaches it and else
    at the nearest value inside that one reaches. ``alpha < 0`` reflects: the result
    lies in the box if :math:`|\hat w| \le V (1 + 2 / |\alpha|)`, and is not clamped
    otherwise. ``alpha = -1`` is the elastic wall; with ``V = 0`` it flips every sign
    each step.

    .. warning::
      It must be the last link of a chain, but for `quantize_every`. Updates that a
      later link changes do not land on the wall.

    Args:
      volume: The wall ``V >= 0``, in units of the weights. A number; a tree that
        matches the parameters or a prefix of them; or a function of the parameters
        that makes such a tree, as `he_volume` and `lipschitz_volume` do. Numbers may
        be floats, schedules, and arrays that broadcast to the weight, traced ones too.
      alpha: In [-1, 1]: a number, a schedule or a traced scalar.
      mask: Which leaves to volumize: a tree of booleans, or a function of the
        parameters that makes one. By default all weights, as `weight_mask` says.
      dims: What the axes of the weights mean, for rules: see `weight_layers`.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, except that
      one narrower than the parameter's is widened to it: steps as coarse as that
      cannot reach the box.

    Raises:
      ValueError: On construction or in ``init``: ``alpha`` outside [-1, 1], ``V``
        negative or NaN, trees that do not match, a rule for a leaf without fans. In
        ``update``: ``params`` not passed.
      TypeError: A masked leaf is no floating-point array of 16, 32 or 64 bits.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(optax.sgd(1.0), wr.volumize(0.5, alpha=0.0))
      >>> params = {"kernel": jnp.array([[0.1, 0.4]]), "bias": jnp.array([0.4, 0.4])}
      >>> grads = {"kernel": jnp.array([[0.2, -0.3]]), "bias": jnp.array([-1.0, 0.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[-0.1,  0.5]], dtype=float32)
    """
    _check(volume, alpha)

    def init_fn(params):
        volumes_of("volumize", params, volume, mask, dims)
        return VolumizeState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        box = _Box(volume, alpha, params, mask, dims, state.count)
        updates, _ = box.confine(updates)
        return updates, VolumizeState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def volumized(
    optimizer: optax.GradientTransformation,
    volume: Any,
    alpha: Number,
    *,
    mask: Mask = None,
    dims: Dims = None,
    require_momentum: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes any optimizer a volumized one: weights and momentum.

    With :math:`\hat w` and :math:`\hat m` the weight and the first moment after the
    optimizer's own step, where :math:`|\hat w| > V`

    .. math::
      w \leftarrow \hat w + (1 - \alpha) (V \, \mathrm{sgn}(\hat w) - \hat w),
      \qquad m \leftarrow \alpha \hat m,

    and otherwise nothing changes; nor does any other state of the optimizer.
    `volumize` says what ``alpha`` and ``V`` mean and what is exact.

    The first moment is ``mu`` of the Adam family, Lion and Muon, ``m`` of Adan,
    ``trace`` of SGD and RMSProp with momentum, and so on for all of Optax. It is
    found through ``chain``, ``masked``, ``partition``, ``inject_hyperparams``,
    ``MultiSteps``, ``apply_if_finite`` and ``flatten``; and in optimizers of other
    packages where a field ``mu`` or ``trace`` of a state (a ``NamedTuple``) has the
    structure of the parameters. Where ``MultiSteps`` or ``apply_if_finite`` inside of
    ``optimizer`` puts a step off, nothing is volumized, and schedules wait. (A rejected
    step is known by its zeros: no link that adds to them may follow.)

    .. warning::
      ``optax.flatten`` must be inside of ``volumized``: around it, it hides which
      parameters are weights; and it must flatten all parameters: inside of ``masked``
      or ``partition`` nothing tells which ones it has joined, so that no moment is
      found. ``sam`` and ``conditionally_mask`` must be around ``volumized``. Nothing
      that changes updates may come after it, but `quantize_every`. Under
      ``optax.inject_hyperparams``, which calls every function as a schedule, name in
      ``static_args`` the arguments that are functions of the parameters.

    Args:
      optimizer: Any Optax optimizer, learning rate included.
      volume: As in `volumize`.
      alpha: As in `volumize`.
      mask: As in `volumize`.
      dims: As in `volumize`.
      require_momentum: Whether a volumized weight without a first moment (plain SGD,
        RMSProp) is an error. ``False`` says that it is meant.

    Returns:
      An optimizer that needs ``params``. Its state keeps its dtypes and shardings.

    Raises:
      ValueError: As in `volumize`; and in ``init``, a volumized weight has no first
        moment though ``require_momentum``.
      TypeError: As in `volumize`.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, Algorithm 1 (2 to 4 for SGD, Adam and LaProp).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = wr.volumized(optax.sgd(1.0, momentum=0.9), volume=0.5, alpha=0.5)
      >>> params = jnp.array([[0.1, 0.4]])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([[0.2, -0.3]]), state, params)
      >>> optax.apply_updates(params, updates)  # 0.4 + 0.3 is outside: half way back
      Array([[-0.1,  0.6]], dtype=float32)
      >>> optax.tree.get(state, "trace")
      Array([[ 0.2 , -0.15]], dtype=float32)
    """
    _check(volume, alpha)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        flags, _ = volumes_of("volumized", params, volume, mask, dims)
        inner = optimizer.init(params)
        _, covered = map_moments(lambda _, m: m, inner, params)
        if require_momentum:
            _check_covered(flags, covered, params)
        return VolumizedState(
            count=jnp.zeros([], jnp.int32), inner_state=_strong(inner)
        )

    def update_fn(updates, state, params=None, **extra_args):
        box = _Box(volume, alpha, params, mask, dims, state.count)
        updates, inner = optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        stepped = took_step(updates, state.inner_state, inner)
        updates, outside = box.confine(updates, stepped)

        def damp(index: int, moment: jax.Array) -> jax.Array:
            left = outside[index]
            if left is None:
                return moment
            wide = moment.astype(compute_dtype(moment.dtype))
            damped = _scaled(box.alpha(wide.dtype), wide).astype(moment.dtype)
            return jnp.where(left, damped, moment)

        inner, _ = map_moments(damp, inner, params)
        count = jnp.where(stepped, optax.safe_increment(state.count), state.count)
        return updates, VolumizedState(count=count, inner_state=_strong(inner))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Box:
    """The walls and ``alpha`` of one step."""

    def __init__(self, volume, alpha, params, mask, dims, count):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        _, volumes = volumes_of("volumize", params, volume, mask, dims)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self._volumes = [
            None
            if v is None
            else at(f"volume at {show_path(path)}", v, count, jnp.shape(p))
            for v, (path, p) in zip(volumes, leaves, strict=True)
        ]
        self._alpha = at("alpha", alpha, count, ())
        self._params = params

    def alpha(self, dtype) -> jax.Array:
        return jnp.asarray(self._alpha, dtype)

    def confine(self, updates: Any, stepped: jax.Array | bool = True):
        """The updates that stay in the box, and where they would have left it."""
        leaves, treedef = jax.tree.flatten(self._params)
        walled = [
            i
            for i, volume in enumerate(self._volumes)
            if volume is not None and not _is_infinite(volume)
        ]
        confined = leaves_like("updates", updates, self._params, walled)
        outside: list[jax.Array | None] = [None] * len(leaves)
        for i in walled:
            p, u = jnp.asarray(leaves[i]), jnp.asarray(confined[i])
            volume = jnp.asarray(self._volumes[i])
            if volume.ndim:  # explicit, for users who forbid JAX to promote ranks
                volume = jnp.broadcast_to(volume, p.shape)
            confined[i], outside[i] = _confine(p, u, volume, self._alpha, stepped)
        return jax.tree.unflatten(treedef, confined), outside


@jax.jit  # traced once for all weights of one shape
def _confine(p, u, volume, alpha, stepped):
    """One weight's update and where it was outside.

    Comparisons are such that rounding cannot turn them. XLA may contract a product
    inside of ``u`` and the sum with ``p`` to one rounding here and to two in
    ``optax.apply_updates``. So the sign is read off ``u > -p``, and with ``alpha = 0``
    an update is held back also where it passes the one that reaches the wall, whatever
    the sum says.
    """
    p_dtype, u_dtype = p.dtype, jnp.promote_types(p.dtype, u.dtype)
    dtype = compute_dtype(u_dtype)
    alpha = jnp.asarray(alpha, dtype)
    wall = round_to(jnp.asarray(volume, dtype), p_dtype)
    p, u = p.astype(dtype), u.astype(dtype)

    positive = u > -p
    proposed = land(p, u, p_dtype, u_dtype)
    outside = (jnp.abs(proposed) > wall) & stepped
    excess = jnp.where(outside, jnp.abs(proposed) - wall, 0)
    target = round_to(wall + _scaled(alpha, excess), p_dtype)
    target = jnp.where(positive, target, -target)
    increment = reach(p, target, positive, p_dtype, u_dtype)

    passes = jnp.where(positive, u > increment, u < increment)
    hard = (alpha == 0) & (wall < jnp.inf) & stepped
    # At alpha = 1 the increment is u but for rounding, and the derivative the same.
    exact = jnp.where(alpha == 1, _with_derivative_of(increment, u), increment)
    kept = jnp.where(outside | (passes & hard), exact, u)
    return kept.astype(u_dtype), outside


@jax.custom_jvp
def _with_derivative_of(function: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, which is differentiated as if it were ``function``."""
    del function
    return value


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals, tangents):
    return _with_derivative_of(*primals), tangents[0]


def _is_infinite(volume: Any) -> bool:
    """Whether it is known before tracing that no weight can be outside.

    Then nothing is computed at all: a comparison with infinity would already keep XLA
    from fusing the sum of weight and update as it does without.
    """
    return isinstance(volume, float | np.ndarray) and bool(np.all(np.isinf(volume)))


def _scaled(alpha: jax.Array, x: jax.Array) -> jax.Array:
    """``alpha x``, but 0 for ``alpha = 0`` also where ``x`` is infinite."""
    return jnp.where((alpha == 0) & jnp.isinf(x), 0, alpha * x)


def _strong(state: Any) -> Any:
    """Takes weak types off a state, so that its types never change between steps.

    ``optax.adam`` starts with weak moments for weak parameters, and ends with strong.
    """

    def strong(x):
        weak = isinstance(x, jax.Array) and x.aval.weak_type
        return lax.convert_element_type(x, x.dtype) if weak else x

    return jax.tree.map(strong, state)


def _check(volume: Any, alpha: Any) -> None:
    """Refuses what can be known to be wrong on construction."""
    check_argument(volume)
    if isinstance(alpha, VolumeRule):
        raise TypeError(
            f"alpha must be a scalar or a schedule, not the rule {alpha!r}."
        )
    if not callable(alpha):
        check_scalar("alpha", alpha, -1, 1, "a scalar or a schedule")


def _check_covered(flags: list[bool], covered: set[int], params: Any) -> None:
    paths = jax.tree_util.tree_leaves_with_path(params)
    for index, (flag, (path, _)) in enumerate(zip(flags, paths, strict=True)):
        if flag and index not in covered:
            raise ValueError(
                f"optimizer keeps no first moment for {show_path(path)} that could be "
                "found and damped: a state's field mu or trace with the structure of "
                "the parameters. Give it momentum (optax.sgd(..., momentum=0.9)), "
                "leave the leaf out with mask=, or pass require_momentum=False to "
                "volumize the weights alone."
            )
