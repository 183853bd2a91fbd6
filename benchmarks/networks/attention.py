"""A recurrent network with attention, in linen, for texts as numbers of words."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax

from benchmarks.data import PADDING

LECUN, ORTHOGONAL = nn.initializers.lecun_normal(), nn.initializers.orthogonal()
GATES = ("input", "forget", "cell", "output")
DIMENSIONS = 50  # of vectors of words, where only shapes are asked for


class LSTMAttention(nn.Module):
    r"""An LSTM over words, additive attention over its states, and a dense layer.

    Words are looked up in the variable ``"vectors"`` of the collection ``"constants"``,
    of shape (numbers, dimensions), which is given and never trained. With states
    :math:`h_t`, :math:`\alpha = \mathrm{softmax}_t(v^\top \tanh(W h_t + b))` over words
    that are no padding, and the logits are a dense layer's of
    :math:`\sum_t \alpha_t h_t`, as in Bahdanau et al. (2014) with one query.

    Without vectors ``init`` puts NaN in their place: it is for shapes only, and no
    accuracy comes out of it.
    """

    classes: int
    hidden: int = 128
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps numbers of words, (batch, length), to logits (batch, classes)."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                "LSTMAttention takes texts as integers of shape (batch, length), not "
                f"{x.dtype.name} of shape {x.shape}."
            )
        vectors = self.variable(
            "constants", "vectors", jnp.full, (1, DIMENSIONS), jnp.nan
        ).value
        x = x.T  # time comes first, as a loop wants it
        # What is no number of a word becomes NaN, and not another word.
        looked_up = vectors.at[x].get(mode="fill", wrap_negative_indices=False)
        h = LSTM(self.hidden, self.dtype)(looked_up)
        score = nn.Dense(1, use_bias=False, dtype=self.dtype, name="query")
        scores = score(nn.tanh(nn.Dense(self.hidden, dtype=self.dtype, name="key")(h)))
        scores = jnp.where(x == PADDING, jnp.finfo(scores.dtype).min, scores[..., 0])
        shares = nn.softmax(scores.astype(jnp.float32), axis=0).astype(h.dtype)
        context = jnp.einsum("tb,tbh->bh", shares, h)
        return nn.Dense(self.classes, dtype=self.dtype, name="logits")(context)


class LSTM(nn.Module):
    """A layer of long short-term memory, whose cells are float32 at least.

    Inputs are multiplied at once, before the loop over time. Every gate has kernels of
    its own, as in Flax's cells, so that each is a weight with its own fan.
    """

    features: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (time, batch, dimensions) to states (time, batch, features)."""
        inputs = [
            # A gate that forgets little to begin with lets gradients through.
            Dense(self.features, LECUN, float(gate == "forget"), name=f"{gate}_x")
            for gate in GATES
        ]
        states = [Dense(self.features, ORTHOGONAL, name=f"{gate}_h") for gate in GATES]
        of_x, bias = zip(*(dense(x.shape[-1]) for dense in inputs), strict=True)
        of_h, _ = zip(*(dense(self.features) for dense in states), strict=True)
        x, of_x, of_h, bias = promote_dtype(
            x,
            jnp.concatenate(of_x, axis=1),
            jnp.concatenate(of_h, axis=1),
            jnp.concatenate(bias),
            dtype=self.dtype,
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def step(carry: tuple[Any, Any], x: jax.Array):
            cell, h = carry
            gates = (x + h @ of_h).astype(wide)
            i, f, g, o = jnp.split(gates, len(GATES), axis=-1)
            cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * nn.tanh(g)
            h = (nn.sigmoid(o) * nn.tanh(cell)).astype(x.dtype)
            return (cell, h), h

        zeros = jnp.zeros((x.shape[1], self.features))
        carry = zeros.astype(wide), zeros.astype(x.dtype)
        return lax.scan(step, carry, x @ of_x + bias)[1]


class Dense(nn.Module):
    """The parameters of a dense layer, for those who join several."""

    features: int
    kernel_init: nn.initializers.Initializer
    bias: float | None = None

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array | None]:
        """The kernel, of shape (inputs, features), and the bias if there is one."""
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        if self.bias is None:
            return kernel, None
        constant = nn.initializers.constant(self.bias)
        return kernel, self.param("bias", constant, (self.features,))
