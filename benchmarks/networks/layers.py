"""What several networks are made of."""

import flax.linen as nn
import jax
from flax.typing import Dtype

from benchmarks.networks.convolutions import Convolution

HE = nn.initializers.he_uniform()  # where a ReLU follows


def norm(
    x: jax.Array, train: bool, dtype: Dtype | None, epsilon: float = 1e-5
) -> jax.Array:
    """Batch normalization, whose layer belongs to the module that calls this."""
    # Networks here see few batches: statistics must follow faster than Flax's do.
    layer = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=epsilon, dtype=dtype
    )
    return layer(x)


def normalized(
    x: jax.Array,
    features: int,
    window: int,
    strides: int,
    train: bool,
    dtype: Dtype | None,
    groups: int = 1,
    epsilon: float = 1e-5,
) -> jax.Array:
    """A convolution without a bias, and batch normalization after it."""
    layer = Convolution(
        features,
        window,
        strides,
        use_bias=False,
        kernel_init=HE,
        groups=groups,
        dtype=dtype,
    )
    return norm(layer(x), train, dtype, epsilon)


def outputs(
    x: jax.Array, classes: int, last_norm: bool, train: bool, dtype: Dtype | None
) -> jax.Array:
    """The last dense layer, and a normalization after it or a bias."""
    x = nn.Dense(classes, use_bias=not last_norm, dtype=dtype)(x)
    return norm(x, train, dtype) if last_norm else x


def as_images(x: jax.Array) -> jax.Array:
    """Inputs with an axis of channels, which those of one channel may lack."""
    if x.ndim not in (3, 4):
        raise ValueError(
            "A convolutional network takes images of shape (batch, height, width) or "
            f"(batch, height, width, channels), not inputs of shape {x.shape}."
        )
    return x[..., None] if x.ndim == 3 else x
