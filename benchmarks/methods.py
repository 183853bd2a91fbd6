"""The methods that are compared: an optimizer and a search space each.

To add a method, add an entry to `METHODS`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from scipy.stats import qmc

import weightreg as wr

Hyperparameters = Mapping[str, float]
Space = dict[str, tuple[float, float]]
Direction = Callable[[], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Base:
    """What a method is added to.

    Attributes:
      direction: The optimizer without its learning rate.
      learning_rate: Smallest and largest, in every method's space, so that "none" uses
        its trials too. Rates so low that training ends before it fits would be early
        stopping, another method.
      usual: A rate that does, for networks that are only to be attacked with.
    """

    direction: Direction
    learning_rate: tuple[float, float]
    usual: float


BASES: dict[str, Base] = {
    "adam": Base(optax.scale_by_adam, (5e-4, 5e-3), 1e-3),
    "momentum": Base(lambda: optax.trace(0.9), (1e-2, 2e-1), 5e-2),
}


QUANTIZERS = {"binary": wr.binarize, "ternary": wr.ternarize}
QUANTIZE_EPOCHS = 2  # how many lie between, as in the paper


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: Name in tables and plots.
      optimizer: From hyperparameters, which may be traced, a direction and a learning
        rate as links of a chain, to an optimizer.
      space: Smallest and largest value of every further hyperparameter, on a log scale.
      log_size: From an untrained network to the logarithm of what its ``energy`` is
        multiplied by, by which the range of ``energy`` is divided: a product of norms
        has a size that no fixed range can foresee.
      fixed: All hyperparameters, for a method that is not tuned.
      fixed_for: The base that these are for.
      volume: From hyperparameters to a volume rule, if weights have walls.
      norm: From hyperparameters to a map, see ``weightreg.equivalent_norm``, if the
        network does not run on the weights that are trained.
      normed: Whether the map is for networks with a normalization after every layer.
      levels: ``"binary"`` or ``"ternary"``, if such networks come out, at the walls.
      on_the_way: Whether weights are also quantized every two epochs.
    """

    label: str
    optimizer: Callable[..., optax.GradientTransformation]
    space: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    log_size: Callable[[Any], jax.Array] | None = None
    fixed: Hyperparameters | None = None
    fixed_for: str = "momentum"
    volume: Callable[[Hyperparameters], Callable] | None = None
    norm: Callable[[Hyperparameters], Any] | None = None
    normed: bool = True
    levels: str | None = None
    on_the_way: bool = True

    def build(
        self,
        hyper: Hyperparameters,
        base: str,
        shrink: optax.Schedule | None = None,
        epoch: int = 1,
    ) -> optax.GradientTransformation:
        """The optimizer for some hyperparameters.

        Args:
          hyper: The hyperparameters, which may be traced.
          base: Name in `BASES`.
          shrink: What the learning rate is multiplied by at each step.
          epoch: Steps of an epoch.
        """
        learning_rate = hyper["learning_rate"]
        rate = optax.scale_by_learning_rate(
            (lambda count: learning_rate * shrink(count)) if shrink else learning_rate
        )
        optimizer = self.optimizer(hyper, BASES[base].direction(), rate)
        if not (self.levels and self.on_the_way):
            return optimizer
        every = QUANTIZE_EPOCHS * epoch
        return optax.chain(
            optimizer, wr.quantize_every(every, self.levels, self.walls(hyper))
        )

    def walls(self, hyper: Hyperparameters) -> Callable:
        """The rule for the walls of a method that has some."""
        assert self.volume is not None
        return self.volume(hyper)

    def finish(self, hyper: Hyperparameters, params: Any) -> Any:
        """What becomes of weights after training."""
        if not self.levels:
            return params
        return QUANTIZERS[self.levels](params, self.walls(hyper))

    def distances(self, hyper: Hyperparameters, params: Any) -> dict[str, jax.Array]:
        """How far each layer is from its levels."""
        assert self.levels is not None
        return wr.level_distances(params, self.walls(hyper), self.levels)

    def whole_space(self, base: str, params: Any) -> Space:
        """The space for an untrained network, learning rate included."""
        space = {"learning_rate": BASES[base].learning_rate, **self.space}
        if self.log_size:
            log_size = float(self.log_size(params))
            if log_size > 700:
                raise ValueError(
                    f"The energy of this network is e^{log_size:.0f}, out of the range "
                    f"of any strength of {self.label}: compare weissi_log."
                )
            low, high = space["energy"]
            space["energy"] = low / math.exp(log_size), high / math.exp(log_size)
        return space


def _l2(h, direction, rate):
    decay = optax.add_decayed_weights(h["strength"], mask=wr.weight_mask)
    return optax.chain(decay, direction, rate)


def _weissi(h, direction, rate):
    return optax.chain(wr.add_weissi(h["energy"], h["complexity"]), direction, rate)


def _weissi_cnn(h, direction, rate):
    penalty = wr.add_weissi(h["energy"], h["complexity"], exponents=wr.cnn_exponents)
    return optax.chain(penalty, direction, rate)


