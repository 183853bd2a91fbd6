"""Tables and sentences of a comparison, from its JSON alone."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from benchmarks import claims, settling
from benchmarks.deploy import BATCHES
from benchmarks.experiments import EXPERIMENTS
from benchmarks.methods import METHODS
from benchmarks.plots import title
from benchmarks.record import ATTACKS, is_plan
from benchmarks.step_plans import BATCH, LIMITS, MODEL

COLUMNS = {
    "best": "best",
    "last": "last epochs",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "worst": "all attacks",
}
# In the units of the outputs over those of the inputs, squared; not in percent.
SENSITIVITY = {
    "gbr of logits": "GBR (logits)",
    "gbr of probabilities": "GBR (probabilities)",
    "gbr of label probability": "GBR (label)",
}
# With 9 trials for each method, methods on MNIST with 80 % wrong labels came in another
# order than with 40.
ENOUGH_TRIALS = 40


def paper(result: dict) -> tuple[Mapping[str, Mapping[str, float]], str | None]:
    """The rows of a paper's table on the same wrong labels, and in what it differs.

    Of a comparison that is part of no experiment. Those of an experiment's parts stand
    in `benchmarks.standings`.
    """
    settings = result["settings"]
    data = settings["dataset"], settings["noise"]
    for experiment in EXPERIMENTS.values():
        for name, published in experiment.paper.items():
            part = experiment.settings(name, "full")
            if published and data[1] and (part["dataset"], part["noise"]) == data:
                return published, experiment.note
    return {}, None


def rows(result: dict) -> list[list[str]]:
    """One row of text a method: label, hyperparameters, metrics, time."""
    times = result.get("relative_step_time", {})
    table = []
    for name, entry in result["results"].items():
        chosen = entry["tuning"]["chosen"].items()
        cells = [entry["label"], ", ".join(f"{_short(k)} {v:.2g}" for k, v in chosen)]
        cells += [share(entry, metric) for metric in _measured(result)]
        for metric in _sensitivity(result):
            m = entry["metrics"][metric]
            known = None not in (m["mean"], m["std"])
            cells.append(f"{m['mean']:.3g} ± {m['std']:.3g}" if known else "diverged")
        if times:
            cells.append(f"{times[name]:.2f}" if name in times else "")
        table.append(cells)
    return table


def header(result: dict) -> list[str]:
    """Names of the columns."""
    return [
        "method",
        "settings",
        *(COLUMNS[metric] for metric in _measured(result)),
        *_sensitivity(result).values(),
        *["step time"] * bool(result.get("relative_step_time")),
    ]


def further(result: dict) -> tuple[list[str], list[list[str]]]:
    """A table of attacks within further radii: its header and its rows."""
    radii = result["settings"].get("epsilons") or ()
    names = {
        f"{attack} {radius:g}": f"{COLUMNS[attack]}, {radius:g}"
        for radius in sorted(radii)
        for attack in ATTACKS
    }
    table = [
        [entry["label"], *(share(entry, metric) for metric in names)]
        for entry in result["results"].values()
    ]
    return ["method", *names.values()], table if names else []


def share(entry: dict, metric: str) -> str:
    """Mean and, of several seeds, deviation in percent; empty if not measured."""
    if (m := entry["metrics"].get(metric)) is None:
        return ""
    mean, std = f"{100 * m['mean']:.1f}", f"{100 * m['std']:.1f}"
    return f"{mean} ± {std}" if len(m["seeds"]) > 1 else mean


def table(result: dict) -> Table:
    """The table for a terminal."""
    shown = Table(title=f"Test accuracy (%): {_heading(result)}")
    for i, name in enumerate(header(result)):
        shown.add_column(name, justify="left" if i < 2 else "right")
    for row in rows(result):
        shown.add_row(*row)
    return shown


def deployed_table(result: dict) -> Table:
    """The table of `deployed` for a terminal."""
    head, cells, sentence = deployed(result)
    shown = Table(title="Stored and run", caption=sentence)
    for i, name in enumerate(head):
        side = "left" if i < 2 else "right"
        shown.add_column(name, justify=side, overflow="fold")
    for row in cells:
        shown.add_row(*row)
    return shown


def verdict(result: dict) -> list[str]:
    """What the numbers say, and what they do not."""
    results = result["results"]
    if not results:
        known = [lacking(result)] * ("missing" in result)
        return ["Nothing is finished yet.", *known]
    questions = {"last": "in the last epochs", "worst": "under all attacks"}
    lines = [
        _ranking(result, metric, f"Highest accuracy {words}")
        for metric, words in questions.items()
        if metric in _measured(result)
    ]
    if counts := _trials(result):
        lines.append(
            f"Note: Tuned with {counts} a method; with fewer than {ENOUGH_TRIALS}, the "
            "ranking may not have settled."
        )
    elif not any(e["tuning"]["trials"] for e in results.values()):
        lines.append("Note: No method was tuned: this ranks settings, not methods.")
    lines += _settling(result)
    for entry in results.values():
        if edge := entry["tuning"]["at_edge"]:
            lines.append(
                f"Note: {entry['label']} was tuned to the edge of its range in "
                f"{', '.join(_short(e) for e in edge)}; a wider range may do better."
            )
        lines += [f"Warning: {entry['label']}: {w}" for w in entry["warnings"]]
    if not result["complete"]:
        lines.append(lacking(result))
    return lines


def lacking(result: dict) -> str:
    """How many of its runs a comparison has, and which ones it lacks."""
    if "missing" not in result:
        return "Interrupted or still going on: not all methods are finished."
    there = Counter(c["method"] for c in result["cells"] if c["role"] == "final")
    seeds = result["settings"]["seeds"]
    left = {name: seeds - there[name] for name in result["settings"]["methods"]}
    done = len(result["cells"])
    named = [
        f"{_label(result, name)} ({count} seed{'s' * (count > 1)})"
        for name, count in left.items()
        if count > 0
    ]
    which = f"; missing: {', '.join(named)}" if named else ""
    return f"{done} of {done + result['missing']} cells{which}."


def _label(result: dict, name: str) -> str:
    """What a method is called, also where it has not been run yet."""
    if name in result["results"]:
        return result["results"][name]["label"]
    return METHODS[name].label if name in METHODS else name


def _settling(result: dict) -> list[str]:
    """Whether more trials might still change which tuned methods come first."""
    try:
        first_two = settling.settled(result)
    except LookupError:
        return []
    if first_two is None:
        return [
            "Note: Tuning has not settled: over the last half of the trials, the first "
            "two methods by test accuracy of the best trial so far have changed."
        ]
    first, second = (result["results"][name]["label"] for name in first_two)
    return [
        f"Over the last half of the trials, the first two by test accuracy of the best "
        f"trial so far have been {first} and then {second}."
    ]


def _ranking(result: dict, metric: str, question: str) -> str:
    """The first two by a metric, and whether seeds can tell them apart.

    Luck makes a gap larger between those that are picked for being first.
    """
    known = [e for e in result["results"].values() if metric in e["metrics"]]
    by = sorted(known, key=lambda e: -e["metrics"][metric]["mean"])
    line = f"{question}: {by[0]['label']} ({_percent(by[0], metric)})"
    if len(by) == 1:
        return line + "."
    line += f", then {by[1]['label']} ({_percent(by[1], metric)}); "
    seeds = [entry["metrics"][metric]["seeds"] for entry in by[:2]]
    gap = claims.difference(*seeds, of=result["settings"]["seeds"])
    if gap.uncertainty is None:
        return line + "one seed cannot tell which is better."
    if not gap.uncertainty and gap.mean:
        return line + "the gap is the same for all seeds."
    line += f"the gap is {points(gap)}"
    if gap.outcome == claims.OPEN:
        return line + ", so which is better cannot be told."
    return line + "."


def points(gap: claims.Difference) -> str:
    """A difference of accuracies with its uncertainty."""
    assert gap.mean is not None and gap.uncertainty is not None
    return f"{100 * gap.mean:.1f} ± {100 * gap.uncertainty:.1f} points"


def _trials(result: dict) -> str:
    """How many trials methods were tuned with, where that is too few to rank them."""
    entries = result["results"].values()
    tuned = [n for e in entries if (n := len(e["tuning"]["trials"]))]
    if not tuned or min(tuned) >= ENOUGH_TRIALS:
        return ""
    return f"{min(tuned)} trial{'s' if min(tuned) > 1 else ''}"


def markdown(result: dict) -> str:
    """The same table, sentences and settings for a page."""
    lines = [f"**{_heading(result)}**", ""]
    lines += markdown_table(header(result), rows(result))
    published, note = ({}, None) if result.get("experiment") else paper(result)
    empty = [""] * (len(header(result)) - 2 - len(_measured(result)))
    for name, metrics in published.items():
        known = [
            f"*{metrics[m]:.1f}*" if m in metrics else "" for m in _measured(result)
        ]
        label = METHODS[name].label if name in METHODS else name
        lines.append(f"| {' | '.join([f'*paper: {label}*', '', *known, *empty])} |")
    head, cells = further(result)
    if cells:
        lines += ["", *markdown_table(head, cells)]
    lines += ["", *(f"- {line}" for line in verdict(result))]
    lines += [f"- {note}", ""] if note else [""]
    if "deployed" in result:
        head, cells, sentence = deployed(result)
        lines += [*markdown_table(head, cells), "", f"- {sentence}", ""]
    lines.append(f"`{result['command']}`, {origin(result)}.")
    return "\n".join(lines)


def origin(result: dict) -> str:
    """On what and from which code a result was measured."""
    if (commit := result.get("commit")) is None:
        reason = result.get("no_commit")
        code = f"commit not recorded ({reason})" if reason else "commit not recorded"
    else:
        code = f"commit {commit[:10]}"
        code += ", with changes" if result.get("dirty") else ""
    return f"{result['device']}, {code}"


def deployed(result: dict) -> tuple[list[str], list[list[str]], str]:
    """Trained networks in the forms they can be stored and run in.

    Returns:
      The header of a table, its rows, and a sentence on the networks run from bits.
    """
    forms = result["deployed"]
    float32 = next(iter(forms.values()))["kernel_bytes"]
    table = []
    for form in forms.values():
        shares = 100 * np.array(form["accuracy"])
        spread = np.std(shares, ddof=1) if len(shares) > 1 else 0.0
        names = [form["method"], form["form"], f"{shares.mean():.2f} ± {spread:.2f}"]
        table.append(names + form_cells(form, float32))
    other = {f["method"] for f in forms.values() if not f.get("same_logits", True)}
    sentence = (
        "Times are those of inference, relative to the first row; peaks are what the "
        "compiled program is to hold. "
    )
    if other:
        sentence += (
            f"Warning: from bits, other logits than float32: {', '.join(other)}."
        )
    elif any("same_logits" in form for form in forms.values()):
        sentence += (
            "Networks run from bits give the logits of the same network in float32: "
            "all test examples, all seeds; bit for bit where kernels are unpacked, and "
            "to rounding where products are made from bits."
        )
    return ["network", "stored as", "test accuracy", *FORM_COLUMNS], table, sentence


FORM_COLUMNS = (
    "bytes of weights",
    "times fewer",
    "bytes of the file",
    "bytes on the device",
    "peak, batch 1",
    "peak, batch 100",
    "time, batch 1",
    "time, batch 100",
)


def form_cells(form: dict, float32_bytes: int) -> list[str]:
    """What `FORM_COLUMNS` name."""
    sizes = ("kernel_bytes", "file_bytes", "device_bytes")
    weights, *others = (f"{form[name]:,}" for name in sizes)
    peaks = (f"{form[f'peak_bytes_{batch}']:,}" for batch in BATCHES)
    times = (f"{form[f'relative_time_{batch}']:.2f}" for batch in BATCHES)
    fewer = f"{float32_bytes / form['kernel_bytes']:.4g}"
    return [weights, fewer, *others, *peaks, *times]


def cost_markdown(result: dict) -> str:
    """The tables of `benchmarks.cost`, or of `benchmarks.plans`."""
    return plan_markdown(result) if is_plan(result) else measured_markdown(result)


# Columns of plans, their fields, and how many digits after the point are shown.
PLAN_COLUMNS = {
    "kernels a leaf": ("kernels_a_leaf", 2),
    "bytes a parameter": ("bytes", 1),
    "temporary bytes": ("temporary_bytes", 1),
    "trace seconds": ("trace_seconds", 1),
    "compile seconds": ("compile_seconds", 1),
    "over Adam's": ("relative_compile_time", 2),
}


def plan_markdown(result: dict) -> str:
    """A table for each tree that programs were compiled for."""
    lines = []
    for tree, planned in result["plans"].items():
        about = result["trees"][tree]
        leaves, millions = about["leaves"], about["parameters"] / 1e6
        lines += [f"**{tree}**: {leaves} leaves, {millions:.1f} million parameters", ""]
        cells = [
            [
                f"`{name}`",
                *(f"{plan[key]:.{digits}f}" for key, digits in PLAN_COLUMNS.values()),
            ]
            for name, plan in planned.items()
        ]
        lines += [*markdown_table(["program", *PLAN_COLUMNS], cells), ""]
    lines += [f"`{result['command']}`, {origin(result)},", f"by {_compiler(result)}."]
    return "\n".join(lines)


def _compiler(result: dict) -> str:
    return ", ".join(f"{name} {v}" for name, v in result["compiler"].items())


def measured_markdown(result: dict) -> str:
    """The tables of `benchmarks.cost`."""
    columns = ["time of its step", "bytes read and written a parameter"]
    columns += ["temporary bytes a parameter"]
    kept = [
        [
            f"`{name}`",
            f"{c['relative_time']:.2f}",
            f"{c['bytes']:.0f}",
            f"{c['temporary_bytes']:.0f}",
        ]
        for name, c in result["optimizers"].items()
    ]
    lines = markdown_table(["optimizer", *columns], kept)
    for kind, what in (("training", "training step"), ("inference", "inference")):
        models = result[kind]
        cells = [
            [_code(name), *(f"{step[name]:.2f}" for step in models.values())]
            for name in next(iter(models.values()))
        ]
        lines += ["", *markdown_table([what, *models], cells)]
    for model, forms in result["forms"].items():
        first = next(iter(forms.values()))["kernel_bytes"]
        cells = [[form["form"], *form_cells(form, first)] for form in forms.values()]
        lines += ["", *markdown_table([f"{model} as", *FORM_COLUMNS], cells)]
    millions = result["parameters"] / 1e6
    lines += ["", f"`{result['command']}`, {millions:.1f} million float32 parameters,"]
    lines += [f"{origin(result)}; times relative to the first."]
    return "\n".join(lines)


def speed_markdown(result: dict) -> str:
    """A table for each part of `benchmarks.speed`, below what it is about."""
    lines = []
    for kind, cells in (("timed", _timed), ("counted", _counted)):
        for part, table in result[kind].items():
            lines += [f"**{part}**: {table['about']}", ""]
            lines += [*markdown_table(*cells(table["columns"])), ""]
    lines += [f"Left out: {why}\n" for why in result["left_out"].values()]
    by = f", by {_compiler(result)}" if "compiler" in result else ""
    return "\n".join([*lines, f"`{result['command']}`, {origin(result)}{by}."])


def limits_table(speeds: dict[str, dict]) -> list[str]:
    """What training steps may take on an H100, and what is known of that.

    Args:
      speeds: Results of `benchmarks.speed` by the names of their files.
    """
    column = f"{MODEL}, batch {BATCH}"

    def known(kind: str) -> dict[str, dict]:
        """The column of the last result that has it on an H100."""
        tables = [
            result[kind]["training"]["columns"][column]
            for result in speeds.values()
            if "H100" in result["device"]
            and column in result[kind].get("training", {}).get("columns", {})
        ]
        return tables[-1] if tables else {}

    planned, timed = known("counted"), known("timed")
    rows = [
        [
            _code(name),
            f"{limit:.2f}",
            *_bounds(planned.get(name), limit),
            _timing(timed.get(name)),
        ]
        for name, limit in LIMITS.items()
    ]
    head = [column, "may take", "by bytes alone", "at most", "", "takes"]
    lines = [
        "Times of training steps over that without regularization: what they may take, "
        "what they take by their plans, and what they take. A plan keeps a limit where "
        "bytes and kernels do, and leaves it open where bytes alone do.",
        "",
        *markdown_table(head, rows),
    ]
    if not timed:
        lines += ["", "No GPU has been timed yet: there is no file of one."]
    return lines


def _bounds(row: dict | None, limit: float) -> list[str]:
    """What a plan says of a limit."""
    if row is None:
        return ["", "", ""]
    low, high = row["bytes alone"], row["at most"]
    said = "kept" if high <= limit else "open" if low <= limit else "exceeded"
    return [f"{low:.3f}", f"{high:.3f}", said]


def _timed(columns: dict) -> tuple[list[str], list[list[str]]]:
    """Programs by rows, and what they run on by columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [
        [name, *(_timing(column.get(name)) for column in columns.values())]
        for name in names
    ]
    return ["", *columns], rows


