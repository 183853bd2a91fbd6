"""The methods that are compared: an optimizer and a search space each.

To add a method, add an entry to `METHODS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from scipy.stats import qmc

import weightreg as wr
from benchmarks import optimizers
from benchmarks.optimizers import QUANTIZERS, Hyperparameters, Parts

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
    "laprop": Base(wr.scale_by_laprop, (5e-4, 5e-3), 1e-3),
    "momentum": Base(lambda: optax.trace(0.9), (1e-2, 2e-1), 5e-2),
}

QUANTIZE_EPOCHS = 2  # how many lie between, as in the paper
ADAM, MOMENTUM = ("adam", "laprop"), ("momentum",)  # what settings may be for


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: Name in tables and plots.
      optimizer: See ``benchmarks/optimizers.py``.
      space: Smallest and largest value of every further hyperparameter, on a log scale.
      log_size: From an untrained network to the logarithm of what its ``energy`` is
        multiplied by, by which the range of ``energy`` is divided: a product of norms
        has a size that no fixed range can foresee.
      fixed: All hyperparameters, for a method that is not tuned.
      fixed_for: The bases that these are for.
      like: The name of another method that is this one but for its hyperparameters, if
        there is one: a single program trains runs of both.
      loss: The loss that it trains by in place of the comparison's, if it is one.
      volume: From hyperparameters to a volume rule, if weights have walls.
      norm: From hyperparameters to a map, see ``weightreg.equivalent_norm``, if the
        network does not run on the weights that are trained.
      normed: Whether the map is for networks with a normalization after every layer.
      levels: ``"binary"`` or ``"ternary"``, if such networks come out, at the walls.
      on_the_way: Whether weights are also quantized every two epochs.
    """

    label: str
    optimizer: optimizers.Optimizer
    space: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    log_size: Callable[[Any], jax.Array] | None = None
    fixed: Hyperparameters | None = None
    fixed_for: tuple[str, ...] = MOMENTUM
    like: str | None = None
    loss: str | None = None
    volume: Callable[[Hyperparameters], Callable] | None = None
    norm: Callable[[Hyperparameters], Any] | None = None
    normed: bool = True
    levels: str | None = None
    on_the_way: bool = True

    def build(
        self,
        hyper: Hyperparameters,
        base: str,
        output: str,
        shrink: optax.Schedule | None = None,
        epoch: int = 1,
    ) -> optax.GradientTransformation:
        """The optimizer for some hyperparameters.

        Args:
          hyper: The hyperparameters, which may be traced.
          base: Name in `BASES`.
          output: Path of the output layer's kernel in the parameters.
          shrink: What the learning rate is multiplied by at each step.
          epoch: Steps of an epoch.
        """
        learning_rate = hyper["learning_rate"]
        rate = optax.scale_by_learning_rate(
            (lambda count: learning_rate * shrink(count)) if shrink else learning_rate
        )
        parts = Parts(BASES[base].direction(), rate, output)
        optimizer = self.optimizer(hyper, parts)
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
            # Rounded, so that all machines search the same space.
            log_size = round(float(self.log_size(params)), 1)
            if log_size > 700:
                raise ValueError(
                    f"The energy of this network is e^{log_size:.0f}, out of the range "
                    f"of any strength of {self.label}: compare weissi_log."
                )
            low, high = space["energy"]
            space["energy"] = low / math.exp(log_size), high / math.exp(log_size)
        return space


_VOLUMES = {"v": (0.02, 2.0), "one_minus_alpha": (1e-4, 1.0)}
_WEISSI = {"energy": (1e-2, 1e2), "complexity": (1e-6, 1e-2)}
# Li, Chen and Yang, section 5.1; the numbers of shifted L2 are those of its authors.
_RECIPE = {"learning_rate": 0.1, "strength": 1e-4}
_SHIFTED = {**_RECIPE, "epsilon": 1e-3}

