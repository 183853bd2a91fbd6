"""``python -m benchmarks``: compare, experiment, status, merge, cost, speed, pages."""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import devices, record
from benchmarks.data import DATASETS
from benchmarks.experiments import EXPERIMENTS
from benchmarks.sizes import SIZES
from benchmarks.targets import TARGETS

SCALES = ("smoke", "cpu", "full")
SIDE, ROUNDS = 1024, 200  # of what costs are measured on, by default
# How a process finds the others that it runs together with, in the order of JAX.
PLACE = ("coordinator", "processes", "process")
# Of a comparison; what is not given is a default, which may depend on the data set.
SETTINGS = {
    "noise": (float, "fraction of wrong labels"),
    "seeds": (int, "of the final runs"),
    "epochs": (int, None),
    "batch": (int, None),
    "examples": (int, "to train on, at most"),
    "tested": (int, "test examples, at most"),
    "trials": (int, "of each method's tuning"),
    "tuning_seeds": (int, "that each trial is averaged over"),
    "tune_for": (str, "held-out accuracy, or that under fgsm"),
    "model": (str, "see benchmarks/models.py"),
    "optimizer": (str, "adam or momentum"),
    "schedule": (str, "of the learning rate: constant, steps or thirds, to a tenth"),
    "epsilon": (float, "radius of the attacks, L-infinity"),
    "attacked": (int, "test examples that are attacked, at most; 0 for no attacks"),
    "attack_steps": (int, "of PGD"),
    "restarts": (int, "of PGD"),
    "sensitivity": (int, "training examples on which to measure GBR each epoch"),
    "loss": (str, "cross_entropy, lq (generalized), or mmc (Max-Mahalanobis centres)"),
    "source_epochs": (int, "of the network that attacks are transferred from"),
    "resize": (int, "height and width that images are scaled to before the network"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    It is 2, after one line, where arguments cannot be used or files not be read or
    written, 130 after an interrupt, and 1 where pages are not current.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        options = _parser().parse_args(arguments)
        return options.command(options, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def compare(options: argparse.Namespace, console: Console) -> int:
    """Compares methods on a data set."""
    given = {name: getattr(options, name) for name in SETTINGS}
    for name in ("adversarial", "dtype", "data_dir", "whole", "pretrained"):
        given[name] = getattr(options, name)
    for name in ("methods", "augment", "deploy"):
        named = getattr(options, name)
        given[name] = None if named is None else tuple(filter(None, named.split(",")))
    given["epsilons"] = options.epsilons
    if options.labels is not None:
        given["labels_file"], given["labels"] = options.labels
        given["noise"] = given["noise"] or 0.0
    _prepare(options)
    from benchmarks.settings import Settings

    settings = _mapped(Settings.of(options.dataset, **given), options.mapping)
    devices.announce()
    out = options.out / f"{settings.name()}.json"
    return _shown_in_the_end(
        lambda: _fill(settings, out, {}, _clock(options), console), [out], console
    )


def experiment(options: argparse.Namespace, console: Console) -> int:
    """Runs the comparisons of a table of a paper, or goes on with them."""
    _prepare(options)
    runs = _parts(options)
    devices.announce()
    clock = _clock(options)
    # One seed of every row of all parts comes before more, where time may be short.
    passes = (False,) if options.minutes is None else (True, False)

    def fill() -> None:
        for first in passes:
            for settings, out, mark in runs:
                _fill(settings, out, mark, clock, console, first)

    files = [out for _, out, _ in runs]
    return _shown_in_the_end(fill, files, console, pictures=False)


def _shown_in_the_end(
    work: Callable[[], None],
    files: list[pathlib.Path],
    console: Console,
    pictures: bool = True,
) -> int:
    """Works, and shows what is finished of files even if that is interrupted."""
    status = 0
    try:
        work()
    except KeyboardInterrupt:
        status = 130
    if jax.process_index() == 0:
        for file in filter(pathlib.Path.is_file, files):
            show(file, console, pictures=pictures)
    return status


def _parts(options: argparse.Namespace) -> list[tuple[Any, pathlib.Path, dict]]:
    """Settings, file and mark of each part that is asked for.

    None is refused after others took their time.
    """
    from benchmarks.settings import Settings

    chosen, known = EXPERIMENTS[options.name], _parts_known(options)
    parts = options.parts.split(",") if options.parts else list(known)
    if unknown := set(parts) - set(known):
        raise ValueError(
            f"parts must be among {', '.join(known)}, not {', '.join(unknown)}."
        )
    how = {"data_dir": options.data_dir, "labels_file": options.labels}
    how["dtype"] = options.dtype
    every = {
        part: Settings.of(**chosen.settings(part, options.scale) | how)
        for part in parts
    }
    _check_labels(options, [part for part, s in every.items() if s.labels])
    runs = []
    for part, settings in every.items():
        settings = _mapped(settings, options.mapping)
        words = [options.name, options.scale, part]
        words += [settings.dtype] * (settings.dtype != "float32")
        out = options.out / f"{'-'.join(words)}.json"
        record.refuse_another(_shown(settings), out)
        mark = {"name": options.name, "part": part, "scale": options.scale}
        runs.append((settings, out, {"experiment": mark}))
    return runs


def _parts_known(options: argparse.Namespace) -> tuple[str, ...]:
    """The parts that an experiment has at the scale, of which there are some."""
    chosen = EXPERIMENTS[options.name]
    if not (known := chosen.parts_at(options.scale)):
        scales = ", ".join(scale for scale in SCALES if chosen.parts_at(scale))
        raise ValueError(
            f"--scale must be among {scales} for {options.name}, not {options.scale}."
        )
    return known


def _check_labels(options: argparse.Namespace, human: list[str]) -> None:
    """Refuses labels that no part reads, and parts whose labels are nowhere."""
    if human and options.labels is None:
        raise ValueError(
            f"{', '.join(human)} of {options.name} must have the labels that people "
            "gave: pass --labels FILE, such as cifar10n_labels.npz, or other --parts."
        )
    if options.labels is not None and not human:
        raise ValueError(
            f"--labels must be left out: no part of {options.name} that is asked for "
            "has labels that people gave."
        )


def _shown(settings) -> dict[str, Any]:
    """What a file says of settings."""
    from benchmarks.settings import PLACES

    kept = dataclasses.asdict(settings)
    return {name: value for name, value in kept.items() if name not in PLACES}


def _clock(options: argparse.Namespace):
    from benchmarks.runner import Clock

    return Clock(options.minutes, options.checkpoint_seconds)


def _prepare(options: argparse.Namespace) -> None:
    """Makes each core a device, or this process one of several that run together."""
    _spread_over_cores()
    place = [getattr(options, name) for name in PLACE]
    if place == [None] * len(PLACE):
        return
    if None in place:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in PLACE)} must be given all or none, "
            f"but --{PLACE[place.index(None)]} is not."
        )
    if options.process >= options.processes:
        raise ValueError(
            f"--process must be less than --processes, which is {options.processes}, "
            f"but is {options.process}."
        )
    try:
        jax.distributed.initialize(*place)
    except RuntimeError as error:  # of JAX, whatever went wrong
        raise OSError(f"--coordinator {place[0]} cannot be joined: {error}") from error


