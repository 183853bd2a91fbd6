"""Training a population: runs that share shapes are one compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import weightreg as wr
from benchmarks import models
from benchmarks.augment import augment
from benchmarks.optimizers import Hyperparameters

ADVERSARY_STEPS = 3  # of PGD in every step of adversarial training
# What the sensitivity of is measured; the authors of GBR do not say.
SENSITIVE = ("logits", "probabilities", "label probability")
STATISTICS_BATCHES = 40  # after which all but 1.5 % of a batch normalization's are new
PROBES = 2  # random projections an example, where there are several outputs
# How the runs of one device are mapped.
MAPPINGS = {
    "devices": jax.lax.map,
    "vmap": lambda one, rows: jax.vmap(one)(rows),
}


class Arrays(NamedTuple):
    """Inputs that all runs share, on the device once."""

    x_train: jax.Array
    x_eval: jax.Array


class Labels(NamedTuple):
    """Labels of one run: noise differs between runs."""

    train: jax.Array
    eval: jax.Array


class Progress(NamedTuple):
    """Where a run is.

    Attributes:
      params: What is trained.
      stats: The network's other variables, such as statistics of batches.
      opt_state: The optimizer's.
      key: That the examples are shuffled by.
    """

    params: Any
    stats: models.Variables
    opt_state: Any
    key: jax.Array


class Measured(NamedTuple):
    """What is measured after an epoch; arrays of shape (runs,).

    Attributes:
      accuracy: On the evaluation examples.
      attacked: Likewise, under FGSM, if that is asked for.
      log_energy: Of the weights, see ``weightreg.log_weight_energy``.
      complexity: Of the layers, see ``weightreg.layer_complexity``.
      training_accuracy: On training examples that are not augmented, as they are
        labelled, if sensitivity is asked for.
      gbr: Likewise, the ``weightreg.gbr`` of each of `SENSITIVE`; (runs, 3).
      distance: Of the weights that are trained from their levels, if they have some:
        the mean over layers, see ``weightreg.level_distances``.
    """

    accuracy: Any
    attacked: Any
    log_energy: Any
    complexity: Any
    training_accuracy: Any
    gbr: Any
    distance: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs of a population share.

    Attributes:
      model: The network.
      classes: Number of classes.
      optimizer: From hyperparameters, which may be traced, to an optimizer.
      batch: Examples a step.
      adversary: Radius of the L-infinity ball in which PGD moves the examples of every
        step; 0 for ordinary training.
      epsilon: Radius of the FGSM that evaluation examples are attacked with; None for
        no attack.
      norm: From hyperparameters to a map from what is trained to what the network
        runs on, whose method ``init`` says what is trained; None for no map.
      finish: From hyperparameters and what the network runs on, to what becomes of it
        after training, which is what is measured; None for no change.
      distances: From hyperparameters and what is trained, to how far each layer is from
        what becomes of it, if that is to be measured.
      augment: Names of augmentations.
      sensitivity: Training examples on which to measure the sensitivity to inputs.
    """

    model: nn.Module
    classes: int
    optimizer: Callable[[Hyperparameters], optax.GradientTransformation]
    batch: int
    adversary: float = 0.0
    epsilon: float | None = None
    norm: Callable[[Hyperparameters], Any] | None = None
    finish: Callable[[Hyperparameters, Any], Any] | None = None
    distances: Callable[[Hyperparameters, Any], dict[str, jax.Array]] | None = None
    augment: tuple[str, ...] = ()
    sensitivity: int = 0

    def init(self, hyper: Hyperparameters, params: Any) -> Any:
        """What is trained, from a fresh network's parameters."""
        return self.norm(hyper).init(params) if self.norm else params

    def fold(self, hyper: Hyperparameters, params: Any) -> Any:
        """What the network runs on."""
        return self.norm(hyper)(params) if self.norm else params

    def finished(
        self, hyper: Hyperparameters, params: Any, stats: models.Variables, x: jax.Array
    ) -> models.Variables:
        """What the network is once training is over.

        Statistics of batches are those of other weights, if these have been finished,
        and follow them over some batches of ``x``.
        """
        folded = self.fold(hyper, params)
        if not self.finish:
            return {"params": folded, **stats}
        finished = self.finish(hyper, folded)
        if not stats:
            return {"params": finished}
        count = min(len(x) // self.batch, STATISTICS_BATCHES)
        batches = x[: count * self.batch].reshape(count, self.batch, *x.shape[1:])

        def follow(stats, batch):
            network = {"params": finished, **stats}
            return models.training_logits(self.model, network, batch)[1], None

        stats, _ = jax.lax.scan(follow, stats, batches)
        return {"params": finished, **stats}


class Population:
    """Runs of one method and network, mapped over seeds and hyperparameters.

    Args:
      training: What the runs share.
      arrays: Inputs for training and evaluation.
      mapping: How the runs of a device are mapped: ``"vmap"``, all at once, good on
        accelerators, or ``"devices"``, one after the other. On CPU cores the latter is
        faster, and its results are those of a run alone, bit for bit.
      devices: Where the runs are spread, or ``None`` for all devices of the backend
        that JAX takes by default.
    """

    def __init__(
        self,
        training: Training,
        arrays: Arrays,
        mapping: str,
        devices: Sequence[Any] | None = None,
    ):
        self._training, self._arrays = training, arrays
        self._batches = arrays.x_train.shape[0] // training.batch
        if not self._batches:
            raise ValueError(
                f"batch must be at most {arrays.x_train.shape[0]}, the number of "
                f"training examples, but is {training.batch}."
            )
        if training.sensitivity > arrays.x_train.shape[0]:
            raise ValueError(
                f"sensitivity must be at most {arrays.x_train.shape[0]}, the number of "
                f"training examples, but is {training.sensitivity}."
            )
        if mapping not in MAPPINGS:
            raise ValueError(
                f"mapping must be among {', '.join(MAPPINGS)}, not {mapping!r}."
            )
        self._mesh = Mesh(np.array(devices or jax.devices()), ("runs",))
        self._start = self._mapped(self._start_one, mapping)
        self._epoch = self._mapped(self._epoch_one, mapping, donate=True)

    def start(self, seeds: list[int], hyper: list[dict[str, float]], labels: Labels):
        """Fresh runs; labels are stacked, one row a run."""
        self._runs = len(seeds)
        self._hyper = self._spread(
            {name: np.array([h[name] for h in hyper], np.float32) for name in hyper[0]}
        )
        self._labels = self._spread(labels)
        model = self._training.model
        rows = [initialize(model, s, self._arrays.x_train[:1]) for s in seeds]
        variables, keys = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return self._start(
            self._spread(variables), self._spread(keys), self._hyper, self._arrays
        )

    def epoch(self, progress: Progress) -> tuple[Progress, Measured]:
        """One epoch of every run, and what is measured after it."""
        progress, measured = self._epoch(
            progress, self._labels, self._hyper, self._arrays
        )
        return progress, jax.tree.map(lambda x: np.asarray(x)[: self._runs], measured)

    def networks(self, progress: Progress) -> list[models.Variables]:
        """What every run's network is: finished, with its statistics."""
        finished = jax.jit(jax.vmap(self._training.finished, in_axes=(0, 0, 0, None)))
        stacked = jax.device_get(
            finished(self._hyper, progress.params, progress.stats, self._arrays.x_train)
        )
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self._runs)]

    def _start_one(self, variables, key_data, hyper, arrays) -> Progress:
        del arrays
        stats = {name: v for name, v in variables.items() if name != "params"}
        params = self._training.init(hyper, variables["params"])
        opt_state = self._training.optimizer(hyper).init(params)
        return Progress(params, stats, opt_state, jax.random.wrap_key_data(key_data))

    def _epoch_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        tx = self._training.optimizer(hyper)
        one = functools.partial(train_step, self._training, tx, hyper)
        shuffle, key = jax.random.split(progress.key)
        order = jax.random.permutation(shuffle, arrays.x_train.shape[0])
        size = self._training.batch
        batches = order[: self._batches * size].reshape(self._batches, size)

        def step(carry: tuple[Any, Any, Any], batch):
            x, y = arrays.x_train[batch], labels.train[batch]
            # A key that no other batch of the run has: it has no other first example.
            key = jax.random.fold_in(shuffle, batch[0])
            return one(*carry, x, y, key), None

        carry = progress.params, progress.stats, progress.opt_state
        (params, stats, opt_state), _ = jax.lax.scan(step, carry, batches)
        network = self._training.finished(hyper, params, stats, arrays.x_train)
        measured = self._measure(network, arrays, labels, shuffle)
        if self._training.distances:
            layers = self._training.distances(hyper, params).values()
            measured = measured._replace(distance=jnp.mean(jnp.stack([*layers])))
        return Progress(params, stats, opt_state, key), measured

    def _measure(self, network, arrays: Arrays, labels: Labels, key) -> Measured:
        model, epsilon = self._training.model, self._training.epsilon

        def right(example):  # of the clean input, and of the attacked one
            x, y = jax.tree.map(lambda a: a[None], example)
            loss = lambda x, y: example_loss(model, network, x, y)  # noqa: E731
            inputs = [x] if epsilon is None else [x, wr.fgsm(loss, x, y, epsilon)]
            logits = models.logits(model, network, jnp.concatenate(inputs))
            return jnp.argmax(logits, -1) == y

        # In batches, since all images at once are gigabytes in a convolution.
        examples = arrays.x_eval, labels.eval
        shares = jnp.mean(jax.lax.map(right, examples, batch_size=500), axis=0)
        attacked = jnp.nan if epsilon is None else shares[1]
        params = network["params"]
        energy, complexity = wr.log_weight_energy(params), wr.layer_complexity(params)
        fitted, gbr = jnp.nan, jnp.full(len(SENSITIVE), jnp.nan)
        if count := self._training.sensitivity:
            first = arrays.x_train[:count], labels.train[:count]
            fitted, gbr = sensitivity(model, network, *first, key)
        return Measured(
            shares[0], attacked, energy, complexity, fitted, gbr, distance=jnp.nan
        )

    def _mapped(self, one, mapping: str, donate: bool = False):
        """A program for all runs, each device with as many of them."""
        runs, shared = PartitionSpec("runs"), PartitionSpec()

        def many(*args):
            *rows, arrays = args
            return MAPPINGS[mapping](lambda row: one(*row, arrays), tuple(rows))

        sharded = jax.shard_map(
            many,
            mesh=self._mesh,
            in_specs=(runs, runs, runs, shared),
            out_specs=runs,
            check_vma=False,  # runs never talk to each other
        )
        return jax.jit(sharded, donate_argnums=(0,) if donate else ())

    def _spread(self, rows: Any) -> Any:
        """Puts rows of runs on the devices, the last run again to fill them up."""
        missing = -self._runs % self._mesh.size
        sharding = NamedSharding(self._mesh, PartitionSpec("runs"))

        def place(x):
            filled = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            return jax.device_put(filled, sharding)

        return jax.tree.map(place, rows)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def initialize(
    model: nn.Module, seed: int, x: jax.Array
) -> tuple[models.Variables, jax.Array]:
    """A fresh network, and the data of the key that shuffles the examples."""
    init_key, key = jax.random.split(jax.random.key(seed))
    return model.init(init_key, x), jax.random.key_data(key)


