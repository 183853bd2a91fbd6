"""Networks, in linen: the population needs parameters and nothing else as a tree.

All take the ``dtype`` of their computation, as Flax's layers do: by default that of
inputs and parameters. Parameters and statistics of batches are float32.
"""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax

from weightreg.linen import ConvexSum

HE = nn.initializers.he_uniform()  # where a ReLU follows


class MLP(nn.Module):
    """Dense layers with ReLU between them; inputs are flattened."""

    hidden: Sequence[int]
    classes: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features, dtype=self.dtype, kernel_init=HE)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class Convolution(nn.Module):
    """``nn.Conv(features, (window, window), strides)``, on CPU as products of matrices.

    On CPU the gradient of a convolution is over ten times slower inside of a loop than
    outside (jax-ml/jax#12868), and every epoch is a loop.
    """

    features: int
    window: int = 3
    strides: int = 2
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, self.strides)
        return y if bias is None else bias + y


def convolve(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """A convolution as the device wants it that the program is compiled for."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(by_products, strides=strides),
        default=functools.partial(by_library, strides=strides),
    )


def by_library(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """A convolution as one instruction, for which accelerators have kernels."""
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=layouts
    )


def by_products(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """A convolution as products of matrices, of shapes that a core is fast at."""
    if strides > 1 or len(kernel) == 1:
        return by_shifts(x, kernel, strides)
    # A product with few columns leaves most of a core idle: let it make several pixels,
    # at the price of multiplying by zeros. A few images at a time fit in the cache.
    product = by_tiles if kernel.shape[-1] <= 16 else by_shifts
    one = jax.checkpoint(lambda image: product(image[None], kernel)[0])
    return lax.map(one, x, batch_size=5)


def by_shifts(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    """A convolution as the sum of one product for each position in the window."""
    (h, w), window = x.shape[1:3], kernel.shape[:2]
    pads = lax.padtype_to_pads((h, w), window, (strides, strides), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    products = (
        x[:, i : i + h : strides, j : j + w : strides] @ kernel[i, j]
        for i in range(window[0])
        for j in range(window[1])
    )
    return functools.reduce(operator.add, products)


def by_tiles(x: jax.Array, kernel: jax.Array, tile: int = 4) -> jax.Array:
    """A convolution of stride 1 as one product that makes ``tile`` pixels of a row.

    Its rows are patches as wide as these pixels see. Its columns hold the kernel once
    for each pixel, shifted, and zeros elsewhere.
    """
    batch, h, w, channels = x.shape
    window, features = kernel.shape[0], kernel.shape[-1]
    tiles, width = -(-w // tile), tile + window - 1
    more = -(-width // tile) - 1  # further tiles that a patch reaches into
    low, high = (window - 1) // 2, window // 2
    pads = (low, high), (low, (tiles + more) * tile - w - low)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(batch, h + window - 1, tiles + more, tile * channels)
    reach = [
        x[:, :, p : p + tiles, : (width - p * tile) * channels] for p in range(more + 1)
    ]
    rows = jnp.concatenate(reach, -1)
    patches = jnp.concatenate([rows[:, i : i + h] for i in range(window)], -1)
    shifts = [((0, 0), (s, tile - 1 - s), (0, 0), (0, 0)) for s in range(tile)]
    columns = jnp.stack([jnp.pad(kernel, s) for s in shifts], 3)
    out = patches @ columns.reshape(-1, tile * features)
    return out.reshape(batch, h, tiles * tile, features)[:, :, :w]


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
        return Convolution(self.features, window, strides, False, init, self.dtype)

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


class NormBlock(nn.Module):
    """A residual block of ResNet, with a normalization after every kernel.

    Attributes:
      features: Channels of the inner convolutions.
      strides: Of the first convolution of a 3 by 3 window, and of the shortcut.
      bottleneck: Whether one convolution of a 3 by 3 window is between two of 1 by 1,
        the last to four times as many channels, as in ResNet-50.
      dtype: Of the computation.
    """

    features: int
    strides: int
    bottleneck: bool
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, h: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        n, s = self.features, self.strides
        # Features, window, strides.
        plain = (n, 3, s), (n, 3, 1)
        layers = ((n, 1, 1), (n, 3, s), (4 * n, 1, 1)) if self.bottleneck else plain
        x = h
        for i, (features, window, strides) in enumerate(layers):
            x = nn.relu(x) if i else x
            x = _normalized(x, features, window, strides, train, self.dtype)
        if h.shape != x.shape:
            h = _normalized(h, x.shape[-1], 1, self.strides, train, self.dtype)
        return nn.relu(h + x)


class NormResNet(nn.Module):
    """A residual network with batch normalization after every kernel, last too.

    Attributes:
      classes: Number of classes.
      blocks: Residual blocks in each group; each but the first group begins with half
        the resolution, and has twice the channels.
      width: Channels of the first convolution, and inner ones of the first group.
      strides: Of the first convolution.
      bottleneck: See `NormBlock`.
      dtype: Of the computation.
    """

    classes: int
    blocks: Sequence[int] = (1, 1, 1)
    width: int = 16
    strides: int = 2
    bottleneck: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x, dtype = as_images(x), self.dtype
        h = nn.relu(_normalized(x, self.width, 3, self.strides, train, dtype))
        for group, count in enumerate(self.blocks):
            for i in range(count):
                strides = 2 if group and not i else 1
                features = self.width * 2**group
                h = NormBlock(features, strides, self.bottleneck, dtype)(h, train)
        h = nn.Dense(self.classes, use_bias=False, dtype=dtype)(h.mean((1, 2)))
        return _norm(h, train, dtype)


class NormMLP(nn.Module):
    """Dense layers, each followed by batch normalization, with ReLU between them."""

    hidden: Sequence[int]
    classes: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x, dtype = x.reshape(x.shape[0], -1), self.dtype
        for features in self.hidden:
            dense = nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=HE)
            x = nn.relu(_norm(dense(x), train, dtype))
        x = nn.Dense(self.classes, use_bias=False, dtype=dtype)(x)
        return _norm(x, train, dtype)


def _norm(x: jax.Array, train: bool, dtype: Dtype | None) -> jax.Array:
    # Networks here see few batches: statistics must follow faster than Flax's do.
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)


def _normalized(
    x: jax.Array,
    features: int,
    window: int,
    strides: int,
    train: bool,
    dtype: Dtype | None,
) -> jax.Array:
    return _norm(
        Convolution(features, window, strides, False, HE, dtype)(x), train, dtype
    )


def as_images(x: jax.Array) -> jax.Array:
    """Inputs with an axis of channels, which those of one channel may lack."""
    if x.ndim not in (3, 4):
        raise ValueError(
            "A convolutional network takes images of shape (batch, height, width) or "
            f"(batch, height, width, channels), not inputs of shape {x.shape}."
        )
    return x[..., None] if x.ndim == 3 else x
