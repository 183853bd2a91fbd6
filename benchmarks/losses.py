"""The losses that networks are trained with.

To add one, add an entry to `LOSSES`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import optax

import weightreg as wr


@dataclasses.dataclass(frozen=True)
class Loss:
    """What training lowers, and how a network's outputs are read.

    Attributes:
      of: From outputs ``(batch, classes)`` and labels ``(batch,)`` to the loss of each
        example.
      logits: From outputs to logits, the largest of which tells the class.
    """

    of: Callable[..., jax.Array]
    logits: Callable[[jax.Array], jax.Array]


def _as_they_are(outputs: jax.Array) -> jax.Array:
    return outputs


CROSS_ENTROPY = Loss(optax.softmax_cross_entropy_with_integer_labels, _as_they_are)


def _generalized(classes: int) -> Loss:
    """Zhang and Sabuncu's, at their q of 0.7."""
    del classes
    return Loss(wr.generalized_cross_entropy, _as_they_are)


def _max_mahalanobis(classes: int) -> Loss:
    """Pang et al.'s, on the outputs as features: as many as there are classes."""
    centers = wr.max_mahalanobis(classes, classes)
    return Loss(centers, centers.logits)


LOSSES: Mapping[str, Callable[[int], Loss]] = {
    "cross_entropy": lambda classes: CROSS_ENTROPY,
    "lq": _generalized,
    "mmc": _max_mahalanobis,
}
