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
from benchmarks import deploy as deploy_module
from benchmarks import models, record, robustness
from benchmarks.data import Dataset
from benchmarks.environment import environment
from benchmarks.methods import BASES, METHODS, Method, Space, at_edge, trials
from benchmarks.models import Variables
from benchmarks.settings import Settings, split_of
from benchmarks.timing import relative_times
from benchmarks.train import (
    ADVERSARY_STEPS,
    PROBES,
    SENSITIVE,
    Arrays,
    Labels,
    Measured,
    Population,
    example_loss,
    initialize,
    make_step,
)

TUNING_SEED = 1_000_000  # far from the seeds of the final runs
SOURCE_SEED = 2_000_000  # of the network that attacks are transferred from
NOISE_STREAM = 1
BINS = 60
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of attacks in plots, in units of epsilon

Tick = Callable[[str], None]


def run(
    settings: Settings,
    out: pathlib.Path,
    tick: Tick = lambda _: None,
    mark: dict | None = None,
    partial: pathlib.Path | None = None,
) -> dict:
    """Runs a comparison and writes it to ``out`` when it is complete.

    Until then, what is finished stands in a file of this run alone, so that whatever
    ends a run, and whoever else runs the same, a complete ``out`` stays whole. Of two
    runs that complete it, the later one's stands.

    Args:
      settings: What to compare.
      out: JSON file.
      tick: Called after each epoch of a population, with what it was.
      mark: What else the file is to say, such as the experiment it belongs to.
      partial: JSON file for what is finished, written anew after every method and
        gone in the end; by default a new name beside ``out``.

    Returns:
      The content of the file.

    Raises:
      ValueError: The data cannot be compared on with these settings, or ``out`` holds a
        comparison of others.
      OSError: Data cannot be read, or the result not be written.
    """
    data = data_module.load(settings.dataset, settings.data_dir)
    result = _header(settings, data) | (mark or {})
    record.refuse_another(result["settings"], out, result["data"])
    partial = partial or record.partial(out)
    record.save(result, partial)
    try:
        _measure(settings, data, result, partial, tick)
        result["complete"] = True
        record.save(result, out)
    except BaseException:
        if not result["results"]:  # nothing is finished that could be kept
            partial.unlink(missing_ok=True)
        raise
    partial.unlink(missing_ok=True)
    return result


def _measure(
    settings: Settings, data: Dataset, result: dict, partial: pathlib.Path, tick: Tick
) -> None:
    """Adds to a result what is measured, and keeps what is finished in a file."""
    source = _source(data, settings, tick)
    kept = {}
    for name in settings.methods:
        entry: dict[str, Any] = {"label": METHODS[name].label}
        entry["tuning"] = tune(name, data, settings, tick)
        chosen = entry["tuning"]["chosen"]
        found, networks = final(name, chosen, data, settings, source, tick)
        result["results"][name] = entry | found
        if name in settings.deploy:
            kept[name] = chosen, networks
        record.save(result, partial)
    if kept:
        result["deployed"] = deploy(kept, data, settings)
        record.save(result, partial)
    result["relative_step_time"] = step_times(data, settings, result["results"])
    record.save(result, partial)