def _timing(timing: dict | None) -> str:
    if timing is None:
        return ""
    ratio, low, high = (f"{timing[name]:.2f}" for name in ("ratio", "low", "high"))
    rate = f", {timing['a_second']:,.0f} a second" if "a_second" in timing else ""
    return f"{ratio} ({low} to {high}), {1000 * timing['seconds']:.3g} ms{rate}"


def theory_markdown(result: dict) -> str:
    """The errors of `benchmarks.theory`, closed and trained, and what they say."""
    sigmas, known = result["settings"]["sigmas"], result["theory"]
    methods = {
        "none": "no regularization",
        "weight_decay": "best weight decay",
        "volumization": "best volumization",
    }
    lines = []
    for noise, found in result["simulated"].items():
        closed = noise == "uniform"
        head = ["sigma", *methods.values(), "best V"]
        cells = []
        for i, sigma in enumerate(sigmas):
            row = [f"{sigma:g}"]
            for key in methods:
                formula = f"{known[key][i]:.4f}: " if closed else ""
                mean, std = (found[key][k][i] for k in ("mean", "std"))
                row.append(f"{formula}{mean:.4g} ± {std:.2g}")
            best = f"{known['best_volume'][i]:.3f}: " if closed else ""
            cells.append([*row, f"{best}{found['volumization']['chosen'][i]:.3f}"])
        kind = ": closed form, and then trained" if closed else ": trained"
        lines += [f"**{noise.capitalize()} noise**{kind}", ""]
        lines += [*markdown_table(head, cells), ""]
    lines += [*(f"- {line}" for line in _theory_says(result)), ""]
    return "\n".join([*lines, f"`{result['command']}`, {origin(result)}."])


