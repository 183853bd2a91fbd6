"""Networks, in linen: the population needs parameters and nothing else as a tree."""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from weightreg.linen import ConvexSum

HE = nn.initializers.he_uniform()  # where a ReLU follows


class MLP(nn.Module):
    """Dense layers with ReLU between them; inputs are flattened."""

    hidden: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features, kernel_init=HE)(x))
        return nn.Dense(self.classes)(x)


class Convolution(nn.Module):
    """``nn.Conv(features, (window, window), strides)`` as products of matrices.

    On CPU the gradient of a convolution is over ten times slower inside of a loop than
    outside (jax-ml/jax#12868), and every epoch is a loop.
    """

    features: int
    window: int = 3
    strides: int = 2
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        if not self.use_bias:
            return _convolve(x, kernel, self.strides)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return bias + _convolve(x, kernel, self.strides)


def _convolve(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    if strides > 1 or len(kernel) == 1 or jax.default_backend() != "cpu":
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x = as_images(x)
        for features in (32, 64, 64):
            x = nn.relu(Convolution(features)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class UnstridedCNN(nn.Module):
    """Convolutions at full resolution and a dense layer, without pooling."""

    features: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        x = as_images(x)
        for features in self.features:
            x = nn.relu(Convolution(features, strides=1, kernel_init=HE)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class Shift(nn.Module):
    """Adds one learnt number to all inputs, as Fixup does around every layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps the shape."""
        return x + self.param("bias", nn.initializers.zeros, ())


class Block(nn.Module):
    """A residual block of WEISSI's eq. 16, initialized by Fixup.

    Attributes:
      features: Channels of the result.
      strides: Of the first convolution and the shortcut.
      depth: Residual blocks in the network.
      convex: Whether shortcut and branch are balanced (eq. 19) and not just added.
      activate: Whether the branch begins with a ReLU; that on the input does not.
    """

    features: int
    strides: int
    depth: int
    convex: bool
    activate: bool

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        # Fixup's L^(-1/(2m-2)) for m = 2 convolutions in a branch
        scaled = nn.initializers.variance_scaling(2 / self.depth, "fan_in", "uniform")
        x = nn.relu(Shift()(h)) if self.activate else h
        x = self._convolution(3, self.strides, scaled)(Shift()(x))
        x = nn.relu(Shift()(x))
        x = self._convolution(3, 1, nn.initializers.zeros)(Shift()(x))
        x = x * self.param("scale", nn.initializers.ones, ())
        if self.strides > 1 or h.shape[-1] != self.features:
            h = self._convolution(1, self.strides, HE)(Shift()(h))
        return ConvexSum()(h, x) if self.convex else h + x

    def _convolution(self, window, strides, init) -> Convolution:
        return Convolution(self.features, window, strides, False, init)


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
    """

    classes: int
    blocks: int = 2
    width: int = 1
    convex: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        h, depth = as_images(x), 3 * self.blocks
        for i in range(depth):
            group, place = divmod(i, self.blocks)
            strides = 2 if group and not place else 1
            features = 16 * 2**group * self.width
            h = Block(features, strides, depth, self.convex, activate=i > 0)(h)
        h = nn.relu(Shift()(h)).mean((1, 2))
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros)(Shift()(h))


class NormBlock(nn.Module):
    """A residual block of ResNet, with a normalization after every kernel.

    Attributes:
      features: Channels of the inner convolutions.
      strides: Of the first convolution of a 3 by 3 window, and of the shortcut.
      bottleneck: Whether one convolution of a 3 by 3 window is between two of 1 by 1,
        the last to four times as many channels, as in ResNet-50.
    """

    features: int
    strides: int
    bottleneck: bool

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
            x = _normalized(x, features, window, strides, train)
        if h.shape != x.shape:
            h = _normalized(h, x.shape[-1], 1, self.strides, train)
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
    """

    classes: int
    blocks: Sequence[int] = (1, 1, 1)
    width: int = 16
    strides: int = 2
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images, see `as_images`, to logits of shape (batch, classes)."""
        h = nn.relu(_normalized(as_images(x), self.width, 3, self.strides, train))
        for group, count in enumerate(self.blocks):
            for i in range(count):
                strides = 2 if group and not i else 1
                features = self.width * 2**group
                h = NormBlock(features, strides, self.bottleneck)(h, train)
        h = nn.Dense(self.classes, use_bias=False)(h.mean((1, 2)))
        return _norm(h, train)


class NormMLP(nn.Module):
    """Dense layers, each followed by batch normalization, with ReLU between them."""

    hidden: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            dense = nn.Dense(features, use_bias=False, kernel_init=HE)
            x = nn.relu(_norm(dense(x), train))
        return _norm(nn.Dense(self.classes, use_bias=False)(x), train)


def _norm(x: jax.Array, train: bool) -> jax.Array:
    # Networks here see few batches: statistics must follow faster than Flax's do.
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def _normalized(x, features: int, window: int, strides: int, train: bool) -> jax.Array:
    x = Convolution(features, window, strides, use_bias=False, kernel_init=HE)(x)
    return _norm(x, train)


def as_images(x: jax.Array) -> jax.Array:
    """Inputs with an axis of channels, which those of one channel may lack."""
    if x.ndim not in (3, 4):
        raise ValueError(
            "A convolutional network takes images of shape (batch, height, width) or "
            f"(batch, height, width, channels), not inputs of shape {x.shape}."
        )
    return x[..., None] if x.ndim == 3 else x
