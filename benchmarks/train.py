"""Training a population: runs that share shapes are one compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import weightreg as wr
from benchmarks import models
from benchmarks.augment import MIXING, augment
from benchmarks.losses import CROSS_ENTROPY, Loss
from benchmarks.optimizers import Hyperparameters

CONSTANTS = "constants"  # the collection of variables that are never trained
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
    """What all runs share, on the device once.

    Attributes:
      x_train: Inputs to train on.
      x_eval: Inputs on which accuracy is measured after every epoch.
      constants: The network's variables that are never trained, such as word vectors.
      x_test: Inputs of `Population.test`, for runs that are not chosen by them.
      y_test: Their labels.
    """

    x_train: Any
    x_eval: Any
    constants: Mapping[str, Any] | None = None
    x_test: Any = None
    y_test: Any = None

    def variables(self) -> dict[str, Any]:
        """The constants as the network takes them."""
        return {CONSTANTS: dict(self.constants)} if self.constants else {}


class Labels(NamedTuple):
    """Labels of one run: noise differs between runs."""

    train: Any
    eval: Any


class Progress(NamedTuple):
    """Where a run is.

    Attributes:
      params: What is trained.
      stats: The network's other variables, such as statistics of batches.
      opt_state: The optimizer's.
      key: Data of the key that the examples are shuffled by.
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
      loss: What training lowers.
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
      pretrained: From a fresh network's variables to those that training begins with;
        None for the fresh ones.
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
    loss: Loss = CROSS_ENTROPY
    pretrained: Callable[[models.Variables], models.Variables] | None = None

    def logits(self, network: models.Variables, x: jax.Array) -> jax.Array:
        """What a network makes of inputs, in inference mode."""
        return self.loss.logits(models.logits(self.model, network, x))

    def init(self, hyper: Hyperparameters, params: Any) -> Any:
        """What is trained, from a fresh network's parameters."""
        return self.norm(hyper).init(params) if self.norm else params

    def fold(self, hyper: Hyperparameters, params: Any) -> Any:
        """What the network runs on."""
        return self.norm(hyper)(params) if self.norm else params

    def finished(
        self,
        hyper: Hyperparameters,
        params: Any,
        stats: models.Variables,
        arrays: Arrays,
    ) -> models.Variables:
        """What the network is once training is over.

        Statistics of batches lag behind the weights of one run more than behind those
        of another, and are of other weights where these have been finished. So they
        follow over some batches to train on, with weights at rest, whatever the method.
        Where inputs are files, they stay as they are.
        """
        params = self.fold(hyper, params)
        if self.finish:
            params = self.finish(hyper, params)
        constants, x = arrays.variables(), arrays.x_train
        if not stats or not isinstance(x, jax.Array | np.ndarray):
            return {"params": params, **stats, **constants}
        count = min(len(x) // self.batch, STATISTICS_BATCHES)
        batches = x[: count * self.batch].reshape(count, self.batch, *x.shape[1:])

        def follow(stats, batch):
            network = {"params": params, **stats, **constants}
            key = jax.random.key(0)  # of what is dropped
            return models.training_logits(self.model, network, batch, key)[1], None

        stats, _ = jax.lax.scan(follow, stats, batches)
        return {"params": params, **stats, **constants}


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
        self._training = training
        self._batches = arrays.x_train.shape[0] // training.batch
        expect_enough(training, arrays.x_train.shape[0])
        if mapping not in MAPPINGS:
            raise ValueError(
                f"mapping must be among {', '.join(MAPPINGS)}, not {mapping!r}."
            )
        self._mesh = Mesh(np.array(devices or jax.devices()), ("runs",))
        self._first = arrays.x_train[:1]
        self._constants = arrays.variables()
        self._arrays = jax.tree.map(self._share, arrays)
        self._start = self._mapped(self._start_one, mapping)
        self._train = self._mapped(self._train_one, mapping, donate=True)
        self._measure = self._mapped(self._measure_one, mapping)
        self._test = self._mapped(self._test_one, mapping)
        self._finish = self._mapped(self._finish_one, mapping)

    def start(self, seeds: list[int], hyper: list[dict[str, float]], labels: Labels):
        """Fresh runs; labels are stacked, one row a run."""
        self._runs = len(seeds)
        self._hyper = self._spread(
            {name: np.array([h[name] for h in hyper], np.float32) for name in hyper[0]}
        )
        self._labels = self._spread(labels)
        first = jax.tree.map(np.asarray, self._first)
        rows = [begin(self._training, s, first, self._constants) for s in seeds]
        variables, keys = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return self._start(
            self._spread(variables), self._spread(keys), self._hyper, self._arrays
        )

    def epoch(self, progress: Progress) -> tuple[Progress, Measured]:
        """One epoch of every run, and what is measured after it."""
        progress = self.train(progress)
        return progress, self.measure(progress)

    def train(self, progress: Progress) -> Progress:
        """One epoch of every run, of which nothing is measured."""
        return self._train(progress, self._labels, self._hyper, self._arrays)

    def measure(self, progress: Progress) -> Measured:
        """What every run is like after an epoch."""
        labels, hyper = self._labels, self._hyper
        return self.fetch(self._measure(progress, labels, hyper, self._arrays))

    def test(self, progress: Progress) -> np.ndarray:
        """Accuracy of every run on the test examples."""
        labels, hyper = self._labels, self._hyper
        return self.fetch(self._test(progress, labels, hyper, self._arrays))

    def networks(self, progress: Progress) -> list[models.Variables]:
        """What every run's network is: finished, with its statistics."""
        labels, hyper = self._labels, self._hyper
        stacked = self.fetch(self._finish(progress, labels, hyper, self._arrays))
        constants = jax.device_get(self._constants)
        return [
            {**jax.tree.map(lambda x, i=i: x[i], stacked), **constants}
            for i in range(self._runs)
        ]

    def fetch(self, tree: Any) -> Any:
        """Values of all runs on this host, wherever they are."""
        if jax.process_count() > 1:
            tree = multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(lambda x: np.asarray(x)[: self._runs], tree)

    def place(self, fresh: Progress, leaves: Sequence[np.ndarray]) -> Progress:
        """Runs that go on from what `fetch` gave of them, in place of fresh ones."""
        return self._spread(jax.tree.unflatten(jax.tree.structure(fresh), leaves))

    def _start_one(self, variables, key_data, hyper, arrays) -> Progress:
        del arrays
        stats = {name: v for name, v in variables.items() if name != "params"}
        params = self._training.init(hyper, variables["params"])
        opt_state = self._training.optimizer(hyper).init(params)
        return Progress(params, stats, opt_state, key_data)

    def _test_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        del labels
        network = self._training.finished(
            hyper, progress.params, progress.stats, arrays
        )

        def right(example):
            x, y = jax.tree.map(lambda a: a[None], example)
            return jnp.argmax(self._training.logits(network, x), -1)[0] == y[0]

        examples = arrays.x_test, arrays.y_test
        return jnp.mean(jax.lax.map(right, examples, batch_size=500))

    def _finish_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        del labels
        network = self._training.finished(
            hyper, progress.params, progress.stats, arrays
        )
        return {name: v for name, v in network.items() if name != CONSTANTS}

    def _train_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        tx = self._training.optimizer(hyper)
        constants = arrays.variables()
        one = functools.partial(train_step, self._training, tx, hyper)
        shuffle, key = jax.random.split(jax.random.wrap_key_data(progress.key))
        order = jax.random.permutation(shuffle, arrays.x_train.shape[0])
        size = self._training.batch
        batches = order[: self._batches * size].reshape(self._batches, size)

        def step(carry: tuple[Any, Any, Any], batch):
            x, y = arrays.x_train[batch], labels.train[batch]
            # A key that no other batch of the run has: it has no other first example.
            key = jax.random.fold_in(shuffle, batch[0])
            return one(*carry, x, y, key, constants), None

        carry = progress.params, progress.stats, progress.opt_state
        (params, stats, opt_state), _ = jax.lax.scan(step, carry, batches)
        return Progress(params, stats, opt_state, jax.random.key_data(key))

    def _measure_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        network = self._training.finished(
            hyper, progress.params, progress.stats, arrays
        )
        epsilon = self._training.epsilon
        logits_of = functools.partial(self._training.logits, network)

        def right(example):  # of the clean input, and of the attacked one
            x, y = jax.tree.map(lambda a: a[None], example)
            loss = functools.partial(example_loss, logits_of)
            inputs = [x] if epsilon is None else [x, wr.fgsm(loss, x, y, epsilon)]
            logits = logits_of(jnp.concatenate(inputs))
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
            key = jax.random.wrap_key_data(progress.key)
            fitted, gbr = sensitivity(logits_of, *first, key)
        distance = jnp.nan
        if self._training.distances:
            layers = self._training.distances(hyper, progress.params).values()
            distance = jnp.mean(jnp.stack([*layers]))
        return Measured(shares[0], attacked, energy, complexity, fitted, gbr, distance)

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

        def place(x):
            filled = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            return self._put(filled, PartitionSpec("runs"))

        return jax.tree.map(place, rows)

    def _share(self, x: Any) -> jax.Array:
        return self._put(np.asarray(x), PartitionSpec())

    def _put(self, x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """An array on the devices of all hosts, each of which has it whole."""
        sharding = NamedSharding(self._mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def expect_enough(training: Training, examples: int) -> None:
    """Refuses more than there are examples to train on."""
    for name in ("batch", "sensitivity"):
        if (count := getattr(training, name)) > examples:
            raise ValueError(
                f"{name} must be at most {examples}, the number of training examples, "
                f"but is {count}."
            )


def begin(
    training: Training,
    seed: int,
    x: jax.Array,
    constants: models.Variables | None = None,
) -> tuple[models.Variables, jax.Array]:
    """What a run begins with: a network as `initialize` gives it, or a trained one."""
    variables, key = initialize(training.model, seed, x, constants)
    if training.pretrained:
        variables = training.pretrained(variables)
    return variables, key


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def initialize(
    model: nn.Module,
    seed: int,
    x: jax.Array,
    constants: models.Variables | None = None,
) -> tuple[models.Variables, jax.Array]:
    """A fresh network, and the data of the key that shuffles the examples.

    The network is without the variables that are never trained; others may have sizes
    that go by theirs.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if constants:
        fresh = ["params", "batch_stats"]
        rngs = {"params": init_key}
        _, variables = model.apply(constants, x, rngs=rngs, mutable=fresh)
    else:
        variables = model.init(init_key, x)
    return variables, jax.random.key_data(key)


def example_loss(
    logits: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> jax.Array:
    """Cross-entropy of every example in inference mode, of shape (batch,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(x), y)


def sensitivity(
    logits: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array, key
) -> tuple[jax.Array, jax.Array]:
    """Accuracy, and the ``weightreg.gbr`` of each of `SENSITIVE`."""
    f = lambda x: logits(x[None])[0]  # noqa: E731
    known = functools.partial(wr.gbr, probes=PROBES, key=key, batch_size=100)
    several = [known(f, x).mean, known(wr.probabilities(f), x).mean]
    right = jax.lax.map(lambda x: jnp.argmax(f(x)), x, batch_size=500) == y
    own = wr.gbr(wr.label_probability(f), x, y, batch_size=100)
    return jnp.mean(right), jnp.stack([*several, own])


def train_step(
    training: Training,
    tx,
    hyper,
    params,
    stats,
    opt_state,
    x,
    y,
    key,
    constants: models.Variables = MappingProxyType({}),
):
    """One step. What is trained and its state come in and go out in one order.

    Donation needs that.
    """
    x, criterion = _criterion(training, x, y, jax.random.fold_in(key, 1))
    fixed = {**stats, **constants}
    if training.adversary:
        network = {"params": training.fold(hyper, params), **fixed}
        x = wr.pgd(
            lambda x, _: criterion(models.logits(training.model, network, x)),
            x,
            None,
            training.adversary,
            steps=ADVERSARY_STEPS,
            key=key,
        )
    dropout = jax.random.fold_in(key, 2)

    def loss(params):
        network = {"params": training.fold(hyper, params), **fixed}
        out, after = models.training_logits(training.model, network, x, dropout)
        return criterion(out).mean(), after

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state


def _criterion(training: Training, x, y, key):
    """Inputs as they are trained on, and the loss of outputs for them."""

    def own(outputs: jax.Array) -> jax.Array:
        return training.loss.of(outputs, y)

    if not training.augment:
        return x, own
    targets = jax.nn.one_hot(y, training.classes)
    x, targets = augment(training.augment, key, x, targets)
    if not set(training.augment) & set(MIXING):
        return x, own
    return x, functools.partial(optax.softmax_cross_entropy, labels=targets)


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