def _theory_says(result: dict) -> list[str]:
    """Where closed forms and training part, and which method errs least."""
    s, known, found = result["settings"], result["theory"], result["simulated"]
    sigmas, a = np.array(s["sigmas"]), s["a"]
    trained = found["uniform"]["volumization"]
    mean = np.array(trained["mean"])
    error = np.array(trained["std"]) / len(s["seeds"]) ** 0.5
    off = np.abs(np.array(known["volumization"]) - mean).max() / mean.max()
    parted = sigmas[np.abs(np.array(known["printed"]) - mean) > 2 * error]
    decayed = sigmas[np.array(known["weight_decay"]) < known["volumization"]]
    cauchy = {name: np.array(m["mean"]) for name, m in found["cauchy"].items()}
    decay, zero = cauchy["weight_decay"], cauchy["boxes"][:, s["volumes"].index(0)]
    beaten = sigmas[cauchy["volumization"] < 0.99 * zero]
    return [
        f"The paper derives the least error of volumization, "
        f"(1 - 27 sigma / 64 a) sigma^2 / 3, for sigma up to a = {a:g}. It is exact up "
        f"to 4 a / 3 = {4 / 3 * a:.2f}, which is why the paper finds it right up to "
        f"about 1.5. Beyond, it is too small: of the sigmas tried, it is more "
        f"than two standard errors from what is trained at {_range(parted)}.",
        f"The closed form for all sigma, in `benchmarks/theory.py`, is never further "
        f"than {100 * off:.1f} % of the largest error from what is trained.",
        f"Under uniform noise the best weight decay errs less than the best "
        f"volumization at {_range(decayed)}, and more at the others.",
        f"Under Cauchy noise, what is trained without regularization has an error of "
        f"{cauchy['none'].min():,.0f} and more, and the best weight decay one of "
        f"{decay.min():.3f} to {decay.max():.3f}, where the zero model has "
        f"{zero.mean():.3f}. Volumization errs at least 1 % less than the zero model "
        f"at {_range(beaten)}.",
    ]


