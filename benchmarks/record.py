"""Results as files: written whole or not at all, and checked when they are read."""

import json
import os
import pathlib
import re
import reprlib
import secrets
from typing import Any

FORMAT = 1  # of the files; those without this field are older, and can be read

NUMBERS = re.compile(r'\[\n([^][{}"]+)\]')  # the innermost lists, of no strings

EACH = "each"  # stands for every name of an object
KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "true or false": (bool,),
    "a whole number": (int,),
    "a number": (int, float),
    "a number or null": (int, float, type(None)),
    "a list": (list,),
    "an object": (dict,),
}
NESTED = {dict: "an object", list: "a list"}
# What tables and plots need of a file. What a name with "?" stands for may be missing.
SHARE = {"seeds": "a list", "mean": "a number", "std": "a number"}
SIZE = SHARE | dict.fromkeys(("mean", "std"), "a number or null")
ATTACKS = ("fgsm", "pgd", "worst")
METHOD = {
    "label": "text",
    "tuning": {
        "trials": [
            {
                "hyperparameters": {EACH: "a number"},
                "score": "a number or null",
                "tested?": "a number or null",  # older files do not have it
            }
        ],
        "chosen": {EACH: "a number"},
        "at_edge": "a list",
    },
    "metrics": {
        **dict.fromkeys(("best", "last"), SHARE),
        **{f"{name}?": SHARE for name in ATTACKS},
        EACH: SIZE,
    },
    "warnings": "a list",
    "test_accuracy": "a list",
    "log_energy": "a list",
    "complexity": "a list",
    "strength?": dict.fromkeys(("epsilon", "clean", *ATTACKS), "a list"),
    "gradients?": {"counts": "a list", "log10_edges": "a list"},
    "weights?": {
        EACH: {"counts": "a list", "edges": "a list", "wall": "a number or null"}
    },
}
CELL = {
    "role": "text",
    "method": "text",
    "seed": "a whole number",
    "trial?": "a number or null",
}
FORM = {
    "form": "text",
    **dict.fromkeys(("kernel_bytes", "file_bytes", "device_bytes"), "a whole number"),
    **dict.fromkeys(("peak_bytes_1", "peak_bytes_100"), "a whole number"),
    **dict.fromkeys(("relative_time_1", "relative_time_100"), "a number"),
}
COMPARISON = {
    "complete": "true or false",
    "command": "text",
    "settings": {
        "dataset": "text",
        "noise": "a number",
        "model": "text",
        "methods": "a list",
        "seeds": "a whole number",
        "adversarial": "a number",
        "epsilon": "a number",
        "epsilons?": ["a number"],
    },
    "data": {"source": "text"},
    "device": "text",
    "results": {EACH: METHOD},
    "experiment?": {"name": "text", "part": "text", "scale": "text"},
    "deployed?": {EACH: {"method": "text", "accuracy": "a list", **FORM}},
    "relative_step_time?": {EACH: "a number"},
    "cells?": [CELL],
    "missing?": "a whole number",
}
TIMES = {EACH: {EACH: "a number"}}
COST = {
    "command": "text",
    "parameters": "a whole number",
    "device": "text",
    "optimizers": {
        EACH: dict.fromkeys(("relative_time", "bytes", "temporary_bytes"), "a number")
    },
    "training": TIMES,
    "inference": TIMES,
    "forms": {EACH: {EACH: FORM}},
}
PLANS = {
    "command": "text",
    "target": "text",
    "device": "text",
    "compiler": {EACH: "text"},
    "trees": {EACH: dict.fromkeys(("leaves", "parameters"), "a whole number")},
    "plans": {
        EACH: {
            EACH: {
                "kernels": "a whole number",
                **dict.fromkeys(("kernels_a_leaf", "bytes"), "a number"),
                **dict.fromkeys(("temporary_bytes", "trace_seconds"), "a number"),
                **dict.fromkeys(
                    ("compile_seconds", "relative_compile_time"), "a number"
                ),
            }
        }
    },
}
TIMING = dict.fromkeys(("ratio", "low", "high", "seconds"), "a number")
SPEED = {
    "command": "text",
    "device": "text",
    "left_out": {EACH: "text"},
    "timed": {EACH: {"about": "text", "columns": {EACH: {EACH: TIMING}}}},
    "counted": {EACH: {"about": "text", "columns": {EACH: {EACH: TIMES[EACH]}}}},
}
OVER_SEEDS = {"mean": "a list", "std": "a list"}
CHOSEN = {"chosen": "a list", **OVER_SEEDS}
THEORY = {
    "command": "text",
    "device": "text",
    "settings": {
        "a": "a number",
        **dict.fromkeys(("parameters", "steps"), "a whole number"),
        **dict.fromkeys(("seeds", "tuning_seeds"), "a list"),
        **dict.fromkeys(("sigmas", "volumes", "decays"), "a list"),
    },
    "theory": dict.fromkeys(
        ("none", "constant", "weight_decay", "volumization", "printed", "best_volume"),
        "a list",
    ),
    "simulated": {
        noise: {
            "none": OVER_SEEDS,
            "volumization": CHOSEN,
            "weight_decay": CHOSEN,
            "boxes": OVER_SEEDS,
        }
        for noise in ("uniform", "cauchy")
    },
}


