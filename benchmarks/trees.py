"""Trees of leaves that programs are compiled for: shapes and dtypes, without values.

To add a tree, add an entry to `TREES`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Blocks of each of ResNet-50's stages, and channels within them.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
TREES: dict[str, Callable[[], Any]] = {
    "resnet50": lambda: resnet(STAGES),
    "32x2048x2048": lambda: kernels(32, 2048),
    "8x2048x2048": lambda: kernels(8, 2048),
    "4x4096x4096": lambda: kernels(4, 4096),
}


def kernels(count: int, side: int) -> dict[str, Any]:
    """Kernels of ``side`` by ``side``."""
    return {str(i): _leaf(side, side) for i in range(count)}


def resnet(stages: Sequence[tuple[int, int]], classes: int = 1000) -> dict[str, Any]:
    """A ResNet of bottlenecks: kernels, and scales and biases of normalizations."""
    layers, width = {"stem": _convolution(7, 3, 64)}, 64
    for stage, (blocks, channels) in enumerate(stages):
        for i in range(blocks):
            block = f"stage{stage}_block{i}"
            layers[f"{block}_reduce"] = _convolution(1, width, channels)
            layers[f"{block}_conv"] = _convolution(3, channels, channels)
            layers[f"{block}_expand"] = _convolution(1, channels, 4 * channels)
            if i == 0:
                layers[f"{block}_shortcut"] = _convolution(1, width, 4 * channels)
            width = 4 * channels
    params = {}
    for name, (convolution, normalization) in layers.items():
        params |= {name: convolution, f"{name}_norm": normalization}
    head = {"kernel": _leaf(width, classes), "bias": _leaf(classes)}
    return params | {"head": head}


def _convolution(side: int, inputs: int, outputs: int) -> tuple[dict, dict]:
    """A convolution and the normalization after it."""
    normalization = {"scale": _leaf(outputs), "bias": _leaf(outputs)}
    return {"kernel": _leaf(side, side, inputs, outputs)}, normalization


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