def merge(options: argparse.Namespace, console: Console) -> int:
    """Puts together what several machines have made of the same comparisons."""
    from benchmarks.merge import merge

    by_name: dict[str, list[pathlib.Path]] = {}
    for file in options.results:
        by_name.setdefault(file.name, []).append(file)
    for name, files in by_name.items():
        # What stands where the result goes is one of them: none of its cells is lost.
        there = [options.out / name] * (options.out / name).exists()
        result = merge([*files, *there])
        record.save(result, options.out / name)
        done = len(result["cells"])
        console.print(
            f"{options.out / name}: {done} cells, {result['missing']} missing",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _spread_over_cores() -> None:
    """Makes each core a device of the CPU, however runs will be mapped.

    Where JAX runs already, as in tests, its devices stay as they are.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _cores())


def _mapped(settings, asked: str | None):
    """Settings with the way runs are mapped, which depends on device and network.

    Dense layers of many runs at once are one batched product, and a GPU's launches are
    shared. Convolutions of many kernels are grouped ones, and the gradients of these
    kernels are convolutions with windows as large as images: with eight runs, a GPU's
    compiler plans 1.5 to 3 times the bytes of one run after another.
    """
    from benchmarks.models import MODELS

    together = MODELS[settings.model].together
    together = together and not DATASETS[settings.dataset].streamed
    once = jax.default_backend() != "cpu" and together
    mapping = asked or ("vmap" if once else "devices")
    return dataclasses.replace(settings, mapping=mapping)


def _fill(
    settings,
    out: pathlib.Path,
    mark: dict,
    clock,
    console: Console,
    first: bool = False,
) -> None:
    """Runs what is missing of a comparison, with a progress bar."""
    from benchmarks.runner import run

    with _progress(settings.ticks(), console) as tick:
        run(settings, out, tick, mark, clock, first)


@contextlib.contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A progress bar, and what advances it and tells what is going on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def report(options: argparse.Namespace, console: Console) -> int:
    """Prints the table of a result and draws its plots again."""
    file = options.result
    show(file, console, options.out / file.name if options.out else file)
    return 0


def status(options: argparse.Namespace, console: Console) -> int:
    """Says what is missing of the papers' tables, and how long it would take here."""
    _spread_over_cores()
    from benchmarks.status import states, table

    names = [options.name] if options.name and _parts_known(options) else EXPERIMENTS
    found = states(names, options.scale, options.out, dtype=options.dtype)
    console.print(table(found))
    return 0


def cost(options: argparse.Namespace, console: Console) -> int:
    """Measures what a step of an optimizer costs, or counts it for another device."""
    if options.target and (options.side or options.rounds):
        raise ValueError("--side and --rounds are of measuring, not of a --target.")
    _check_writable(options.out)
    result, name = (_planned if options.target else _measured)(options, console)
    out = options.out / f"{name}.json"
    record.save(result, out)
    show(out, console)
    return 0


def _check_writable(folder: pathlib.Path) -> None:
    """A full disk is noticed before all is measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(2**16))


def _measured(options: argparse.Namespace, console: Console) -> tuple[dict, str]:
    """Costs on this machine, and their name."""
    from benchmarks.cost import run

    side, rounds = options.side or SIDE, options.rounds or ROUNDS
    devices.announce()
    with console.status("measuring"):
        result = run(side, rounds)
    words = ["cost", jax.default_backend()]
    words += [f"side{side}"] * (side != SIDE)
    words += [f"rounds{rounds}"] * (rounds != ROUNDS)
    return result, "-".join(words)


def _planned(options: argparse.Namespace, console: Console) -> tuple[dict, str]:
    """What a compiler plans for a device that need not be there, and its name."""
    from benchmarks import plans

    with _progress(plans.ticks(options.target), console) as tick:
        return plans.run(options.target, tick), f"cost-{options.target}"


def theory(options: argparse.Namespace, console: Console) -> int:
    """Volumization's errors in closed form, and of students that are trained."""
    from benchmarks import theory

    _check_writable(options.out)
    with console.status("training"):
        result = theory.run()
    out = options.out / f"{theory.NAME}.json"
    record.save(result, out)
    show(out, console)
    return 0


def speed(options: argparse.Namespace, console: Console) -> int:
    """Times this machine's device, or counts what a compiler plans for another."""
    from benchmarks import speed

    parts = options.parts.split(",") if options.parts else None
    if options.target and options.sizes:
        raise ValueError("--sizes are of what is timed, not of a --target.")
    ticks = speed.ticks(options.target, parts)
    _check_writable(options.out)
    run = _foreseen if options.target else _timed
    with _progress(ticks, console) as tick:
        result, words = run(options, parts, tick)
    out = options.out / f"{'-'.join(['speed', *words, *(parts or ())])}.json"
    record.save(result, out)
    show(out, console)
    return 0


def _timed(options, parts: list[str] | None, tick) -> tuple[dict, list[str]]:
    """Speeds of this machine's device, and what they are called by."""
    from benchmarks.sizes import default_sizes
    from benchmarks.speed import run

    _spread_over_cores()  # populations take all of them
    devices.announce()
    usual = default_sizes()
    sizes = options.sizes or usual
    words = [jax.default_backend(), *([sizes] * (sizes != usual))]
    return run(sizes, parts, tick), words


def _foreseen(options, parts: list[str] | None, tick) -> tuple[dict, list[str]]:
    """What a compiler plans for a device that need not be there."""
    from benchmarks.speed import plan

    return plan(options.target, parts, tick), [options.target]


def pages(options: argparse.Namespace, console: Console) -> int:
    """Writes the committed results into RESULTS.md, COSTS.md and SPEED.md."""
    from benchmarks.pages import stale, update

    if not options.check:
        update()
    elif differ := [page.name for page in stale()]:
        print(
            f"{' and '.join(differ)} differ from benchmarks/results: write them by "
            "python -m benchmarks pages",
            file=sys.stderr,
        )
        return 1
    return 0


def show(
    file: pathlib.Path,
    console: Console,
    out: pathlib.Path | None = None,
    pictures: bool = True,
) -> None:
    """Table, sentences and, if asked for, plots of a result file."""
    from benchmarks import plots, theory_plot
    from benchmarks.report import (
        cost_markdown,
        deployed_table,
        speed_markdown,
        table,
        theory_markdown,
        verdict,
    )

    result, where = record.load(file), f"The result is in {file}."
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    try:
        if record.is_cost(result):
            console.print(cost_markdown(result), highlight=False)
            say(where)
        elif record.is_speed(result):
            say(speed_markdown(result))
            say(where)
        elif record.is_theory(result):
            say(theory_markdown(result))
            say(where)
            say(f"wrote {theory_plot.draw(result, out or file)}")
        else:
            console.print(table(result))
            for line in verdict(result):
                console.print(line, highlight=False)
            if "deployed" in result:
                console.print(deployed_table(result))
            say(where)
            for path in plots.draw(result, out or file) if pictures else []:
                say(f"wrote {path}")
    except (
        ValueError,
        TypeError,
        LookupError,
        StopIteration,
        ArithmeticError,
    ) as error:
        raise ValueError(
            f"{file} must be as `python -m benchmarks` writes it, but has a value that "
            f"cannot be shown ({type(error).__name__}: {error})."
        ) from error


def _cores() -> int:
    """How many cores this process may use; not every system can restrict it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as all others are, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _whole(least: int, text: str) -> int:
    """An argument that counts something."""
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, but is {text}."
        )
    return int(text)


_count = functools.partial(_whole, 1)


def _time(text: str) -> float:
    """An argument that is a time, in whatever unit."""
    with contextlib.suppress(ValueError):
        if 0 <= (time := float(text)) < math.inf:
            return time
    raise argparse.ArgumentTypeError(
        f"must be a number of at least 0 and finite, but is {text}."
    )


def _radii(text: str) -> tuple[float, ...]:
    """An argument of several radii."""
    try:
        return tuple(map(float, filter(None, text.split(","))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be numbers, separated by commas, but is {text}."
        ) from error


def _labels(text: str) -> tuple[str, str]:
    """An argument that is a file and the name of an array in it."""
    file, _, name = text.rpartition(":")
    if not (file and name):
        raise argparse.ArgumentTypeError(
            f"must be FILE:NAME, such as cifar10n_labels.npz:worse_label, but is "
            f"{text}."
        )
    return file, name


def _address(text: str) -> str:
    """An argument that is where a process listens."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, but is {text}.")
    return text


