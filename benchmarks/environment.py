"""Where a result was measured: versions, device, and the commit of the code."""

import pathlib
import platform
import subprocess
from importlib.metadata import version
from typing import Any

from benchmarks.devices import described

PACKAGES = ("weightreg", "jax", "optax", "flax", "numpy")
FOLDER = pathlib.Path(__file__).parent
# Results are written while others are measured, and do not change what is measured.
CODE = (":(top)", ":(top,exclude)benchmarks/results")


def environment() -> dict[str, Any]:
    """The versions, the device and the commit that a result was measured with."""
    python = {"python": platform.python_version()}
    return {
        "versions": {p: version(p) for p in PACKAGES} | python,
        "device": described(),
        **commit(),
    }


def commit(folder: pathlib.Path = FOLDER) -> dict[str, Any]:
    """The commit of the repository that holds a folder, if there is one.

    Returns:
      The commit, and whether tracked files differ from it; without a commit, None and
      the reason.
    """
    try:
        # A copy inside of another project's repository is not of that project's commit.
        _git(folder, "ls-files", "--error-unmatch", ".")
        head = _git(folder, "rev-parse", "--verify", "HEAD")
        status = ("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return {"commit": head, "dirty": bool(_git(folder, *status))}
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["git says nothing"]
        return {"commit": None, "no_commit": said[0]}
    except OSError as error:
        return {"commit": None, "no_commit": f"git cannot be run: {error.strerror}"}


def _git(folder: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    ran = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace"
    )
    return ran.stdout.strip()
