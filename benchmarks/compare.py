"""The comparison: tune every method alike, then train fresh seeds and attack them."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import weightreg as wr
from benchmarks import data as data_module
from benchmarks import models
from benchmarks.cost import relative_times
from benchmarks.data import Dataset
from benchmarks.methods import METHODS, at_edge, trials
from benchmarks.record import environment, save
from benchmarks.train import Arrays, Labels, Population, example_loss, make_step

TUNING_SEED = 1_000_000  # far from the seeds of the final runs
NOISE_STREAM = 1
ATTACKED = 1000  # test examples, at most
PGD_STEPS = 20
BINS = 60

# Two draws of the noise to tune on, since held-out labels are noisy too. Digits are
# few: small batches. Cifar10's radius is the usual 8/255.
DEFAULTS = {
    "digits": {"epochs": 80, "batch": 32, "tuning_seeds": 2, "epsilon": 0.1},
    "mnist": {"epochs": 20, "batch": 128, "tuning_seeds": 2, "epsilon": 0.1},
    "cifar10": {"epochs": 20, "batch": 128, "tuning_seeds": 2, "epsilon": 8 / 255},
}

Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared."""

    dataset: str
    noise: float = 0.4
    seeds: int = 5
    epochs: int
    batch: int
    trials: int = 12
    tuning_seeds: int
    methods: tuple[str, ...] = ("none", "weight_decay", "l2", "volumization")
    epsilon: float
    mapping: str = "devices"
    data_dir: str | None = None

    @classmethod
    def of(cls, dataset: str, **given: Any) -> "Settings":
        """Settings with a data set's defaults for all that is not given or None."""
        if dataset not in DEFAULTS:
            raise ValueError(
                f"dataset must be among {', '.join(DEFAULTS)}, not {dataset!r}."
            )
        known = {name: value for name, value in given.items() if value is not None}
        return cls(dataset=dataset, **(DEFAULTS[dataset] | known))

    def __post_init__(self):
        """Refuses what cannot be run."""
        for name in ("seeds", "epochs", "batch", "trials", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, but is {getattr(self, name)}."
                )
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(
                f"methods must be among {', '.join(METHODS)}, not {', '.join(unknown)}."
            )
        if len(set(self.methods)) < max(len(self.methods), 1):
            raise ValueError(
                f"methods must be one or more, named once each, not {self.methods}."
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], but is {self.noise}.")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, but is {self.epsilon}.")

    @property
    def last(self) -> int:
        """How many epochs "last" averages: ten as the paper, or a fifth of few."""
        return min(10, max(1, self.epochs // 5))

    def ticks(self) -> int:
        """How often `run` will report: once an epoch of every population."""
        return 2 * self.epochs * len(self.methods)

    def command(self) -> str:
        """The command line that repeats the comparison."""
        names = (
            "noise",
            "seeds",
            "epochs",
            "batch",
            "trials",
            "tuning_seeds",
            "epsilon",
        )
        words = [f"python -m benchmarks compare --dataset {self.dataset}"]
        words += [f"--{n.replace('_', '-')} {getattr(self, n):.6g}" for n in names]
        words += [f"--methods {','.join(self.methods)} --mapping {self.mapping}"]
        return " ".join(words + (["--data-dir DATA"] if self.data_dir else []))


def run(settings: Settings, out: pathlib.Path, tick: Tick = lambda _: None) -> dict:
    """Runs a comparison and keeps ``out`` up to date with all that is finished.

    Args:
      settings: What to compare.
      out: JSON file, written anew after every method.
      tick: Called after each epoch of a population, with what it was.

    Returns:
      The content of the file.
    """
    data = data_module.load(settings.dataset, settings.data_dir)
    result = _header(settings, data)
    save(result, out)
    for name in settings.methods:
        entry: dict[str, Any] = {"label": METHODS[name].label}
        entry["tuning"] = tune(name, data, settings, tick)
        entry |= final(name, entry["tuning"]["chosen"], data, settings, tick)
        result["results"][name] = entry
        save(result, out)
    result["relative_step_time"] = step_times(data, settings, result["results"])
    result["complete"] = True
    save(result, out)
    return result


def tune(name: str, data: Dataset, settings: Settings, tick: Tick) -> dict:
    """Trains all trials at once and chooses by accuracy on held-out noisy labels."""
    method = METHODS[name]
    tried = trials(method, settings.trials)
    train, held_out = data_module.split(data)
    arrays = Arrays(
        jnp.asarray(data.x_train[train]), jnp.asarray(data.x_train[held_out])
    )
    seeds = [TUNING_SEED + i for i in range(settings.tuning_seeds)]
    noisy = [_noisy(data, settings, seed) for seed in seeds]
    rows = lambda part: np.repeat([n[part] for n in noisy], len(tried), axis=0)  # noqa: E731
    labels = Labels(jnp.asarray(rows(train)), jnp.asarray(rows(held_out)))
    curves, _ = _train(
        name,
        models.make(data.name, data.classes),
        arrays,
        labels,
        np.repeat(seeds, len(tried)),
        tried * len(seeds),
        settings,
        tick,
    )
    scores = curves[:, -settings.last :].mean(1).reshape(len(seeds), -1).mean(0)
    best = int(np.argmax(scores))
    return {
        "trials": [
            {"hyperparameters": h, "score": _round(s)}
            for h, s in zip(tried, scores, strict=True)
        ],
        "chosen": tried[best],
        "score": _round(scores[best]),
        "at_edge": at_edge(method, tried[best]),
    }


def final(
    name: str, chosen: dict[str, float], data: Dataset, settings: Settings, tick: Tick
) -> dict:
    """Trains fresh seeds with the chosen hyperparameters, then tests and attacks."""
    seeds = list(range(settings.seeds))
    train, _ = data_module.split(data)
    arrays = Arrays(jnp.asarray(data.x_train[train]), jnp.asarray(data.x_test))
    labels = Labels(
        jnp.asarray([_noisy(data, settings, seed)[train] for seed in seeds]),
        jnp.tile(data.y_test, (len(seeds), 1)),
    )
    model = models.make(data.name, data.classes)
    hyper = [chosen] * len(seeds)
    curves, params = _train(name, model, arrays, labels, seeds, hyper, settings, tick)
    last = curves[:, -settings.last :].mean(1)
    metrics = {"best": curves.max(1), "last": last} | attack(params, data, settings)
    return {
        "test_accuracy": [[_round(a) for a in curve] for curve in curves],
        "metrics": {
            metric: {
                "seeds": [_round(v) for v in values],
                "mean": _round(np.mean(values)),
                "std": _round(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            }
            for metric, values in metrics.items()
        },
        "weights": weights(name, chosen, params[0]),
    }


def attack(
    params: list[Any], data: Dataset, settings: Settings
) -> dict[str, np.ndarray]:
    """Accuracy of each network under FGSM, under PGD, and where it withstands both."""
    model = models.make(data.name, data.classes)
    subset = np.random.default_rng(0).permutation(len(data.y_test))[:ATTACKED]
    x, y = jnp.asarray(data.x_test[subset]), jnp.asarray(data.y_test[subset])
    rows = [_attacked(model, settings.epsilon, p, x, y) for p in params]
    return dict(zip(("fgsm", "pgd", "both"), np.array(rows).T, strict=True))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def _attacked(model, epsilon, params, x, y) -> list[jax.Array]:
    loss = lambda x, y: example_loss(model, params, x, y)  # noqa: E731
    fgsm = wr.fgsm(loss, x, y, epsilon)
    key = jax.random.key(0)
    pgd = wr.pgd(loss, x, y, epsilon, steps=PGD_STEPS, key=key)
    hits = [jnp.argmax(models.logits(model, params, a), -1) == y for a in (fgsm, pgd)]
    return [jnp.mean(h) for h in (*hits, hits[0] & hits[1])]


def weights(name: str, chosen: dict[str, float], params: Any) -> dict[str, dict]:
    """A histogram of every layer's weights, and where its walls are."""
    volume = METHODS[name].volume
    leaves = jax.tree.leaves(params)
    walls = jax.tree.leaves(volume(chosen)(params)) if volume else []
    layers = {}
    for i, layer in enumerate(wr.weight_layers(params)):
        counts, edges = np.histogram(np.asarray(leaves[layer.index]), BINS)
        layers[layer.path] = {
            "counts": counts.tolist(),
            "edges": [float(f"{e:.6g}") for e in edges],
            "wall": float(walls[i]) if volume else None,
        }
    return layers


def step_times(data: Dataset, settings: Settings, results: dict) -> dict[str, float]:
    """Time of a training step relative to one without regularization."""
    model = models.make(data.name, data.classes)
    first = slice(settings.batch)
    x, y = jnp.asarray(data.x_train[first]), jnp.asarray(data.y_train[first])
    chosen = {"none": {"learning_rate": 1e-3}}  # timed first, even if not asked for
    chosen |= {name: entry["tuning"]["chosen"] for name, entry in results.items()}
    steps, carries = {}, {}
    for name, hyper in chosen.items():
        step, *carries[name] = make_step(model, METHODS[name], hyper, x)

        def several(carry, step=step):  # one step alone is too short to time
            for _ in range(5):
                carry = step(*carry, x, y)
            return carry

        steps[name] = several
    times = relative_times(steps, carries)
    return {name: times[name] for name in results}


def _train(name, model, arrays, labels, seeds, hyper, settings, tick):
    """Accuracy curves (runs, epochs), and the parameters in the end."""
    population = Population(
        model, METHODS[name], arrays, settings.batch, settings.mapping
    )
    progress = population.start(seeds, hyper, labels)
    curves = []
    for _ in range(settings.epochs):
        progress, accuracy = population.epoch(progress)
        curves.append(accuracy)
        tick(METHODS[name].label)
    return np.stack(curves, axis=1), population.params(progress)


def _noisy(data: Dataset, settings: Settings, seed: int) -> np.ndarray:
    # A stream of its own: the split's would corrupt exactly the examples it picks.
    rng = np.random.default_rng([NOISE_STREAM, seed])
    return data_module.corrupt(data.y_train, settings.noise, data.classes, rng)


def _round(x: Any) -> float:
    return round(float(x), 5)


def _header(settings: Settings, data: Dataset) -> dict:
    shown = dataclasses.asdict(settings) | {"last": settings.last}
    del shown["data_dir"]  # a path of this machine; data.source says what was read
    return {
        "complete": False,
        "command": settings.command(),
        "settings": shown,
        "fixed": {
            "model": models.describe(models.make(data.name, data.classes)),
            "pgd_steps": PGD_STEPS,
            "attacked_examples": min(ATTACKED, len(data.y_test)),
            "tuning_seeds": [TUNING_SEED + i for i in range(settings.tuning_seeds)],
            "seeds": list(range(settings.seeds)),
        },
        "data": {
            "source": data.source,
            "train": len(data_module.split(data)[0]),
            "validation": len(data_module.split(data)[1]),
            "test": len(data.y_test),
        },
        **environment(),
        "results": {},
    }