def tune(name: str, data: Dataset, settings: Settings, tick: Tick) -> dict:
    """Trains all trials at once and chooses by held-out examples, labels noisy."""
    method = METHODS[name]
    if method.fixed:
        chosen = dict(method.fixed)
        return {"trials": [], "chosen": chosen, "score": None, "at_edge": []}
    space = _space(method, data, settings)
    tried = trials(space, settings.trials)
    train, held_out = split_of(data, settings)
    seeds = [TUNING_SEED + i for i in range(settings.tuning_seeds)]
    noisy = [_noisy(data, settings, seed) for seed in seeds]
    rows = lambda part: np.repeat([n[part] for n in noisy], len(tried), axis=0)  # noqa: E731
    measured, _ = _train(
        settings.training(name, data, tuning=True),
        Arrays(jnp.asarray(data.x_train[train]), jnp.asarray(data.x_train[held_out])),
        Labels(jnp.asarray(rows(train)), jnp.asarray(rows(held_out))),
        np.repeat(seeds, len(tried)),
        tried * len(seeds),
        settings,
        lambda: tick(method.label),
    )
    by = {"accuracy": measured.accuracy, "fgsm": measured.attacked}
    curves = by[settings.tune_for]
    scores = curves[:, -settings.last :].mean(1).reshape(len(seeds), -1).mean(0)
    best = int(np.argmax(scores))
    return {
        "trials": [
            {"hyperparameters": h, "score": _round(s)}
            for h, s in zip(tried, scores, strict=True)
        ],
        "chosen": tried[best],
        "score": _round(scores[best]),
        "at_edge": at_edge(space, tried[best]),
    }


