"""Networks that begin with trained weights, and those that see scaled images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from drawn import normal

from benchmarks import deploy, measure, models
from benchmarks.cells import Run
from benchmarks.data import Dataset
from benchmarks.networks import MLP
from benchmarks.part import Part
from benchmarks.settings import Settings

pytestmark = quick.everything

SIDE = 2  # of images as the network sees them


def trained(variables):
    """What is published, but for the output layer."""
    params = dict(variables["params"])
    params["Dense_0"] = jax.tree.map(lambda x: np.full_like(x, 2), params["Dense_0"])
    return {"params": params}


@pytest.fixture
def images(monkeypatch):
    fake = models.Model(
        make=lambda classes: MLP((4,), classes),
        output="Dense_1/kernel",
        pretrained=trained,
    )
    monkeypatch.setitem(models.MODELS, "fake", fake)
    x, y = abs(normal(20, 5, 5, 3)), np.arange(20, dtype=np.int32) % 10
    return Dataset("cifar10", "drawn", x, y, x, y, 10)


def settings(**given):
    few = {"model": "fake", "methods": ("weissi",), "attacked": 3, "batch": 8}
    return Settings.of("cifar10", **(few | {"resize": SIDE} | given))


def test_all_runs_begin_with_trained_weights_but_for_the_output_layer(images):
    part = Part(settings(pretrained=True, noise=0.0), images)
    hyper = {"learning_rate": 0.1, "energy": 1.0, "complexity": 1e-4}
    runs = [Run("final", "weissi", hyper, seed) for seed in (0, 1)]
    population, progress = part.start(runs)
    params = population.fetch(progress).params
    assert params["Dense_0"]["kernel"].shape == (2, 3 * SIDE**2, 4)
    assert np.all(params["Dense_0"]["kernel"] == 2)
    one, other = params["Dense_1"]["kernel"]
    assert np.abs(one - other).max() > 0.1  # of each seed's own draw
    # Tuning goes by the energy of what training begins with.
    plain = Part(settings(noise=0.0), images)
    begun, fresh = (p.spaces()["weissi"]["energy"] for p in (part, plain))
    assert begun[0] < 0.5 * fresh[0]


def test_attacks_and_deployed_networks_see_scaled_images(images, monkeypatch):
    given = settings()
    part, x = Part(given, images), jnp.asarray(images.x_test)

    @jax.jit
    def expect():
        network = MLP((4,), 10).init(jax.random.key(0), jnp.ones((1, SIDE, SIDE, 3)))
        scaled = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "bilinear")
        return network, models.logits(MLP((4,), 10), network, scaled)

    network, expected = expect()
    np.testing.assert_allclose(jax.jit(part.logits)(network, x), expected, rtol=1e-5)
    seen, _ = measure.attacked_examples(images, given)
    assert seen.shape == (3, 5, 5, 3)
    model = models.make("fake", 10, resize=SIDE)
    narrow = deploy.logits(model, deploy.FLOATS[1], network, x)
    np.testing.assert_allclose(narrow, expected, rtol=0.05, atol=0.05)
    _, by_layers = deploy.packed_forms("binary", 1.0)
    assert deploy.logits(model, by_layers, network, x).shape == (20, 10)


def test_a_command_says_how_images_are_scaled_and_networks_begin(images):
    command = settings(pretrained=True).command()
    assert f" --resize {SIDE} " in command and " --pretrained" in command
    assert "pretrained" not in settings(resize=None).command()
    assert "resize" not in settings(resize=None).command()
    assert settings().name() != settings(pretrained=True).name()
