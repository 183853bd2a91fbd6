"""Trees of leaves that programs are compiled for: shapes and dtypes, without values.

To add a tree, add an entry to `TREES`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import transformer
from benchmarks.transformer import Size

# Blocks of each of ResNet-50's stages, and channels within them.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
TREES: dict[str, Callable[[], Any]] = {
    "resnet50": lambda: resnet(STAGES),
    # As many leaves with a quarter of the channels.
    "resnet50, narrow": lambda: resnet([(n, c // 4) for n, c in STAGES], 16),
    # Layers are stacked.
    "transformer of 100M": lambda: transformer.shapes(Size(12, 768, 10_000, 512)),
    "transformer of 2M": lambda: transformer.shapes(Size(12, 96, 4_000, 512)),
    "1000x64x64": lambda: kernels(1000, 64),
    "2x8x8": lambda: kernels(2, 8),
    "16x512x512": lambda: kernels(16, 512),
    "32x2048x2048": lambda: kernels(32, 2048),
    "8x2048x2048": lambda: kernels(8, 2048),
    "4x4096x4096": lambda: kernels(4, 4096),
}


def kernels(count: int, side: int) -> dict[str, Any]:
    """Kernels of ``side`` by ``side``."""
    return {str(i): _leaf(side, side) for i in range(count)}


def resnet(
    stages: Sequence[tuple[int, int]], stem: int = 64, classes: int = 1000
) -> dict[str, Any]:
    """A ResNet of bottlenecks: kernels, and scales and biases of normalizations."""
    layers, width = {"stem": _convolution(7, 3, stem)}, stem
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
