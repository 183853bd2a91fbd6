"""EfficientNet-Lite0: narrow layers between which depthwise convolutions are wide."""

import functools

import flax.linen as nn
import jax
from flax.typing import Dtype

from benchmarks.networks.layers import as_images, normalized

# Channels of the result, how many times wider it is inside, window and strides.
BLOCKS = (
    (16, 1, 3, 1),
    (24, 6, 3, 2),
    (24, 6, 3, 1),
    (40, 6, 5, 2),
    (40, 6, 5, 1),
    (80, 6, 3, 2),
    (80, 6, 3, 1),
    (80, 6, 3, 1),
    (112, 6, 5, 1),
    (112, 6, 5, 1),
    (112, 6, 5, 1),
    (192, 6, 5, 2),
    (192, 6, 5, 1),
    (192, 6, 5, 1),
    (192, 6, 5, 1),
    (320, 6, 3, 1),
)
NORMALIZED = functools.partial(normalized, epsilon=1e-3)  # as it was trained


class InvertedBlock(nn.Module):
    """A residual block that is wide inside, where channels do not mix.

    Attributes:
      features: Channels of the result.
      wider: How many times as many channels as the input it has inside.
      window: Of the convolution inside.
      strides: Of the convolution inside.
      dropout: How many examples skip the block in training, where they can.
      dtype: Of the computation.
    """

    features: int
    wider: int
    window: int
    strides: int
    dropout: float
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, h: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        apply = functools.partial(NORMALIZED, train=train, dtype=self.dtype)
        x, inside = h, self.wider * h.shape[-1]
        if self.wider > 1:
            x = nn.relu6(apply(x, inside, 1, 1))
        x = nn.relu6(apply(x, inside, self.window, self.strides, groups=inside))
        x = apply(x, self.features, 1, 1)
        if h.shape != x.shape:
            return x
        skip = nn.Dropout(self.dropout, broadcast_dims=(1, 2, 3))
        return h + skip(x, deterministic=not train)


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 without excitations and with ReLU6, as for small devices.

    Trained weights, see `benchmarks.efficientnet`, are for images from about -1 to 1:
    those from 0 to 1, as all networks here take, are shifted and scaled.

    Attributes:
      classes: Number of classes.
      dropout: How many inputs of the last layer are dropped in training. The last block
        is skipped by nearly as many examples, earlier ones by fewer in proportion.
      dtype: Of the computation.

    References:
      Tan and Le, 2019, https://arxiv.org/abs/1905.11946
    """

    classes: int
    dropout: float = 0.2
    dtype: Dtype | None = None

    trains = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        apply = functools.partial(NORMALIZED, train=train, dtype=self.dtype)
        x = (255 * as_images(x) - 127) / 128  # as TensorFlow's code does
        h = nn.relu6(apply(x, 32, 3, 2))
        for i, (features, wider, window, strides) in enumerate(BLOCKS):
            dropout = self.dropout * i / len(BLOCKS)
            block = InvertedBlock(
                features, wider, window, strides, dropout, dtype=self.dtype
            )
            h = block(h, train)
        h = nn.relu6(apply(h, 1280, 1, 1)).mean((1, 2))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.classes, dtype=self.dtype)(h)