def _range(sigmas: np.ndarray) -> str:
    """The first and the last of those at which something is so."""
    return f"sigma = {sigmas[0]:g} to {sigmas[-1]:g}" if sigmas.size else "none"


def _counted(columns: dict) -> tuple[list[str], list[list[str]]]:
    """Each program a row, and what is counted by columns."""
    kept = [
        (column, name, counts)
        for column, programs in columns.items()
        for name, counts in programs.items()
    ]
    names = dict.fromkeys(name for _, _, counts in kept for name in counts)
    rows = [
        [column, program, *(_number(counts.get(name)) for name in names)]
        for column, program, counts in kept
    ]
    return ["", "", *names], rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def markdown_table(head: list[str], cells: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return [lines[0], "| --- " * len(head) + "|", *lines[1:]]


def _measured(result: dict) -> list[str]:
    """Which of `COLUMNS` some method has: not all comparisons attack."""
    entries = result["results"].values()
    return [m for m in COLUMNS if any(m in entry["metrics"] for entry in entries)]


def _sensitivity(result: dict) -> dict[str, str]:
    return SENSITIVITY if result["settings"].get("sensitivity") else {}


def _heading(result: dict) -> str:
    attacked = f", attacks within {result['settings']['epsilon']:.2g}"
    return title(result) + attacked * ("worst" in _measured(result))


def _code(name: str) -> str:
    """Names of functions as code."""
    return " ".join(f"`{w}`" if "_" in w or w == "weissi" else w for w in name.split())


def _percent(entry: dict, metric: str) -> str:
    return f"{100 * entry['metrics'][metric]['mean']:.1f} %"


def _short(name: str) -> str:
    return {"learning_rate": "lr", "one_minus_alpha": "1-alpha"}.get(name, name)
