"""A transformer whose layers are stacked and scanned: it compiles as one layer does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HEADS = 8


class Size(NamedTuple):
    """How large a transformer is.

    Attributes:
      layers: How many are stacked.
      width: Channels of a token, a multiple of `HEADS`; within a layer four times that.
      vocabulary: Tokens that there are.
      length: Tokens of a sequence, at most.
    """

    layers: int
    width: int
    vocabulary: int
    length: int


def shapes(size: Size) -> dict[str, Any]:
    """Its parameters as shapes and dtypes, stacked in the first axis of `blocks`."""
    n, width = size.layers, size.width
    blocks = {
        "attention_norm": _norm(n, width),
        "qkv": _dense((n,), width, 3 * width),
        "out": _dense((n,), width, width),
        "mlp_norm": _norm(n, width),
        "up": _dense((n,), width, 4 * width),
        "down": _dense((n,), 4 * width, width),
    }
    return {
        "tokens": {"embedding": _leaf(size.vocabulary, width)},
        "positions": {"embedding": _leaf(size.length, width)},
        "blocks": blocks,
        "norm": _norm(width),
        "head": _dense((), width, size.vocabulary),
    }


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """Maps tokens (batch, length) to logits (batch, length, vocabulary)."""
    x = params["tokens"]["embedding"][tokens]
    x = x + params["positions"]["embedding"][: tokens.shape[1]]
    x, _ = jax.lax.scan(lambda x, p: (_block(p, x), None), x, params["blocks"])
    return _apply(params["head"], _normalize(params["norm"], x))


def _block(p: Any, x: jax.Array) -> jax.Array:
    qkv = _apply(p["qkv"], _normalize(p["attention_norm"], x))
    heads = qkv.reshape(*x.shape[:2], 3, HEADS, -1)
    q, k, v = (heads[:, :, i] for i in range(3))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + _apply(p["out"], attended.reshape(x.shape))
    return x + _apply(
        p["down"], jax.nn.gelu(_apply(p["up"], _normalize(p["mlp_norm"], x)))
    )


def _apply(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _normalize(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-6) * p["scale"] + p["bias"]


def _dense(stack: tuple[int, ...], inputs: int, outputs: int) -> dict[str, Any]:
    return {"kernel": _leaf(*stack, inputs, outputs), "bias": _leaf(*stack, outputs)}


def _norm(*shape: int) -> dict[str, Any]:
    return {"scale": _leaf(*shape), "bias": _leaf(*shape)}


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