def final(
    name: str,
    chosen: dict[str, float],
    data: Dataset,
    settings: Settings,
    source: robustness.Network,
    tick: Tick,
) -> tuple[dict, list[Variables]]:
    """Trains fresh seeds with the chosen hyperparameters, then tests and attacks."""
    seeds = list(range(settings.seeds))
    measured, networks = _final_runs(
        name, chosen, data, settings, seeds, lambda: tick(METHODS[name].label)
    )
    curves = measured.accuracy
    last = curves[:, -settings.last :].mean(1)
    attacked, warnings = attack(networks, data, settings, source)
    metrics = {"best": curves.max(1), "last": last} | attacked
    known = {}
    if METHODS[name].levels:
        known["level_distance"] = measured.distance
    if settings.sensitivity:
        gbr = {f"gbr of {f}": measured.gbr[..., i] for i, f in enumerate(SENSITIVE)}
        metrics |= {name: values[:, -1] for name, values in gbr.items()}
        known |= {"training_accuracy": measured.training_accuracy, **gbr}
    entry = {
        "test_accuracy": _rounded(curves),
        "log_energy": _rounded(measured.log_energy),
        "complexity": _rounded(measured.complexity),
        **{name: _rounded(values) for name, values in known.items()},
        "metrics": {
            metric: {
                "seeds": [_round(v) for v in values],
                "mean": _round(np.mean(values)),
                "std": _round(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            }
            for metric, values in metrics.items()
        },
        "warnings": warnings,
        "strength": strength(networks[0], data, settings, source),
        "gradients": gradients(networks, data, settings),
        "weights": weights(name, chosen, networks[0]["params"]),
    }
    return entry, networks


def deploy(
    kept: dict[str, tuple[dict[str, float], list[Variables]]],
    data: Dataset,
    settings: Settings,
) -> dict[str, dict]:
    """Accuracy, bytes and times of trained networks in the forms they can be run in."""
    # Each form says what it computes in, whatever the network was trained in.
    model, x = models.make(settings.model, data.classes), jnp.asarray(data.x_test)
    forms = {}
    for name, (chosen, networks) in kept.items():
        method = METHODS[name]
        hyper: Any = {k: np.float32(v) for k, v in chosen.items()}  # as in training
        own = deploy_module.FLOATS
        if method.levels:
            own = deploy_module.packed_forms(method.levels, method.walls(hyper))
        for form in own:
            forms[f"{name}: {form.label}"] = method.label, form, networks
    found = deploy_module.measure(
        model, {key: (form, many[0]) for key, (_, form, many) in forms.items()}, x
    )
    for key, (label, form, networks) in forms.items():
        logits = [deploy_module.logits(model, form, n, x) for n in networks]
        hits = [np.mean(rows.argmax(-1) == data.y_test) for rows in logits]
        found[key] |= {"method": label, "accuracy": [_round(share) for share in hits]}
        if form.of_bits:
            same = (deploy_module.same_logits(model, form, n, x) for n in networks)
            found[key]["same_logits"] = all(same)
    return found


def attack(
    networks: list[Variables],
    data: Dataset,
    settings: Settings,
    source: robustness.Network,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Accuracy of each network under each attack, and warnings of masked gradients."""
    x, y = _attacked_examples(data, settings)
    found = [
        robustness.evaluate(
            robustness.Network(source.logits, network),
            x,
            y,
            settings.epsilon,
            settings.attacks(),
            source,
        )
        for network in networks
    ]
    rows = [robustness.accuracies(f) for f in found]
    metrics = {a: np.array([row[a] for row in rows]) for a in rows[0] if a != "clean"}
    warned = [(seed, robustness.masked_gradients(f)) for seed, f in enumerate(found)]
    return metrics, [f"Seed {seed}: {text}" for seed, text in warned if text]


def strength(
    network: Variables, data: Dataset, settings: Settings, source: robustness.Network
) -> dict[str, list[float | None]]:
    """Accuracy of one network over the strength of attacks."""
    x, y = _attacked_examples(data, settings)
    epsilons = [settings.epsilon * s for s in STRENGTHS] if settings.epsilon else [0.0]
    attacked = robustness.Network(source.logits, network)
    rows = robustness.curve(attacked, x, y, epsilons, settings.attacks(), source)
    return {name: [_round(v) for v in values] for name, values in rows.items()}


def gradients(
    networks: list[Variables], data: Dataset, settings: Settings
) -> dict[str, list]:
    """A histogram of the norms of input gradients, over test examples and seeds."""
    model = settings.network(data.classes)
    x, y = _attacked_examples(data, settings)
    norms = np.concatenate([_gradient_norms(model, n, x, y) for n in networks])
    counts, edges = _histogram(np.log10(np.maximum(norms, 1e-20)))
    return {"counts": counts, "log10_edges": edges}


@functools.partial(jax.jit, static_argnums=0)
def _gradient_norms(model, network, x, y) -> jax.Array:
    def loss(x, y):
        return example_loss(model, network, x[None], y[None])[0]

    return wr.input_gradient_norms(loss, x, y, batch_size=100)


def weights(name: str, chosen: dict[str, float], params: Any) -> dict[str, dict]:
    """A histogram of every layer's weights, and where its walls are."""
    volume = METHODS[name].volume
    leaves = jax.tree.leaves(params)
    tree = volume(chosen)(params) if volume else {}
    walls = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    layers = {}
    for layer in wr.weight_layers(params):
        counts, edges = _histogram(leaves[layer.index])
        layers[layer.path] = {
            "counts": counts,
            "edges": edges,
            "wall": float(walls[layer.index]) if volume else None,
        }
    return layers


def step_times(data: Dataset, settings: Settings, results: dict) -> dict[str, float]:
    """Time of a training step relative to one without regularization."""
    first = slice(settings.batch)
    x, y = jnp.asarray(data.x_train[first]), jnp.asarray(data.y_train[first])
    key = jax.random.key(0)
    # Timed first, even if not asked for.
    chosen = {"none": {"learning_rate": BASES[settings.optimizer].usual}}
    chosen |= {name: entry["tuning"]["chosen"] for name, entry in results.items()}
    steps, carries = {}, {}
    for name, hyper in chosen.items():
        training = settings.training(name, data)
        step, *carries[name] = make_step(training, hyper, x)

        def several(carry, step=step):  # one step alone is too short to time
            for _ in range(5):
                carry = step(*carry, x, y, key)
            return carry

        steps[name] = several
    times = relative_times(steps, carries, seconds=60)
    return {name: times[name].ratio for name in results}


def _source(data: Dataset, settings: Settings, tick: Tick) -> robustness.Network:
    """An unregularized network, trained like the others, to transfer attacks from."""
    hyper = {"learning_rate": BASES[settings.optimizer].usual}
    seeds = [SOURCE_SEED]
    _, (network,) = _final_runs(
        "none", hyper, data, settings, seeds, lambda: tick("a network to attack with")
    )
    model = settings.network(data.classes)
    return robustness.Network(functools.partial(models.logits, model), network)


def _space(method: Method, data: Dataset, settings: Settings) -> Space:
    """Where a method's hyperparameters are searched."""
    model = settings.network(data.classes)
    variables, _ = initialize(model, TUNING_SEED, jnp.asarray(data.x_train[:1]))
    return method.whole_space(settings.optimizer, variables["params"])


def _final_runs(name, hyper, data, settings, seeds, tick):
    """Runs on noisy training labels, tested on the test examples."""
    train, _ = split_of(data, settings)
    labels = Labels(
        jnp.asarray([_noisy(data, settings, seed)[train] for seed in seeds]),
        jnp.tile(data.y_test, (len(seeds), 1)),
    )
    arrays = Arrays(jnp.asarray(data.x_train[train]), jnp.asarray(data.x_test))
    training = settings.training(name, data)
    hypers = [hyper] * len(seeds)
    return _train(training, arrays, labels, seeds, hypers, settings, tick)


def _train(
    training, arrays, labels, seeds, hyper, settings, tick
) -> tuple[Measured, list[Variables]]:
    """What is measured, (runs, epochs), and the networks in the end."""
    population = Population(training, arrays, settings.mapping)
    progress = population.start(seeds, hyper, labels)
    rows = []
    for _ in range(settings.epochs):
        progress, measured = population.epoch(progress)
        rows.append(measured)
        tick()
    stacked = jax.tree.map(lambda *epochs: np.stack(epochs, axis=1), *rows)
    return stacked, population.networks(progress)


def _attacked_examples(data: Dataset, settings: Settings):
    subset = np.random.default_rng(0).permutation(len(data.y_test))
    subset = subset[: settings.attacked]
    return data.x_test[subset], data.y_test[subset]


def _noisy(data: Dataset, settings: Settings, seed: int) -> np.ndarray:
    # A stream of its own: the split's would corrupt exactly the examples it picks.
    rng = np.random.default_rng([NOISE_STREAM, seed])
    return data_module.corrupt(data.y_train, settings.noise, data.classes, rng)


def _histogram(values: Any) -> tuple[list[int], list[float]]:
    """Counts and edges; what has diverged is in no bin."""
    known = np.asarray(values)
    counts, edges = np.histogram(known[np.isfinite(known)], BINS)
    return counts.tolist(), [float(f"{e:.6g}") for e in edges]


def _round(x: Any) -> float | None:
    """For the record: five digits, counted from the first one of small numbers.

    JSON has no infinities, nor NaN.
    """
    if not np.isfinite(x):
        return None
    return float(f"{x:.5g}") if abs(x) < 1e-3 else round(float(x), 5)


def _rounded(curves: np.ndarray) -> list[list[float | None]]:
    return [[_round(x) for x in curve] for curve in curves]


def _header(settings: Settings, data: Dataset) -> dict:
    shown = dataclasses.asdict(settings) | {"last": settings.last}
    del shown["data_dir"]  # a path of this machine; data.source says what was read
    return {
        "format": record.FORMAT,
        "complete": False,
        "command": settings.command(),
        "settings": shown,
        "fixed": {
            "model": models.describe(settings.network(data.classes)),
            "adversary_steps": ADVERSARY_STEPS,
            "probes": PROBES,
            "tuning_seeds": [TUNING_SEED + i for i in range(settings.tuning_seeds)],
            "seeds": list(range(settings.seeds)),
            "source_seed": SOURCE_SEED,
        },
        "data": {
            "source": data.source,
            "train": len(split_of(data, settings)[0]),
            "validation": len(split_of(data, settings)[1]),
            "test": len(data.y_test),
            "sha256": data.digest(),
        },
        **environment(),
        "results": {},
    }
