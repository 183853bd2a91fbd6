"""Networks of dense layers."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from flax.typing import Dtype

from benchmarks.networks.layers import HE, norm, outputs


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


class NormMLP(nn.Module):
    """Dense layers, each followed by batch normalization, with ReLU between them."""

    hidden: Sequence[int]
    classes: int
    dtype: Dtype | None = None

    trains = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs of shape (batch, ...) to logits of shape (batch, classes)."""
        x, dtype = x.reshape(x.shape[0], -1), self.dtype
        for features in self.hidden:
            dense = nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=HE)
            x = nn.relu(norm(dense(x), train, dtype))
        return outputs(x, self.classes, True, train, dtype)
