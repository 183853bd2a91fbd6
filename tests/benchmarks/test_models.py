"""The models by name: their shapes, their entries, and how they are applied."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit as quick
from shapes import count, flat, shapes_of

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


# As published, at 1,000 classes. That of SE-ResNet-101 is 49.36 million in the paper on
# equivalent norms, and this elsewhere.
PUBLISHED = {
    "resnet50_imagenet": 25_557_032,
    "resnet101_imagenet": 44_549_160,
    "resnext50_imagenet": 25_028_904,
    "resnext101_imagenet": 44_177_704,
    "se_resnet50_imagenet": 28_088_024,
    "se_resnet101_imagenet": 49_326_872,
    "densenet201_imagenet": 20_013_928,
    "efficientnet_lite0": 4_652_008,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_an_entry_is_true_of_its_network(name):
    """Weights are the kernels, and one gives the classes.

    Where a normalization follows every layer, as many of them are there, and layers
    have no biases. Shapes are all that is made, once for every network.
    """
    entry, model = models.MODELS[name], models.make(name, 1000)
    images = jax.ShapeDtypeStruct((2, 12, 12, 3), jnp.float32)
    texts = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    x = texts if name == "lstm_attention" else images
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (2, 1000)
    params = variables["params"]
    mask = flat(wr.weight_mask(params))
    assert mask == {path: path.endswith("/kernel") for path in mask}

    leaves = flat(params)
    kernels = {path: leaf for path, leaf in leaves.items() if mask[path]}
    of_classes = [path for path, leaf in kernels.items() if leaf.shape[-1] == 1000]
    assert of_classes == [entry.output]

    others = [path for path, weight in mask.items() if not weight]
    scales = [path for path in others if re.search(r"BatchNorm_\d+/scale$", path)]
    shifts = [path for path in others if re.search(r"BatchNorm_\d+/bias$", path)]
    alone = len(others) == len(scales) + len(shifts)
    assert entry.normalized == (alone and len(scales) >= len(kernels))

    assert getattr(model, "trains", False) == (
        "batch_stats" in variables or hasattr(model, "dropout")
    )
    assert count(params) == PUBLISHED.get(name, count(params))
    assert entry.together == (max(leaf.ndim for leaf in leaves.values()) == 2)


@pytest.mark.parametrize("name", ["cnn", "cnn16", *RESNETS])
def test_convolutional_networks_take_images_alone(name):
    model = models.make(name, 10)
    assert shapes_of(model, 2, 8, 8) == shapes_of(model, 2, 8, 8, 1)
    with pytest.raises(ValueError, match=r"takes images of .* not .*\(2, 64\)"):
        shapes_of(model, 2, 64)


def test_models_are_known_by_name():
    assert {info.model for info in DATASETS.values()} <= set(models.MODELS)
    with pytest.raises(ValueError, match=r"model must be among mlp, .* not 'alexnet'"):
        models.make("alexnet", 10)
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
        networks.VGG(10, (1, 1), 4),
        networks.NormResNet(
            10, (1,), 4, 2, True, 2, 2, squeeze=4, pool=True, last_norm=False
        ),
        networks.DenseNet(10, (1, 1), 4, pool=True),
        networks.EfficientNetLite0(10),
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
        model, variables, x, jax.random.key(0)
    )
    assert {aval.dtype.name for aval in program.out_avals} == {"float32"}
    products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_|conv_)general", str(program))
    assert set(products) == {"bf16"}


def test_networks_for_cifar10_have_their_sizes():
    assert count(shapes_of(models.make("resnet18", 10), 1, 32, 32, 3)) == 11_173_962
    vgg = shapes_of(models.make("vgg16", 10), 1, 32, 32, 3)
    # Convolutions of VGG16, which has 14,714,688 parameters in them.
    assert count(vgg) == 14_714_688 + (512 + 1) * 512 + (512 + 1) * 10


def test_statistics_are_of_networks_that_have_them():
    model, x = networks.MLP((4,), 10), np.ones((2, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    logits, stats = models.training_logits(model, variables, x)
    assert stats == {}
    np.testing.assert_array_equal(logits, models.logits(model, variables, x))


def test_what_is_dropped_in_training_needs_a_key():
    """And is the same for the same key, and nothing in inference."""
    model, x = networks.VGG(10, (1,), 4), np.ones((2, 4, 4, 3), np.float32)
    variables = quick(model.init)(jax.random.key(0), x)
    run = quick(functools.partial(models.training_logits, model))
    keys = jax.random.split(jax.random.key(1))
    first, after = run(variables, x, keys[0])
    assert not after
    np.testing.assert_array_equal(run(variables, x, keys[0])[0], first)
    assert np.abs(run(variables, x, keys[1])[0] - first).max() > 0.01
    kept = model.clone(dropout=0.0)
    inference = quick(functools.partial(models.logits, model))(variables, x)
    plain, _ = quick(functools.partial(models.training_logits, kept))(variables, x)
    np.testing.assert_allclose(plain, inference, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"key must be given for VGG, .* x, key\)"):
        models.training_logits(model, variables, x)
