"""A paper's table beside what was measured, and which of its claims held."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks import claims
from benchmarks.claims import Difference
from benchmarks.experiments import Claim, Experiment
from benchmarks.methods import METHODS
from benchmarks.report import (
    COLUMNS,
    ENOUGH_TRIALS,
    SENSITIVITY,
    lacking,
    markdown_table,
    points,
    share,
)

SCALES = ("cpu", "full")  # of which the summary speaks
Results = Mapping[str, Mapping[str, Any]]  # of one part, by scale


def scale_of(result: Mapping[str, Any]) -> str:
    """The scale of a result, and what layers compute in where it is not float32."""
    dtype = result["settings"].get("dtype", "float32")
    return result["experiment"]["scale"] + f", {dtype}" * (dtype != "float32")


def table(experiment: Experiment, part: str, results: Results) -> list[str]:
    """The rows of a part: the paper's numbers, and ours at each scale.

    Rows at fixed settings, which are mostly the paper's, come before those that are
    tuned. Attacks within further radii have a table of their own.
    """
    published = experiment.paper[part]
    shown = {metric for row in published.values() for metric in row}
    shown |= {claim.metric for claim in experiment.claims.get(part, ())}
    shown = shown or {"best", "last"}
    usual = [metric for metric in COLUMNS if metric in shown]
    names = sorted(_names(experiment, part, results), key=_is_tuned)
    lines = []
    for metrics in filter(None, (usual, sorted(shown - {*usual}))):
        words = " / ".join(in_words(metric) for metric in metrics)
        columns = ["paper", *results] if published else [*results]
        head = ["method", "settings", *(f"{column}: {words}" for column in columns)]
        rows = [
            [
                _label(name),
                _kind(name),
                *([_printed(published.get(name, {}), metrics)] if published else []),
                *(_measured(result, name, metrics) for result in results.values()),
            ]
            for name in names
        ]
        lines += [*markdown_table(head, rows), ""]
    return [*lines, *_lacking(results)]


def judged(experiment: Experiment, part: str, results: Results) -> list[str]:
    """Each claim of a part in a row: the paper's difference, and what ours say.

    Of claims on methods that have been run nowhere there is only the number.
    """
    head = ["claim", "in", "paper", *_columns(results)]
    every = experiment.claims.get(part, ())
    told = [c for c in every if any(claims.judge(r, c) for r in results.values())]
    rows = [
        [
            f"{_label(claim.better)} beats {_label(claim.worse)}",
            in_words(claim.metric),
            _printed_difference(experiment.paper[part], claim),
            *(_verdict(result, claim) for result in _columns(results).values()),
        ]
        for claim in told
    ]
    lines = [*markdown_table(head, rows), ""] if rows else []
    if left := len(every) - len(told):
        lines += [f"- Claims on what has not been run or measured yet: {left}.", ""]
    return lines


def summary(experiment: Experiment, part: str, results: Results) -> list[list[str]]:
    """Rows of the summary: what two methods' claims came to, in which metrics."""
    pairs: dict[tuple[str, str], list[Claim]] = {}
    for claim in experiment.claims.get(part, ()):
        pairs.setdefault((claim.better, claim.worse), []).append(claim)
    return [
        [
            f"{_label(better)} beats {_label(worse)}",
            *(_outcomes(_at(results, scale), several) for scale in SCALES),
        ]
        for (better, worse), several in pairs.items()
    ]


def counted(experiment: Experiment, part: str, results: Results, scale: str) -> Counter:
    """How many of a part's claims came to what at a scale."""
    result = _at(results, scale)
    return Counter(outcome(result, c) for c in experiment.claims.get(part, ()))


def in_words(metric: str) -> str:
    """What a metric is called, with the radius of an attack if it is a further one."""
    name, _, radius = metric.partition(" ")
    if name in COLUMNS:
        return f"{COLUMNS[name]} {radius}".strip()
    return SENSITIVITY.get(metric, metric)


def outcome(result: Mapping[str, Any] | None, claim: Claim) -> str:
    """Whether a claim held, could not be told, failed, or was not run."""
    found = claims.judge(result, claim)
    return claims.NOT_RUN if found is None else found.outcome


