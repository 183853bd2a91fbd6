"""Plots of a comparison, from its JSON alone."""

import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
NAMES = {"digits": "Digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}


def draw(result: dict, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws what is finished of a comparison, beside the JSON file ``out``."""
    if not result["results"]:
        return []
    return [accuracy(result, out), weights(result, out)]


def accuracy(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Test accuracy over epochs: mean over seeds, and one standard deviation."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, entry in zip(
        itertools.cycle(COLOURS), result["results"].values(), strict=False
    ):
        curves = 100 * np.array(entry["test_accuracy"])
        epochs = np.arange(1, curves.shape[1] + 1)
        mean, std = curves.mean(0), curves.std(0, ddof=1 if len(curves) > 1 else 0)
        axes.plot(epochs, mean, color=colour, label=entry["label"])
        axes.fill_between(
            epochs, mean - std, mean + std, color=colour, alpha=0.15, lw=0
        )
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=title(result))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, out, "accuracy")


def weights(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Weights of every layer under every method, with the walls of their boxes."""
    rows = list(result["results"].values())
    columns = list(rows[0]["weights"])
    figure, grid = plt.subplots(
        len(rows),
        len(columns),
        figsize=(4 * len(columns), 2.3 * len(rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes_row, colour, entry in zip(
        grid, itertools.cycle(COLOURS), rows, strict=False
    ):
        for axes, layer in zip(axes_row, columns, strict=True):
            histogram = entry["weights"][layer]
            axes.stairs(
                histogram["counts"], histogram["edges"], fill=True, color=colour
            )
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            heading = f"{entry['label']}: {_readable(layer)}"
            if (wall := histogram["wall"]) is not None:
                for side in (-wall, wall):
                    axes.axvline(side, color="black", ls="--", lw=1)
                heading += f", walls at ±{wall:.2g}"
            axes.set_title(heading, fontsize=9)
    figure.supylabel("number of weights", fontsize=10)
    figure.supxlabel("weight (seed 0)", fontsize=10)
    return _save(figure, out, "weights")


def title(result: dict) -> str:
    """What was compared, in one line."""
    s = result["settings"]
    return (
        f"{NAMES[s['dataset']]}, {s['noise']:.0%} of training labels wrong, "
        f"{s['seeds']} seed{'s' if s['seeds'] > 1 else ''}"
    )


def _readable(path: str) -> str:
    return path.replace("']['", "/").strip("[']")


def _save(figure, out: pathlib.Path, name: str) -> pathlib.Path:
    path = out.with_name(f"{out.stem}-{name}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
