"""Networks whose layers see all layers before them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks.networks.convolutions import Convolution
from benchmarks.networks.layers import HE, as_images, norm, outputs


class DenseNet(nn.Module):
    """DenseNet with bottlenecks, halved between blocks (DenseNet-BC).

    A normalization comes before every convolution, and after the last block: whatever
    a convolution gives is normalized wherever it goes.

    Attributes:
      classes: Number of classes.
      layers: How many each block has.
      growth: Channels that a layer adds. Its bottleneck has four times as many, and the
        first convolution twice.
      window: Of the first convolution.
      strides: Of the first convolution.
      pool: Whether maxima of windows of 3 by 3 halve the resolution after it, as for
        ImageNet.
      last_norm: Whether a normalization follows the dense layer too, instead of a bias.
      dtype: Of the computation.

    References:
      Huang et al., 2017, https://arxiv.org/abs/1608.06993
    """

    classes: int
    layers: Sequence[int] = (6, 12, 48, 32)
    growth: int = 32
    window: int = 3
    strides: int = 1
    pool: bool = False
    last_norm: bool = True
    dtype: Dtype | None = None

    trains = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""

        def convolution(x, features, window, strides=1):
            return Convolution(
                features,
                window,
                strides,
                use_bias=False,
                kernel_init=HE,
                dtype=self.dtype,
            )(x)

        def activated(x):
            return nn.relu(norm(x, train, self.dtype))

        h = convolution(as_images(x), 2 * self.growth, self.window, self.strides)
        if self.pool:
            h = nn.max_pool(activated(h), (3, 3), (2, 2), "SAME")
        for block, count in enumerate(self.layers):
            if block:
                h = convolution(activated(h), h.shape[-1] // 2, 1)
                h = nn.avg_pool(h, (2, 2), (2, 2), "SAME", count_include_pad=False)
            for _ in range(count):
                x = convolution(activated(h), 4 * self.growth, 1)
                x = convolution(activated(x), self.growth, 3)
                h = jnp.concatenate([h, x], -1)
        h = activated(h).mean((1, 2))
        return outputs(h, self.classes, self.last_norm, train, self.dtype)
