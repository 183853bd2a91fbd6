"""VGG, with one dense layer before the outputs, for images of 32 by 32."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks.networks.convolutions import Convolution
from benchmarks.networks.layers import HE, as_images


class VGG(nn.Module):
    """Groups of convolutions with a maximum over 2 by 2 pixels after each.

    This is the variant of WEISSI (appendix B.1) where ``convolutions`` are those of
    VGG16: one dense layer of 512 units instead of two of 4096, with dropout, biases,
    He's initialization and no batch normalization.

    Attributes:
      classes: Number of classes.
      convolutions: How many each group has.
      width: Channels of the first group. A further group has twice as many as the one
        before, but at most eight times this, as the dense layer has units.
      dropout: How many of the dense layer's units are dropped in training.
      dtype: Of the computation.

    References:
      Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556
    """

    classes: int
    convolutions: Sequence[int] = (2, 2, 3, 3, 3)
    width: int = 64
    dropout: float = 0.5
    dtype: Dtype | None = None

    trains = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x, dtype = as_images(x), self.dtype
        for group, count in enumerate(self.convolutions):
            features = self.width * min(2**group, 8)
            for _ in range(count):
                layer = Convolution(features, strides=1, kernel_init=HE, dtype=dtype)
                x = nn.relu(layer(x))
            x = maxima(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(8 * self.width, dtype=dtype, kernel_init=HE)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=dtype)(x)


def maxima(x: jax.Array) -> jax.Array:
    """The largest of every 2 by 2 pixels; at odd ends there are fewer.

    These are those of ``nn.max_pool``, whose gradient makes a step of a small network
    take a quarter longer on CPU, and one of VGG16 move half as many bytes again in the
    plan for an H100.
    """
    odd = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    x = jnp.pad(x, odd, "edge")
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])
