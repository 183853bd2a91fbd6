"""Results as files: where they were measured, and writing them safely."""

import json
import pathlib
import platform
from importlib.metadata import version
from typing import Any

import jax

PACKAGES = ("weightreg", "jax", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """The versions and the device that a result was measured with."""
    python = {"python": platform.python_version()}
    return {
        "versions": {p: version(p) for p in PACKAGES} | python,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def save(result: dict, out: pathlib.Path) -> None:
    """Writes a file in one move, so that an interrupt leaves the last whole one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    part.replace(out)
