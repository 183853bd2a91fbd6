"""Settings of a comparison, and which are refused."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data
from benchmarks.data import DATASETS
from benchmarks.settings import COUNTS, RADII, UNLESS_NONE, Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "svhn"}, "dataset must be among digits"),
        ({"noise": 1.5}, "noise must be in"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"methods": ("none", "magic")}, "methods must be among"),
        ({"methods": ()}, "one or more"),
        ({"methods": ("none", "none")}, "named once each"),
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"adversarial": -1.0}, "adversarial must be"),
        ({"model": "vgg"}, "model must be among mlp"),
        ({"optimizer": "lion"}, "optimizer must be among adam"),
        ({"schedule": "cosine"}, "schedule must be among constant, steps"),
        ({"dtype": "float16"}, "dtype must be among float32, bfloat16, not 'float16'"),
        ({"augment": ("cutout", "zoom")}, "augment must be among .*, not zoom"),
        ({"sensitivity": -1}, "sensitivity must be at least 0"),
        ({"methods": ("enc",)}, "enc, which needs a normalization .*not mlp"),
        ({"methods": ("l2_paper",)}, "l2_paper, whose settings are for momentum"),
        ({"tune_for": "luck"}, "tune_for must be among accuracy"),
        ({"methods": ("binary_paper",), "optimizer": "momentum"}, "are for adam"),
        ({"deploy": ("binary",)}, "deploy must be among methods, but binary is not"),
        ({"deploy": ("none", "none")}, "deploy must be named once each"),
        ({"methods": ("binary",), "deploy": ("binary",)}, "begin with .* float32"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"resize": 8}, "resize is for images, which digits has none of, but is 8"),
        ({"pretrained": True}, "model must be among efficientnet_lite0, not mlp"),
        (
            {"dataset": "mnist", "model": "efficientnet_lite0", "pretrained": True},
            r"three channels, but those of mnist have shape \(28, 28\)",
        ),
        ({"restarts": 1}, "restarts must be at least 2"),
        ({"attack_steps": 0}, "attack_steps must be at least 1"),
        ({"attacked": 0, "epsilons": (0.1,)}, "epsilons and .* where attacked is 0"),
        ({"attacked": 0, "source_epochs": 2}, r"source_epochs .* are \(\) and 2"),
        ({"epsilons": (0.1, -1.0)}, "epsilons must be at least 0 .* but is -1.0"),
        ({"labels": "worse_label"}, "noise must be 0 where labels are given"),
        ({"loss": "hinge"}, "loss must be among cross_entropy, .* not 'hinge'"),
        ({"loss": "mmc", "augment": ("mixup",)}, "mixes labels: loss must be cross_e"),
        ({"dataset": "imdb", "attacked": 5}, "attacked must be 0 for imdb, since wo"),
        ({"dataset": "imdb", "adversarial": 0.1}, "adversarial must be 0 for imdb"),
        *(
            ({name: number}, f"{name} must be .* but is {number}")
            for name in (*COUNTS, *RADII, "noise")
            for number in (math.nan, math.inf, -1)
        ),
        *(({name: 2.5}, f"{name} must be .* whole number.* 2.5") for name in COUNTS),
    ],
)
def test_settings_that_cannot_be_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(**({"dataset": "digits"} | given))


def test_every_number_is_checked():
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    numbers = {name for name, kind in fields.items() if kind in (int, float)}
    assert {*numbers, *UNLESS_NONE} == {*COUNTS, *RADII, "noise"}


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_not_given_is_the_data_sets_own(name):
    settings, info = Settings.of(name, batch=7), DATASETS[name]
    assert (settings.model, settings.epochs) == (info.model, info.epochs)
    assert settings.tuning_seeds == info.tuning_seeds
    assert (settings.epsilon, settings.attacked) == (info.epsilon, info.attacked)
    assert settings.name() == f"{name}-noise40-{settings.name()[-8:]}"
    assert settings.batch == 7


def test_the_learning_rate_is_lowered_three_times(digits):
    config = Settings.of("digits", schedule="steps", epochs=10, batch=100)
    steps = 10 * (len(data.split(digits)[0]) // 100)
    tx = config.training("none", digits).optimizer({"learning_rate": 1.0})
    params, rates = jnp.zeros(()), []
    state = tx.init(params)
    for _ in range(steps):
        update, state = tx.update(jnp.ones(()), state, params)
        rates.append(float(-update))
    shares = [round(s * steps) for s in (0.3, 0.6, 0.9)]
    for i, (low, high) in enumerate(zip([0, *shares], [*shares, steps], strict=True)):
        np.testing.assert_allclose(rates[low:high], 0.1**i, rtol=1e-3)