# Methods that are tuned and of which papers also print settings.
_L2 = Method("weight decay (L2)", optimizers.l2, {"strength": (1e-5, 1e-1)})
_LQ = Method("Lq loss", optimizers.plain, loss="lq")
_PARSEVAL = Method("Parseval", optimizers.parseval, {"beta": (1e-5, 1e-1)})
_VOLUMIZATION = Method(
    "volumization", optimizers.boxed(optimizers.he), _VOLUMES, volume=optimizers.he
)
_SAME_BOX = optimizers.boxed(optimizers.same)
_ENERGY = Method(
    "WEISSI",
    optimizers.weissi(),
    _WEISSI,
    # The logarithm leaves out layers that begin at 0, as the product could not.
    log_size=wr.weissi(1.0, 0.0, log=True),
)
_ENERGY_CNN = Method(  # the paper's for deep convolutional networks
    "WEISSI (CNN)",
    optimizers.weissi(exponents=wr.cnn_exponents),
    _WEISSI,
    log_size=wr.weissi(1.0, 0.0, log=True, exponents=wr.cnn_exponents),
)


def _quantized(levels: str) -> Method:
    """Weights are led to the walls of a box, and come out there."""
    return Method(
        levels,
        optimizers.boxed(optimizers.he),
        _VOLUMES,
        volume=optimizers.he,
        levels=levels,
    )


def _quantized_paper(levels: str) -> Method:
    """Ziyin et al., section 5.4."""
    return Method(
        f"{levels}, as in the paper",
        _SAME_BOX,
        fixed={"learning_rate": 2e-4, "V": 0.1, "one_minus_alpha": 0.05},
        fixed_for=ADAM,
        volume=optimizers.same,
        levels=levels,
    )


def _straight_through(levels: str) -> Method:
    """Weights are quantized in every step."""
    return Method(
        f"{levels}, straight-through",
        optimizers.clipped,
        {"v": _VOLUMES["v"]},
        volume=optimizers.he,
        norm=lambda h: optimizers.StraightThrough(levels, optimizers.he(h)),
        normed=False,
        levels=levels,
        on_the_way=False,
    )


def _box(volume: float, alpha: float, like: str | None = "box_1.2_0.99") -> Method:
    """Ziyin et al., Figure 10."""
    return Method(
        f"V {volume:g}, alpha {alpha:g}",
        _SAME_BOX,
        fixed={"learning_rate": 1e-3, "V": volume, "one_minus_alpha": 1 - alpha},
        fixed_for=ADAM,
        like=like,
        volume=optimizers.same,
    )


def _vol(v: float, alpha: float, rate: float = 1e-4) -> Method:
    """Vol(v, alpha) of Ziyin et al., section 5.2 and appendix B."""
    hyper = {"learning_rate": rate, "v": v, "one_minus_alpha": 1 - alpha}
    label = f"volumization ({v:g}, {alpha:g})" + f", rate {rate:g}" * (rate != 1e-4)
    return _at(_VOLUMIZATION, "volumization", label, ADAM, hyper)


def _l2(strength: float) -> Method:
    """A weight decay of Li, Chen and Yang."""
    hyper = {**_RECIPE, "strength": strength}
    return _at(_L2, "l2", f"L2 {strength:g}", MOMENTUM, hyper)


def _l2_adam(strength: float) -> Method:
    """A weight decay of Ziyin et al., in the gradient as PyTorch's Adam has it.

    That decays biases and normalizations too, which nothing here does.
    """
    hyper = {"learning_rate": 1e-4, "strength": strength}
    label = f"L2 {strength:g}, as in the paper"
    return _at(_L2, "l2", label if strength else "no regularization", ADAM, hyper)


def _l2_liu(network: str, rate: float) -> Method:
    """The weight decay of Liu et al., appendix B.1.

    Theirs is the sum of squares, whose gradient is twice the weight.
    """
    label = f"weight decay, as in the paper{network}"
    hyper = {"learning_rate": rate, "strength": 2e-4}
    return _at(_L2, "l2", label, MOMENTUM, hyper)


def _parseval(network: str, rate: float) -> Method:
    """Parseval OC of Liu et al., appendix B.1."""
    label = f"Parseval, as in the paper{network}"
    hyper = {"learning_rate": rate, "beta": 1e-4}
    return _at(_PARSEVAL, "parseval", label, MOMENTUM, hyper)


