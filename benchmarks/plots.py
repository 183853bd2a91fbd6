"""Plots of a comparison, from its JSON alone."""

import io
import itertools
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks.data import DATASETS
from benchmarks.record import write
from benchmarks.settling import courses

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
COLOURS += ("#56B4E9", "#F0E442", "#882255", "#999999")  # and two more


def draw(result: dict, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws what is finished of a comparison, beside the JSON file ``out``."""
    if not result["results"]:
        return []
    entries = result["results"].values()
    plots = [accuracy, energy]
    plots += [weights] * any("weights" in e for e in entries)
    plots += [gradients] * any("gradients" in e for e in entries)
    plots += [strength] * any("strength" in e for e in entries)
    plots += [sensitivity] * bool(result["settings"].get("sensitivity"))
    plots += [levels] * any("level_distance" in e for e in entries)
    plots += [settling] * bool(courses(result))
    plots += [grid, grid_curves] * (len(_grid(result)) > 1)
    return [plot(result, out) for plot in plots]


def accuracy(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Accuracy over epochs: mean over seeds, and one standard deviation.

    That on training examples, where it is known, is dashed (GBR, Figure 2).
    """
    trained = bool(result["settings"].get("sensitivity"))
    width = 9 if _many(result) else 7
    figure, axes = plt.subplots(figsize=(width, 4.2), layout="constrained")
    _over_epochs(axes, result, "test_accuracy", 100)
    axes.set(ylabel="test accuracy (%)", title=title(result))
    _legend(figure, axes, result)
    if trained:
        _over_epochs(axes, result, "training_accuracy", 100, ls="--", lw=1, band=False)
        count = result["settings"]["sensitivity"]
        axes.set(ylabel=f"accuracy (%); dashed: {count} training examples")
    return save(figure, out, "accuracy")


def sensitivity(result: dict, out: pathlib.Path) -> pathlib.Path:
    """The generalization-bound regularizer over epochs (GBR, Figures 1 and 3)."""
    shown = next(iter(result["results"].values()))
    names = [name for name in shown if name.startswith("gbr of ")]
    width = 14 if _many(result) else 12
    figure, grid = plt.subplots(1, 3, figsize=(width, 4), layout="constrained")
    for axes, name in zip(grid, names, strict=True):
        _over_epochs(axes, result, name, 1)
        axes.set(yscale="log", title=name.replace("gbr", "GBR"))
    grid[0].set_ylabel("mean squared norm of the input Jacobian")
    _legend(figure, grid[-1], result)
    count = result["settings"]["sensitivity"]
    figure.suptitle(f"{title(result)}, on {count} training examples")
    return save(figure, out, "sensitivity")


def levels(result: dict, out: pathlib.Path) -> pathlib.Path:
    """How far weights in training are from their levels, over epochs."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    _over_epochs(axes, result, "level_distance", 1)
    axes.set(
        ylim=(0, None),
        ylabel="mean distance from a level, in units of V",
        title=title(result),
    )
    _legend(figure, axes, result)
    return save(figure, out, "levels")


def energy(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Weight energy and layer complexity over epochs (WEISSI, Figure 2)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    _over_epochs(left, result, "log_energy", 1 / np.log(10))
    left.set(ylabel="log10 of the weight energy", title="weight energy")
    _over_epochs(right, result, "complexity", 1)
    right.set(ylabel="sum over layers", title="layer complexity")
    _legend(figure, right, result)
    figure.suptitle(title(result))
    return save(figure, out, "energy")


def gradients(result: dict, out: pathlib.Path) -> pathlib.Path:
    """How the norms of input gradients are distributed (WEISSI, Figure 3)."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, entry in _methods(result):
        if (histogram := entry.get("gradients")) is None:
            continue
        edges = 10 ** np.array(histogram["log10_edges"])
        share = np.array(histogram["counts"]) / np.diff(histogram["log10_edges"])
        share /= max(sum(histogram["counts"]), 1)
        axes.stairs(share, edges, color=colour, lw=1.5, label=entry["label"])
    axes.set(
        xscale="log",
        xlabel="norm of the input gradient of the cross-entropy",
        ylabel="examples per decade, of all",
        title=title(result),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, out, "gradients")


def strength(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Accuracy over the strength of attacks (WEISSI, Figure 4; volumization, 8 and 9).

    Lines are of the first seed. Where all seeds were attacked within further radii,
    points are means over seeds, with one standard deviation.
    """
    shown = {"fgsm": "FGSM", "pgd": "PGD", "worst": "all attacks, the worst for each"}
    figure, grid = plt.subplots(
        1, len(shown), figsize=(11, 3.8), sharey=True, layout="constrained"
    )
    for axes, (attack, name) in zip(grid, shown.items(), strict=True):
        for colour, entry in _methods(result):
            if (curve := entry.get("strength")) is None:
                continue
            x = [0.0, *curve["epsilon"]]
            y = 100 * np.array([curve["clean"][0], *curve[attack]], float)
            axes.plot(x, y, ".-", ms=4, color=colour, label=entry["label"])
            if radii := _radii(result, entry, attack):
                axes.errorbar(*radii, fmt="o", ms=4, capsize=2, color=colour)
        axes.set(xlabel="radius of the attack (L-infinity)", title=name)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("test accuracy (%)")
    _legend(figure, grid[-1], result)
    figure.suptitle(title(result))
    return save(figure, out, "strength")


def _radii(result: dict, entry: dict, attack: str) -> list[np.ndarray]:
    """Radii, means over seeds and their deviations in percent, if there are several."""
    settings, metrics = result["settings"], entry["metrics"]
    names = {settings["epsilon"]: attack}
    names |= {e: f"{attack} {e:g}" for e in settings.get("epsilons") or ()}
    known = [
        (radius, 100 * metrics[name]["mean"], 100 * metrics[name]["std"])
        for radius, name in sorted(names.items())
        if name in metrics
    ]
    return [*np.array(known).T] if len(known) > 1 else []


def settling(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Test accuracy of the best trial so far, over the number of trials."""
    width = 9 if _many(result) else 7
    figure, axes = plt.subplots(figsize=(width, 4.2), layout="constrained")
    known = courses(result)
    for colour, (name, course) in zip(
        itertools.cycle(COLOURS), known.items(), strict=False
    ):
        x, label = np.arange(1, len(course) + 1), result["results"][name]["label"]
        axes.step(x, 100 * np.array(course), where="post", color=colour, label=label)
    axes.set(
        xlabel="trials",
        ylabel="test accuracy (%) of the best trial so far",
        title=title(result),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(figure, axes, result)
    return save(figure, out, "settling")


def grid(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Accuracy over the volume, a line for each alpha (volumization, Figure 5).

    Means over seeds and one standard deviation, of the best and of the last epochs.
    """
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 4.2), sharey=True, layout="constrained"
    )
    lines, shown = _grid(result), {"best": "best epoch", "last": "last epochs"}
    volumes = sorted({v for line in lines.values() for v in line})
    for axes, (metric, name) in zip(panels, shown.items(), strict=True):
        colours = itertools.cycle(COLOURS)
        for (alpha, line), colour in zip(lines.items(), colours, strict=False):
            m = [entry["metrics"][metric] for entry in line.values()]
            mean, std = (100 * np.array([x[k] for x in m]) for k in ("mean", "std"))
            label = f"alpha {alpha:g}"
            axes.errorbar([*line], mean, std, fmt=".-", color=colour, label=label)
        axes.set(xlabel="v", xscale="log", title=name)
        axes.set_xticks(volumes, [f"{v:g}" for v in volumes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title(result))
    return save(figure, out, "grid")


def grid_curves(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Accuracy over epochs, a panel for each alpha (volumization, Figures 6 and 7)."""
    lines = _grid(result)
    figure, panels = plt.subplots(
        1,
        len(lines),
        figsize=(1 + 2.6 * len(lines), 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    volumes = dict.fromkeys(v for line in lines.values() for v in line)
    colours = dict(zip(sorted(volumes), itertools.cycle(COLOURS), strict=False))
    handles = {}
    for axes, (alpha, line) in zip(panels[0], lines.items(), strict=True):
        for v, entry in line.items():
            mean = 100 * np.array(entry["test_accuracy"], float).mean(0)
            epochs = np.arange(1, len(mean) + 1)
            (handles[v],) = axes.plot(epochs, mean, color=colours[v])
        axes.set(xlabel="epoch", title=f"alpha {alpha:g}")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("test accuracy (%)")
    names = {f"v {v:g}": line for v, line in sorted(handles.items())}
    figure.legend([*names.values()], [*names], loc="outside right upper")
    figure.suptitle(title(result))
    return save(figure, out, "grid_curves")


def _grid(result: dict) -> dict[float, dict[float, dict]]:
    """Methods at given volumes: by alpha, and then by ``v``, both in order.

    The same place with another learning rate is no part of the grid.
    """
    places: dict[tuple[float, float], dict] = {}
    for entry in result["results"].values():
        tuning, known = entry["tuning"], entry["tuning"]["chosen"]
        if not tuning["trials"] and known.keys() >= {"v", "one_minus_alpha"}:
            place = round(1 - known["one_minus_alpha"], 6), known["v"]
            places.setdefault(place, entry)
    found: dict[float, dict[float, dict]] = {}
    for (alpha, v), entry in sorted(places.items(), key=lambda item: item[0]):
        found.setdefault(alpha, {})[v] = entry
    return found


def weights(result: dict, out: pathlib.Path) -> pathlib.Path:
    """Weights of every layer under every method, with the walls of their boxes.

    Of the first seed; methods that lack it are left out.
    """
    rows = [entry for entry in result["results"].values() if "weights" in entry]
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
    return save(figure, out, "weights")


def dataset(result: dict) -> str:
    """The data set as it was: JPEG costs detail."""
    name = result["settings"]["dataset"]
    jpeg = " (as JPEG)" * ("JPEG" in result["data"]["source"])
    return (DATASETS[name].title if name in DATASETS else name) + jpeg


def title(result: dict) -> str:
    """What was compared, in one line."""
    s = result["settings"]
    words = [dataset(result)]
    if s["noise"] or not result.get("experiment"):
        words.append(f"{s['noise']:.0%} of training labels wrong")
    if s.get("labels"):
        words.append(f"labels {s['labels']}")
    known = DATASETS.get(s["dataset"])
    if known is None or s["model"] != known.model:
        words.append(s["model"])
    if (dtype := s.get("dtype", "float32")) != "float32":
        words.append(dtype)
    words += s.get("augment") or []
    if (loss := s.get("loss", "cross_entropy")) != "cross_entropy":
        words.append(f"loss {loss}")
    if s["adversarial"]:
        words.append(f"adversarial training within {s['adversarial']:.2g}")
    words.append(f"{s['seeds']} seed{'s' if s['seeds'] > 1 else ''}")
    return ", ".join(words)


def _methods(result: dict):
    """A colour and an entry for each method that is drawn."""
    return zip(itertools.cycle(COLOURS), _drawn(result), strict=False)


def _drawn(result: dict) -> list[dict]:
    """Methods that are tuned alone, where there are some and not a colour for each."""
    entries = [*result["results"].values()]
    tuned = [entry for entry in entries if entry["tuning"]["trials"]]
    return tuned if tuned and len(entries) > len(COLOURS) else entries


def _over_epochs(
    axes, result: dict, name: str, factor: float, band: bool = True, **line: Any
) -> None:
    for colour, entry in _methods(result):
        if name not in entry:
            continue
        curves = factor * np.array(entry[name], float)  # None becomes NaN
        epochs = np.arange(1, curves.shape[1] + 1)
        mean, std = curves.mean(0), curves.std(0, ddof=1 if len(curves) > 1 else 0)
        axes.plot(epochs, mean, color=colour, label=entry["label"], **line)
        if band:
            axes.fill_between(
                epochs, mean - std, mean + std, color=colour, alpha=0.15, lw=0
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _many(result: dict) -> bool:
    return len(_drawn(result)) > 5


def _legend(figure, axes, result: dict) -> None:
    """Outside, where many methods would hide the curves."""
    if _many(result):
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    else:
        axes.legend()


def _readable(path: str) -> str:
    return path.replace("']['", "/").strip("[']")


def save(figure, out: pathlib.Path, name: str) -> pathlib.Path:
    """Writes a figure beside the JSON file ``out``, and closes it."""
    path = out.with_name(f"{out.stem}-{name}.png")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    write(picture.getvalue(), path)
    return path
