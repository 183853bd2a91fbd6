"""Volumization around any optimizer: weights are pulled back, their momentum is damped.

The first moments are found in the optimizer's state, which may be wrapped and chained
however Optax allows it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from weightreg._core._arguments import (
    Number,
    at,
    check_params,
    compute_dtype,
    each,
    replaced,
    show_path,
)
from weightreg._core._weights import Dims, Mask
from weightreg._volumization._box import confine, damp, tied
from weightreg._volumization._volumes import check_alpha, check_argument, volumes_of

# States are told by the names of their classes, so that one which a version of Optax
# lacks does no harm. A first moment is what the optimizer's step is proportional to,
# which SM3 keeps under nu. States that are not here count if they have a field mu or
# trace with the structure of the parameters.
_FIELDS = {
    "DAdaptAdamWState": ("exp_avg",),
    "EmaState": ("ema",),
    "MomoAdamState": ("exp_avg",),
    "MomoState": ("exp_avg",),
    "ProdigyState": ("exp_avg",),
    "ScaleByAdanState": ("m",),
    "ScaleByAdemamixState": ("m1", "m2"),
    "ScaleByRStdDevState": (),  # its mu centres the second moment
    "ScaleByRStdDevWithCountState": (),
    "ScaleBySM3State": ("nu",),
    "ScaleBySimplifiedAdEMAMixState": ("m",),
}
_USUAL_FIELDS = ("mu", "trace")

# Moments of projected gradients are in rotated axes even where their shapes agree with
# the parameters', and no step depends on measurements.
_OPAQUE = frozenset({"GaLoreState", "MonitorState"})

# Wrappers after which other parameters are used than those that are stepped.
_ELSEWHERE = {
    "LookaheadState": (
        "lookahead, whose parameters are two copies, the slow one of which is used. "
        "Put it around: optax.lookahead(volumized(...), ...) keeps both in the box, up "
        "to rounding, if they start there."
    ),
    "MechanicState": (
        "mechanize, whose optimizer takes other steps, with another momentum, than the "
        "parameters that are used, which move by a learnt multiple of their sum. "
        "Confine the weights alone behind it: optax.chain(optax.contrib.mechanize("
        "...), volumize(...))."
    ),
    "ScheduleFreeState": (
        "schedule_free, after which not the parameters y are used but x, which is made "
        "of y and of a sequence z that nothing confines. Put it around: "
        "schedule_free(from_z, ...) confines x up to rounding if from_z is a volumized "
        "that steps from z and not from y, as in weightreg/_volumization/README.md."
    ),
}

# Optimizers that know the sum of all gradients and the initial weights, and make the
# new weights of these, wherever the old ones are.
_ABSOLUTE = frozenset({"COCOBState", "MadgradState"})


class VolumizedState(NamedTuple):
    """State of `volumized`.

    Attributes:
      count: Steps taken, for schedules; int32 scalar. Optimizers count too, so that
        ``optax.tree.get(state, "count")`` finds several. Take ``state.count``, and
        ``optax.tree.get(state.inner_state, "count")``.
      inner_state: State of the wrapped optimizer, first moments damped.
    """

    count: jax.typing.ArrayLike
    inner_state: optax.OptState


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

    and otherwise nothing changes, nor does any other state of the optimizer. What
    ``alpha`` and ``V`` mean, and what is exact, is explained at `volumize`.

    The first moment is ``mu`` of the Adam family, Lion and Muon, ``m`` of Adan,
    ``trace`` of SGD and RMSProp with momentum, and so on for all of Optax. It is
    found through ``chain``, ``masked``, ``partition``, ``inject_hyperparams``,
    ``MultiSteps``, ``apply_if_finite`` and ``flatten``; and in optimizers of other
    packages where a field ``mu`` or ``trace`` of a state (a ``NamedTuple``) has the
    structure of the parameters. Where ``MultiSteps`` or ``apply_if_finite`` inside of
    ``optimizer`` puts a step off, nothing is volumized, and schedules wait. (A rejected
    step is known by its zeros: no link that adds to them may follow.)

    .. warning::
      ``optax.flatten`` must be inside of ``volumized``, since around it it would hide
      which parameters are weights, and it must flatten all parameters, since inside of
      ``masked`` or ``partition`` nothing tells which ones it has joined. ``sam``,
      ``conditionally_mask``, ``lookahead`` and ``schedule_free`` must be around
      ``volumized``; the last needs more, which the README beside this file shows.
      Behind ``mechanize`` `volumize` confines the weights alone. Leaves that
      ``optimizer`` freezes must be left out with ``mask``, or they move. Nothing that
      changes updates may come after it, but `quantize_every`. Under
      ``optax.inject_hyperparams``, which calls every function as a schedule, name in
      ``static_args`` the arguments that are functions of the parameters. ``cocob`` and
      ``madgrad`` undo each pull, hence have no soft wall.

    Args:
      optimizer: Any Optax optimizer, learning rate included.
      volume: The wall ``V >= 0``: a number, schedule or traced array, a tree of these
        (or a prefix), or a function of the parameters such as `he_volume`.
      alpha: The share of an excess that stays, in [-1, 1]; may be a schedule or traced.
      mask: Which leaves to volumize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.
      require_momentum: Whether a volumized weight without a first moment (plain SGD,
        RMSProp) is an error. ``False`` says that it is meant.

    Returns:
      An optimizer that needs ``params``. Its state keeps its dtypes and shardings.

    Raises:
      ValueError: ``alpha`` is outside [-1, 1], ``V`` is negative or NaN, a tree does
        not match the parameters, a rule meets a leaf without fans, or ``update`` is
        not given ``params``; a volumized weight has no first moment and
        ``require_momentum`` is true; or ``optimizer`` holds a wrapper that must be
        around ``volumized``, or undoes each pull and ``alpha`` is neither 0 nor 1.
      TypeError: A number is none, or a weight is no float of 16, 32 or 64 bits.

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
    check_argument(volume)
    check_alpha(alpha)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        volumes = volumes_of("volumized", params, volume, mask, dims)
        inner = optimizer.init(params)
        _check_used(inner, alpha)
        if require_momentum:
            _check_moments(volumes, inner, params)
        return VolumizedState(jnp.zeros([], jnp.int32), _strong(inner))

    def update_fn(updates, state, params=None, **extra_args):
        check_params(params)
        _check_used(state.inner_state, alpha)
        walls = volumes_of("volumized", params, volume, mask, dims, state.count)
        share = at("alpha", alpha, state.count)
        updates, inner = optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        stepped = took_step(updates, state.inner_state, inner)
        updates, outside = confine(updates, params, walls, share, stepped)
        moments: dict[int, jax.Array] = {}

        def damped(index: int, moment: jax.Array) -> jax.Array:
            if index not in outside:
                return moment
            wide = lax.convert_element_type(moment, compute_dtype(moment.dtype))
            less = damp(jnp.asarray(share, wide.dtype), wide)
            less = lax.convert_element_type(less, moment.dtype)
            moments[index] = lax.select(outside[index], less, moment)
            return moments[index]

        inner, _ = map_moments(damped, inner, params)
        # Where nothing is damped, XLA rounds a step as it does without a wall.
        if isinstance(share, Tracer) or np.asarray(share) != 1:
            new = {i: tied(u, moments[i]) for i, u in each(updates, moments)}
            updates = replaced(updates, new, params)
        count = jnp.where(stepped, optax.safe_increment(state.count), state.count)
        return updates, VolumizedState(count, _strong(inner))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_used(state: Any, alpha: Any) -> None:
    """Refuses an optimizer whose next step would not start from what is confined."""
    names = _ELSEWHERE.keys() | _ABSOLUTE
    named = lambda node: type(node).__name__ in names  # noqa: E731
    for node in filter(named, jax.tree.leaves(state, is_leaf=named)):
        name = type(node).__name__
        if name in _ELSEWHERE:
            raise ValueError(f"volumized cannot wrap {_ELSEWHERE[name]}")
        known = not callable(alpha) and not isinstance(alpha, Tracer)
        if not known or np.asarray(alpha) not in (0, 1):
            raise ValueError(
                f"alpha must be the number 0 or 1 around {name[:-5].lower()}, but is "
                f"{alpha}: this optimizer makes weights of the initial ones and all "
                "gradients, wherever they are now, so that each step undoes the last "
                "pull, and no soft wall holds. Take alpha=0.0, or another optimizer."
            )


def _check_moments(volumes: Mapping[int, Any], state: Any, params: Any) -> None:
    """Refuses an optimizer without a first moment for some weight that has a wall."""
    _, covered = map_moments(lambda _, moment: moment, state, params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    for index in volumes:
        if index not in covered:
            raise ValueError(
                f"optimizer keeps no first moment for {show_path(paths[index][0])} "
                "that could be found and damped: a state's field mu or trace with the "
                "structure of the parameters. If the leaf is frozen, leave it out with "
                "mask= (or put volumized inside of optax.partition): volumized would "
                "move it. Otherwise give it momentum (optax.sgd(..., momentum=0.9)), "
                "or pass require_momentum=False to volumize the weights alone."
            )


def _fields(node: Any) -> tuple[str, ...]:
    """The fields of a state that may be first moments."""
    names = getattr(node, "_fields", ())
    wanted = _FIELDS.get(type(node).__name__, _USUAL_FIELDS)
    return tuple(name for name in wanted if name in names)


def map_moments(
    scale: Callable[[int, jax.Array], jax.Array], state: Any, params: Any
) -> tuple[Any, set[int]]:
    """Applies ``scale(index, moment)`` to every leaf of every first moment.

    Args:
      scale: Takes the index of a leaf of ``params`` and this leaf's first moment, of
        the same shape.
      state: State of an optimizer, wrapped and chained however it may be.
      params: The parameters which the state was made for.

    Returns:
      The new state, and the indices of the leaves that have a first moment.
    """
    treedef = jax.tree.structure(params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    index_of = {path: index for index, (path, _) in enumerate(paths)}
    shapes = [jnp.shape(leaf) for _, leaf in paths]
    covered: set[int] = set()

    def map_tree(moment: Any) -> Any | None:
        """Scales a first moment, if it has the parameters' structure."""
        leaves = jax.tree_util.tree_leaves_with_path(moment)
        indices = [index_of.get(path, -1) for path, _ in leaves]
        pieces = [leaf for _, leaf in leaves]
        if all(
            i >= 0 and jnp.shape(m) == shapes[i]
            for i, m in zip(indices, pieces, strict=True)
        ):
            covered.update(indices)
            scaled = [scale(i, m) for i, m in zip(indices, pieces, strict=True)]
            return jax.tree.unflatten(jax.tree.structure(moment), scaled)
        return map_flat(pieces)

    def map_flat(pieces: list[Any]) -> Any | None:
        """Scales the one vector that ``optax.flatten`` makes of all leaves."""
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        if not shapes or len(pieces) != 1 or jnp.shape(pieces[0]) != (ends[-1],):
            return None
        covered.update(range(len(shapes)))
        scaled = [
            scale(i, piece.reshape(shapes[i])).ravel()
            for i, piece in enumerate(jnp.split(pieces[0], ends[:-1]))
        ]
        return jnp.concatenate(scaled)

    def map_node(node: Any) -> Any:
        if stop(node) or not (moments := _fields(node)):
            return node
        new = {}
        for name in node._fields:
            value = getattr(node, name)
            scaled = map_tree(value) if name in moments else None
            new[name] = walk(value) if scaled is None else scaled
        return type(node)(**new)

    def stop(node: Any) -> bool:
        # Parameters may themselves be named tuples with a field called mu.
        return type(node).__name__ in _OPAQUE or jax.tree.structure(node) == treedef

    def walk(tree: Any) -> Any:
        return jax.tree.map(
            map_node, tree, is_leaf=lambda node: stop(node) or bool(_fields(node))
        )

    return walk(state), covered


