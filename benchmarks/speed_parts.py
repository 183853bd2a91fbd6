"""The parts of `benchmarks.speed`: programs that take turns, column by column."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import weightreg as wr
from benchmarks import (
    deploy,
    models,
    plain,
    programs,
    train,
    training,
    transformer,
    trees,
)
from benchmarks.networks import MLP
from benchmarks.programs import STEPS, Program
from benchmarks.sizes import Sizes
from benchmarks.timing import Timing, relative_times
from benchmarks.training import Task

SEED = 0
CLASSES = 10
# What a tree of a thousand leaves is stepped with: each takes minutes to compile.
FEW = ("adam", "chain(adam, volumize)", "volumized(adam)", "chain(add_weissi, adam)")
PROBES = (2, 8)
Column = dict[str, Timing]


def optimizers(sizes: Sizes) -> dict[str, Column]:
    """Steps called one by one, and repeated in one program, where no host waits."""
    columns = {
        f"{tree}, one by one": called(tree, STEPS, sizes) for tree in sizes.called
    }
    columns |= {
        f"{tree}, {sizes.steps} in one program": looped(tree, STEPS, sizes)
        for tree in sizes.looped
    }
    if sizes.many:
        name = f"{sizes.many}, {sizes.steps} in one program"
        columns[name] = looped(sizes.many, FEW, sizes)
    return columns


def called(tree: str, names: Iterable[str], sizes: Sizes) -> Column:
    """Steps that the host calls one after another, without waiting for results."""
    params = trees.TREES[tree]()
    given = {name: programs.program(name, params) for name in names}
    steps, carries = ready(given, 2)
    return relative_times(steps, carries, sizes.rounds, sizes.seconds, sizes.steps)


def looped(tree: str, names: Iterable[str], sizes: Sizes) -> Column:
    """Steps that one program repeats."""
    params = trees.TREES[tree]()
    given = {
        name: _repeated(programs.program(name, params), sizes.steps) for name in names
    }
    steps, carries = ready(given, 2)
    times = relative_times(steps, carries, sizes.rounds, sizes.seconds)
    return {name: time.each(sizes.steps) for name, time in times.items()}


def _repeated(program: Program, count: int) -> Program:
    def run(params, state, grads):
        body = lambda _, carry: program.run(*carry, grads)  # noqa: E731
        return jax.lax.fori_loop(0, count, body, (params, state))

    return program._replace(run=run)


def ready(given: dict[str, Program], carried: int) -> tuple[dict, dict]:
    """Compiled steps from a carry to the next, and what each starts from.

    The first arguments are the carry, of which each step has its own; the others are
    shared.
    """
    compiled = programs.compiled(given)
    shared = values(next(iter(given.values())).arguments[carried:])
    steps = {
        name: lambda carry, run=run: run(*carry, *shared)
        for name, run in compiled.items()
    }
    return steps, {n: values(p.arguments[:carried]) for n, p in given.items()}


def values(shapes: Any) -> Any:
    """Arrays of these shapes: positive noise, and zeros where there are whole numbers.

    Variances must not be negative. Arrays stay as they are.
    """
    noise = np.random.default_rng(SEED).uniform(0.001, 0.02, 2**16)

    def fill(leaf):
        if isinstance(leaf, jax.Array):
            return leaf
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        filled = np.resize(noise, leaf.shape) if floats else np.zeros(leaf.shape)
        return jnp.asarray(filled, leaf.dtype)

    return jax.tree.map(fill, shapes)


def trained(sizes: Sizes) -> dict[str, Column]:
    """Training steps with each of `training.REGULARIZERS`.

    Where there is the same network in Flax and Optax alone, so is its step.
    """
    columns = {}
    for title, (task, beside) in tasks(sizes).items():
        given = {
            name: training.step(task, regularizer, optax.adam(1e-3))
            for name, regularizer in training.REGULARIZERS.items()
        }
        steps, carries = ready(given | beside, 3)
        times = relative_times(steps, carries, sizes.rounds, sizes.seconds)
        columns[title] = {n: time.rated(len(task.x)) for n, time in times.items()}
    return columns


def tasks(sizes: Sizes) -> dict[str, tuple[Task, dict[str, Program]]]:
    """What networks are trained on, and steps to compare with beside.

    A title says how many examples a step sees.
    """
    found = {}
    x, y = _images(sizes, sizes.batch), _labels(CLASSES, sizes.batch)
    for name, dtype in sizes.trained:
        model = models.make(name, CLASSES, jnp.dtype(dtype))
        task = Task(training.cross_entropy(model), _variables(model, x), x, y)
        words = [name, dtype] if dtype != "float32" else [name]
        beside = {}
        if name == "resnet18_norm":
            beside["none, in Flax and Optax alone"] = _plain(jnp.dtype(dtype), x, y)
        found[", ".join([*words, f"batch {sizes.batch}"])] = task, beside

    def loss(params, kept, x, y):
        return training.mean_cross_entropy(transformer.logits(params, x), y), kept

    size, count = sizes.transformer, sizes.sequences
    tokens = _labels(size.vocabulary, count, size.length)
    task = Task(loss, {"params": transformer.shapes(size)}, tokens, tokens)
    return found | {f"transformer, batch {count}": (task, {})}


def _plain(dtype: Any, x: jax.Array, y: jax.Array) -> Program:
    """A step of `benchmarks.plain`."""
    model, tx = plain.resnet18(CLASSES, dtype), optax.adam(1e-3)
    variables = _variables(model, x)
    params, kept = variables["params"], {"batch_stats": variables["batch_stats"]}
    state = jax.eval_shape(tx.init, params)
    run = functools.partial(plain.train_step, model, tx)
    return Program(run, (params, kept, state, x, y), donated=(0, 1, 2))


def _variables(model: nn.Module, x: jax.Array) -> Any:
    """Shapes of what a network keeps."""
    return jax.eval_shape(model.init, jax.random.key(SEED), x)


def _images(sizes: Sizes, count: int) -> jax.Array:
    rng = np.random.default_rng(SEED)
    return jnp.asarray(rng.uniform(size=(count, *sizes.image)), jnp.float32)


def _labels(classes: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(SEED).integers(0, classes, shape))


def gbr(sizes: Sizes) -> dict[str, Column]:
    """Exact, with one pullback for each output, and by random projections."""
    x, key, columns = _images(sizes, sizes.examples), jax.random.key(SEED), {}
    for name in sizes.small:
        model = models.make(name, CLASSES)
        network = values(_variables(model, x))
        logits = functools.partial(models.logits, model)

        def exact(network, x, logits=logits):
            return wr.gbr(lambda x: logits(network, x[None])[0], x)

        def projected(network, x, logits=logits, probes=2):
            one = lambda x: logits(network, x[None])[0]  # noqa: E731
            return wr.gbr(one, x, probes=probes, key=key).mean

        runs = {"the network": logits, "exact": exact}
        runs |= {f"{p} probes": functools.partial(projected, probes=p) for p in PROBES}
        steps = _calls({label: Program(r, (network, x)) for label, r in runs.items()})
        columns[f"{name}, {sizes.examples} examples"] = _times(steps, sizes)
    return columns


def _calls(given: dict[str, Program]) -> dict[str, Callable[[Any], Any]]:
    """Steps that begin anew each time."""
    compiled = programs.compiled(given)
    return {
        name: lambda _, run=run, arguments=given[name].arguments: run(*arguments)
        for name, run in compiled.items()
    }


def _times(steps: dict[str, Callable], sizes: Sizes, calls: int = 1) -> Column:
    nothing = dict.fromkeys(steps)
    return relative_times(steps, nothing, sizes.rounds, sizes.seconds, calls)


def populations(sizes: Sizes) -> dict[str, Column]:
    """Epochs of a network's runs, in the ways that `benchmarks.train` knows."""
    columns = {}
    for name in sizes.small:
        setup = train.Training(
            model=models.make(name, CLASSES),
            classes=CLASSES,
            optimizer=lambda hyper: optax.adam(hyper["learning_rate"]),
            batch=sizes.batch,
        )
        x, y = _images(sizes, 4 * sizes.batch), _labels(CLASSES, 4 * sizes.batch)
        arrays = train.Arrays(x, x[: sizes.batch])
        labels = train.Labels(
            *(jnp.stack([part] * sizes.runs) for part in (y, y[: sizes.batch]))
        )
        hyper, seeds = [{"learning_rate": 1e-3}] * sizes.runs, [*range(sizes.runs)]
        steps, carries = {}, {}
        for mapping in train.MAPPINGS:
            population = train.Population(setup, arrays, mapping)
            carries[mapping] = population.start(seeds, hyper, labels)
            steps[mapping] = lambda carry, of=population: of.epoch(carry)[0]
        times = relative_times(steps, carries, sizes.rounds, sizes.seconds)
        columns[f"{name}, {sizes.runs} runs"] = {
            mapping: time.each(sizes.runs) for mapping, time in times.items()
        }
    return columns


def bits(sizes: Sizes) -> dict[str, Column]:
    """A network of dense layers in floating point and from bits."""
    model = MLP((sizes.width,) * (sizes.layers - 1), sizes.width)
    x = jnp.ones((max(sizes.batches), sizes.width))
    variables = values(_variables(model, x))
    floats = {form.label: form for form in deploy.FLOATS}
    forms = [(floats[label], variables) for label in sizes.floats]
    # Bits are decoded to what the network would run in otherwise.
    dtype = jnp.dtype(sizes.floats[0])
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    for levels in ("binary", "ternary"):
        packed = deploy.packed_forms(levels, wr.he_volume(0.5))
        forms += [(form, narrow) for form in packed]
    stored = {form.label: (form, form.store(given)) for form, given in forms}
    columns = {}
    for batch in sizes.batches:
        given = {}
        for label, (form, tree) in stored.items():
            inputs = x[:batch].astype(dtype if form.of_bits else jnp.float32)
            run = functools.partial(form.run, model)
            given[label] = Program(run, (tree, inputs))
        columns[f"batch {batch}"] = _times(_calls(given), sizes, sizes.steps)
    return columns
