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
    "momentum": Base(lambda: optax.trace(0.9), (1e-2, 2e-1), 5e-2),
}

QUANTIZE_EPOCHS = 2  # how many lie between, as in the paper


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
      fixed_for: The base that these are for.
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
    fixed_for: str = "momentum"
    volume: Callable[[Hyperparameters], Callable] | None = None
    norm: Callable[[Hyperparameters], Any] | None = None
    normed: bool = True
    levels: str | None = None
    on_the_way: bool = True
    like: str | None = None
    loss: str | None = None

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
# Li, Chen and Yang, section 5.1; the numbers of shifted L2 are those of its authors.
_RECIPE = {"learning_rate": 0.1, "strength": 1e-4}
_SHIFTED = {**_RECIPE, "epsilon": 1e-3}


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
        optimizers.boxed(optimizers.same),
        fixed={"learning_rate": 2e-4, "V": 0.1, "one_minus_alpha": 0.05},
        fixed_for="adam",
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


def _box(volume: float, alpha: float) -> Method:
    """Ziyin et al., Figure 10."""
    return Method(
        f"V {volume:g}, alpha {alpha:g}",
        optimizers.boxed(optimizers.same),
        fixed={"learning_rate": 1e-3, "V": volume, "one_minus_alpha": 1 - alpha},
        fixed_for="adam",
        volume=optimizers.same,
    )


def _enc(label: str, scope: str = "unit", center: bool = True, **norm: Any) -> Method:
    """An equivalent norm at the paper's settings."""
    optimizer = optimizers.shifted_l2(scope, center)
    mapped = wr.equivalent_norm(scope, center, **norm)
    return Method(label, optimizer, fixed=_SHIFTED, norm=lambda h: mapped)


def _l2(strength: float) -> Method:
    """A weight decay that is not tuned."""
    fixed = {"learning_rate": 0.1, "strength": strength}
    return Method(f"L2 {strength:g}", optimizers.l2, fixed=fixed)


METHODS: Mapping[str, Method] = {
    "none": Method("none", optimizers.plain),
    "weight_decay": Method(
        "weight decay (AdamW)",
        optimizers.decoupled_decay,
        {"strength": (1e-2, 1e2)},
    ),
    "l2": Method("weight decay (L2)", optimizers.l2, {"strength": (1e-5, 1e-1)}),
    "volumization": Method(
        "volumization",
        optimizers.boxed(optimizers.he),
        _VOLUMES,
        volume=optimizers.he,
    ),
    "weissi": Method(
        "WEISSI",
        optimizers.weissi(),
        {"energy": (1e-2, 1e2), "complexity": (1e-6, 1e-2)},
        # The logarithm leaves out layers that begin at 0, as the product could not.
        log_size=wr.weissi(1.0, 0.0, log=True),
    ),
    "weissi_cnn": Method(  # the paper's for deep convolutional networks
        "WEISSI (CNN)",
        optimizers.weissi(exponents=wr.cnn_exponents),
        {"energy": (1e-2, 1e2), "complexity": (1e-6, 1e-2)},
        log_size=wr.weissi(1.0, 0.0, log=True, exponents=wr.cnn_exponents),
    ),
    "weissi_log": Method(
        "WEISSI (logarithm)",
        optimizers.weissi(log=True),
        {"energy": (1e-5, 1e-1), "complexity": (1e-6, 1e-2)},
    ),
    "parseval": Method("Parseval", optimizers.parseval, {"beta": (1e-5, 1e-1)}),
    # Liu et al., appendix B.1 and Table 5. Their weight decay is the sum of squares,
    # whose gradient is twice the weight.
    "l2_paper": Method(
        "weight decay, as in the paper",
        optimizers.l2,
        fixed={"learning_rate": 0.1, "strength": 2e-4},
    ),
    "weissi_paper": Method(
        "WEISSI, as in the paper",
        optimizers.weissi(),
        fixed={"learning_rate": 0.1, "energy": 1e-6, "complexity": 1e-5},
    ),
    "binary": _quantized("binary"),
    "binary_ste": _straight_through("binary"),
    "binary_paper": _quantized_paper("binary"),
    "ternary": _quantized("ternary"),
    "ternary_ste": _straight_through("ternary"),
    "ternary_paper": _quantized_paper("ternary"),
    "volumization_paper": Method(  # Ziyin et al., Table 3
        "volumization (0.25, 0.5)",
        optimizers.boxed(optimizers.he),
        fixed={"learning_rate": 2e-4, "v": 0.25, "one_minus_alpha": 0.5},
        fixed_for="adam",
        volume=optimizers.he,
    ),
    "box_1.2_0.99": _box(1.2, 0.99),
    "box_0.9_0.99": _box(0.9, 0.99),
    "box_0.6_0.99": _box(0.6, 0.99),
    "box_0.3_0.99": _box(0.3, 0.99),
    "box_1.2_0.9999": _box(1.2, 0.9999),
    "box_0.9_0.9999": _box(0.9, 0.9999),
    "box_0.6_0.9999": _box(0.6, 0.9999),
    "box_0.3_0.9999": _box(0.3, 0.9999),
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
