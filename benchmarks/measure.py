"""What is measured of a network once it is trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import weightreg as wr
from benchmarks import deploy as deploy_module
from benchmarks import models, robustness
from benchmarks.cells import Run
from benchmarks.data import Dataset
from benchmarks.methods import METHODS
from benchmarks.models import Variables
from benchmarks.settings import Settings
from benchmarks.train import example_loss

BINS = 60
# Of input gradients, the same edges for all, so that histograms of seeds can be added.
LOG10_EDGES = np.linspace(-8, 4, 121)
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of attacks in plots, in units of epsilon


def of_network(
    run: Run,
    network: Variables,
    data: Dataset,
    settings: Settings,
    source: robustness.Network | None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Accuracies under attack, and what else tables and plots show of a network.

    Args:
      run: Which one it is of.
      network: The network, finished.
      data: What it was trained on.
      settings: Of the comparison.
      source: What attacks are transferred from; None for no attacks.

    Returns:
      Metrics by name, and further fields of its cell.
    """
    metrics, more = {}, {}
    if run.seed == 0:
        more["weights"] = weights(run, network["params"])
    if source is not None:
        victim = robustness.Network(source.logits, network)
        x, y = attacked_examples(data, settings)
        for radius in settings.radii:
            shares, warning = attack(victim, x, y, radius, settings, source)
            main = radius == settings.epsilon
            names = {a: a if main else f"{a} {radius:g}" for a in shares}
            metrics |= {names[a]: rounded(share) for a, share in shares.items()}
            if main and warning:
                more["warning"] = warning
        more["gradients"] = gradients(victim, x, y)
        if run.seed == 0:
            more["strength"] = strength(victim, x, y, settings, source)
    return metrics, more


def attack(
    victim: robustness.Network,
    x: np.ndarray,
    y: np.ndarray,
    radius: float,
    settings: Settings,
    source: robustness.Network,
) -> tuple[dict[str, float], str | None]:
    """Accuracy under each attack, and a warning of masked gradients, if they are."""
    how = settings.attacks()
    right = robustness.evaluate(victim, x, y, radius, how, source)
    shares = robustness.accuracies(right)
    del shares["clean"]
    return shares, robustness.masked_gradients(right)


def strength(
    victim: robustness.Network,
    x: np.ndarray,
    y: np.ndarray,
    settings: Settings,
    source: robustness.Network,
) -> dict[str, list[float | None]]:
    """Accuracy of one network over the strength of attacks."""
    units = STRENGTHS if settings.epsilon else (0.0,)
    radii = [settings.epsilon * unit for unit in units]
    rows = robustness.curve(victim, x, y, radii, settings.attacks(), source)
    return {name: [rounded(v) for v in values] for name, values in rows.items()}


def gradients(network: robustness.Network, x: np.ndarray, y: np.ndarray) -> list[int]:
    """How many inputs have a gradient of what norm, by `LOG10_EDGES`.

    Those outside are in the first bin or the last; what has diverged is in none.
    """
    norms = np.asarray(_gradient_norms(network.logits, network.params, x, y))
    known = np.log10(np.maximum(norms[np.isfinite(norms)], 1e-20))
    inside = np.clip(known, LOG10_EDGES[0], LOG10_EDGES[-1])
    return np.histogram(inside, LOG10_EDGES)[0].tolist()


def weights(run: Run, params: Any) -> dict[str, dict]:
    """A histogram of every layer's weights, and where its walls are."""
    volume = METHODS[run.method].volume
    leaves = jax.tree.leaves(params)
    tree = volume(run.hyperparameters)(params) if volume else {}
    walls = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    layers = {}
    for layer in wr.weight_layers(params):
        known = np.asarray(leaves[layer.index])
        counts, edges = np.histogram(known[np.isfinite(known)], BINS)
        layers[layer.path] = {
            "counts": counts.tolist(),
            "edges": [float(f"{e:.6g}") for e in edges],
            "wall": float(walls[layer.index]) if volume else None,
        }
    return layers


def deploy(
    kept: dict[str, tuple[dict[str, float], list[Variables]]],
    data: Dataset,
    settings: Settings,
) -> dict[str, dict]:
    """Accuracy, bytes and times of trained networks in the forms they can be run in."""
    # Each form says what it computes in, whatever the network was trained in.
    model = models.make(settings.model, data.classes, resize=settings.resize)
    x = jnp.asarray(data.x_test)
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
        found[key] |= {"method": label, "accuracy": [rounded(share) for share in hits]}
        if form.of_bits:
            same = (deploy_module.same_logits(model, form, n, x) for n in networks)
            found[key]["same_logits"] = all(same)
    return found


def attacked_examples(
    data: Dataset, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """The test examples that are attacked, the same for all networks."""
    subset = np.random.default_rng(0).permutation(len(data.y_test))
    subset = subset[: settings.attacked]
    return data.test_inputs(subset), data.y_test[subset]


def rounded(x: Any) -> float | None:
    """For the record: five digits, counted from the first one of small numbers.

    JSON has no infinities, nor NaN.
    """
    if not np.isfinite(x):
        return None
    return float(f"{x:.5g}") if abs(x) < 1e-3 else round(float(x), 5)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_norms(logits, network, x, y) -> jax.Array:
    def loss(x, y):
        own = functools.partial(logits, network)
        return example_loss(own, x[None], y[None])[0]

    return wr.input_gradient_norms(loss, x, y, batch_size=100)
