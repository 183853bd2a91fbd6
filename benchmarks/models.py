"""Networks, in linen: the population needs parameters and nothing else as a tree."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class MLP(nn.Module):
    """Dense layers with ReLU between them; inputs are flattened."""

    hidden: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features, kernel_init=nn.initializers.he_uniform())(x))
        return nn.Dense(self.classes)(x)


class Convolution(nn.Module):
    """``nn.Conv(features, (3, 3), strides=2)`` as products of matrices.

    On CPU the gradient of a convolution is over ten times slower inside of a loop than
    outside (jax-ml/jax#12868), and every epoch is a loop.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to half the height and width."""
        size = x.shape[1:3]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        pads = lax.padtype_to_pads(size, (3, 3), (2, 2), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        h, w = size
        return bias + sum(
            x[:, i : i + h : 2, j : j + w : 2] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )


class CNN(nn.Module):
    """Three strided convolutions and a dense layer."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images of shape (batch, height, width, channels) to logits."""
        for features in (32, 64, 64):
            x = nn.relu(Convolution(features)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


def make(dataset: str, classes: int) -> nn.Module:
    """The network that a data set is compared on."""
    if dataset == "cifar10":
        return CNN(classes)
    # The paper's two-layer network; it does not say how wide.
    return MLP((256,), classes)


def logits(model: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    """The network's outputs, of shape (batch, classes)."""
    out = model.apply({"params": params}, x)
    assert isinstance(out, jax.Array)  # apply may also give a pair
    return out


def describe(model: nn.Module) -> dict[str, Any]:
    """A network's class and settings, for the record."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    kept = {k: v for k, v in fields.items() if k not in ("parent", "name")}
    return {"class": type(model).__name__, **kept}
