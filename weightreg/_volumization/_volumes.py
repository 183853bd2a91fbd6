"""The size of the box: rules that give every layer its volume, and their checks."""

import abc
import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from weightreg._core._arguments import (
    EqualByFields,
    Number,
    check_scheduled,
    check_shape,
    given,
    is_function,
    is_hole,
    is_real,
    leaf_path,
    match,
    refuse_step_count,
    spread,
)
from weightreg._core._weights import (
    Dims,
    Mask,
    Need,
    WeightLayer,
    check_dtypes,
    check_whole,
    layers_of,
    mask_leaves,
)


@dataclasses.dataclass(frozen=True, eq=False)
class VolumeRule(EqualByFields, abc.ABC):
    """A function of the parameters that gives each weight its volume.

    Attributes:
      mask: Which leaves are weights, by default the ``mask`` given to `volumize`.
      dims: What their axes mean, by default the ``dims`` given to `volumize`.
    """

    name: ClassVar[str]
    mask: Mask
    dims: Dims

    needs_all: ClassVar[bool] = False  # whether each volume depends on all layers

    @abc.abstractmethod
    def volumes(self, layers: tuple[WeightLayer, ...]) -> list[Number]:
        """One volume for each of all layers."""

    @property
    @abc.abstractmethod
    def need(self) -> Need:
        """What the rule makes of a layer."""

    def __call__(self, params: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
        """Makes the tree of volumes, with ``None`` for leaves that are no weights."""
        refuse_step_count("volume", params)
        mask = mask if self.mask is None else self.mask
        dims = dims if self.dims is None else self.dims
        layers = layers_of(self.name, params, mask, dims, self.need)
        if layers and self.needs_all:
            around = "wr.volumized(optax.partition(...), wr.lipschitz_volume(...), ...)"
            around = f"Put it around the partition, as {around}."
            check_whole("lipschitz_volume", params, mask, dims, around)
        indices = (layer.index for layer in layers)
        volumes = dict(zip(indices, self.volumes(layers), strict=True))
        return spread(params, volumes, None)


@dataclasses.dataclass(frozen=True, eq=False)
class HeVolume(VolumeRule):
    """The rule that `he_volume` makes."""

    name = "he_volume"
    v: Number
    fan: str

    def volumes(self, layers: tuple[WeightLayer, ...]) -> list[Number]:
        """One volume for each layer, by its own fan."""
        return [self._volume(_FANS[self.fan](layer)) for layer in layers]

    @property
    def need(self) -> Need:
        """The fans of a layer."""
        fans = {"avg": ("fan_in", "fan_out")}.get(self.fan, (f"fan_{self.fan}",))
        return operator.attrgetter(*fans)

    def _volume(self, fan: float) -> Number:
        if not fan:  # for a layer without elements no wall matters
            return math.inf
        return _lift(lambda v: v * math.sqrt(6 / fan), self.v)


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzVolume(VolumeRule):
    """The rule that `lipschitz_volume` makes."""

    name = "lipschitz_volume"
    bound: Number

    needs_all: ClassVar[bool] = True

    def volumes(self, layers: tuple[WeightLayer, ...]) -> list[Number]:
        """One volume for each layer, for which it matters how many there are."""
        depth = max(sum(_passes(layer) for layer in layers), 1)

        def volume(layer: WeightLayer) -> Number:
            sides = max(layer.fan_out // max(layer.window, 1), layer.fan_in, 1)
            scale = 1 / (sides * math.sqrt(layer.reach) * layer.factor)
            return _lift(lambda c: c ** (1 / depth) * scale, self.bound)

        return list(map(volume, layers))

    @property
    def need(self) -> Need:
        """The sides of a layer's matrix, and what its window and its stack add."""
        return operator.attrgetter("fan_in", "fan_out", "window", "reach", "stack_axes")


def _passes(layer: WeightLayer) -> int:
    """How often a path through the network goes through a layer, or through a stack."""
    if layer.calls is None:
        raise ValueError(
            f"lipschitz_volume needs to know how often {layer.path} is called, which "
            "the traced network does not tell: it is called in a while loop. Give it a "
            "volume of its own, as in a tree of volumes."
        )
    if layer.combined or math.isinf(layer.factor):
        made = ", ".join(layer.combined) or "some of its numbers are repeated"
        raise ValueError(
            f"lipschitz_volume cannot bound the layer that is made from {layer.path} "
            f"({made}): the leaf's box is not the weight's. Leave it out with mask=."
        )
    stack = math.prod(layer.shape[a] for a in layer.stack_axes)
    return stack if layer.passes is None else layer.passes


_FANS: dict[str, Callable[[WeightLayer], float]] = {
    "out": lambda layer: layer.fan_out,
    "in": lambda layer: layer.fan_in,
    "avg": lambda layer: (layer.fan_in + layer.fan_out) / 2,
}


def he_volume(
    v: Number, fan: str = "out", *, mask: Mask = None, dims: Dims = None
) -> VolumeRule:
    r"""The volume of a layer in units of He's uniform initialization.

    .. math::
      V_l = v \sqrt{6 / h_l}

    where :math:`h_l` is the layer's fan as ``jax.nn.initializers`` counts it. At
    ``v = 1`` the box is the support of ``he_uniform(in_axis, out_axis)`` for the same
    fan.

    Args:
      v: The box in units of that support: a number, a traced array or a schedule.
        The paper takes it from {0.25, 0.5, 1, 2}; smaller regularizes more.
      fan: ``"out"`` as in the paper, ``"in"``, or ``"avg"`` for their mean.
      mask: Which leaves count, if not what `volumize` is told: see `weight_mask`.
      dims: What their axes mean, if not what `volumize` is told: see `weight_layers`.

    Returns:
      A function from parameters to a tree of volumes, ``None`` where a leaf is no
      weight. Inside of ``jax.shard_map`` it would take the fans of a device's shard:
      where weights are split there, call it outside, and pass its tree as the volume.

    Raises:
      ValueError: ``fan`` is none of the three, or ``v`` is negative or NaN.
      TypeError: ``v`` is no number, array or schedule.

    References:
      Ziyin et al., Volumization as a Natural Generalization of Weight Decay, 2020,
      section 2. It does not say whether its "number of fan-out channels" counts the
      window. Here it does, which agrees with He et al., 2015.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.he_volume(0.5)({"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)})
      {'bias': None, 'kernel': 0.5}
    """
    if fan not in list(_FANS):
        raise ValueError(f"fan must be one of 'out', 'in' and 'avg', not {fan!r}.")
    check_volume("v", v)
    return HeVolume(mask, dims, v, fan)


def lipschitz_volume(
    bound: Number = 1.0, *, mask: Mask = None, dims: Dims = None
) -> VolumeRule:
    r"""The volume that bounds the Lipschitz constant of a network.

    .. math::
      V_l = \frac{c^{1/L}}{\max(a_l, b_l) \sqrt{k_l}}

    for a kernel matrix of :math:`a_l` units and :math:`b_l` inputs (window included)
    and :math:`k_l` window positions that one input reaches, at most the size of the
    window. With entries in the box, every layer's largest singular value is at most
    :math:`c^{1/L}`, hence a chain of these ``L`` layers and 1-Lipschitz activations
    changes by at most ``c`` times the change of its input, in the Euclidean norm.

    The bound holds for chains of dense layers and convolutions (any stride, with
    padding by zeros, or circular padding of images at least as large as the window) up
    to the rounding of ``V`` to the weights' dtype. It needs ``alpha <= 0`` and, for
    ``alpha < 0``, the condition on reflections that `volumize` states. It says nothing
    about layers that ``mask`` leaves out, about normalization, attention, or branches
    that are added. It is a bound in exact arithmetic: where a network runs in TF32
    (JAX's default on a GPU) or bfloat16, outputs of inputs that are close together may
    differ by more, by what they are rounded.

    Args:
      bound: Lipschitz constant ``c`` of the whole network, greater than or equal to
        0: a number, a traced array or a schedule. Stacked layers count one by one, and
        those of a traced network as often as one path goes through them.
      mask: Which leaves count, if not what `volumize` is told: see `weight_mask`.
      dims: What their axes mean, if not what `volumize` is told: see `weight_layers`.

    Returns:
      A function from parameters to a tree of volumes, ``None`` where a leaf is no
      weight.

    Raises:
      ValueError: ``bound`` is negative or NaN; or, where the rule is applied, a traced
        network calls a layer an unknown number of times, or makes a weight from several
        leaves or from repeated numbers, or the parameters have a hole where a weight
        may be, as inside of ``optax.partition``.
      TypeError: ``bound`` is no number, array or schedule.

    References:
      Ziyin et al., 2020, Propositions 4.1 and 4.2 (for :math:`c = 1`); the square
      root of :math:`k_l` is what convolutions need beyond their kernel matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.lipschitz_volume()({"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)})
      {'bias': None, 'kernel': 0.125}
    """
    check_volume("bound", bound)
    return LipschitzVolume(mask, dims, bound)


def check_volume(name: str, volume: Any) -> None:
    """Refuses what no box can have, as far as it is known before tracing."""
    if volume is None or callable(volume):
        return
    if not is_real(volume):
        raise TypeError(
            f"{name} must be a number, an array or a schedule, not {volume!r}."
        )
    if isinstance(volume, Tracer):
        return
    if not np.all(np.asarray(volume).astype(np.float64) >= 0):
        raise ValueError(f"{name} must be at least 0 and not NaN, but is {volume}.")


def check_argument(volume: Any) -> None:
    """Refuses what cannot be a volume, a tree of volumes or a rule."""
    if jax.tree_util.all_leaves([volume]) and not isinstance(volume, VolumeRule):
        check_volume("volume", volume)
    if volume is None:
        raise TypeError("volume must be a number, a tree or a function, not None.")


def check_alpha(alpha: Any) -> None:
    """Refuses what is no scalar in [-1, 1], nor a schedule."""
    if isinstance(alpha, VolumeRule):
        raise TypeError(
            f"alpha must be a scalar or a schedule, not the rule {alpha!r}."
        )
    check_scheduled("alpha", alpha, -1, 1)


def volumes_of(
    caller: str,
    params: Any,
    volume: Any,
    mask: Mask,
    dims: Dims,
    count: jax.typing.ArrayLike | None = None,
) -> dict[int, Number]:
    """The volume of every weight, by its position among the leaves of ``params``.

    Args:
      caller: Name of the function that a user has called, for errors.
      params: The parameters.
      volume: A number, a tree or a rule, as `volumize` describes it.
      mask: Which leaves are weights.
      dims: What their axes mean.
      count: The step at which schedules are evaluated; without it they stay what they
        are.

    Raises:
      ValueError: The tree does not match; a weight has no volume, a negative or NaN
        one, or one of a shape that does not broadcast to the weight's.
      TypeError: A volume is no number, array or schedule, or a weight is of a dtype
        that ``caller`` cannot handle.
    """
    flags = mask_leaves(params, mask, dims)
    weights = [index for index, flag in enumerate(flags) if flag]
    check_dtypes(caller, params, weights)
    paths = jax.tree_util.tree_leaves_with_path(params)
    if not paths:
        return {}
    found = match("volume", _tree(volume, params, mask, dims), params)
    volumes: dict[int, Any] = {}
    for index in weights:
        path, leaf = paths[index]
        entry: Any = found[index]
        where = f"volume at {leaf_path(path)}"
        if is_hole(entry):
            raise ValueError(
                f"{where} is missing, though the leaf (shape {jnp.shape(leaf)}) is a "
                "weight. Give it a volume, or leave it out with mask=."
            )
        check_volume(where, entry)
        if callable(entry) and count is not None:
            entry = given(where, entry(count), jnp.shape(leaf))
        elif not callable(entry):
            check_shape(where, jnp.shape(entry), jnp.shape(leaf))
        volumes[index] = entry
    return volumes


def _tree(volume: Any, params: Any, mask: Mask, dims: Dims) -> Any:
    """What a number, a tree or a rule says of these parameters."""
    if isinstance(volume, VolumeRule):
        return volume(params, mask=mask, dims=dims)
    if not is_function(volume) or _is_schedule(volume, params):
        return volume
    try:
        return volume(params)
    except Exception as error:
        error.add_note(
            "volume was taken for a function of the parameters, since it gives no "
            "scalar for a step count. Schedules of arrays go into a tree."
        )
        raise


def _lift(fn: Callable[[Any], Any], number: Number) -> Number:
    """Applies ``fn`` to a number, or to what a schedule will give."""
    if callable(number):
        return lambda count: fn(number(count))
    return fn(number)


def _is_schedule(volume: Callable[[Any], Any], params: Any) -> bool:
    """Whether a function is one of the step count rather than of the parameters.

    A schedule makes a scalar of a count, and cannot take a tree of parameters. (A
    bare array it can take, but then it makes an array of it.)
    """

    def shape_of(argument: Any) -> Any:
        try:
            out = jax.eval_shape(volume, argument)
        except Exception:  # whatever a function says to an argument not meant for it
            return None
        return getattr(out, "shape", None)

    if shape_of(jax.ShapeDtypeStruct((), jnp.int32)) != ():
        return False
    if not jax.tree_util.all_leaves([params]):
        try:
            jax.eval_shape(volume, params)
        except Exception:
            return True
        return False
    return shape_of(params) != ()