def save(result: dict, out: pathlib.Path) -> None:
    """Writes a result as JSON.

    Raises:
      ValueError: It has an infinity or NaN, which JSON has not.
      OSError: The file cannot be written. What stood there before stands there still.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    # Numbers of a list in one line, which halves the file.
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write(text.encode(), out)


def write(content: bytes, out: pathlib.Path) -> None:
    """Writes a file in one move: whoever reads it finds the old one or the new one.

    Raises:
      OSError: With the name of the file. What stood there before stands there still.
    """
    part = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(content)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:  # a full disk's error names no file
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(out)) from error


def load(file: pathlib.Path) -> dict[str, Any]:
    """Reads a comparison, costs, speeds or theory, and refuses a file that is none.

    Raises:
      ValueError: The file is no JSON, or lacks what a result has, or is newer.
      OSError: It cannot be read.
    """
    try:
        result = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, but is not: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(
            f"{file} must be a result of `python -m benchmarks`, a JSON object, but "
            f"holds {reprlib.repr(result)}."
        )
    if (version := result.get("format", FORMAT)) != FORMAT:
        raise ValueError(
            f"{file} has format {version!r}, but this version reads {FORMAT} only: "
            f"read it with the version that wrote it."
        )
    _check(result, _expected(result), "", file)
    return result


def _expected(result: dict) -> dict:
    """What a result has to have, by what it is of."""
    if is_speed(result):
        return SPEED
    if is_theory(result):
        return THEORY
    if is_cost(result):
        return PLANS if is_plan(result) else COST
    return COMPARISON


def is_cost(result: dict) -> bool:
    """Whether a result is of what steps cost, rather than a comparison."""
    return "optimizers" in result or is_plan(result)


def is_plan(result: dict) -> bool:
    """Whether a result is what a compiler plans, rather than what was measured."""
    return "plans" in result


def is_speed(result: dict) -> bool:
    """Whether a result is of `benchmarks.speed`."""
    return "timed" in result


def is_theory(result: dict) -> bool:
    """Whether a result is of `benchmarks.theory`."""
    return "simulated" in result


def refuse_another(settings: dict, out: pathlib.Path, data: dict | None = None) -> None:
    """Refuses to write a comparison over one of other settings or other data.

    Files of other settings have other names, unless what a default or a paper's table
    is has changed since. What an older file does not tell cannot differ.

    Args:
      settings: Of the comparison.
      out: Where it is to be written.
      data: What its file will say of the data, if these are loaded already.

    Raises:
      ValueError: The file is of other settings or data, or no result.
    """
    if not out.exists():
        return
    known = load(out)
    for kind, given in (("settings", settings), ("data", data or {})):
        old, new = known.get(kind, {}), json.loads(json.dumps(given))
        for name in sorted(old.keys() & new.keys() - {"mapping"}):
            if old[name] != new[name]:
                raise ValueError(
                    f"{out} holds another comparison, whose {name} is {old[name]}, not "
                    f"{new[name]}: move it away, or write into another folder."
                )


def _check(value: Any, expected: Any, where: str, file: pathlib.Path) -> None:
    """Compares what was read with what is needed, down to the first difference."""
    kind = expected if isinstance(expected, str) else NESTED[type(expected)]
    if not isinstance(value, KINDS[kind]):
        raise ValueError(
            f"{file} must have {kind} as {where}, but has {reprlib.repr(value)}."
        )
    if isinstance(expected, list):
        for i, entry in enumerate(value):
            _check(entry, expected[0], f"{where}[{i}]", file)
    if not isinstance(expected, dict):
        return
    known = {name.removesuffix("?"): inner for name, inner in expected.items()}
    each = known.pop(EACH, None)
    for name in known | dict.fromkeys(value if each else ()):
        inner = f"{where}.{name}" if where else name
        if name in value:
            _check(value[name], known.get(name, each), inner, file)
        elif f"{name}?" not in expected:
            raise ValueError(
                f"{file} lacks the field {inner}, which results have: it is of another "
                f"version, or no result of `python -m benchmarks`."
            )
