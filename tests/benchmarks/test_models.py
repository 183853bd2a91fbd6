"""The models by name: their shapes, their entries, and how they are applied."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit as quick
from shapes import count, flat, shapes_for, shapes_of

import weightreg as wr
from benchmarks import models, networks
from benchmarks.data import DATASETS

RESNETS = ("resnet", "resnet_convex")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("mlp", [(784, 256), (256, 10)]),
        ("mlp1024", [(784, 1024), (1024, 1024), (1024, 10)]),
        ("cnn16", [(3, 3, 1, 16), (3, 3, 16, 16), (28 * 28 * 16, 10)]),
        ("cnn128", [(3, 3, 1, 128), (3, 3, 128, 128), (28 * 28 * 128, 10)]),
        ("cnn", [(3, 3, 1, 32), (3, 3, 32, 64), (3, 3, 64, 64), (4 * 4 * 64, 10)]),
    ],
)
def test_networks_for_mnist_have_the_papers_shapes(name, kernels):
    params = shapes_of(models.make(name, 10), 1, 28, 28)
    assert [layer.shape for layer in wr.weight_layers(params)] == kernels
    assert count(params) == sum(math.prod(k) + k[-1] for k in kernels)


@pytest.mark.parametrize("name", ["mlp1024", "cnn16"])
def test_layers_before_a_relu_start_as_he_says(name):
    init = quick(models.make(name, 10).init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8)))["params"]
    leaves = jax.tree.leaves(params)
    for layer in wr.weight_layers(params)[1:-1]:  # the first is small
        deviation = np.std(leaves[layer.index])
        assert deviation == pytest.approx(math.sqrt(2 / layer.fan_in), rel=0.1)


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_are_the_kernels(name):
    params = shapes_for(name, 10)
    mask = flat(wr.weight_mask(params))
    assert mask == {path: path.endswith("/kernel") for path in mask}
    most = max(leaf.ndim for leaf in jax.tree.leaves(params))
    assert most == (2 if models.MODELS[name].dense else 4)


@pytest.mark.parametrize("name", ["cnn", "cnn16", *RESNETS])
def test_convolutional_networks_take_images_alone(name):
    model = models.make(name, 10)
    assert shapes_of(model, 2, 8, 8) == shapes_of(model, 2, 8, 8, 1)
    with pytest.raises(ValueError, match=r"takes images of .* not .*\(2, 64\)"):
        shapes_of(model, 2, 64)


def test_models_are_known_by_name():
    assert {info.model for info in DATASETS.values()} <= set(models.MODELS)
    with pytest.raises(ValueError, match=r"model must be among mlp, .* not 'vgg'"):
        models.make("vgg", 10)
    for name in models.MODELS:
        assert models.make(name, 7) == models.make(name, 7)  # compiled once
        assert hash(models.make(name, 7)) == hash(models.make(name, 7))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"class": "MLP", "hidden": (256,), "classes": 3}),
        ("cnn", {"class": "CNN", "classes": 3}),
        ("cnn16", {"class": "UnstridedCNN", "features": (16, 16), "classes": 3}),
        (
            "resnet_convex",
            {"class": "ResNet", "classes": 3, "blocks": 2, "width": 1, "convex": True},
        ),
    ],
)
def test_a_description_is_for_the_record(name, expected):
    expected = {**expected, "dtype": "bfloat16"}
    assert models.describe(models.make(name, 3, jnp.bfloat16)) == expected
    json.dumps(expected)


@pytest.mark.parametrize(
    "small",
    [
        networks.MLP((4,), 10),
        networks.CNN(10),
        networks.UnstridedCNN((4, 20), 10),
        networks.ResNet(10, blocks=1, convex=True),
        networks.NormResNet(10, (1,), 4),
        networks.NormMLP((4,), 10),
    ],
    ids=lambda small: type(small).__name__,
)
def test_layers_alone_compute_in_bfloat16(small, monkeypatch):
    """What is trained, statistics of batches, and logits are float32."""
    entry = dataclasses.replace(models.MODELS["mlp"], make=lambda classes: small)
    monkeypatch.setitem(models.MODELS, "mlp", entry)
    model, x = models.make("mlp", 10, dtype=jnp.bfloat16), jnp.zeros((2, 4, 4, 3))
    variables = jax.eval_shape(small.init, jax.random.key(0), x)
    assert jax.eval_shape(model.init, jax.random.key(0), x) == variables
    program = jax.make_jaxpr(models.training_logits, static_argnums=0)(
        model, variables, x
    )
    assert {aval.dtype.name for aval in program.out_avals} == {"float32"}
    products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_|conv_)general", str(program))
    assert set(products) == {"bf16"}


def test_resnet50_has_its_layers_and_size():
    shapes = shapes_of(models.make("resnet50", 10), 1, 32, 32, 3)
    kernels = [k for k, weight in flat(wr.weight_mask(shapes)).items() if weight]
    assert len(kernels) == 1 + 16 * 3 + 4 + 1
    # Of the 25.56 million of the paper, without 990 classes and with a smaller stem.
    assert 23.4e6 < count(shapes) < 23.6e6


def test_statistics_are_of_networks_that_have_them():
    model, x = networks.MLP((4,), 10), np.ones((2, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    logits, stats = models.training_logits(model, variables, x)
    assert stats == {}
    np.testing.assert_array_equal(logits, models.logits(model, variables, x))


@pytest.mark.parametrize("name", models.MODELS)
def test_the_output_layer_is_there_and_gives_the_classes(name):
    leaves = flat(shapes_for(name, 7))
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}
    of_classes = [path for path, leaf in kernels.items() if leaf.shape[-1] == 7]
    assert of_classes == [models.MODELS[name].output]


@pytest.mark.parametrize("name", models.MODELS)
def test_a_normalization_follows_every_layer_or_the_entry_says_no(name):
    """Then there is one scale, and no bias, for every kernel."""
    paths = list(flat(shapes_for(name, 10)))
    kernels = [path for path in paths if path.endswith("/kernel")]
    scales = [path for path in paths if re.search(r"BatchNorm_\d+/scale$", path)]
    shifts = [path for path in paths if re.search(r"BatchNorm_\d+/bias$", path)]
    of_layers = len(kernels) == len(scales) == len(shifts) == len(paths) / 3
    assert models.MODELS[name].normalized == of_layers
