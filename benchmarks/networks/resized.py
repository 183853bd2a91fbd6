"""A network for images of another size than the data set's."""

from typing import Any

import flax.linen as nn
import jax


class Resized(nn.Module):
    """Scales images before a network sees them, whose variables keep their paths.

    Whoever moves the images' pixels, as attacks do, moves those of the data set.

    Attributes:
      network: What sees the scaled images.
      size: Their height and width, in pixels.
    """

    network: nn.Module
    size: int

    @property
    def trains(self) -> bool:
        """Whether the network is another one in training."""
        return getattr(self.network, "trains", False)

    @property
    def dropout(self) -> float:
        """How much the network drops in training."""
        return getattr(self.network, "dropout", 0.0)

    def setup(self):
        """Leaves the variables where the network alone would have them."""
        nn.share_scope(self, self.network)

    def __call__(self, x: jax.Array, **how: Any) -> jax.Array:
        """Maps images (batch, height, width, ...) to what the network makes of them."""
        shape = (x.shape[0], self.size, self.size, *x.shape[3:])
        network: Any = self.network
        return network(jax.image.resize(x, shape, "bilinear"), **how)
