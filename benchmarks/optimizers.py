"""How methods make an optimizer, and which weights the network runs on.

Each optimizer is a function of hyperparameters, which may be traced, and `Parts`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import weightreg as wr

Hyperparameters = Mapping[str, float]
QUANTIZERS = {"binary": wr.binarize, "ternary": wr.ternarize}


class Parts(NamedTuple):
    """What a method puts an optimizer together from.

    Attributes:
      direction: The plain optimizer without its learning rate.
      rate: The link that multiplies by the learning rate.
      output: Path of the output layer's kernel, such as ``"Dense_1/kernel"``.
    """

    direction: optax.GradientTransformation
    rate: optax.GradientTransformation
    output: str


Optimizer = Callable[[Hyperparameters, Parts], optax.GradientTransformation]


def plain(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
    """No regularization."""
    del h
    return optax.chain(parts.direction, parts.rate)


def decoupled_decay(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
    """Weight decay beside the direction, as in AdamW."""
    decay = optax.add_decayed_weights(h["strength"], mask=wr.weight_mask)
    return optax.chain(parts.direction, decay, parts.rate)


def l2(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
    """Weight decay in the gradient."""
    decay = optax.add_decayed_weights(h["strength"], mask=wr.weight_mask)
    return optax.chain(decay, parts.direction, parts.rate)


def weissi(**form: Any) -> Optimizer:
    """WEISSI in one of the forms of ``weightreg.add_weissi``."""

    def optimizer(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
        penalty = wr.add_weissi(h["energy"], h["complexity"], **form)
        return optax.chain(penalty, parts.direction, parts.rate)

    return optimizer


def parseval(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
    """Parseval steps on all layers but the output layer, which is decayed.

    Liu et al. spare it since it has to tell classes apart, and decay it by 1e-4 times
    its squared norm.
    """

    def output(params):
        return is_output(params, parts.output)

    def others(params):
        both = wr.weight_mask(params), output(params)
        return jax.tree.map(lambda weight, spared: weight and not spared, *both)

    decay = optax.add_decayed_weights(2e-4, mask=output)
    step = wr.parseval(h["beta"], mask=others)
    return optax.chain(decay, parts.direction, parts.rate, step)


def is_output(params: Any, output: str) -> Any:
    """Whether each leaf is the output layer's kernel.

    Raises:
      ValueError: None is.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
    if output not in paths:
        raise ValueError(
            f"output must be the path of the output layer's kernel, but the parameters "
            f"have no {output!r}; they have {', '.join(paths)}."
        )
    return jax.tree.unflatten(treedef, [path == output for path in paths])


def shifted_l2(scope: str = "unit", center: bool = True) -> Optimizer:
    """In the place of L2 where weights are mapped."""

    def optimizer(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
        form = {"scope": scope, "center": center}
        penalty = wr.add_shifted_l2(h["strength"], h["epsilon"], **form)
        return optax.chain(penalty, parts.direction, parts.rate)

    return optimizer


def boxed(volume: Callable[[Hyperparameters], Callable]) -> Optimizer:
    """Volumization, with the walls that a rule gives."""

    def optimizer(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
        chain = optax.chain(parts.direction, parts.rate)
        return wr.volumized(chain, volume(h), 1 - h["one_minus_alpha"])

    return optimizer


def clipped(h: Hyperparameters, parts: Parts) -> optax.GradientTransformation:
    """Weights are put back onto the walls that they have passed."""
    return optax.chain(parts.direction, parts.rate, wr.volumize(he(h), 0.0))


def he(h: Hyperparameters) -> Callable:
    """Walls in proportion to He's initialization."""
    return wr.he_volume(h["v"])


def same(h: Hyperparameters) -> Callable:
    """One ``V`` for all layers."""

    def volume(params):
        return jax.tree.map(lambda w: h["V"] if w else None, wr.weight_mask(params))

    return volume


class Rescaled:
    """An equivalent norm, but of a squared norm that differs between layers.

    Args:
      center: Whether every unit's mean is taken away first.
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
