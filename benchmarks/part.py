"""A comparison's data, populations and networks, made when they are first needed."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from benchmarks import data as data_module
from benchmarks import labels as labels_module
from benchmarks import models, record, robustness
from benchmarks.cells import Run
from benchmarks.data import Dataset
from benchmarks.folders import Streamed
from benchmarks.losses import LOSSES, Loss
from benchmarks.methods import METHODS, Space
from benchmarks.models import Variables
from benchmarks.settings import Settings, split_of, test_examples, trained_on
from benchmarks.streams import StreamedPopulation
from benchmarks.train import CONSTANTS, Arrays, Labels, Population, Training, begin

NOISE_STREAM = 1


class Part:
    """What all runs of a comparison share.

    Args:
      settings: What is compared.
      data: What it is compared on.
    """

    def __init__(self, settings: Settings, data: Dataset):
        tested = test_examples(data, settings)
        x_test, y_test = data.x_test[tested], data.y_test[tested]
        data = dataclasses.replace(data, x_test=x_test, y_test=y_test)
        self.settings, self.data = settings, data
        model = settings.network(data.classes)
        loss = LOSSES[settings.loss](data.classes)
        self.logits = functools.partial(network_logits, model, loss)
        self._populations: dict[tuple[str, str], Any] = {}
        self.given = data.y_train
        if settings.labels is not None:
            source = f"{settings.labels_file}:{settings.labels}"
            self.given = labels_module.read(source, data)

    @property
    def width(self) -> int | None:
        """How many runs are trained at once; None for all that share a program."""
        if isinstance(self.data, Streamed):
            return 1
        return None if self.settings.mapping == "vmap" else jax.device_count()

    def spaces(self) -> dict[str, Space]:
        """Where each method that is tuned is searched."""
        names = [n for n in self.settings.methods if METHODS[n].fixed is None]
        sized = [name for name in names if METHODS[name].log_size]
        params = self._untrained(sized[0]) if sized else None
        return {
            name: METHODS[name].whole_space(self.settings.optimizer, params)
            for name in names
        }

    def start(self, runs: list[Run]) -> tuple[Any, Any]:
        """The population of some runs of one program, and where it starts."""
        population = self._population(runs[0].program)
        tuning = runs[0].role == "trial"
        seeds = [run.seed for run in runs]
        train = trained_on(self.data, self.settings, tuning)
        noisy = [self.noisy(seed) for seed in seeds]
        measured = (
            [row[split_of(self.data, self.settings)[1]] for row in noisy]
            if tuning
            else [self.data.y_test] * len(runs)
        )
        labels = Labels(np.stack([row[train] for row in noisy]), np.stack(measured))
        hyper = [dict(run.hyperparameters) for run in runs]
        return population, population.start(seeds, hyper, labels)

    def noisy(self, seed: int) -> np.ndarray:
        """The labels of all training examples, as a run of that seed is told them."""
        # A stream of its own: the split's would corrupt exactly the examples it picks.
        rng = np.random.default_rng([NOISE_STREAM, seed])
        noise, classes = self.settings.noise, self.data.classes
        return data_module.corrupt(self.given, noise, classes, rng)

    def source(self, out: pathlib.Path) -> robustness.Network:
        """The network that attacks are transferred from, as it was kept.

        Raises:
          FileNotFoundError: It was not kept here.
        """
        kept = load_network(network_file(out, "source"))
        return robustness.Network(self.logits, kept)

    def _population(self, program: tuple[str, str]) -> Any:
        """Of the last program only, since each holds the data on the devices."""
        if program not in self._populations:
            role, method = program
            training = self.settings.training(method, self.data, role == "trial")
            self._populations = {program: self._populated(training, self._arrays(role))}
        return self._populations[program]

    def _populated(self, training: Training, arrays: Arrays) -> Any:
        if isinstance(self.data, Streamed):
            return StreamedPopulation(training, arrays, self.data.size)
        return Population(training, arrays, self.settings.mapping)

    def _arrays(self, role: str) -> Arrays:
        data, tuning = self.data, role == "trial"
        x_train = data.x_train[trained_on(data, self.settings, tuning)]
        if not tuning:
            return Arrays(x_train, data.x_test, self._constants())
        held_out = data.x_train[split_of(data, self.settings)[1]]
        test = data.x_test, data.y_test
        return Arrays(x_train, held_out, self._constants(), *test)

    def _constants(self) -> Mapping[str, Any] | None:
        return dict(self.data.constants) or None

    def _untrained(self, method: str) -> Variables:
        training = self.settings.training(method, self.data)
        first = jnp.asarray(self.data.test_inputs(np.arange(1)))
        constants = self._constants()
        known = {CONSTANTS: constants} if constants else None
        return begin(training, 0, first, known)[0]["params"]


def network_logits(
    model: Any, loss: Loss, network: Variables, x: jax.Array
) -> jax.Array:
    """What a network makes of inputs, as it is attacked."""
    return loss.logits(models.logits(model, network, x))


def network_file(out: pathlib.Path, name: str) -> pathlib.Path:
    """Where a network is kept beside a comparison's file, as long as it is needed."""
    return out.with_name(f"{out.stem}.{name}.network")


def keep_network(network: Variables, out: pathlib.Path, name: str) -> None:
    """Writes a network.

    Raises:
      OSError: The file cannot be written.
    """
    record.write(serialization.to_bytes(network), network_file(out, name))


def load_network(file: pathlib.Path) -> Any:
    """A network that `keep_network` wrote.

    Raises:
      FileNotFoundError: It was not kept here.
    """
    return serialization.msgpack_restore(file.read_bytes())