def example_loss(
    model: nn.Module, variables: models.Variables, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Cross-entropy of every example in inference mode, of shape (batch,)."""
    logits = models.logits(model, variables, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def sensitivity(
    model: nn.Module, network: models.Variables, x: jax.Array, y: jax.Array, key
) -> tuple[jax.Array, jax.Array]:
    """Accuracy, and the ``weightreg.gbr`` of each of `SENSITIVE`."""
    f = lambda x: models.logits(model, network, x[None])[0]  # noqa: E731
    known = functools.partial(wr.gbr, probes=PROBES, key=key, batch_size=100)
    several = [known(f, x).mean, known(wr.probabilities(f), x).mean]
    right = jax.lax.map(lambda x: jnp.argmax(f(x)), x, batch_size=500) == y
    own = wr.gbr(wr.label_probability(f), x, y, batch_size=100)
    return jnp.mean(right), jnp.stack([*several, own])


def train_step(training: Training, tx, hyper, params, stats, opt_state, x, y, key):
    """One step. What is trained and its state come in and go out in one order.

    Donation needs that.
    """
    if training.augment:
        targets = jax.nn.one_hot(y, training.classes)
        x, targets = augment(training.augment, jax.random.fold_in(key, 1), x, targets)
        criterion = functools.partial(optax.softmax_cross_entropy, labels=targets)
    else:
        criterion = functools.partial(
            optax.softmax_cross_entropy_with_integer_labels, labels=y
        )
    if training.adversary:
        network = {"params": training.fold(hyper, params), **stats}
        x = wr.pgd(
            lambda x, _: criterion(models.logits(training.model, network, x)),
            x,
            None,
            training.adversary,
            steps=ADVERSARY_STEPS,
            key=key,
        )

    def loss(params):
        network = {"params": training.fold(hyper, params), **stats}
        logits, after = models.training_logits(training.model, network, x)
        return criterion(logits).mean(), after

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state


def make_step(training: Training, hyper: Hyperparameters, x: jax.Array):
    """A compiled step that can be timed, and what it starts from.

    It maps ``(params, stats, opt_state, x, y, key)`` to the first three of them.
    """
    tx = training.optimizer(hyper)
    variables, _ = initialize(training.model, 0, x[:1])
    stats = {name: v for name, v in variables.items() if name != "params"}
    params = training.init(hyper, variables["params"])
    one = functools.partial(train_step, training, tx, hyper)
    return jax.jit(one, donate_argnums=(0, 1, 2)), params, stats, tx.init(params)
