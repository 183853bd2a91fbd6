"""``RESULTS.md``, ``COSTS.md`` and ``SPEED.md``: each result once, with its meaning."""

import pathlib
from collections import Counter
from typing import Any

from benchmarks import claims, record, standings
from benchmarks.experiments import EXPERIMENTS
from benchmarks.plots import dataset, title
from benchmarks.report import (
    ENOUGH_TRIALS,
    cost_markdown,
    limits_table,
    markdown,
    markdown_table,
    points,
    share,
    speed_markdown,
    theory_markdown,
)

FOLDER = pathlib.Path(__file__).parent
# The committed pictures: results, and what is drawn of them.
PICTURES: dict[str, tuple[str, ...]] = {
    "volumization-table2-full-noise80": ("accuracy",),
    "volumization-table2-cpu-noise80": ("settling",),
    "volumization-grids-cpu-noise80": ("grid",),
    "enc-tables-cpu-decay": ("sensitivity",),
    "theory-figure4": ("errors",),
}
# What each plot of `benchmarks.plots` shows.
SHOWN = {
    "accuracy": "Accuracy over epochs",
    "sensitivity": "Sensitivity over epochs",
    "energy": "Weight energy and complexity over epochs",
    "gradients": "Norms of input gradients",
    "strength": "Accuracy over the strength of attacks",
    "weights": "Weights of every layer",
    "levels": "Distances from levels over epochs",
    "settling": "Test accuracy of the best trial so far",
    "grid": "Accuracy over v and alpha",
    "grid_curves": "Accuracy over epochs, for v and alpha",
    "errors": "Errors over the noise",
}
WRITTEN = "<!-- Written by `python -m benchmarks pages`; changes here are lost. -->"
RESULTS_HEAD = f"""\
# Results

{WRITTEN}

What the comparisons measured; what follows for a method is on its card. "What held" is
the short answer, and each table of a paper has a section of its own below. The scales
are `cpu`, fewer examples and epochs and mostly smaller networks, and `full`, those of
the paper.
"""
READING = f"""\
## How to read the tables

- **settings**: what was chosen by accuracy on held-out labels as noisy as the
  training labels (under FGSM, where the command says so), with the same number of
  trials for each method. Methods at fixed settings, such as a paper's, are not tuned.
- **best**: test accuracy in percent, of the best epoch. **last epochs**: its mean
  over the last fifth of the epochs, at most ten; that is what one gets who cannot
  tell the best.
- **±**: one standard deviation over seeds.
- **FGSM**, **PGD**: accuracy under these attacks in the L-infinity norm, PGD from one
  random start, as papers report them. **all attacks**: the share of inputs that are
  right and also withstand PGD with further random starts, PGD on the margin of the
  logits, which does not saturate, and what PGD finds on a network of another seed
  without regularization. If a transferred attack beats those that know the network,
  its gradients are masked, and a warning says so. None of these networks is robust;
  the columns say which is the least fragile.
- **GBR**: the mean squared norm of the input Jacobian on training examples, in the
  end.
- **step time**: of a whole training step, relative to one without regularization.
- *In italics*: the papers' own figures.
- **commit**: of the code that measured; older files do not tell it.
- **claims**: a paper's, or one of ours, that a method beats another. It **held** or
  **failed** where the difference of the means over seeds, in percentage points, is
  larger than its uncertainty, the half width of its 95 % interval: of Welch's t, or,
  where both have all of five seeds or more, of the differences seed by seed, since
  runs of a seed begin with the same weights and the same wrong labels. Otherwise it
  **could not be told**, as with a single seed. Of twenty claims on methods that are
  alike, one is expected to hold or to fail by luck. **after** so many **trials**: fewer
  than {ENOUGH_TRIALS}, so that more tuning may well change it.
- **fixed**: a row at the paper's settings, or others that are not tuned. **tuned**: at
  the best of its trials. In parentheses: the number of seeds.
- **binary**, **ternary**: quantized before they are measured.
- Where a network has batch normalizations (`mlp_norm`, ResNets), their statistics are
  renewed before it is measured, see "Statistics that lag".

## What {ENOUGH_TRIALS} trials showed

Few trials tell who was lucky in tuning. Earlier versions of this page had nine for each
method on MNIST with 80 % wrong labels, and binary networks eight points ahead of weight
decay: 79.7 % against 71.6 % in the last epochs. {{forty}}

Tables with fewer trials say so below them, and their sentences on which method has the
highest accuracy do not rank the methods. Files also have the test accuracy of every
trial, which chooses nothing, and their tables say whether the first two methods by that
of the best trial so far have changed over the last half of the trials. If so, the
ranking has not settled.

## Statistics that lag

The running statistics of batch normalizations lag behind the weights of methods that
train at high rates, whose accuracy then jumps by ten points from one epoch to the next.
While they were renewed for binary and ternary networks alone, whose weights change when
they are quantized, these seemed 14 points ahead of weight decay on CIFAR-10 in small,
with 9 % wrong labels as with 40 %, and most of that lead was not theirs. Now they
follow over 40 batches with weights at rest, whatever the method. Files in which `fixed`
has 0 `statistics_batches`, and those without that field whose networks have
normalizations, are older.

## How to run them again

The lines below each table have the command that makes it, such as `python -m benchmarks
experiment volumization-table2 --parts noise80`. There are three scales: `--scale smoke`
shows in minutes that all runs, `cpu` is the default, and `full` has the papers' epochs
and data, for which one wants a GPU, and perhaps layers that compute in bfloat16, by
`--dtype bfloat16`. `DATA` is a folder with Parquet files, and without `--data-dir` they
come from the Hugging Face hub.

- A table is made cell by cell, of one method and one seed, or one trial of its tuning.
  `--minutes 50` stops at a checkpoint in time, and the same command goes on from there.
- `python -m benchmarks status --scale full` says which cells are missing, and what they
  cost.
- `python -m benchmarks merge FOLDER OTHER` puts together what several machines made.
- `--coordinator HOST:PORT --processes 2 --process 0`, and the same command with
  `--process 1`, share a table between processes that see one folder.
- `human-noise` needs `--labels FILE`, an `.npz` with the labels that people gave, of
  CIFAR-10N.
- `python -m benchmarks theory` repeats the volumization paper's Figure 4.

`python -m benchmarks report FILE` prints a table and draws all its plots: accuracy,
weight energy and complexity over epochs, input gradients, accuracy over the strength of
attacks, weights, GBR, distances from levels, and accuracy over trials and over v and
alpha.
"""
SETTLED_BY = "volumization-table2-cpu-noise80"  # what nine trials had got wrong
COSTS_HEAD = f"""\
# Costs

{WRITTEN}

Of each result, the first table is the optimizer's part of a step alone, where nothing
hides it; the second is whole training steps, and so is "step time" in
[RESULTS.md](RESULTS.md). The third is inference: a folded network is an ordinary one.
The last ones are inference from bits, all layers unpacked at once or one after
another (`unpack_layers`, which multiplies with bits where that pays); peaks are bytes
that the compiled program is to hold.

The wrapper `volumized` costs more than the link `volumize` because it needs the old
weights twice, for the new ones and for the momentum; a form that reads which weights
were outside off the result is cheaper, but errs by rounding. Donate parameters and
state to the compiled step, and let it take and return them in the same order
(`step(params, opt_state, ...) -> params, opt_state`): otherwise XLA copies both.

Times depend on the machine, bytes on the compiler. `python -m benchmarks cost`
measures them on yours.

Results named after a device that was not there, an H100 or a TPU v5e, are plans and not
times: `python -m benchmarks cost --target h100` (or `v5e`) has the device's compiler
translate each program and counts what it would launch, read, write and hold. Nothing is
run. Bytes, also temporary ones, are a parameter's; those of a TPU include copies
between its two memories. Seconds are the compiler's own, of processors; the last column
has those to compile over Adam's. `equivalent_norm` has the number of the paper's
equation, and `vjp(...)` is the map together with its pullback.
"""
SPEED_HEAD = f"""\
# Speed

{WRITTEN}

`python -m benchmarks speed` times steps of optimizers, whole training steps, GBR,
populations of runs, inference from bits, and, where PyTorch is installed, the same
steps there. All runs in one process, on whatever device JAX has. What is compared takes
turns, in another order each round. A cell has the median of the ratios to the first
row, turn by turn, their quartiles, and the median time. Sizes differ between CPUs and
accelerators, and each result's file says them; ratios of one cannot be compared with
those of the other.

"One by one": the host calls step after step and waits for none, so that its own time
shows where steps are short. "In one program": it calls a loop.

`python -m benchmarks speed --target h100` needs no H100. It has the compiler plan whole
training steps and growing trees for one, and counts. Nothing is run.
"""