def _at(results: Results, scale: str) -> Mapping[str, Any] | None:
    """The result of a scale, whatever layers compute in."""
    found = [r for name, r in results.items() if name.split(",")[0] == scale]
    return found[0] if found else None


def _columns(results: Results) -> dict[str, Mapping[str, Any] | None]:
    """Every result, and nothing for a scale of which there is none."""
    lacked = {scale: None for scale in SCALES if _at(results, scale) is None}
    return {**results, **lacked}


def _outcomes(result: Mapping[str, Any] | None, several: list[Claim]) -> str:
    """In which metrics a claim came to what."""
    found: dict[str, list[str]] = {}
    for claim in several:
        found.setdefault(outcome(result, claim), []).append(in_words(claim.metric))
    if [*found] == [claims.NOT_RUN]:
        return claims.NOT_RUN
    words = "; ".join(f"**{what}**: {', '.join(ms)}" for what, ms in found.items())
    return words + _after_few(result, several[0])


def _verdict(result: Mapping[str, Any] | None, claim: Claim) -> str:
    found = claims.judge(result, claim)
    if found is None:
        return claims.NOT_RUN
    return f"{found.outcome} ({_reason(found)}{_after_few(result, claim)})"


def _after_few(result: Mapping[str, Any] | None, claim: Claim) -> str:
    """How many trials there were, where that is too few to rank tuned methods."""
    results = result["results"] if result else {}
    entries = [results[n] for n in (claim.better, claim.worse) if n in results]
    tuned = [n for entry in entries if (n := len(entry["tuning"]["trials"]))]
    few = min(tuned, default=ENOUGH_TRIALS)
    return f"; after {few} trial{'s' * (few > 1)}" * (few < ENOUGH_TRIALS)


def _reason(found: Difference) -> str:
    """The numbers behind an outcome."""
    if found.mean is None:
        return "diverged"
    if found.uncertainty is None:
        return f"{100 * found.mean:.1f} points, one seed"
    return points(found)


def _printed_difference(
    published: Mapping[str, Mapping[str, float]], claim: Claim
) -> str:
    pair = [published.get(name, {}) for name in (claim.better, claim.worse)]
    if not all(claim.metric in row for row in pair):
        return ""
    better, worse = (row[claim.metric] for row in pair)
    return f"*{better - worse:+.1f}*"


def _names(experiment: Experiment, part: str, results: Results) -> list[str]:
    """Rows: what was measured or is to be, and what only the paper has."""
    measured = [result["settings"]["methods"] for result in results.values()]
    known = dict.fromkeys(name for methods in measured for name in methods)
    return [*known | dict.fromkeys(experiment.paper[part])]


def _is_tuned(name: str) -> bool:
    return name in METHODS and METHODS[name].fixed is None


def _kind(name: str) -> str:
    """Whether a row is at fixed settings or tuned; the paper's own are neither."""
    if name not in METHODS:
        return ""
    return "tuned" if _is_tuned(name) else "fixed"


def _label(name: str) -> str:
    return METHODS[name].label if name in METHODS else name


def _printed(row: Mapping[str, float], metrics: list[str]) -> str:
    cells = [f"{row[m]:.1f}" if m in row else "-" for m in metrics]
    return f"*{' / '.join(cells)}*" if row.keys() & {*metrics} else ""


def _measured(result: Mapping[str, Any], name: str, metrics: list[str]) -> str:
    """Means and, of several seeds, deviations in percent, and how many seeds."""
    entry = result["results"].get(name, {"metrics": {}})
    known = entry["metrics"]
    cells = [share(entry, metric) or "-" for metric in metrics]
    seeds = max((len(known[m]["seeds"]) for m in metrics if m in known), default=0)
    return f"{' / '.join(cells)} ({seeds})" if seeds else ""


def _lacking(results: Results) -> list[str]:
    """What is missing of each result."""
    lines = [
        f"- {scale}: {lacking(dict(result))}"
        for scale, result in results.items()
        if not result["complete"]
    ]
    return [*lines, ""] if lines else []
