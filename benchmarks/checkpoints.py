"""Where runs in training are kept, so that whoever ends them loses an epoch at most."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import serialization

from benchmarks import record
from benchmarks.cells import Run

try:
    import fcntl
except ImportError:  # not every system can lock files
    fcntl = None


class Checkpoint(NamedTuple):
    """Runs after some epochs.

    Attributes:
      about: What they are of: settings and data, as in the comparison's file.
      runs: Which ones.
      leaves: Arrays of their progress, one row a run.
      rows: What was measured after each epoch, by name.
      seconds: That they have taken so far.
    """

    about: str
    runs: list[Run]
    leaves: list[Any]
    rows: list[dict[str, Any]]
    seconds: float


def path(out: pathlib.Path) -> pathlib.Path:
    """Where the runs of a comparison's file are kept, a file for its owner alone."""
    return out.with_name(f"{out.stem}.checkpoint")


def save(checkpoint: Checkpoint, out: pathlib.Path) -> None:
    """Writes it in one move, over the one before.

    Raises:
      OSError: The file cannot be written.
    """
    kept = checkpoint._asdict() | {
        "runs": [run._asdict() for run in checkpoint.runs],
        # Arrays of many bytes are cut into pieces where they are values of an object.
        "leaves": {str(i): leaf for i, leaf in enumerate(checkpoint.leaves)},
    }
    record.write(serialization.msgpack_serialize(kept), path(out))


def load(out: pathlib.Path, about: str) -> Checkpoint | None:
    """What was kept last, if it is of the same settings and data.

    Raises:
      ValueError: The file is no checkpoint.
      OSError: It cannot be read.
    """
    file = path(out)
    if not file.is_file():
        return None
    try:
        fields: Any = serialization.msgpack_restore(file.read_bytes())
        kept = Checkpoint(**fields)
        runs = [Run(**run) for run in fields["runs"]]
        leaves = [fields["leaves"][str(i)] for i in range(len(fields["leaves"]))]
    except Exception as error:  # msgpack's errors have no common class
        raise ValueError(
            f"{file} must be a checkpoint of `python -m benchmarks`, but cannot be "
            f"read ({type(error).__name__}): delete it, which loses the epochs in it."
        ) from error
    same = kept.about == about
    return kept._replace(runs=runs, leaves=leaves) if same else None


def discard(out: pathlib.Path) -> None:
    """What was kept is of no more use: its runs have become cells."""
    path(out).unlink(missing_ok=True)


@contextlib.contextmanager
def alone(out: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from running the same comparison into the same file.

    The system gives the file free again however a process ends.

    Raises:
      OSError: Another process runs it.
    """
    if jax.process_index() > 0 or fcntl is None:
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.stem}.lock")
    with file.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"{out} is being filled by another process: wait for it, or write into "
                "another folder by --out and put them together by merge."
            ) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
