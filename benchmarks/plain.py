"""ResNet-18 and its training step in Flax and Optax alone, as users write them.

Nothing here is ours: a step of the benchmarks has to be as fast as this one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a third one where shapes change."""

    features: int
    strides: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to as much by ``strides``."""
        conv, norm = _layers(self.dtype, train)
        y = conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3))(y)
        y = norm()(y)
        if x.shape != y.shape:
            x = conv(self.features, (1, 1), self.strides)(x)
            x = norm()(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The network of ``benchmarks.networks.NormResNet``, whose first stride is 1."""

    classes: int
    blocks: Sequence[int]
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits, in float32."""
        conv, norm = _layers(self.dtype, train)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for group, count in enumerate(self.blocks):
            for i in range(count):
                strides = 2 if group and not i else 1
                x = Block(self.width * 2**group, strides, self.dtype)(x, train)
        x = nn.Dense(self.classes, use_bias=False, dtype=self.dtype)(x.mean((1, 2)))
        return norm()(x).astype(jnp.float32)


def _layers(dtype: Dtype, train: bool) -> tuple[Callable, Callable]:
    conv = functools.partial(
        nn.Conv, use_bias=False, dtype=dtype, kernel_init=nn.initializers.he_uniform()
    )
    norm = functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype
    )
    return conv, norm


def resnet18(classes: int, dtype: Dtype = jnp.float32) -> nn.Module:
    """ResNet-18 for images of 32 by 32, which computes in a dtype."""
    return ResNet(classes, (2, 2, 2, 2), 64, dtype)


def make_step(model: nn.Module, tx: optax.GradientTransformation, x: jax.Array):
    """A compiled step, and what it starts from, as of ``benchmarks.train.make_step``.

    It maps ``(params, stats, opt_state, x, y)`` to the first three of them.
    """
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    one = functools.partial(train_step, model, tx)
    return jax.jit(one, donate_argnums=(0, 1, 2)), params, stats, tx.init(params)


def train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    params: Any,
    stats: Any,
    opt_state: Any,
    x: jax.Array,
    y: jax.Array,
) -> tuple[Any, Any, Any]:
    """One step on a batch of images and their labels."""

    def loss(params):
        variables = {"params": params, **stats}
        logits, after = model.apply(variables, x, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), after

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state
