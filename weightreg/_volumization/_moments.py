"""Finding and scaling the first moments in the state of any Optax optimizer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The names of the states' classes, so that one which a version of Optax lacks does no
# harm. A first moment is what the optimizer's step is proportional to: SM3 keeps it
# under nu. States that are not here count when they have a field mu or trace with the
# structure of the parameters.
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

# Moments of projected gradients, in rotated axes even where the shapes agree; and
# measurements, which no step depends on.
_OPAQUE = frozenset({"GaLoreState", "MonitorState"})


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
        """The scaled first moment; None if it has not the parameters' structure."""
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
        """The same for the one vector which ``optax.flatten`` makes of all leaves."""
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
