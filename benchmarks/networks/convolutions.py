"""Convolutions, as the device wants them that a program is compiled for."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax


class Convolution(nn.Module):
    """``nn.Conv(features, (window, window), strides)``, on CPU as products of matrices.

    With ``groups``, Flax's ``feature_group_count``, channels are cut in as many equal
    parts, and each part of the result sees one of them. On CPU the gradient of a
    convolution is over ten times slower inside of a loop than outside
    (jax-ml/jax#12868), and every epoch is a loop.
    """

    features: int
    window: int = 3
    strides: int = 2
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    groups: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups must divide the {x.shape[-1]} channels of the input and the "
                f"{self.features} of the result, but is {self.groups}."
            )
        seen = x.shape[-1] // self.groups
        shape = (self.window, self.window, seen, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, self.strides, self.groups)
        return y if bias is None else bias + y


def convolve(
    x: jax.Array, kernel: jax.Array, strides: int, groups: int = 1
) -> jax.Array:
    """A convolution as the device wants it that the program is compiled for."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(by_products, strides=strides, groups=groups),
        default=functools.partial(by_library, strides=strides, groups=groups),
    )


def by_library(
    x: jax.Array, kernel: jax.Array, strides: int, groups: int = 1
) -> jax.Array:
    """A convolution as one instruction, for which accelerators have kernels."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def by_products(
    x: jax.Array, kernel: jax.Array, strides: int, groups: int = 1
) -> jax.Array:
    """A convolution as products of matrices, of shapes that a core is fast at."""
    shifted = functools.partial(by_shifts, strides=strides, groups=groups)
    if strides > 1 or len(kernel) == 1:
        return shifted(x, kernel)
    # A product with few columns leaves most of a core idle: let it make several pixels,
    # at the price of multiplying by zeros. A few images at a time fit in the cache.
    narrow = groups == 1 and kernel.shape[-1] <= 16
    product = by_tiles if narrow else shifted
    one = jax.checkpoint(lambda image: product(image[None], kernel)[0])
    return lax.map(one, x, batch_size=5)


def by_shifts(
    x: jax.Array, kernel: jax.Array, strides: int = 1, groups: int = 1
) -> jax.Array:
    """A convolution as the sum of one product for each position in the window."""
    (h, w), window = x.shape[1:3], kernel.shape[:2]
    pads = lax.padtype_to_pads((h, w), window, (strides, strides), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    products = (
        by_groups(x[:, i : i + h : strides, j : j + w : strides], kernel[i, j], groups)
        for i in range(window[0])
        for j in range(window[1])
    )
    return functools.reduce(operator.add, products)


def by_groups(x: jax.Array, matrix: jax.Array, groups: int) -> jax.Array:
    """A product for each part of the channels, with its columns of the matrix."""
    if groups == 1:
        return x @ matrix
    if matrix.shape == (1, groups):
        return x * matrix[0]
    parts = x.reshape(*x.shape[:-1], groups, -1)
    matrices = matrix.reshape(len(matrix), groups, -1)
    out = jnp.einsum("...gi,igo->...go", parts, matrices)
    return out.reshape(*x.shape[:-1], -1)


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