def took_step(updates: Any, before: Any, after: Any) -> jax.Array | bool:
    """Whether an optimizer has stepped, which wrappers inside it may have put off.

    Args:
      updates: What the optimizer proposes.
      before: Its state before the step.
      after: Its state after the step.

    Raises:
      ValueError: Only some of the parameters' optimizers put off their steps, or a
        wrapper puts them off and does not tell.
    """
    silent = (optax.ApplyEvery, optax.ConditionallyMaskState, optax.contrib.SAMState)
    waits = (optax.MultiStepsState, optax.ApplyIfFiniteState)
    parts = (optax.transforms.PartitionState, optax.MaskedState)

    def find(tree: Any, kinds: tuple[type, ...]) -> list[Any]:
        is_kind = lambda node: isinstance(node, kinds)  # noqa: E731
        return [n for n in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(n)]

    if find(after, silent):
        raise ValueError(
            "volumized cannot wrap conditionally_mask, sam or apply_every, whose "
            "states do not tell which updates are steps. Put them around volumized "
            "(and MultiSteps in the place of apply_every)."
        )
    if any(find(part, waits) for part in find(after, parts)):
        raise ValueError(
            "volumized cannot wrap MultiSteps or apply_if_finite inside of partition "
            "or masked, where some parameters step and others wait. Put MultiSteps or "
            "apply_if_finite around volumized."
        )
    stepped: jax.Array | bool = True
    for old, new in zip(find(before, waits), find(after, waits), strict=True):
        if isinstance(new, optax.MultiStepsState):
            stepped &= new.gradient_step != old.gradient_step
            inner = old.inner_opt_state, new.inner_opt_state
        else:
            # A rejected step proposes zeros. One that is not finite but accepted (too
            # many errors in a row) does not.
            moves = [jnp.any(u != 0) for u in jax.tree.leaves(updates)]
            stepped &= new.last_finite | jnp.any(jnp.array(moves))
            inner = old.inner_state, new.inner_state
        stepped &= took_step(updates, *inner)
    return stepped


def _strong(state: Any) -> Any:
    """Takes weak types off a state, so that its types never change between steps.

    ``optax.adam`` starts with weak moments for weak parameters, and ends with strong.
    """

    def strong(x):
        if not isinstance(x, jax.Array) or not x.aval.weak_type:
            return x
        if isinstance(x, Tracer):
            return lax.convert_element_type(x, x.dtype)
        # A conversion would be a program for each shape, and arrays of shards are
        # strong.
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    return jax.tree.map(strong, state)