def update(folder: pathlib.Path = FOLDER) -> None:
    """Writes the pages beside the folder ``results`` that they are written from."""
    for page, text in _pages(folder).items():
        record.write(text.encode(), page)


def stale(folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
    """Pages that are missing or not what `update` would write."""
    return [
        page
        for page, text in _pages(folder).items()
        if not page.is_file() or page.read_text() != text
    ]


def _pages(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """The pages by their files.

    Raises:
      ValueError: A file is no result, or is not complete.
    """
    files = sorted(folder.glob("results/*.json"))
    results = {file.stem: record.load(file) for file in files}
    costs = {stem: r for stem, r in results.items() if record.is_cost(r)}
    speeds = {stem: r for stem, r in results.items() if record.is_speed(r)}
    theories = {s: r for s, r in results.items() if record.is_theory(r)}
    compared = {s: r for s, r in results.items() if s not in costs | speeds | theories}
    for stem, result in compared.items():
        if not (result["complete"] or "missing" in result):
            raise ValueError(
                f"results/{stem}.json must be complete to go on a page, but its run "
                f"has ended early: run it again."
            )
    return {
        folder / "RESULTS.md": _results(compared, theories),
        folder / "COSTS.md": _costs(costs),
        folder / "SPEED.md": _speeds(speeds),
    }


def _results(
    compared: dict[str, dict[str, Any]], theories: dict[str, dict[str, Any]]
) -> str:
    """What held, then the data sets' own comparisons, the papers' tables and theory."""
    parts = _parts(compared)
    listed = {
        stem
        for parts_of in parts.values()
        for by_scale in parts_of.values()
        for stem in by_scale.values()
    }
    groups: dict[str, list[str]] = {}
    for stem in sorted(compared, key=lambda stem: (*_place(compared[stem]), stem)):
        groups.setdefault(_group(compared[stem]), []).append(stem)
    groups |= {THEORY: sorted(theories)} if theories else {}
    contents, sections = ["## Contents", ""], []
    for heading, stems in groups.items():
        contents.append(f"- {heading}")
        sections += [f"## {heading}", ""]
        for stem in stems:
            about = title(compared[stem]) if stem in compared else "closed and trained"
            contents.append(f"  - [{stem}](#{stem}): {about}")
            if stem not in listed:
                sections += _section(stem, (compared | theories)[stem], "###")
        for name in _names_of(stems, compared):
            sections += _experiment(name, parts[name], compared)
    reading = READING.format(forty=_forty(compared))
    held = _summary(parts, compared)
    lines = [RESULTS_HEAD, *contents, "", *held, reading, *sections]
    return "\n".join(lines).rstrip() + "\n"


def _forty(compared: dict[str, dict[str, Any]]) -> str:
    """What came of the lead of binary networks, if its comparison is there."""
    result = compared.get(SETTLED_BY)
    gap = claims.judge(result, claims.Claim("binary", "weight_decay", "last"))
    if result is None or gap is None:
        return ""
    binary, decay = (result["results"][name] for name in ("binary", "weight_decay"))
    return (
        f"With\n{len(decay['tuning']['trials'])} trials ([below](#{SETTLED_BY})) these "
        f"have {share(binary, 'last')} %,\nand weight decay {share(decay, 'last')} %: "
        f"a lead of {points(gap)}. The rest was luck\nin tuning."
    )


THEORY = "Theory (volumization, Figure 4)"
Parts = dict[str, dict[str, str]]  # stems by part, and then by scale


def _parts(compared: dict[str, dict[str, Any]]) -> dict[str, Parts]:
    """The files of every part of every experiment, in the registry's order."""
    found: dict[str, Parts] = {
        name: {part: {} for part in experiment.parts}
        for name, experiment in EXPERIMENTS.items()
    }
    for stem, result in sorted(compared.items()):
        mark = result.get("experiment", {"name": None})
        if mark["name"] in found and mark["part"] in found[mark["name"]]:
            found[mark["name"]][mark["part"]][standings.scale_of(result)] = stem
    return found


def _names_of(stems: list[str], compared: dict[str, dict[str, Any]]) -> list[str]:
    """The experiment of a group, if it is one's that is still repeated."""
    marks = (compared[s].get("experiment") for s in stems if s in compared)
    return [n for n in dict.fromkeys(m["name"] for m in marks if m) if n in EXPERIMENTS]


def _summary(parts: dict[str, Parts], compared: dict[str, dict[str, Any]]) -> list[str]:
    """A line for what is claimed of two methods, and which parts have no file yet."""
    rows, lacked = [], []
    counts = {scale: Counter() for scale in standings.SCALES}
    for name, parts_of in parts.items():
        experiment = EXPERIMENTS[name]
        for part, stems in parts_of.items():
            results = {scale: compared[stem] for scale, stem in stems.items()}
            for scale, count in counts.items():
                count += standings.counted(experiment, part, results, scale)
            found = standings.summary(experiment, part, results)
            found = [row for row in found if {*row[1:]} != {claims.NOT_RUN}]
            where = f"[{name} {part}](#{name}-{part})"  # in the first row
            rows += [[where * (i == 0), *row] for i, row in enumerate(found)]
        if absent := [part for part, stems in parts_of.items() if not stems]:
            lacked.append(f"- {name}: {', '.join(absent)}")
    lines = ["## What held", "", *map(_counts, counts, counts.values()), ""]
    lines += [*markdown_table(["table", "claim", *standings.SCALES], rows), ""]
    return [*lines, "Not run yet, at any scale:", "", *lacked, ""] if lacked else lines


def _counts(scale: str, counts: Counter) -> str:
    """How many claims came to what at a scale."""
    outcomes = (claims.HELD, claims.OPEN, claims.FAILED, claims.NOT_RUN)
    words = ", ".join(f"{counts[outcome]} {outcome}" for outcome in outcomes)
    return f"- {scale}: of {counts.total()} claims, {words}."


def _experiment(
    name: str, parts: Parts, compared: dict[str, dict[str, Any]]
) -> list[str]:
    """An experiment's parts, each with its tables, claims and files."""
    experiment = EXPERIMENTS[name]
    lines = [experiment.note, ""]
    for part, stems in parts.items():
        if not stems:
            continue
        results = {scale: compared[stem] for scale, stem in stems.items()}
        lines += [f"### {name} {part}", ""]
        if experiment.paper[part] or len(results) > 1:  # else it is the file's own
            lines += standings.table(experiment, part, results)
        lines += standings.judged(experiment, part, results)
        for stem in stems.values():
            lines += _section(stem, compared[stem], "####")
    return lines


def _place(result: dict) -> tuple[int, int]:
    """Where a comparison's group goes, and where it does therein.

    Those that are repeated no longer go last.
    """
    if not (mark := result.get("experiment")):
        return -1, 0
    names = [*EXPERIMENTS]
    if mark["name"] not in names:
        return len(names), 0
    parts = [*EXPERIMENTS[mark["name"]].parts, mark["part"]]
    return names.index(mark["name"]), parts.index(mark["part"])


def _group(result: dict) -> str:
    """The heading under which a comparison goes."""
    if not (mark := result.get("experiment")):
        return dataset(result)
    known = EXPERIMENTS.get(mark["name"])
    text = known.title if known else mark["name"]
    return text[0].upper() + text[1:]


def _section(stem: str, result: dict, level: str) -> list[str]:
    """A result under its file's name, which is its address on the page."""
    theory = record.is_theory(result)
    lines = [
        f"{level} {stem}",
        "",
        theory_markdown(result) if theory else markdown(result),
        "",
        f"[{stem}.json](results/{stem}.json)",
    ]
    if mark := result.get("experiment"):
        command = f"experiment {mark['name']} --scale {mark['scale']}"
        lines[-1] += f"; `python -m benchmarks {command} --parts {mark['part']}`"
    about = "" if theory else f": {title(result)}"
    for what in PICTURES.get(stem, ()):
        picture = f"results/{stem}-{what}.png"
        lines += ["", f"![{SHOWN[what]}{about}]({picture})"]
    return [*lines, ""]


def _costs(costs: dict[str, dict[str, Any]]) -> str:
    lines = [COSTS_HEAD]
    for stem, result in sorted(costs.items()):
        file = f"[{stem}.json](results/{stem}.json)"
        lines += [f"## {stem}", "", cost_markdown(result), "", file, ""]
    return "\n".join(lines).rstrip() + "\n"


def _speeds(speeds: dict[str, dict[str, Any]]) -> str:
    lines = [SPEED_HEAD, "## Limits for an H100", "", *limits_table(speeds), ""]
    for stem, result in sorted(speeds.items()):
        file = f"[{stem}.json](results/{stem}.json)"
        lines += [f"## {stem}", "", speed_markdown(result), "", file, ""]
    return "\n".join(lines).rstrip() + "\n"
