"""Residual networks with batch normalization: ResNet, ResNeXt and SE-ResNet."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from flax.typing import Dtype

from benchmarks.networks.layers import HE, as_images, normalized, outputs


class NormBlock(nn.Module):
    """A residual block of ResNet, with a normalization after every kernel.

    Attributes:
      features: Channels of the result, or a quarter of them with a bottleneck.
      strides: Of the first convolution of a 3 by 3 window, and of the shortcut.
      bottleneck: Whether one convolution of a 3 by 3 window is between two of 1 by 1,
        the last to four times as many channels, as in ResNet-50.
      groups: Of that one convolution, as in ResNeXt.
      inner: Channels of its input and result are ``features`` times this.
      squeeze: See `Excitation`; None for none.
      dtype: Of the computation.
    """

    features: int
    strides: int
    bottleneck: bool
    groups: int = 1
    inner: int = 1
    squeeze: int | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, h: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        n, s, g, m = (
            self.features,
            self.strides,
            self.groups,
            self.features * self.inner,
        )
        # Features, window, strides, groups.
        plain = (n, 3, s, 1), (n, 3, 1, 1)
        narrow = (m, 1, 1, 1), (m, 3, s, g), (4 * n, 1, 1, 1)
        x = h
        for i, (features, window, strides, groups) in enumerate(
            narrow if self.bottleneck else plain
        ):
            x = nn.relu(x) if i else x
            x = normalized(x, features, window, strides, train, self.dtype, groups)
        if self.squeeze:
            x = Excitation(self.squeeze, self.dtype)(x)
        if h.shape != x.shape:
            h = normalized(h, x.shape[-1], 1, self.strides, train, self.dtype)
        return nn.relu(h + x)


class Excitation(nn.Module):
    """Multiplies channels by what a small network makes of their means.

    Attributes:
      squeeze: How many times fewer units than channels it has between its layers.
      dtype: Of the computation.

    References:
      Hu et al., Squeeze-and-Excitation Networks, 2018, https://arxiv.org/abs/1709.01507
    """

    squeeze: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps the shape."""
        channels = x.shape[-1]
        few = nn.Dense(channels // self.squeeze, dtype=self.dtype, kernel_init=HE)
        all = nn.Dense(channels, dtype=self.dtype)
        scale = nn.sigmoid(all(nn.relu(few(x.mean((1, 2))))))
        return x * scale[:, None, None]


class NormResNet(nn.Module):
    """A residual network with batch normalization after every convolution.

    Attributes:
      classes: Number of classes.
      blocks: Residual blocks in each group; each but the first group begins with half
        the resolution, and has twice the channels.
      width: Channels of the first convolution, and ``features`` of the first group.
      strides: Of the first convolution.
      bottleneck: See `NormBlock`, as for the next three.
      groups: Of the convolutions of 3 by 3 windows.
      inner: How much wider these are.
      squeeze: See `Excitation`.
      window: Of the first convolution.
      pool: Whether maxima of windows of 3 by 3 halve the resolution after it, as for
        ImageNet.
      last_norm: Whether a normalization follows the dense layer too, instead of a bias.
      dtype: Of the computation.
    """

    classes: int
    blocks: Sequence[int] = (1, 1, 1)
    width: int = 16
    strides: int = 2
    bottleneck: bool = False
    groups: int = 1
    inner: int = 1
    squeeze: int | None = None
    window: int = 3
    pool: bool = False
    last_norm: bool = True
    dtype: Dtype | None = None

    trains = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x, dtype = as_images(x), self.dtype
        h = nn.relu(normalized(x, self.width, self.window, self.strides, train, dtype))
        if self.pool:
            h = nn.max_pool(h, (3, 3), (2, 2), "SAME")
        for group, count in enumerate(self.blocks):
            for i in range(count):
                block = NormBlock(
                    features=self.width * 2**group,
                    strides=2 if group and not i else 1,
                    bottleneck=self.bottleneck,
                    groups=self.groups,
                    inner=self.inner,
                    squeeze=self.squeeze,
                    dtype=dtype,
                )
                h = block(h, train)
        return outputs(h.mean((1, 2)), self.classes, self.last_norm, train, dtype)
