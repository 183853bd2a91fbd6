"""Wide residual networks without normalization, with and without convex sums."""

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from benchmarks.networks.convolutions import Convolution
from benchmarks.networks.layers import HE, as_images
from weightreg.linen import ConvexSum


class Shift(nn.Module):
    """Adds one learnt number to all inputs, as Fixup does around every layer."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps the shape."""
        bias = self.param("bias", nn.initializers.zeros, ())
        x, bias = promote_dtype(x, bias, dtype=self.dtype)
        return x + bias


class Block(nn.Module):
    """A residual block of WEISSI's eq. 16, initialized by Fixup.

    Attributes:
      features: Channels of the result.
      strides: Of the first convolution and the shortcut.
      depth: Residual blocks in the network.
      convex: Whether shortcut and branch are balanced (eq. 19) and not just added.
      activate: Whether the branch begins with a ReLU; that on the input does not.
      dtype: Of the computation.
    """

    features: int
    strides: int
    depth: int
    convex: bool
    activate: bool
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        # Fixup's L^(-1/(2m-2)) for m = 2 convolutions in a branch
        scaled = nn.initializers.variance_scaling(2 / self.depth, "fan_in", "uniform")
        x = nn.relu(self._shift()(h)) if self.activate else h
        x = self._convolution(3, self.strides, scaled)(self._shift()(x))
        x = nn.relu(self._shift()(x))
        x = self._convolution(3, 1, nn.initializers.zeros)(self._shift()(x))
        scale = self.param("scale", nn.initializers.ones, ())
        x, scale = promote_dtype(x, scale, dtype=self.dtype)
        x = x * scale
        if self.strides > 1 or h.shape[-1] != self.features:
            h = self._convolution(1, self.strides, HE)(self._shift()(h))
        return ConvexSum(dtype=self.dtype)(h, x) if self.convex else h + x

    def _convolution(self, window, strides, init) -> Convolution:
        return Convolution(
            self.features,
            window,
            strides,
            use_bias=False,
            kernel_init=init,
            dtype=self.dtype,
        )

    def _shift(self) -> Shift:
        return Shift(self.dtype)


class ResNet(nn.Module):
    """A wide residual network without normalization, initialized by Fixup.

    As in WEISSI's eq. 16 nothing comes before the first block, whose shortcut, like
    that of every block that changes shape, is a linear map. Fixup is due to `Zhang et
    al., 2019 <https://arxiv.org/abs/1901.09321>`_.

    Attributes:
      classes: Number of classes.
      blocks: Residual blocks in each of three groups; the second and the third begin
        with half the resolution.
      width: Channels are 16, 32 and 64 times this.
      convex: See `Block`.
      dtype: Of the computation.
    """

    classes: int
    blocks: int = 2
    width: int = 1
    convex: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        h, depth = as_images(x), 3 * self.blocks
        for i in range(depth):
            group, place = divmod(i, self.blocks)
            strides = 2 if group and not place else 1
            features = 16 * 2**group * self.width
            block = Block(features, strides, depth, self.convex, i > 0, self.dtype)
            h = block(h)
        h = nn.relu(Shift(self.dtype)(h)).mean((1, 2))
        init = nn.initializers.zeros
        dense = nn.Dense(self.classes, dtype=self.dtype, kernel_init=init)
        return dense(Shift(self.dtype)(h))
