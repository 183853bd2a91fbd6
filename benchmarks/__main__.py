"""``python -m benchmarks``: compare, experiment, cost, report, readme."""

import argparse
import contextlib
import json
import os
import pathlib
import sys

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.data import DATASETS
from benchmarks.experiments import EXPERIMENTS

# Of a comparison; what is not given is a default, which may depend on the data set.
SETTINGS = {
    "noise": (float, "fraction of wrong labels"),
    "seeds": (int, "of the final runs"),
    "epochs": (int, None),
    "batch": (int, None),
    "examples": (int, "to train on, at most"),
    "trials": (int, "of each method's tuning"),
    "tuning_seeds": (int, "that each trial is averaged over"),
    "tune_for": (str, "held-out accuracy, or that under fgsm"),
    "model": (str, "see benchmarks/models.py"),
    "optimizer": (str, "adam or momentum"),
    "schedule": (str, "of the learning rate: constant, or steps, each to a tenth"),
    "epsilon": (float, "radius of the attacks, L-infinity"),
    "attacked": (int, "test examples that are attacked, at most"),
    "attack_steps": (int, "of PGD"),
    "restarts": (int, "of PGD"),
    "sensitivity": (int, "training examples on which to measure GBR each epoch"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(
            options, Console(width=None if sys.stdout.isatty() else 120)
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace, console: Console) -> int:
    """Compares methods on a data set."""
    given = {name: getattr(options, name) for name in SETTINGS}
    given |= {"adversarial": options.adversarial, "data_dir": options.data_dir}
    for name in ("methods", "augment", "deploy"):
        named = getattr(options, name)
        given[name] = named and tuple(named.split(","))
    given["mapping"] = options.mapping or _mapping()
    from benchmarks.settings import Settings

    settings = Settings.of(options.dataset, **given)
    return _compare(settings, options.out / f"{settings.name()}.json", {}, console)


def experiment(options: argparse.Namespace, console: Console) -> int:
    """Runs the comparisons of a table of a paper."""
    mapping = options.mapping or _mapping()
    from benchmarks.settings import Settings

    chosen = EXPERIMENTS[options.name]
    parts = options.parts.split(",") if options.parts else list(chosen.parts)
    if unknown := set(parts) - set(chosen.parts):
        raise ValueError(
            f"parts must be among {', '.join(chosen.parts)}, not {', '.join(unknown)}."
        )
    for part in parts:
        given = chosen.settings(part, options.scale)
        where = {"mapping": mapping, "data_dir": options.data_dir}
        settings = Settings.of(**given, **where)
        mark = {"name": options.name, "part": part, "scale": options.scale}
        out = options.out / f"{options.name}-{options.scale}-{part}.json"
        if status := _compare(settings, out, {"experiment": mark}, console):
            return status
    return 0


def _mapping() -> str:
    """Spreads runs over devices on CPU: lets each core be one, unless JAX runs."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _cores())
    return "devices" if jax.default_backend() == "cpu" else "vmap"


def _compare(settings, out: pathlib.Path, mark: dict, console: Console) -> int:
    """Runs a comparison with a progress bar, and shows what is finished of it."""
    from benchmarks.compare import run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    status = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=settings.ticks())

        def tick(what: str) -> None:
            bar.update(task, advance=1, description=what)

        try:
            run(settings, out, tick, mark)
        except KeyboardInterrupt:
            status = 130
    if out.is_file():
        show(out, console)
    return status


def report(options: argparse.Namespace, console: Console) -> int:
    """Prints the table of a result and draws its plots again."""
    out = options.out / options.result.name if options.out else options.result
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    return show(options.result, console, out)


def cost(options: argparse.Namespace, console: Console) -> int:
    """Measures what a step of an optimizer costs."""
    from benchmarks.cost import run
    from benchmarks.record import save
    from benchmarks.report import cost_markdown

    with console.status("measuring"):
        result = run(options.side, options.rounds)
    console.print(cost_markdown(result), highlight=False)
    save(result, options.out / f"cost-{jax.default_backend()}.json")
    return 0


def readme(options: argparse.Namespace, console: Console) -> int:
    """Writes the committed results into README.md."""
    from benchmarks.report import update_readme

    current = update_readme(pathlib.Path("README.md"), options.check)
    if options.check and not current:
        console.print(
            "README.md differs from benchmarks/results: python -m benchmarks readme"
        )
        return 1
    return 0


def show(
    result_file: pathlib.Path, console: Console, out: pathlib.Path | None = None
) -> int:
    """Table, sentences and plots of a result file."""
    from benchmarks import plots
    from benchmarks.report import deployed_table, table, verdict

    result = json.loads(result_file.read_text())
    console.print(table(result))
    for line in verdict(result):
        console.print(line, highlight=False)
    if "deployed" in result:
        console.print(deployed_table(result))
    for path in [result_file, *plots.draw(result, out or result_file)]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def _cores() -> int:
    """How many cores this process may use; not every system can restrict it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True)

    add = commands.add_parser("compare", help="compare methods on a data set")
    add.add_argument("--dataset", choices=tuple(DATASETS), default="digits")
    for name, (kind, text) in SETTINGS.items():
        add.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    add.add_argument(
        "--adversarial",
        type=float,
        nargs="?",
        const=0.01,
        help="train on examples that PGD has moved by at most this (0.01)",
    )
    add.add_argument("--methods", help="separated by commas; see benchmarks/methods.py")
    add.add_argument(
        "--augment", help="separated by commas: flip_crop,cutout,mixup,cutmix,smooth"
    )
    add.add_argument(
        "--deploy",
        help="methods, separated by commas, whose networks are stored and run as bits, "
        "or in bfloat16",
    )
    _add_common(add)
    add.set_defaults(command=compare)

    add = commands.add_parser("experiment", help="repeat a table of a paper")
    add.add_argument("name", choices=tuple(EXPERIMENTS))
    add.add_argument("--scale", choices=("cpu", "full"), default="cpu")
    add.add_argument("--parts", help="separated by commas; default: all")
    _add_common(add)
    add.set_defaults(command=experiment)

    add = commands.add_parser("cost", help="measure what an optimizer's step costs")
    add.add_argument(
        "--side", type=int, default=1024, help="rows and columns of each kernel"
    )
    add.add_argument("--rounds", type=int, default=200)
    add.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    add.set_defaults(command=cost)

    add = commands.add_parser("report", help="redraw table and plots of a result")
    add.add_argument("result", type=pathlib.Path)
    add.add_argument("--out", type=pathlib.Path, help="folder for the plots")
    add.set_defaults(command=report)

    add = commands.add_parser("readme", help="write committed results into README.md")
    add.add_argument(
        "--check", action="store_true", help="only say whether it is current"
    )
    add.set_defaults(command=readme)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mapping",
        choices=("devices", "vmap"),
        help="one run after another on each device (on CPU, each core), or all at once",
    )
    parser.add_argument(
        "--data-dir", help="folder with NAME/train.parquet and test.parquet"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))


if __name__ == "__main__":
    sys.exit(main())
