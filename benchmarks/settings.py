"""What is compared: the settings of a comparison, checked."""

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import data as data_module
from benchmarks import models, robustness
from benchmarks.augment import AUGMENTATIONS, MIXING
from benchmarks.data import DATASETS, Dataset
from benchmarks.losses import LOSSES
from benchmarks.methods import BASES, METHODS
from benchmarks.train import MAPPINGS, Training

# What a data set has a default of its own for.
DEFAULTS = ("model", "epochs", "batch", "tuning_seeds", "epsilon", "attacked")

# Where the learning rate is divided by ten, in shares of all steps.
DROPS = {
    "constant": (),
    "steps": (0.3, 0.6, 0.9),
    "thirds": (1 / 3, 2 / 3),
    "half": (1 / 2,),
}

# What layers compute in; whatever is kept from step to step is float32.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Whole numbers, and the least of each. A start of PGD alone says little.
COUNTS = {
    "seeds": 1,
    "epochs": 1,
    "batch": 1,
    "examples": 1,
    "trials": 1,
    "tuning_seeds": 1,
    "attacked": 0,
    "attack_steps": 1,
    "restarts": 2,
    "sensitivity": 0,
    "tested": 1,
    "source_epochs": 1,
    "resize": 1,
}
UNLESS_NONE = (
    "examples",
    "tested",
    "source_epochs",
    "resize",
)  # counts that need not be given
RADII = ("epsilon", "adversarial")  # of balls around inputs
CHOICES = {
    "model": models.MODELS,
    "optimizer": BASES,
    "schedule": DROPS,
    "dtype": DTYPES,
    "loss": LOSSES,
    "tune_for": ("accuracy", "fgsm"),
    "mapping": MAPPINGS,
}
# Commands do not say these, which are newer than many of them.
UNSAID = (
    ("schedule", "constant"),
    ("sensitivity", 0),
    ("dtype", "float32"),
    ("loss", "cross_entropy"),
    ("whole", False),
    ("pretrained", False),
)
# Where things are and run, which is no part of what is compared.
PLACES = {"mapping", "data_dir", "labels_file"}
LISTS = ("augment", "methods", "deploy", "epsilons")  # settings that are several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared.

    Those that say more than their names:

    Attributes:
      labels: Name of the labels that people gave, see ``benchmarks/labels.py``, which
        are wrong at times; none beside theirs is then made wrong.
      labels_file: Where these are.
      whole: Whether final runs train on all examples. Tuning holds out a fifth.
      tested: How many test examples accuracy is measured on, at most.
      epsilons: Further radii of the attacks.
      attacked: How many test examples are attacked; 0 for no attacks.
      source_epochs: Of the network that attacks are transferred from; None for as many
        as the others train.
      resize: Height and width in pixels that images are scaled to before the network,
        which attacks go through; None for as they are.
      pretrained: Whether networks begin with trained weights that are published.
    """

    dataset: str
    noise: float = 0.4
    labels: str | None = None
    labels_file: str | None = None
    seeds: int = 5
    epochs: int
    batch: int
    trials: int = 40
    tuning_seeds: int
    methods: tuple[str, ...] = ("none", "weight_decay", "l2", "volumization", "weissi")
    model: str
    optimizer: str = "adam"
    schedule: str = "constant"
    dtype: str = "float32"
    loss: str = "cross_entropy"
    augment: tuple[str, ...] = ()
    deploy: tuple[str, ...] = ()
    adversarial: float = 0.0
    sensitivity: int = 0
    tune_for: str = "accuracy"
    examples: int | None = None
    whole: bool = False
    tested: int | None = None
    epsilon: float
    epsilons: tuple[float, ...] = ()
    attacked: int
    attack_steps: int = 20
    restarts: int = 3
    source_epochs: int | None = None
    resize: int | None = None
    pretrained: bool = False
    mapping: str = "devices"
    data_dir: str | None = None

    @classmethod
    def of(cls, dataset: str, **given: Any) -> "Settings":
        """Settings with a data set's defaults for all that is not given or None."""
        if dataset not in DATASETS:
            raise ValueError(
                f"dataset must be among {', '.join(DATASETS)}, not {dataset!r}."
            )
        known = {name: value for name, value in given.items() if value is not None}
        default = {name: getattr(DATASETS[dataset], name) for name in DEFAULTS}
        return cls(dataset=dataset, **(default | known))

    def __post_init__(self):
        """Refuses what cannot be run."""
        self._check_numbers()
        for name, known in CHOICES.items():
            if getattr(self, name) not in list(known):
                raise ValueError(
                    f"{name} must be among {', '.join(known)}, not "
                    f"{getattr(self, name)!r}."
                )
        if unknown := set(self.augment) - set(AUGMENTATIONS):
            raise ValueError(
                f"augment must be among {', '.join(AUGMENTATIONS)}, not "
                f"{', '.join(unknown)}."
            )
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(
                f"methods must be among {', '.join(METHODS)}, not {', '.join(unknown)}."
            )
        self._check_methods()
        self._check_loss()
        self._check_attacks()
        self._check_images()
        self._check_streamed()
        if unknown := set(self.deploy) - set(self.methods):
            raise ValueError(
                f"deploy must be among methods, but {', '.join(unknown)} is not."
            )
        if len(set(self.deploy)) < len(self.deploy):
            raise ValueError(f"deploy must be named once each, not {self.deploy}.")
        if self.deploy and METHODS[self.deploy[0]].levels:
            raise ValueError(
                "deploy must begin with a network in float32, which the others are "
                f"compared to, not with {self.deploy[0]}."
            )
        if len(set(self.methods)) < max(len(self.methods), 1):
            raise ValueError(
                f"methods must be one or more, named once each, not {self.methods}."
            )

    def _check_numbers(self) -> None:
        """Refuses numbers out of range, such as NaN, which is in none."""
        for name, least in COUNTS.items():
            count = getattr(self, name)
            if name in UNLESS_NONE and count is None:
                continue
            if not (isinstance(count, int) and count >= least):
                raise ValueError(
                    f"{name} must be at least {least} and a whole number, but is "
                    f"{count}."
                )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], but is {self.noise}.")
        if self.labels is not None and self.noise:
            raise ValueError(
                f"noise must be 0 where labels are given, which are {self.labels}, but "
                f"is {self.noise}."
            )
        for name, radius in [
            *((name, getattr(self, name)) for name in RADII),
            *(("epsilons", radius) for radius in self.epsilons),
        ]:
            if not 0 <= radius < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, but is {radius}."
                )

    def _check_loss(self) -> None:
        """Refuses losses of labels that are not whole."""
        own = {loss for m in self.methods if (loss := METHODS[m].loss)}
        losses = {self.loss, *own}
        if (mixing := set(self.augment) & set(MIXING)) and losses != {"cross_entropy"}:
            raise ValueError(
                f"augment has {', '.join(sorted(mixing))}, which mixes labels: loss "
                f"must be cross_entropy, not {', '.join(sorted(losses))}."
            )

    def _check_attacks(self) -> None:
        """Refuses attacks on what is no point of [0, 1], and what no attack needs."""
        if not self.attacked and (self.epsilons or self.source_epochs):
            raise ValueError(
                "epsilons and source_epochs must be left out where attacked is 0, but "
                f"are {self.epsilons} and {self.source_epochs}."
            )
        if DATASETS[self.dataset].kind != "text":
            return
        for name, meant in (
            ("attacked", 0),
            ("adversarial", 0),
            ("sensitivity", 0),
            ("tune_for", "accuracy"),
        ):
            if (value := getattr(self, name)) != meant:
                raise ValueError(
                    f"{name} must be {meant} for {self.dataset}, since words cannot be "
                    f"moved by a little, but is {value}."
                )

    def _check_images(self) -> None:
        """Refuses what only images, or some networks, have."""
        info = DATASETS[self.dataset]
        if self.resize is not None and info.kind != "images":
            raise ValueError(
                f"resize is for images, which {self.dataset} has none of, but is "
                f"{self.resize}."
            )
        trained = [name for name, m in models.MODELS.items() if m.pretrained]
        if self.pretrained and self.model not in trained:
            raise ValueError(
                f"pretrained needs trained weights: model must be among "
                f"{', '.join(trained)}, not {self.model}."
            )
        if self.pretrained and info.shape[2:] != (3,):
            raise ValueError(
                "pretrained networks take images of three channels, but those of "
                f"{self.dataset} have shape {info.shape}."
            )

    def _check_streamed(self) -> None:
        """Refuses what needs all inputs as arrays where these are read as needed."""
        if not DATASETS[self.dataset].streamed:
            return
        refused = {
            "methods": [name for name in self.methods if METHODS[name].levels],
            "deploy": self.deploy,
            "mapping": [self.mapping] if self.mapping != "devices" else [],
        }
        for name, values in refused.items():
            if values:
                raise ValueError(
                    f"{name} has {', '.join(values)}, which needs inputs as arrays: "
                    f"leave it out. Those of {self.dataset} are files that are read as "
                    "they are needed, for a network at a time."
                )

    @property
    def radii(self) -> tuple[float, ...]:
        """All radii of attacks, without repetition, the main one first."""
        return tuple(dict.fromkeys((self.epsilon, *self.epsilons)))

    def _check_methods(self) -> None:
        """Refuses methods that this network or optimizer would put at a loss."""
        normalized = [n for n, model in models.MODELS.items() if model.normalized]
        for name in self.methods:
            method = METHODS[name]
            if method.norm and method.normed and self.model not in normalized:
                raise ValueError(
                    f"methods has {name}, which needs a normalization after every "
                    f"layer: model must be among {', '.join(normalized)}, not "
                    f"{self.model}."
                )
            if method.fixed and self.optimizer not in method.fixed_for:
                raise ValueError(
                    f"methods has {name}, whose settings are for "
                    f"{' and '.join(method.fixed_for)}: optimizer must be among these, "
                    f"not {self.optimizer}."
                )

    @property
    def last(self) -> int:
        """How many epochs "last" averages: ten as the paper, or a fifth of few."""
        return min(10, max(1, self.epochs // 5))

    def name(self) -> str:
        """What results are called, which is the same for the same comparison.

        Words tell some settings. All others that are not the data set's defaults are
        in a hash of eight digits, but for where data lie and how runs are spread over
        devices: these are no part of what is compared.
        """
        default = Settings.of(self.dataset)
        words = [self.dataset, f"noise{round(100 * self.noise)}"]
        words += [self.model] * (self.model != default.model)
        words += [self.optimizer] * (self.optimizer != default.optimizer)
        words += [self.schedule] * (self.schedule != default.schedule)
        words += [self.dtype] * (self.dtype != default.dtype)
        words += self.augment
        words += ["adversarial"] * (self.adversarial > 0)
        told = {"dataset", "model", "optimizer", "schedule", "dtype", "augment"}
        told |= PLACES
        if self.noise == round(100 * self.noise) / 100:
            told.add("noise")
        untold = {}
        for name in {field.name for field in dataclasses.fields(self)} - told:
            if (value := getattr(self, name)) != getattr(default, name):
                # Equal numbers are one setting: 1 and 1.0 are written alike.
                untold[name] = float(value) if isinstance(value, int) else value
        if untold:
            text = json.dumps(untold, sort_keys=True)
            words.append(hashlib.sha256(text.encode()).hexdigest()[:8])
        return "-".join(words)

    def ticks(self) -> int:
        """How often a run that finds nothing finished reports: once each epoch."""
        tuned = sum(not METHODS[name].fixed for name in self.methods)
        finals = self.seeds * len(self.methods)
        trained = tuned * self.trials * self.tuning_seeds + finals
        source = (self.source_epochs or self.epochs) * (self.attacked > 0)
        return self.epochs * trained + source

    def attacks(self) -> robustness.Settings:
        """How hard networks are attacked in the end."""
        return robustness.Settings(steps=self.attack_steps, restarts=self.restarts)

    def network(self, classes: int) -> nn.Module:
        """What is trained and attacked."""
        return models.make(self.model, classes, DTYPES[self.dtype], self.resize)

    def training(self, method: str, data: Dataset, tuning: bool = False) -> Training:
        """How runs of a method are trained, and what is measured meanwhile."""
        attacked = tuning and self.tune_for == "fgsm"
        chosen = METHODS[method]
        loss = LOSSES[chosen.loss or self.loss](data.classes)
        optimizer = functools.partial(
            chosen.build,
            base=self.optimizer,
            output=models.MODELS[self.model].output,
            shrink=self._shrink(data, tuning),
            epoch=self._steps(data, tuning),
        )
        return Training(
            model=self.network(data.classes),
            classes=data.classes,
            loss=loss,
            optimizer=optimizer,
            batch=self.batch,
            adversary=self.adversarial,
            epsilon=self.epsilon if attacked else None,
            norm=chosen.norm,
            finish=chosen.finish if chosen.levels else None,
            distances=chosen.distances if chosen.levels else None,
            augment=self.augment,
            sensitivity=0 if tuning else self.sensitivity,
            pretrained=(
                models.MODELS[self.model].pretrained if self.pretrained else None
            ),
        )

    def _shrink(self, data: Dataset, tuning: bool) -> optax.Schedule | None:
        """What the learning rate is multiplied by at each step, if not by 1."""
        if not (drops := DROPS[self.schedule]):
            return None
        steps = self._steps(data, tuning) * self.epochs
        return optax.piecewise_constant_schedule(
            1.0, {round(share * steps): 0.1 for share in drops}
        )

    def _steps(self, data: Dataset, tuning: bool) -> int:
        """Steps of an epoch."""
        return len(trained_on(data, self, tuning)) // self.batch

    def command(self) -> str:
        """The command line that repeats the comparison."""
        words = ["python -m benchmarks compare"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in {*PLACES, *LISTS, "labels"} or value is None:
                continue
            if (field.name, value) in UNSAID:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {value}")
        for name in LISTS:
            if value := getattr(self, name):
                words.append(f"--{name} {','.join(map(str, value))}")
        words += [f"--labels LABELS:{self.labels}"] * (self.labels is not None)
        words += ["--data-dir DATA"] * (self.data_dir is not None)
        return " ".join(words)


def split_of(data: Dataset, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training examples, no more than asked for, and held-out ones."""
    train, held_out = data_module.split(data)
    return train[: settings.examples], held_out


def trained_on(data: Dataset, settings: Settings, tuning: bool) -> np.ndarray:
    """Positions of the examples that runs train on."""
    train, held_out = data_module.split(data)
    if settings.whole and not tuning:
        train = np.concatenate([train, held_out])
    return train[: settings.examples]


def test_examples(data: Dataset, settings: Settings) -> np.ndarray:
    """Positions of the test examples, no more than asked for, of all classes."""
    if settings.tested is None:
        return np.arange(len(data.y_test))
    return np.random.default_rng(0).permutation(len(data.y_test))[: settings.tested]
