"""What is declared of the papers' tables can be run, and says what it means."""

import math

import pytest

from benchmarks import flops, models
from benchmarks.data import DATASETS
from benchmarks.experiments import EXPERIMENTS
from benchmarks.methods import METHODS
from benchmarks.settings import Settings

SCALES = ("smoke", "cpu", "full")
ATTACKS = ("fgsm", "pgd", "worst")
PARTS = [(name, part) for name, e in EXPERIMENTS.items() for part in e.parts]
RUN = [
    (name, scale, part)
    for name, e in EXPERIMENTS.items()
    for scale in SCALES
    for part in e.parts_at(scale)
]


def settings_of(name, scale, part):
    """The settings of a part, whose labels are in a file of that name."""
    given = EXPERIMENTS[name].settings(part, scale)
    if labels := given.get("labels"):
        given["labels"] = f"labels.npz:{labels}"
    return Settings.of(**given)


def metrics_of(settings):
    """What is measured of networks in the end."""
    radii = ["", *(f" {epsilon:g}" for epsilon in settings.epsilons)]
    attacked = [f"{attack}{radius}" for attack in ATTACKS for radius in radii]
    return {"best", "last", *(attacked if settings.attacked else [])}


@pytest.mark.parametrize(("name", "scale", "part"), RUN)
def test_every_part_has_settings(name, scale, part):
    settings = settings_of(name, scale, part)
    everything = settings_of(name, "full", part)
    # In few steps nothing is learnt at the paper's rate, so that no method's is tuned.
    assert set(settings.methods) <= {*everything.methods, "none"}
    if scale == "smoke":
        assert settings.epochs <= 2 and settings.attacked <= 4
        assert settings.examples is not None and settings.examples <= 128
        tuned = any(not METHODS[method].fixed for method in settings.methods)
        assert settings.trials == 1 or not tuned
    else:
        assert settings.whole == (scale == "full")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_said_of_parts_and_scales_is_of_some(name):
    experiment = EXPERIMENTS[name]
    parts = set(experiment.parts)
    assert tuple(experiment.scales) == SCALES
    assert set(experiment.paper) == parts and set(experiment.claims) <= parts
    assert set(experiment.limited) <= {"smoke", "cpu"}
    for scale in SCALES:
        assert set(experiment.parts_at(scale)) <= parts
    assert experiment.parts_at("full") == tuple(experiment.parts)
    for scale, part in experiment.resized:
        assert part in experiment.parts_at(scale)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_rows_and_claims_are_of_methods_that_are_run(name, part):
    settings = settings_of(name, "full", part)
    metrics = metrics_of(settings)
    for label, row in EXPERIMENTS[name].paper[part].items():
        assert label in settings.methods or (label not in METHODS and "_" not in label)
        assert row and set(row) <= metrics
        assert all(0 < percent < 100 for percent in row.values())
    claims = EXPERIMENTS[name].claims.get(part, ())
    assert len(set(claims)) == len(claims)
    for claim in claims:
        assert {claim.better, claim.worse} <= set(settings.methods)
        assert claim.better != claim.worse and claim.metric in metrics


def test_full_scales_are_traced_and_how_long_they_take_is_estimated():
    rows = {}
    for name, part in PARTS:
        settings = settings_of(name, "full", part)
        seconds = flops.epoch_seconds(settings, settings.methods[0], "NVIDIA H100")
        assert seconds is not None and 0 < seconds < math.inf
        params = flops.parameters(settings)
        output = params[models.MODELS[settings.model].output]
        assert output.shape[-1] == DATASETS[settings.dataset].classes
        count = sum(leaf.size for leaf in params.values())
        key = settings.dataset, settings.model, settings.adversarial
        rows[key] = f"{count:,} parameters, {seconds:.2f} s an epoch"
    for key, row in rows.items():
        print(*key, row)