def _folder(text: str) -> pathlib.Path:
    """An argument that is a folder, or is to become one."""
    path = pathlib.Path(text)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(
                f"must be a folder, but {place} is a file."
            )
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks")
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
        "--epsilons", type=_radii, help="further radii, separated by commas"
    )
    add.add_argument(
        "--whole", action="store_true", help="train final runs on all examples"
    )
    add.add_argument(
        "--pretrained",
        action="store_true",
        help="begin with trained weights that are published",
    )
    add.add_argument(
        "--labels",
        type=_labels,
        metavar="FILE:NAME",
        help="labels that people gave, in an .npz with clean_label and NAME",
    )
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
    add.add_argument("--scale", choices=SCALES, default="cpu")
    add.add_argument("--parts", help="separated by commas; default: all")
    add.add_argument(
        "--labels",
        metavar="FILE",
        help="an .npz with clean_label and labels that people gave, for parts on these",
    )
    _add_common(add)
    add.set_defaults(command=experiment)

    add = commands.add_parser("status", help="say what is missing of papers' tables")
    add.add_argument("name", nargs="?", choices=tuple(EXPERIMENTS))
    add.add_argument("--scale", choices=SCALES, default="cpu")
    _add_dtype(add)
    _add_out(add)
    add.set_defaults(command=status)

    add = commands.add_parser(
        "merge", help="put together what several machines have made"
    )
    add.add_argument("results", type=pathlib.Path, nargs="+")
    _add_out(add)
    add.set_defaults(command=merge)

    add = commands.add_parser("cost", help="measure what an optimizer's step costs")
    add.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="a device that need not be there: programs are compiled for it, not run; "
        "default: this machine, where they are timed",
    )
    add.add_argument(
        "--side", type=_count, help=f"rows and columns of each kernel ({SIDE})"
    )
    add.add_argument("--rounds", type=_count, help=f"that are timed ({ROUNDS})")
    _add_out(add)
    add.set_defaults(command=cost)

    add = commands.add_parser(
        "speed",
        help="time steps, training, GBR, populations, bits and PyTorch on this device",
    )
    add.add_argument(
        "--parts",
        help="separated by commas: optimizers,training,gbr,populations,bits,torch,"
        "growth, or for a --target training,growth; default: all",
    )
    add.add_argument(
        "--sizes",
        choices=tuple(SIZES),
        help="of what is timed, see benchmarks/sizes.py; default: those for the device",
    )
    add.add_argument(
        "--target",
        choices=("h100",),
        help="a device that need not be there: training steps and growing trees are "
        "compiled for it, not run",
    )
    _add_out(add)
    add.set_defaults(command=speed)

    add = commands.add_parser(
        "theory", help="set volumization's closed forms beside students (Figure 4)"
    )
    _add_out(add)
    add.set_defaults(command=theory)

    add = commands.add_parser("report", help="redraw table and plots of a result")
    add.add_argument("result", type=pathlib.Path)
    add.add_argument("--out", type=_folder, help="folder for the plots")
    add.set_defaults(command=report)

    add = commands.add_parser(
        "pages",
        help="write RESULTS.md, COSTS.md and SPEED.md from committed results",
    )
    add.add_argument(
        "--check", action="store_true", help="only say whether they are current"
    )
    add.set_defaults(command=pages)
    return parser


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what layers compute in (float32); parameters, the optimizer's state, "
        "statistics of batches and losses are float32",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_dtype(parser)
    parser.add_argument(
        "--mapping",
        choices=("devices", "vmap"),
        help="one run after another on each device (on CPU, each core), or all at "
        "once, which is the default of networks without convolutions off CPU",
    )
    parser.add_argument(
        "--data-dir",
        help="folder with NAME/train.parquet and test.parquet, or NAME/train/CLASS and "
        "NAME/val/CLASS for imagenet",
    )
    parser.add_argument(
        "--minutes",
        type=_time,
        help="stop in time at a checkpoint; the same command goes on from there",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=_time,
        default=0.0,
        help="between checkpoints at least; default: one after every epoch",
    )
    parser.add_argument(
        "--coordinator",
        type=_address,
        metavar="HOST:PORT",
        help="of several processes, each with the same command and a --process of its "
        "own, whose devices share the runs; --out must be a folder that all see",
    )
    parser.add_argument("--processes", type=_count, help="how many they are")
    parser.add_argument(
        "--process",
        type=functools.partial(_whole, 0),
        help="which one this is, from 0",
    )
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=_folder, default=pathlib.Path("results"), help="folder of results"
    )


if __name__ == "__main__":
    sys.exit(main())