def _weissi_log(h, direction, rate):
    penalty = wr.add_weissi(h["energy"], h["complexity"], log=True)
    return optax.chain(penalty, direction, rate)


def _last_layer(params):
    """Whether a leaf is the weight of the output layer, which has the last name."""
    last = wr.weight_layers(params)[-1].index
    marks = [i == last for i in range(len(jax.tree.leaves(params)))]
    return jax.tree.unflatten(jax.tree.structure(params), marks)


def _other_layers(params):
    both = wr.weight_mask(params), _last_layer(params)
    return jax.tree.map(lambda weight, last: weight and not last, *both)


def _parseval(h, direction, rate):
    # Liu et al. keep the output layer out, which has to tell classes apart, and decay
    # it by 1e-4 times its squared norm.
    decay = optax.add_decayed_weights(2e-4, mask=_last_layer)
    step = wr.parseval(h["beta"], mask=_other_layers)
    return optax.chain(decay, direction, rate, step)


def _shifted_l2(scope, center):
    """In the place of L2 where weights are mapped."""

    def optimizer(h, direction, rate):
        form = {"scope": scope, "center": center}
        penalty = wr.add_shifted_l2(h["strength"], h["epsilon"], **form)
        return optax.chain(penalty, direction, rate)

    return optimizer


class Rescaled:
    """An equivalent norm, but of a squared norm that differs between layers.

    Args:
      center: As in ``weightreg.equivalent_norm``, of every unit.
      squared_norm: From a ``WeightLayer``.
    """

    def __init__(self, center: bool, squared_norm: Callable[[Any], float]):
        self._norm = wr.equivalent_norm("unit", center)
        self._squared_norm = squared_norm
        self.init = self._norm.init

    def __call__(self, params: Any) -> Any:
        """What the network runs on."""
        leaves, treedef = jax.tree.flatten(self._norm(params))
        for layer in wr.weight_layers(params):
            leaves[layer.index] *= math.sqrt(self._squared_norm(layer))
        return jax.tree.unflatten(treedef, leaves)


def _boxed(volume: Callable[[Hyperparameters], Callable]):
    """Volumization, with the walls that a rule gives."""

    def optimizer(h, direction, rate):
        chain = optax.chain(direction, rate)
        return wr.volumized(chain, volume(h), 1 - h["one_minus_alpha"])

    return optimizer


def _he(h):
    return wr.he_volume(h["v"])


def _same(h):
    """One ``V`` for all layers."""

    def volume(params):
        return jax.tree.map(lambda w: h["V"] if w else None, wr.weight_mask(params))

    return volume


@jax.custom_jvp
def _straight_through(quantized: jax.Array, weight: jax.Array) -> jax.Array:
    """Quantized weights, whose derivative is that of the weights."""
    del weight
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return _straight_through(*primals), tangents[1]


class StraightThrough:
    """The usual way to quantize: gradients pass as if weights had not been moved.

    The weights that are trained stay in the box of which the levels are the walls
    (Courbariaux, Bengio and David, BinaryConnect, 2015).
    """

    def __init__(self, levels: str, volume: Callable):
        self._quantize = functools.partial(QUANTIZERS[levels], volume=volume)

    def init(self, params: Any) -> Any:
        """What is trained."""
        return params

    def __call__(self, params: Any) -> Any:
        """What the network runs on."""
        return jax.tree.map(_straight_through, self._quantize(params), params)


def _clipped(h, direction, rate):
    return optax.chain(direction, rate, wr.volumize(_he(h), 0.0))


_VOLUMES = {"v": (0.02, 2.0), "one_minus_alpha": (1e-4, 1.0)}
METHODS: dict[str, Method] = {
    "none": Method("none", lambda h, direction, rate: optax.chain(direction, rate)),
    "weight_decay": Method(
        "weight decay (AdamW)",
        lambda h, direction, rate: optax.chain(
            direction,
            optax.add_decayed_weights(h["strength"], mask=wr.weight_mask),
            rate,
        ),
        {"strength": (1e-2, 1e2)},
    ),
    "l2": Method("weight decay (L2)", _l2, {"strength": (1e-5, 1e-1)}),
    "volumization": Method(
        "volumization",
        _boxed(_he),
        _VOLUMES,
        volume=_he,
    ),
    "weissi": Method(
        "WEISSI",
        _weissi,
        {"energy": (1e-2, 1e2), "complexity": (1e-6, 1e-2)},
        # The logarithm leaves out layers that begin at 0, as the product could not.
        log_size=wr.weissi(1.0, 0.0, log=True),
    ),
    "weissi_cnn": Method(  # the paper's for deep convolutional networks
        "WEISSI (CNN)",
        _weissi_cnn,
        {"energy": (1e-2, 1e2), "complexity": (1e-6, 1e-2)},
        log_size=wr.weissi(1.0, 0.0, log=True, exponents=wr.cnn_exponents),
    ),
    "weissi_log": Method(
        "WEISSI (logarithm)",
        _weissi_log,
        {"energy": (1e-5, 1e-1), "complexity": (1e-6, 1e-2)},
    ),
    "parseval": Method(
        "Parseval",
        _parseval,
        {"beta": (1e-5, 1e-1)},
    ),
    # Liu et al., appendix B.1 and Table 5. Their weight decay is the sum of squares,
    # whose gradient is twice the weight.
    "l2_paper": Method(
        "weight decay, as in the paper",
        _l2,
        fixed={"learning_rate": 0.1, "strength": 2e-4},
    ),
    "weissi_paper": Method(
        "WEISSI, as in the paper",
        _weissi,
        fixed={"learning_rate": 0.1, "energy": 1e-6, "complexity": 1e-5},
    ),
}
for _levels in QUANTIZERS:
    METHODS[_levels] = Method(
        _levels, _boxed(_he), _VOLUMES, volume=_he, levels=_levels
    )
    METHODS[f"{_levels}_ste"] = Method(
        f"{_levels}, straight-through",
        _clipped,
        {"v": _VOLUMES["v"]},
        volume=_he,
        norm=functools.partial(
            lambda levels, h: StraightThrough(levels, _he(h)), _levels
        ),
        normed=False,
        levels=_levels,
        on_the_way=False,
    )
    # Ziyin et al., section 5.4.
    METHODS[f"{_levels}_paper"] = Method(
        f"{_levels}, as in the paper",
        _boxed(_same),
        fixed={"learning_rate": 2e-4, "V": 0.1, "one_minus_alpha": 0.05},
        fixed_for="adam",
        volume=_same,
        levels=_levels,
    )
