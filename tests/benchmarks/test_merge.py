"""Cells of several machines make one comparison."""

import json

import pytest

import benchmarks.__main__ as cli
from benchmarks import assemble, record
from benchmarks.cells import Plan
from benchmarks.methods import METHODS
from benchmarks.settings import Settings

SETTINGS = Settings.of("digits", methods=("binary_paper", "l2"), trials=2, seeds=2)
SPACES = {"l2": METHODS["l2"].whole_space("adam", {})}
METRICS = dict.fromkeys(("best", "last", "fgsm", "pgd", "worst"), 0.5)


@pytest.fixture
def machines(tmp_path, digits):
    """Two files: one with the first half of the cells, one with the rest."""
    plan, cells = Plan(SETTINGS, SPACES), []
    while missing := plan.missing(cells):
        run = missing[0]
        cell = run._asdict() | {"device": "1 x cpu", "seconds": 1.0}
        trial = {"score": 0.1 * (run.trial or 0), "tested": 0.2}
        cell["metrics"] = dict(trial if run.role == "trial" else METRICS)
        if run.role == "final":
            cell["curves"] = {"test_accuracy": [0.5], "log_energy": [1.0]}
            cell["curves"]["complexity"] = [1.0]
            if run.seed == 0:
                cell["weights"] = {}
        cells.append(json.loads(json.dumps(cell)))
    header, files = assemble.header(SETTINGS, digits), []
    for name, share in (("one", cells[:4]), ("other", cells[3:])):
        file = tmp_path / name / "a.json"
        record.save(assemble.result(header, plan, share, SETTINGS), file)
        files.append(file)
    whole = assemble.result(header, plan, cells, SETTINGS)
    return files, whole


def test_files_of_several_machines_are_put_together(machines, tmp_path):
    (one, other), whole = machines
    assert record.load(one)["missing"] and not record.load(one)["complete"]
    out = tmp_path / "both"
    assert cli.main(["merge", str(one), str(other), "--out", str(out)]) == 0
    both = record.load(out / "a.json")
    assert both == json.loads(json.dumps(whole)) and both["complete"]
    assert cli.main(["merge", str(other), str(one), "--out", str(out)]) == 0
    assert record.load(out / "a.json") == both
    chosen = both["results"]["l2"]["tuning"]
    assert chosen["score"] == 0.1 and len(chosen["trials"]) == 2


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        ("settings", "epochs", "differs in settings: epochs is 7, not"),
        ("data", "sha256", "differs in data: sha256 is 7, not"),
        ("spaces", "l2", "differs in spaces: l2 is 7, not"),
        ("fixed", "probes", "differs in fixed: probes is 7, not"),
    ],
)
def test_other_comparisons_are_refused(where, name, message, machines, capsys):
    (one, other), _ = machines
    changed = json.loads(other.read_text())
    changed[where][name] = 7
    other.write_text(json.dumps(changed))
    out = other.parent / "out"
    assert cli.main(["merge", str(one), str(other), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err


def test_how_runs_were_mapped_does_not_matter(machines, tmp_path):
    (one, other), _ = machines
    changed = json.loads(other.read_text())
    changed["settings"]["mapping"] = "vmap"
    other.write_text(json.dumps(changed))
    assert cli.main(["merge", str(one), str(other), "--out", str(tmp_path)]) == 0
