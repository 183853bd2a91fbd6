"""``python -m benchmarks``: compare, cost, report, readme."""

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
    # Runs are spread over devices: let each core be one, unless JAX has started.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _cores())
    on_cpu = jax.default_backend() == "cpu"
    mapping = options.mapping or ("devices" if on_cpu else "vmap")
    from benchmarks.compare import Settings, run

    settings = Settings.of(
        options.dataset,
        noise=options.noise,
        seeds=options.seeds,
        epochs=options.epochs,
        batch=options.batch,
        trials=options.trials,
        tuning_seeds=options.tuning_seeds,
        methods=options.methods and tuple(options.methods.split(",")),
        epsilon=options.epsilon,
        mapping=mapping,
        data_dir=options.data_dir,
    )
    out = options.out / f"{settings.dataset}-noise{round(100 * settings.noise)}.json"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    status = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=settings.ticks())
        try:
            run(
                settings,
                out,
                lambda what: bar.update(task, advance=1, description=what),
            )
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
    from benchmarks.report import table, verdict

    result = json.loads(result_file.read_text())
    console.print(table(result))
    for line in verdict(result):
        console.print(line, highlight=False)
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
    add.add_argument(
        "--dataset", choices=("digits", "mnist", "cifar10"), default="digits"
    )
    add.add_argument(
        "--noise", type=float, default=0.4, help="fraction of wrong labels"
    )
    add.add_argument("--seeds", type=int, default=5)
    add.add_argument("--epochs", type=int, help="default depends on the data set")
    add.add_argument("--batch", type=int, help="default depends on the data set")
    add.add_argument("--trials", type=int, default=12, help="of each method's tuning")
    add.add_argument(
        "--tuning-seeds", type=int, help="that each trial is averaged over"
    )
    add.add_argument("--methods", help="separated by commas; default: all")
    add.add_argument("--epsilon", type=float, help="radius of the attacks, L-infinity")
    add.add_argument(
        "--mapping",
        choices=("devices", "vmap"),
        help="one run after another on each device (on CPU, each core), or all at once",
    )
    add.add_argument(
        "--data-dir", help="folder with NAME/train.parquet and test.parquet"
    )
    add.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    add.set_defaults(command=compare)

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


if __name__ == "__main__":
    sys.exit(main())
