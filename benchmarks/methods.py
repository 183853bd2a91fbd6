"""The methods that are compared: an optimizer and a search space each.

To add a method, add an entry to `METHODS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import optax
from scipy.stats import qmc

import weightreg as wr

Hyperparameters = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: Name in tables and plots.
      optimizer: From hyperparameters, which may be traced, to an optimizer.
      space: Smallest and largest value of every hyperparameter, on a log scale.
      volume: From hyperparameters to a volume rule, if weights have walls.
    """

    label: str
    optimizer: Callable[[Hyperparameters], optax.GradientTransformation]
    space: Mapping[str, tuple[float, float]]
    volume: Callable[[Hyperparameters], Callable] | None = None


# In every space, so that "none" uses its trials too. Around Adam's usual 1e-3: rates so
# low that training ends before it fits would be early stopping, another method.
RATE = {"learning_rate": (5e-4, 5e-3)}

METHODS: dict[str, Method] = {
    "none": Method("none", lambda h: optax.adam(h["learning_rate"]), RATE),
    "weight_decay": Method(
        "weight decay (AdamW)",
        lambda h: optax.adamw(
            h["learning_rate"], weight_decay=h["strength"], mask=wr.weight_mask
        ),
        {**RATE, "strength": (1e-2, 1e2)},
    ),
    "l2": Method(
        "weight decay (L2)",
        lambda h: optax.chain(
            optax.add_decayed_weights(h["strength"], mask=wr.weight_mask),
            optax.adam(h["learning_rate"]),
        ),
        {**RATE, "strength": (1e-5, 1e-1)},
    ),
    "volumization": Method(
        "volumization",
        lambda h: wr.volumized(
            optax.adam(h["learning_rate"]),
            wr.he_volume(h["v"]),
            1 - h["one_minus_alpha"],
        ),
        {**RATE, "v": (0.02, 2.0), "one_minus_alpha": (1e-4, 1.0)},
        volume=lambda h: wr.he_volume(h["v"]),
    ),
}


def trials(method: Method, count: int, seed: int = 0) -> list[dict[str, float]]:
    """``count`` settings that fill a method's space evenly on a log scale."""
    names = list(method.space)
    points = qmc.Halton(d=len(names), scramble=True, rng=seed).random(count)
    low, high = np.log([method.space[n] for n in names]).T
    values = np.exp(low + points * (high - low))
    return [dict(zip(names, map(float, row), strict=True)) for row in values]


def at_edge(method: Method, chosen: Hyperparameters) -> list[str]:
    """Hyperparameters in the outer 5 % of their range: the optimum may lie beyond."""
    edge = []
    for name, (low, high) in method.space.items():
        place = math.log(chosen[name] / low) / math.log(high / low)
        if not 0.05 <= place <= 0.95:
            edge.append(name)
    return edge