def _weissi(network: str, rate: float, energy: float, complexity: float) -> Method:
    """Liu et al., Table 5; of the energy, the form for convolutional networks."""
    hyper = {"learning_rate": rate, "energy": energy, "complexity": complexity}
    label = f"WEISSI, as in the paper{network}"
    return _at(_ENERGY_CNN, "weissi_cnn", label, MOMENTUM, hyper)


def _at(
    method: Method,
    like: str,
    label: str,
    bases: tuple[str, ...],
    hyper: Hyperparameters,
) -> Method:
    """A method at hyperparameters that are not tuned."""
    return dataclasses.replace(
        method, label=label, fixed=hyper, fixed_for=bases, like=like
    )


def _enc(label: str, scope: str = "unit", center: bool = True, **norm: Any) -> Method:
    """An equivalent norm at the paper's settings."""
    optimizer = optimizers.shifted_l2(scope, center)
    mapped = wr.equivalent_norm(scope, center, **norm)
    return Method(label, optimizer, fixed=_SHIFTED, norm=lambda h: mapped)


METHODS: Mapping[str, Method] = {
    "none": Method("none", optimizers.plain),
    "weight_decay": Method(
        "weight decay (AdamW)",
        optimizers.decoupled_decay,
        {"strength": (1e-2, 1e2)},
    ),
    "l2": _L2,
    "volumization": _VOLUMIZATION,
    "weissi": _ENERGY,
    "weissi_cnn": _ENERGY_CNN,
    "weissi_log": Method(
        "WEISSI (logarithm)",
        optimizers.weissi(log=True),
        {"energy": (1e-5, 1e-1), "complexity": (1e-6, 1e-2)},
    ),
    "parseval": _PARSEVAL,
    "lq": _LQ,
    "binary": _quantized("binary"),
    "binary_ste": _straight_through("binary"),
    "binary_paper": _quantized_paper("binary"),
    "ternary": _quantized("ternary"),
    "ternary_ste": _straight_through("ternary"),
    "ternary_paper": _quantized_paper("ternary"),
    # Ziyin et al., section 5.2: Adam with a learning rate of 1e-4.
    "none_adam": _l2_adam(0.0),
    "l2_5e-5_adam": _l2_adam(5e-5),
    "l2_5e-4_adam": _l2_adam(5e-4),
    "l2_5e-3_adam": _l2_adam(5e-3),
    "lq_adam": _at(
        _LQ, "lq", "Lq loss, as in the paper", ADAM, {"learning_rate": 1e-4}
    ),
    "volumization_paper": _vol(0.25, 0.5, rate=2e-4),  # the rate of quantized networks
    "vol_0.25_-1": _vol(0.25, -1),
    "vol_0.25_-0.5": _vol(0.25, -0.5),
    "vol_0.25_0": _vol(0.25, 0),
    "vol_0.25_0.5": _vol(0.25, 0.5),
    "vol_0.25_0.99": _vol(0.25, 0.99),
    "vol_0.25_0.9999": _vol(0.25, 0.9999),
    "vol_0.25_1": _vol(0.25, 1),
    "vol_0.5_-1": _vol(0.5, -1),
    "vol_0.5_-0.5": _vol(0.5, -0.5),
    "vol_0.5_0": _vol(0.5, 0),
    "vol_0.5_0.5": _vol(0.5, 0.5),
    "vol_0.5_0.99": _vol(0.5, 0.99),
    "vol_0.5_0.9999": _vol(0.5, 0.9999),
    "vol_0.5_1": _vol(0.5, 1),
    "vol_1_-1": _vol(1, -1),
    "vol_1_-0.5": _vol(1, -0.5),
    "vol_1_0": _vol(1, 0),
    "vol_1_0.5": _vol(1, 0.5),
    "vol_1_0.99": _vol(1, 0.99),
    "vol_1_0.9999": _vol(1, 0.9999),
    "vol_1_1": _vol(1, 1),
    "vol_2_-1": _vol(2, -1),
    "vol_2_-0.5": _vol(2, -0.5),
    "vol_2_0": _vol(2, 0),
    "vol_2_0.5": _vol(2, 0.5),
    "vol_2_0.99": _vol(2, 0.99),
    "vol_2_0.9999": _vol(2, 0.9999),
    "vol_2_1": _vol(2, 1),
    "box_1.2_0.99": _box(1.2, 0.99, like=None),
    "box_0.9_0.99": _box(0.9, 0.99),
    "box_0.6_0.99": _box(0.6, 0.99),
    "box_0.3_0.99": _box(0.3, 0.99),
    "box_1.2_0.9999": _box(1.2, 0.9999),
    "box_0.9_0.9999": _box(0.9, 0.9999),
    "box_0.6_0.9999": _box(0.6, 0.9999),
    "box_0.3_0.9999": _box(0.3, 0.9999),
    # Liu et al., appendix B.1 and Table 5, which differs with adversarial training.
    "l2_paper": _l2_liu("", 0.1),
    "weissi_paper": _at(
        _ENERGY,
        "weissi",
        "WEISSI, as in the paper",
        MOMENTUM,
        {"learning_rate": 0.1, "energy": 1e-6, "complexity": 1e-5},
    ),
    "l2_vgg": _l2_liu(" (VGG)", 0.01),
    "parseval_vgg": _parseval(" (VGG)", 0.01),
    "weissi_vgg": _weissi(" (VGG)", 0.01, 1e-31, 3e-5),
    "weissi_vgg_adversarial": _weissi(" (VGG, adversarial)", 0.01, 1e-30, 3e-5),
    "l2_wrn": _l2_liu(" (WRN)", 0.03),
    "parseval_wrn": _parseval(" (WRN)", 0.03),
    "weissi_wrn": _weissi(" (WRN)", 0.03, 1e-24, 1e-5),
    "weissi_wrn_convex": _weissi(" (WRN CA)", 0.03, 1e-30, 1e-5),
    "weissi_wrn_convex_adversarial": _weissi(
        " (WRN CA, adversarial)", 0.03, 1e-25, 1e-5
    ),
    "weissi_wrn_energy": _weissi(" (WRN CA), energy alone", 0.03, 1e-30, 0.0),
    "weissi_wrn_complexity": _weissi(" (WRN CA), complexity alone", 0.03, 0.0, 1e-5),
    "enc": Method(
        "ENC",
        optimizers.shifted_l2(),
        {"strength": (1e-5, 1e-1), "epsilon": (1e-4, 1e-1)},
        norm=lambda h: wr.equivalent_norm(),
    ),
    "enc_eq20": _enc("ENC, eq. 20", "layer", center=False),
    "enc_eq21": _enc("ENC, eq. 21", "unit", center=False),
    "enc_eq22": _enc("ENC, eq. 22", "unit", center=True),
    "enc_eq23": _enc("ENC, eq. 23", "layer", center=True),
    "enc_alpha0.5": _enc("ENC, alpha 0.5", alpha=0.5),
    "enc_alpha2": _enc("ENC, alpha 2", alpha=2.0),
    "enc_learnt": _enc("ENC, alpha learnt", learn=True),
    "l2_0": _l2(0.0),
    "l2_1e-08": _l2(1e-8),
    "l2_1e-06": _l2(1e-6),
    "l2_0.0001": _l2(1e-4),
    "l2_0.001": _l2(1e-3),
    "l2_0.01": _l2(1e-2),
    "l2_0.1": _l2(1e-1),
    "wn": Method(  # every unit of norm 1
        "weight normalization",
        optimizers.l2,
        fixed=_RECIPE,
        norm=lambda h: optimizers.Rescaled(
            False, lambda layer: layer.fan_out // layer.window
        ),
    ),
    "ws": Method(  # every unit of standard deviation 1
        "weight standardization",
        optimizers.l2,
        fixed=_RECIPE,
        norm=lambda h: optimizers.Rescaled(True, lambda layer: math.prod(layer.shape)),
    ),
}


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
