"""Small convolutional networks without branches."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from flax.typing import Dtype

from benchmarks.networks.convolutions import Convolution
from benchmarks.networks.layers import HE, as_images


class CNN(nn.Module):
    """Three strided convolutions and a dense layer."""

    classes: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x = as_images(x)
        for features in (32, 64, 64):
            x = nn.relu(Convolution(features, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(x.shape[0], -1))


class UnstridedCNN(nn.Module):
    """Convolutions at full resolution and a dense layer, without pooling."""

    features: Sequence[int]
    classes: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x = as_images(x)
        for features in self.features:
            layer = Convolution(features, strides=1, kernel_init=HE, dtype=self.dtype)
            x = nn.relu(layer(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(x.shape[0], -1))
