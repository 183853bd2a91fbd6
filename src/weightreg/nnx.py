"""Modules for Flax's nnx: ``import weightreg.nnx``."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax.typing import ArrayLike

from weightreg._parseval import convex_sum, initial_logits


class ConvexSum(nnx.Module):
    r"""Adds a residual branch convexly, with a balance that is learnt.

    .. math::
      a h + (1 - a) r, \qquad a = \mathrm{softmax}(l)_1

    as `weightreg.convex_sum`, with the parameter ``convex_logits`` for :math:`l`, two
    numbers, which `weightreg.weight_mask` never takes for a weight.

    Args:
      initial: ``a`` at the start, between 0 and 1.
      dtype: Dtype of the result; by default what ``h``, ``residual`` and the
        parameter promote to, as in Flax's layers.
      param_dtype: Dtype of the parameter.

    Raises:
      TypeError: ``initial`` is no number.
      ValueError: ``initial`` is not between 0 and 1; or on a call, ``h`` and
        ``residual`` differ in shape.

    References:
      Liu et al., WEISSI, 2020, eq. 19.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg.nnx
      >>> layer = weightreg.nnx.ConvexSum()  # nothing is random: it takes no rngs
      >>> layer.convex_logits[...]
      Array([0., 0.], dtype=float32)
      >>> layer(jnp.array([4.0, 0.0]), jnp.array([0.0, 2.0]))
      Array([2., 1.], dtype=float32)
    """

    def __init__(
        self,
        initial: float = 0.5,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.convex_logits = nnx.Param(initial_logits(initial, param_dtype))
        self.dtype = dtype
        self.param_dtype = param_dtype

    def __call__(self, h: ArrayLike, residual: ArrayLike) -> jax.Array:
        """The sum of two branches of one shape; the weight of ``h`` is ``a``."""
        logits = self.convex_logits[...]
        dtype = canonicalize_dtype(h, residual, logits, dtype=self.dtype)
        # Not the logits, which in 16 bits would round to a few balances.
        return convex_sum(jnp.asarray(h, dtype), jnp.asarray(residual, dtype), logits)
