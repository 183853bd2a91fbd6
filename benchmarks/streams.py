"""Training on images that are read as they are needed: one run on all devices.

Every batch is spread over the devices, each of which has the whole network, and the
compiler lets them add up. While they work on a batch, threads of the host read the next
ones.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import weightreg as wr
from benchmarks import folders, models
from benchmarks.train import (
    SENSITIVE,
    Arrays,
    Labels,
    Measured,
    Training,
    begin,
    example_loss,
    expect_enough,
    sensitivity,
    train_step,
)


class Progress(NamedTuple):
    """Where a run is, as `benchmarks.train.Progress` is of a run with arrays.

    Attributes:
      params: What is trained.
      stats: The network's other variables, such as statistics of batches.
      opt_state: The optimizer's.
      steps: How many there were, which tells the epoch, its order and all crops.
    """

    params: Any
    stats: models.Variables
    opt_state: Any
    steps: jax.Array


class StreamedPopulation:
    """A run at a time, with the methods of `benchmarks.train.Population`.

    Args:
      training: What all runs share.
      arrays: Files in the place of inputs.
      size: Of the images, in pixels.
      devices: That batches are spread over, or ``None`` for all devices of the backend
        that JAX takes by default.

    Raises:
      ValueError: Batches cannot be spread, or there are too few examples.
    """

    def __init__(
        self,
        training: Training,
        arrays: Arrays,
        size: int,
        devices: Sequence[Any] | None = None,
    ):
        expect_enough(training, len(arrays.x_train))
        mesh = Mesh(np.array(devices or jax.devices()), ("examples",))
        _expect_spread(training.batch, mesh.size)
        self._training, self._arrays, self._size = training, arrays, size
        self._batches = len(arrays.x_train) // training.batch
        whole = NamedSharding(mesh, PartitionSpec())
        self._spread = NamedSharding(mesh, PartitionSpec("examples"))
        self._share = functools.partial(jax.device_put, device=whole)
        jit = functools.partial(jax.jit, out_shardings=whole)
        self._start = jit(self._start_one)
        self._step = jit(self._step_one, donate_argnums=0)
        self._network = jit(self._network_of)
        self._count = jit(self._count_right, static_argnums=3)
        self._look = jit(self._look_into)

    def start(self, seeds: list[int], hyper: list[dict[str, float]], labels: Labels):
        """A fresh run; all arguments have one entry."""
        (self._seed,), (rates,), arrays = seeds, hyper, self._arrays
        train, test = (rows[0] for rows in labels)
        self._train = dataclasses.replace(arrays.x_train, labels=train)
        self._eval = dataclasses.replace(arrays.x_eval, labels=test)
        self._hyper = self._share({k: np.float32(v) for k, v in rates.items()})
        first = jnp.zeros((1, self._size, self._size, 3))
        variables, key = begin(self._training, self._seed, first)
        self._key = self._share(key)
        return self._start(self._share(variables), self._hyper)

    def train(self, progress: Progress) -> Progress:
        """One epoch, of which nothing is measured."""
        epoch = int(progress.steps) // self._batches
        batches = folders.training_batches(
            self._train, self._training.batch, self._size, self._seed, epoch
        )
        step = lambda carry, x, y: self._step(carry, x, y, self._hyper, self._key)  # noqa: E731
        return self._folded(step, progress, batches)

    def test(self, progress: Progress) -> np.ndarray:
        """Accuracy on the test examples, of shape (1,)."""
        network = self._network(progress, self._hyper)
        return self._shares(network, self._arrays.x_test, None)

    def networks(self, progress: Progress) -> list[models.Variables]:
        """What the run's network is: finished, with its statistics."""
        return [self.fetch(self._network(progress, self._hyper))]

    def fetch(self, tree: Any) -> Any:
        """Values on this host."""
        return jax.device_get(tree)

    def place(self, fresh: Progress, leaves: Sequence[np.ndarray]) -> Progress:
        """A run that goes on from what `fetch` gave of it, in place of a fresh one."""
        return self._share(jax.tree.unflatten(jax.tree.structure(fresh), leaves))

    def _start_one(self, variables, hyper) -> Progress:
        stats = {name: v for name, v in variables.items() if name != "params"}
        params = self._training.init(hyper, variables["params"])
        opt_state = self._training.optimizer(hyper).init(params)
        return Progress(params, stats, opt_state, jnp.int32(0))

    def _step_one(self, progress: Progress, x, y, hyper, key) -> Progress:
        params, stats, opt_state, steps = progress
        key = jax.random.fold_in(jax.random.wrap_key_data(key), steps)
        tx = self._training.optimizer(hyper)
        params, stats, opt_state = train_step(
            self._training, tx, hyper, params, stats, opt_state, x, y, key
        )
        return Progress(params, stats, opt_state, steps + 1)

    def _network_of(self, progress: Progress, hyper) -> models.Variables:
        return self._training.finished(
            hyper, progress.params, progress.stats, self._arrays
        )

    def measure(self, progress: Progress) -> Measured:
        """What the run is like after an epoch."""
        network = self._network(progress, self._hyper)
        epsilon = self._training.epsilon
        shares = self._shares(network, self._eval, epsilon)
        attacked = np.nan if epsilon is None else shares[1]
        examples = None
        if count := self._training.sensitivity:
            examples = self._inspected, self._train.labels[:count]
        looked = self._look(network, progress.steps, self._key, examples)
        measured = Measured(shares[0], attacked, *looked, distance=np.nan)
        return Measured(*(np.asarray(value)[None] for value in measured))

    def _look_into(self, network, steps, key, examples) -> tuple[Any, ...]:
        """All that is measured but accuracy on the evaluation examples."""
        params = network["params"]
        energy, complexity = wr.log_weight_energy(params), wr.layer_complexity(params)
        if examples is None:
            return energy, complexity, jnp.nan, jnp.full(len(SENSITIVE), jnp.nan)
        logits_of, (x, y) = functools.partial(self._training.logits, network), examples
        key = jax.random.fold_in(jax.random.wrap_key_data(key), steps)
        return energy, complexity, *sensitivity(logits_of, x, y, key)

    @functools.cached_property
    def _inspected(self) -> jax.Array:
        """Training examples that sensitivity is measured on, on the devices once."""
        first = self._arrays.x_train[np.arange(self._training.sensitivity)]
        return self._share(folders.middles(first, self._size))

    def _shares(self, network, files: folders.Files, epsilon: float | None):
        """How many examples are recognized, and with a radius how many under FGSM."""
        batches = folders.evaluation_batches(files, self._training.batch, self._size)
        more = lambda right, x, y: right + self._count(network, x, y, epsilon)  # noqa: E731
        return self.fetch(self._folded(more, jnp.int32(0), batches)) / len(files)

    def _count_right(self, network, x, y, epsilon: float | None) -> jax.Array:
        logits_of = functools.partial(self._training.logits, network)
        loss = functools.partial(example_loss, logits_of)
        inputs = [x] if epsilon is None else [x, wr.fgsm(loss, x, y, epsilon)]
        return jnp.stack([jnp.sum(jnp.argmax(logits_of(x), -1) == y) for x in inputs])

    def _folded(
        self,
        step: Callable[[Any, jax.Array, jax.Array], Any],
        carry: Any,
        batches: Generator[folders.Batch],
    ) -> Any:
        """What steps make of a carry, one after another.

        A batch is on its way to the devices while these are busy with the one before,
        and no more than one, since each may be gigabytes.
        """
        with contextlib.closing(batches):  # which ends the threads
            for batch in batches:
                placed = jax.device_put(self._filled(*batch), self._spread)
                carry = step(jax.block_until_ready(carry), *placed)
        return carry

    def _filled(self, x: np.ndarray, y: np.ndarray) -> folders.Batch:
        """A batch that is smaller than others, with examples of no class."""
        if not (missing := self._training.batch - len(y)):
            return x, y
        x = np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return x, np.pad(y, (0, missing), constant_values=-1)


def _expect_spread(batch: int, devices: int) -> None:
    if jax.process_count() > 1:
        raise ValueError(
            "Images that are read as they are needed are for one process with all its "
            f"devices, but there are {jax.process_count()}: run the command without a "
            "coordinator."
        )
    if batch % devices:
        raise ValueError(
            f"batch must be divisible by {devices}, the number of devices, but is "
            f"{batch}: write --batch {batch // devices * devices or devices}, or let "
            "JAX see fewer devices."
        )
