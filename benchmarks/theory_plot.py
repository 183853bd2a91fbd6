"""The plot of `benchmarks.theory`, from its JSON alone."""

import pathlib

import numpy as np

from benchmarks.plots import COLOURS, plt, save
from benchmarks.theory import volumized_error

# Colour, marker and name of what theory and simulation compare.
ROWS = {
    "none": (COLOURS[0], "o", "no regularization"),
    "weight_decay": (COLOURS[1], "s", "best weight decay"),
    "volumization": (COLOURS[2], "D", "best volumization"),
}


def draw(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Errors of a linear student, in closed form and trained (volumization, Figure 4).

    Lines are closed forms, points means over seeds with one standard deviation.
    """
    figure, (left, right, boxes) = plt.subplots(
        1, 3, figsize=(14, 5), layout="constrained"
    )
    kinds = ("uniform", "(a) uniform noise"), ("cauchy", "(b) Cauchy noise")
    for axes, (noise, name) in zip((left, right), kinds, strict=True):
        constant = result["theory"]["constant"]
        axes.set(xlabel="sigma", title=name, ylim=(0, 1.5 * constant[0]))
        _errors_over_noise(axes, result, noise)
    _closed_forms(left, result)
    least = min(result["simulated"]["cauchy"]["none"]["mean"])
    right.set_title(f"(b) Cauchy noise; no regularization: {least:,.0f} and more")
    left.set_ylabel("mean squared error of a weight")
    _errors_over_volumes(boxes, result)
    s, seeds = result["settings"], len(result["settings"]["seeds"])
    figure.suptitle(
        f"Linear teacher and student, {s['parameters']} weights, a = {s['a']:g}, "
        f"{seeds} seeds"
    )
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    return save(figure, out, "errors")


def _errors_over_noise(axes, result: dict, noise: str) -> None:
    """The zero model's error, and each method's as measured."""
    x, y = result["settings"]["sigmas"], result["theory"]["constant"]
    axes.plot(x, y, color="#999999", label="zero model")
    for key, (colour, marker, name) in ROWS.items():
        found = result["simulated"][noise][key]
        if min(found["mean"]) > axes.get_ylim()[1]:
            continue  # the bars alone would be seen, as lines from below to above
        axes.errorbar(
            x,
            found["mean"],
            found["std"],
            fmt=marker,
            ms=4,
            lw=1,
            color=colour,
            label=f"{name}, trained",
        )
    axes.grid(alpha=0.3)


def _closed_forms(axes, result: dict) -> None:
    """Every method's error under uniform noise, and the paper's beyond its range."""
    x, known = result["settings"]["sigmas"], result["theory"]
    for key, (colour, _, name) in ROWS.items():
        axes.plot(x, known[key], color=colour, label=f"{name}, closed form")
    axes.plot(
        x, known["printed"], ":", color=COLOURS[2], label="volumization, as printed"
    )


def _errors_over_volumes(axes, result: dict) -> None:
    """Volumization's error over the volume, for a few strengths of uniform noise."""
    s, boxes = result["settings"], result["simulated"]["uniform"]["boxes"]
    for colour, i in zip(
        COLOURS[3:], np.linspace(1, len(s["sigmas"]) - 1, 4), strict=False
    ):
        i, v = int(i), np.array(s["volumes"])
        sigma = s["sigmas"][i]
        axes.plot(v, volumized_error(v, sigma, s["a"]), color=colour)
        axes.errorbar(
            v[::3],
            boxes["mean"][i][::3],
            boxes["std"][i][::3],
            fmt=".",
            lw=1,
            color=colour,
            label=f"sigma {sigma:g}",
        )
    axes.set(xlabel="volume V", title="uniform noise, over the volume", ylim=(0, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
