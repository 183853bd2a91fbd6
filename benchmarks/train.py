"""Training a population: runs that share shapes are one compiled program."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import models
from benchmarks.methods import Hyperparameters, Method


class Arrays(NamedTuple):
    """Inputs that all runs share, on the device once."""

    x_train: jax.Array
    x_eval: jax.Array


class Labels(NamedTuple):
    """Labels of one run: noise differs between runs."""

    train: jax.Array
    eval: jax.Array


class Progress(NamedTuple):
    """Where a run is."""

    params: Any
    opt_state: Any
    key: jax.Array


class Population:
    """Runs of one method and network, mapped over seeds and hyperparameters.

    Args:
      model: The network.
      method: How it is trained.
      arrays: Inputs for training and evaluation.
      batch: Examples a step.
      mapping: ``"vmap"``, good on accelerators, or ``"devices"``: one run after the
        other on each device. On CPU cores the latter is faster, and its results are
        those of a run alone, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        arrays: Arrays,
        batch: int,
        mapping: str,
    ):
        self._model, self._method, self._arrays = model, method, arrays
        self._batch = batch
        self._batches = arrays.x_train.shape[0] // batch
        if not self._batches:
            raise ValueError(
                f"batch must be at most {arrays.x_train.shape[0]}, the number of "
                f"training examples, but is {batch}."
            )
        self._devices = jax.device_count() if mapping == "devices" else 1
        self._start = self._mapped(self._start_one, mapping)
        self._epoch = self._mapped(self._epoch_one, mapping, donate=True)

    def start(self, seeds: list[int], hyper: list[dict[str, float]], labels: Labels):
        """Fresh runs; labels are stacked, one row a run."""
        self._runs = len(seeds)
        self._hyper = self._spread(
            {name: np.array([h[name] for h in hyper], np.float32) for name in hyper[0]}
        )
        self._labels = self._spread(labels)
        rows = [initialize(self._model, s, self._arrays.x_train[:1]) for s in seeds]
        params, keys = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return self._start(
            self._spread(params), self._spread(keys), self._hyper, self._arrays
        )

    def epoch(self, progress: Progress) -> tuple[Progress, np.ndarray]:
        """One epoch of every run, and the evaluation accuracies (runs,)."""
        progress, accuracy = self._epoch(
            progress, self._labels, self._hyper, self._arrays
        )
        return progress, np.asarray(accuracy)[: self._runs]

    def params(self, progress: Progress) -> list[Any]:
        """The parameters of every run."""
        stacked = jax.device_get(progress.params)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self._runs)]

    def _start_one(self, params, key_data, hyper, arrays) -> Progress:
        del arrays
        opt_state = self._method.optimizer(hyper).init(params)
        return Progress(params, opt_state, jax.random.wrap_key_data(key_data))

    def _epoch_one(self, progress: Progress, labels: Labels, hyper, arrays: Arrays):
        tx = self._method.optimizer(hyper)
        shuffle, key = jax.random.split(progress.key)
        order = jax.random.permutation(shuffle, arrays.x_train.shape[0])
        batches = order[: self._batches * self._batch].reshape(self._batches, -1)

        def step(carry, batch):
            x, y = arrays.x_train[batch], labels.train[batch]
            params, opt_state = carry
            return train_step(self._model, tx, params, opt_state, x, y), None

        carry = progress.params, progress.opt_state
        (params, opt_state), _ = jax.lax.scan(step, carry, batches)
        logits = models.logits(self._model, params, arrays.x_eval)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels.eval)
        return Progress(params, opt_state, key), accuracy

    def _mapped(self, one, mapping: str, donate: bool = False):
        donated = (0,) if donate else ()
        if mapping == "vmap":
            many = jax.vmap(one, in_axes=(0, 0, 0, None))
            return jax.jit(many, donate_argnums=donated)
        if mapping != "devices":
            raise ValueError(f"mapping must be 'vmap' or 'devices', not {mapping!r}.")
        runs, shared = PartitionSpec("runs"), PartitionSpec()

        def many(*args):
            *mapped, arrays = args
            return jax.lax.map(lambda row: one(*row, arrays), tuple(mapped))

        sharded = jax.shard_map(
            many,
            mesh=self._mesh(),
            in_specs=(runs, runs, runs, shared),
            out_specs=runs,
            check_vma=False,  # runs never talk to each other
        )
        return jax.jit(sharded, donate_argnums=donated)

    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()[: self._devices]), ("runs",))

    def _spread(self, rows: Any) -> Any:
        """Puts rows of runs on the devices, the last run again to fill them up."""
        missing = -self._runs % self._devices
        sharding = NamedSharding(self._mesh(), PartitionSpec("runs"))

        def place(x):
            filled = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            return jax.device_put(filled, sharding)

        return jax.tree.map(place, rows)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def initialize(model: nn.Module, seed: int, x: jax.Array) -> tuple[Any, jax.Array]:
    """Fresh parameters, and the data of the key that shuffles the examples."""
    init_key, key = jax.random.split(jax.random.key(seed))
    return model.init(init_key, x)["params"], jax.random.key_data(key)


def example_loss(model: nn.Module, params: Any, x: jax.Array, y: jax.Array):
    """Cross-entropy of every example, of shape (batch,)."""
    logits = models.logits(model, params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def train_step(model, tx, params, opt_state, x, y):
    """One step. Parameters and state come first and in this order: see donation."""
    grads = jax.grad(lambda p: example_loss(model, p, x, y).mean())(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def make_step(model: nn.Module, method: Method, hyper: Hyperparameters, x: jax.Array):
    """A compiled step that can be timed, from ``(params, opt_state, x, y)``."""
    tx = method.optimizer(hyper)
    params, _ = initialize(model, 0, x[:1])
    step = jax.jit(functools.partial(train_step, model, tx), donate_argnums=(0, 1))
    return step, params, tx.init(params)
