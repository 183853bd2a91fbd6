"""Whole training steps with what regularizes them.

To add a regularizer, add an entry to `REGULARIZERS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

import weightreg as wr
from benchmarks import models
from benchmarks.programs import BOX, COMPLEXITY, ENERGY, Program


class Regularizer(NamedTuple):
    """What a training step has beside the network's own loss and the optimizer.

    Attributes:
      penalty: Added to the loss.
      wrap: From the optimizer to what takes its place.
      norm: From what is trained to what the network runs on.
    """

    penalty: Callable[[Any], Any] = lambda params: 0.0
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
        lambda optimizer: optimizer
    )
    norm: Callable[[Any], Any] = lambda params: params


def _before(link: optax.GradientTransformation) -> Callable[..., Any]:
    """A link that comes before the optimizer."""
    return lambda optimizer: optax.chain(link, optimizer)


def _after(link: optax.GradientTransformation) -> Callable[..., Any]:
    """A link that comes after it."""
    return lambda optimizer: optax.chain(optimizer, link)


ENC = wr.equivalent_norm()
SHIFTED_L2 = wr.add_shifted_l2(1e-4, 1e-3)
REGULARIZERS: dict[str, Regularizer] = {
    "none": Regularizer(),
    "add_decayed_weights": Regularizer(
        wrap=_before(optax.add_decayed_weights(1e-4, mask=wr.weight_mask))
    ),
    "volumized": Regularizer(wrap=lambda optimizer: wr.volumized(optimizer, **BOX)),
    "volumize": Regularizer(wrap=_after(wr.volumize(**BOX))),
    "weissi in the loss": Regularizer(wr.weissi(ENERGY, COMPLEXITY)),
    "add_weissi": Regularizer(wrap=_before(wr.add_weissi(ENERGY, COMPLEXITY))),
    "equivalent_norm": Regularizer(norm=ENC),
    "add_shifted_l2": Regularizer(wrap=_before(SHIFTED_L2)),
    "equivalent_norm and add_shifted_l2": Regularizer(
        wrap=_before(SHIFTED_L2), norm=ENC
    ),
    "parseval": Regularizer(wrap=_after(wr.parseval(1e-3))),
}

# From parameters, what else a network keeps, inputs and targets to the loss and to what
# it keeps then.
Loss = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Task(NamedTuple):
    """What a network is trained on.

    Attributes:
      loss: See `Loss`.
      variables: Parameters under "params", and what else the network keeps.
      x: Inputs.
      y: Targets.
    """

    loss: Loss
    variables: Any
    x: Any
    y: Any


def cross_entropy(model: nn.Module) -> Loss:
    """The mean cross-entropy of a network of `benchmarks.models`."""

    def loss(params, kept, x, y):
        network = {"params": params, **kept}
        logits, after = models.training_logits(model, network, x)
        return mean_cross_entropy(logits, y), after

    return loss


def mean_cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Of logits with classes in the last axis, and of labels without it."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def step(
    task: Task, regularizer: Regularizer, optimizer: optax.GradientTransformation
) -> Program:
    """A training step, and what it starts from.

    Variables and the optimizer's state are donated and come out in the order in which
    they go in. Where variables have no values, neither has the state.
    """
    tx = regularizer.wrap(optimizer)

    def run(params, kept, state, x, y):
        def penalized(params):
            value, after = task.loss(regularizer.norm(params), kept, x, y)
            return value + regularizer.penalty(params), after

        grads, kept = jax.grad(penalized, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), kept, state

    params = task.variables["params"]
    kept = {name: v for name, v in task.variables.items() if name != "params"}
    abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    state = jax.eval_shape(tx.init, params) if abstract else tx.init(params)
    return Program(run, (params, kept, state, task.x, task.y), donated=(0, 1, 2))