# Ziyin et al., Table 3, and Figure 10.
METHODS["volumization_paper"] = Method(
    "volumization (0.25, 0.5)",
    _boxed(_he),
    fixed={"learning_rate": 2e-4, "v": 0.25, "one_minus_alpha": 0.5},
    fixed_for="adam",
    volume=_he,
)
METHODS |= {
    f"box_{volume:g}_{alpha:g}": Method(
        f"V {volume:g}, alpha {alpha:g}",
        _boxed(_same),
        fixed={"learning_rate": 1e-3, "V": volume, "one_minus_alpha": 1 - alpha},
        fixed_for="adam",
        volume=_same,
    )
    for alpha in (0.99, 0.9999)
    for volume in (1.2, 0.9, 0.6, 0.3)
}
# Li, Chen and Yang, section 5.1; the numbers of shifted L2 are those of its authors.
_RECIPE = {"learning_rate": 0.1, "strength": 1e-4}
_SHIFTED = {**_RECIPE, "epsilon": 1e-3}
# Equations 20 to 23: scope, and whether means are taken away.
_FORMS = {
    20: ("layer", False),
    21: ("unit", False),
    22: ("unit", True),
    23: ("layer", True),
}


def _enc(label: str, scope: str = "unit", center: bool = True, **norm: Any) -> Method:
    """An equivalent norm at the paper's settings."""
    optimizer = _shifted_l2(scope, center)
    mapped = wr.equivalent_norm(scope, center, **norm)
    return Method(label, optimizer, fixed=_SHIFTED, norm=lambda h: mapped)


METHODS["enc"] = Method(
    "ENC",
    _shifted_l2("unit", True),
    {"strength": (1e-5, 1e-1), "epsilon": (1e-4, 1e-1)},
    norm=lambda h: wr.equivalent_norm(),
)
METHODS |= {
    f"enc_eq{number}": _enc(f"ENC, eq. {number}", *form)
    for number, form in _FORMS.items()
}
METHODS |= {
    f"enc_alpha{alpha:g}": _enc(f"ENC, alpha {alpha:g}", alpha=alpha)
    for alpha in (0.5, 2.0)
}
METHODS["enc_learnt"] = _enc("ENC, alpha learnt", learn=True)
METHODS |= {
    f"l2_{strength:g}": Method(
        f"L2 {strength:g}", _l2, fixed={"learning_rate": 0.1, "strength": strength}
    )
    for strength in (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
}
# Every unit of norm 1 (WN), or of standard deviation 1 (WS).
METHODS["wn"] = Method(
    "weight normalization",
    _l2,
    fixed=_RECIPE,
    norm=lambda h: Rescaled(False, lambda layer: layer.fan_out // layer.window),
)
METHODS["ws"] = Method(
    "weight standardization",
    _l2,
    fixed=_RECIPE,
    norm=lambda h: Rescaled(True, lambda layer: math.prod(layer.shape)),
)


def trials(space: Space, count: int, seed: int = 0) -> list[dict[str, float]]:
    """``count`` settings that fill a space evenly on a log scale."""
    points = qmc.Halton(d=len(space), scramble=True, rng=seed).random(count)
    low, high = np.log(list(space.values())).T
    values = np.exp(low + points * (high - low))
    return [dict(zip(space, map(float, row), strict=True)) for row in values]


def at_edge(space: Space, chosen: Hyperparameters) -> list[str]:
    """Hyperparameters in the outer 5 % of their range: the optimum may lie beyond."""
    edge = []
    for name, (low, high) in space.items():
        place = math.log(chosen[name] / low) / math.log(high / low)
        if not 0.05 <= place <= 0.95:
            edge.append(name)
    return edge
