"""Accuracy under attack that can be believed: several attacks, and the worst of them.

One attack alone overstates the robustness of a network that it happens to fail on, and
all that follow the network's own gradients fail together where those say nothing: they
are then "masked" (`Athalye et al., 2018 <https://arxiv.org/abs/1802.00420>`_). So every
example must withstand five attacks, one of which has never seen the network:

* ``fgsm``: one step up the cross-entropy.
* ``pgd``: many steps up the cross-entropy, from one random start.
* ``restarts``: that and further random starts.
* ``margin``: as many starts, up the margin ``max_{j != y} z_j - z_y`` of the logits,
  whose gradient is there also where softmax saturates.
* ``transfer``: the points that PGD finds on another network, best an unregularized one.

All stay within an L-infinity ball and [0, 1]. An example that is wrong on the clean
input withstands nothing: no attacker would change an input that is already misread.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import bdtrc

import weightreg as wr

ATTACKS = ("fgsm", "pgd", "restarts", "margin", "transfer")
CROSS_ENTROPY = ATTACKS[:3]
WHITE_BOX = ATTACKS[:4]

# What share sound white-box attacks may miss of what a transferred one breaks, and how
# unlikely chance must be to miss more. On digits all together miss none, those on the
# cross-entropy up to two of a hundred.
TOLERATED = 0.05
SIGNIFICANCE = 1e-3


class Network(NamedTuple):
    """What is attacked, or what attacks are transferred from.

    Attributes:
      logits: Function ``(params, x) -> (batch, classes)``, mapped over examples that
        make a batch each. The same object for all networks of an architecture: they
        then share compiled programs.
      params: Its parameters.
    """

    logits: Callable[[Any, jax.Array], jax.Array]
    params: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How hard to try.

    Attributes:
      steps: Steps of PGD, each of ``2.5 * epsilon / steps``.
      restarts: Random starts of ``restarts``, that of ``pgd`` among them, and of
        ``margin``.
      batch: Examples attacked at a time, which bounds memory; results do not depend on
        it but for rounding.
      seed: Of the random starts.
    """

    steps: int = 20
    restarts: int = 5
    batch: int = 500
    seed: int = 0

    def __post_init__(self):
        """Refuses what cannot be run."""
        for name, least in (("steps", 1), ("restarts", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, but is {getattr(self, name)}."
                )


def evaluate(
    network: Network,
    x: np.ndarray,
    y: np.ndarray,
    epsilon: float,
    settings: Settings | None = None,
    source: Network | None = None,
) -> dict[str, np.ndarray]:
    """Which examples withstand which attack.

    Args:
      network: What is attacked.
      x: Inputs in [0, 1], of shape (examples, ...).
      y: Labels, of shape (examples,).
      epsilon: Largest change of an entry of ``x``.
      settings: How hard to try.
      source: What the transferred attack is found on, not ``network`` itself; without
        it there is no such attack, and masked gradients go unnoticed.

    Returns:
      Booleans (examples,): ``clean``, whether the network is right on the clean input,
      then one array for each attack, and ``worst``, right on the clean input and under
      all attacks. `accuracies` makes numbers of them.

    Raises:
      ValueError: There are no inputs or they are not in [0, 1], labels are not one for
        each, or ``epsilon`` is negative or not finite.
    """
    task = _Task.of(network, x, y, settings, source)
    return _attack(task, epsilon, task.start())


def accuracies(right: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The fractions of examples that `evaluate` found right."""
    return {name: float(np.mean(found)) for name, found in right.items()}


def curve(
    network: Network,
    x: np.ndarray,
    y: np.ndarray,
    epsilons: Sequence[float],
    settings: Settings | None = None,
    source: Network | None = None,
) -> dict[str, list[float]]:
    """Accuracies over the strength of the attacks.

    What breaks within a ball is broken in every larger one, so that an example that an
    attack has broken counts as broken by it from there on, and is not attacked again.
    No accuracy ever rises, then, though the fast gradient sign method, which cannot
    stop short, by itself may miss at a larger radius what it has hit at a smaller one.

    Args:
      network: What is attacked.
      x: Inputs in [0, 1], of shape (examples, ...).
      y: Labels, of shape (examples,).
      epsilons: Radii, from small to large.
      settings: How hard to try.
      source: What the transferred attack is found on, if any.

    Returns:
      A list with one entry for each radius: ``epsilon``, ``clean``, each attack, and
      ``worst``.

    Raises:
      ValueError: ``epsilons`` do not increase, or as for `evaluate`.
    """
    if not all(a < b for a, b in itertools.pairwise(epsilons)):
        raise ValueError(f"epsilons must increase, but are {list(epsilons)}.")
    task = _Task.of(network, x, y, settings, source)
    right, rows = task.start(), []
    for epsilon in epsilons:
        right = _attack(task, epsilon, right)
        rows.append({"epsilon": float(epsilon)} | accuracies(right))
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def masked_gradients(right: Mapping[str, np.ndarray]) -> str | None:
    """A warning if a transferred attack finds what white-box attacks miss.

    Whatever a transferred attack breaks, an attack that knows the network breaks too,
    unless the network's gradients lead it astray. Of the examples broken by transfer,
    those that no white-box attack breaks are counted. More than 5 % of them is more
    than a working attack misses; that it is no chance is tested (binomial, one-sided,
    p < 0.001: from 3 of 3, 14 of 100, 74 of 1000). It does not matter how many
    others only the white-box attacks break: gradients may be masked around some
    examples and not around others.

    Args:
      right: From `evaluate`, with a ``source``.

    Returns:
      A sentence, or None. It tells apart masking of the cross-entropy alone, which
      ``margin`` and ``worst`` overcome, and masking that leaves no white-box attack.

    Raises:
      ValueError: There is no transferred attack to compare with.
    """
    if "transfer" not in right:
        raise ValueError("right must have 'transfer': evaluate with a source.")
    broken = right["clean"] & ~right["transfer"]
    for attacks, name, consequence in (
        (WHITE_BOX, "white-box", "and all figures may overstate robustness"),
        (CROSS_ENTROPY, "cross-entropy", "and 'margin' and 'worst' alone are sound"),
    ):
        missed = int(np.sum(broken & np.all([right[a] for a in attacks], axis=0)))
        count = int(np.sum(broken))
        if missed and bdtrc(missed - 1, count, TOLERATED) < SIGNIFICANCE:
            return (
                f"Gradients are masked, {consequence}: of {count} examples that an "
                f"attack transferred from another network breaks, {missed} withstand "
                f"all {name} attacks."
            )
    return None


class _Task(NamedTuple):
    network: Network
    source: Network | None
    x: np.ndarray
    y: np.ndarray
    settings: Settings

    @classmethod
    def of(cls, network, x, y, settings, source) -> "_Task":
        x, y = np.asarray(x), np.asarray(y)
        if not (x.ndim and x.size and np.all((x >= 0) & (x <= 1))):
            raise ValueError("x must be examples with all entries in [0, 1].")
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"y must be one label an example, of shape {x.shape[:1]}, but has "
                f"shape {y.shape}."
            )
        return cls(network, source, x, y, settings or Settings())

    @property
    def attacks(self) -> tuple[str, ...]:
        return ATTACKS if self.source else WHITE_BOX

    def start(self) -> dict[str, np.ndarray]:
        """Before all attacks an example is as good as it is on the clean input."""
        clean = _withstand("clean", self, 0.0, np.ones(len(self.x), bool))
        return dict.fromkeys(("clean", *self.attacks), clean)


def _attack(task: _Task, epsilon: float, right: dict[str, np.ndarray]):
    """Runs every attack on the examples that have withstood it so far."""
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be at least 0 and finite, but is {epsilon}.")
    found = {"clean": right["clean"]}
    for name in task.attacks:
        left = right[name]
        if name == "restarts":  # its first start is that of pgd
            left = left & found["pgd"]
        found[name] = _withstand(name, task, epsilon, left)
    return found | {"worst": np.all(list(found.values()), axis=0)}


def _withstand(name: str, task: _Task, epsilon: float, left: np.ndarray) -> np.ndarray:
    """The examples among ``left`` that withstand an attack, in batches."""
    settings, victim = task.settings, task.network
    guide = task.source if name == "transfer" and task.source else victim
    size = min(settings.batch, len(left))
    withstood, rows = np.zeros_like(left), np.flatnonzero(left)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        filled = np.resize(batch, size)  # a shorter one would be compiled anew
        right = _right_under(
            name if name in ("clean", "fgsm") else "pgd",
            victim.logits,
            guide.logits,
            victim.params,
            guide.params,
            np.float32(epsilon),  # a float would be another type than a NumPy number
            _Search.of(name, settings),
            filled,
            task.x[filled],
            task.y[filled],
        )
        withstood[batch] = np.asarray(right)[: len(batch)]
    return withstood


class _Search(NamedTuple):
    """How PGD searches, all traced: its programs take longest to compile."""

    loss: int
    steps: int
    restarts: int
    seed: int
    stream: int

    @classmethod
    def of(cls, name: str, settings: Settings) -> "_Search":
        loss = {"margin": _margin, "transfer": _cross_entropy}.get(name, _breaking)
        restarts = {"restarts": settings.restarts - 1, "margin": settings.restarts}
        return cls(
            loss=_LOSSES.index(loss),
            steps=settings.steps,
            restarts=restarts.get(name, 1),
            seed=settings.seed,
            stream=(*ATTACKS, "clean").index(name),
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _right_under(
    kind, victim_logits, guide_logits, victim, guide, epsilon, search, index, x, y
) -> jax.Array:
    """Whether the victim is right where the attack, guided by the guide, leads."""
    key = jax.random.fold_in(jax.random.key(search.seed), search.stream)

    # By itself, so that an example's random starts do not depend on its batch
    def one(index, x, y):
        x, y = x[None], y[None]
        own = jax.random.fold_in(key, index)
        logits = functools.partial(guide_logits, guide)
        attacked = _attacked(kind, logits, x, y, epsilon, search, own)
        return _is_right(victim_logits(victim, attacked), y)[0]

    return jax.vmap(one)(index, x, y)


def _attacked(kind, logits, x, y, epsilon, search, key) -> jax.Array:
    if kind == "clean":
        return x
    if kind == "fgsm":
        return wr.fgsm(lambda x, y: _cross_entropy(logits(x), y), x, y, epsilon)
    return wr.pgd(
        lambda x, y: jax.lax.switch(search.loss, _LOSSES, logits(x), y),
        x,
        y,
        epsilon,
        steps=search.steps,
        restarts=search.restarts,
        key=key,
    )


def _is_right(logits: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, -1) == y) & ~jnp.any(jnp.isnan(logits), -1)


def _breaking(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy, and infinity where the network is wrong.

    PGD keeps the point of the highest loss, and among many classes the cross-entropy
    may be higher at a point that is still right than at one that is wrong.
    """
    return jnp.where(_is_right(logits, y), _cross_entropy(logits, y), jnp.inf)


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    # softplus keeps what 1 - softmax rounds away in float32: beyond a margin of 17 the
    # usual form is zero, and its gradient no longer lowers the right logit
    others = _against(logits, y)
    return jax.nn.softplus(jax.nn.logsumexp(others, axis=-1))


def _margin(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.max(_against(logits, y), axis=-1)


# To be searched for points that break the network that is climbed, or another one: what
# has barely fooled the one would not fool the other
_LOSSES = (_breaking, _margin, _cross_entropy)


def _against(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The other classes' logits less the right one's, which itself is left out."""
    own = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    right = jnp.sum(jnp.where(own, logits, 0), axis=-1, keepdims=True)
    return jnp.where(own, -jnp.inf, logits - right)
