"""What `weightreg.trace_network` finds in every layer of Equinox that has parameters.

The table is written by hand, from what the layers compute: Equinox stores units first,
then inputs, then the window of a convolution. Models are traced as they are, with the
functions and numbers that they have among their leaves, under `jax.vmap`, since layers
of Equinox take one example. What is stateful gets its state as one more input.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import quick
from equinox import nn
from traced import W, check, ids
from traced import x as f32

import weightreg as wr

pytestmark = quick.everything

KEY = jax.random.key(0)


def batched(model, state, *inputs):
    """A layer that has no state, on a batch of examples."""
    return jax.vmap(model)(*inputs)


def stateful(model, state, x):
    """A layer with a state that all examples share; the new state is dropped."""
    return with_state(model, state, x)[0]


def with_state(model, state, x):
    """The same, and the new state is part of the result."""
    call = jax.vmap(
        lambda x, state: model(x, state),
        axis_name="batch",
        in_axes=(0, None),
        out_axes=(0, None),
    )
    return call(x, state)


def dropping(model, state, x, key):
    """Dropout draws another mask for each example."""
    keys = jax.random.split(key, len(x))
    return jax.vmap(lambda x, key: model(x, key=key))(x, keys)


def at_positions(model, state, x):
    """A layer at each position of a batch of sequences."""
    return jax.vmap(jax.vmap(model))(x)


def attending(model, state, x, y):
    """Cross attention from `x` to `y`, whose keys and values have the same source."""
    return jax.vmap(lambda x, y: model(x, y, y))(x, y)


def rotating(model, state, x):
    """Self-attention with queries and keys rotated by their positions."""
    attention, rope = model
    rotate = jax.vmap(rope, in_axes=1, out_axes=1)

    def attend(x):
        return attention(
            x, x, x, process_heads=lambda q, k, v: (rotate(q), rotate(k), v)
        )

    return jax.vmap(attend)(x)


def tied(model, state, tokens):
    """A language model whose last layer has the weight of its embedding."""

    def logits(tokens):
        embedding, linear = model()
        return jax.vmap(linear)(jnp.tanh(jax.vmap(embedding)(tokens)))

    return jax.vmap(logits)(tokens)


def unrolled(cell, state, xs):
    """A recurrent cell over time, from zeros; the last hidden state is the result."""

    def run(xs):
        zeros = jnp.zeros(cell.hidden_size)
        start = (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
        return jax.lax.scan(lambda h, x: (cell(x, h), None), start, xs)[0]

    return jax.vmap(run)(xs)


def unrolled_two(cells, state, xs):
    """Two cells on top of each other, in one scan over time."""

    def step(hidden, x):
        low = cells[0](x, hidden[0])
        return (low, cells[1](low, hidden[1])), None

    def run(xs):
        start = tuple(jnp.zeros(cell.hidden_size) for cell in cells)
        return jax.lax.scan(step, start, xs)[0][1]

    return jax.vmap(run)(xs)


def scanned(layers, state, x):
    """Equinox' idiom for depth: parameters of all layers are stacked, and scanned."""
    arrays, static = eqx.partition(layers, eqx.is_array)

    def run(x):
        def step(x, arrays):
            return x + eqx.combine(arrays, static)(x), None

        return jax.lax.scan(step, x, arrays)[0]

    return jax.vmap(run)(x)


def ensemble(members, state, x):
    """Equinox' idiom for ensembles, in which each member has its own batch."""
    return eqx.filter_vmap(lambda model, x: jax.vmap(model)(x))(members, x)


def stack(make, size):
    """Make `size` layers with stacked parameters."""
    return lambda key: eqx.filter_vmap(make)(jax.random.split(key, size))


def keys(make, count):
    """Make something of as many layers as there are keys."""
    return lambda key: make(*jax.random.split(key, count))


class Case(NamedTuple):
    """A model, what it is called with, and what each of its leaves is."""

    make: Callable[[jax.Array], Any]
    inputs: tuple[Any, ...]
    expected: dict[str, Any]
    call: Callable[..., Any] = batched


LINEAR = {"weight": W("out in", bias="bias"), "bias": "bias"}
NORM = {"weight": "scale", "bias": "bias"}


def conv(window, **fields):
    """What a convolution's leaves are, with as many axes of its window."""
    words = " ".join(["out in", *["window"] * window])
    fields = {"bias": "bias", "padding": ((0, 0),) * window, **fields}
    return {"weight": W(words, **fields), "bias": "bias"}


def under(prefix, expected):
    """The same layer as a part of another one."""
    table = {}
    for path, words in expected.items():
        if isinstance(words, tuple) and words[1].get("bias"):
            bias = f"{prefix}/{words[1]['bias']}"
            words = words[0], {**words[1], "bias": bias}
        table[f"{prefix}/{path}"] = words
    return table


COMPOSED = {
    "layer/weight": W("out in", bias="layer/bias", combined=True),
    "layer/bias": "bias",
}


def dense(*prefixes):
    """Linear layers with biases, as parts of another one."""
    return {p: w for prefix in prefixes for p, w in under(prefix, LINEAR).items()}


def stacked(expected):
    """The same leaves, with layers or members along their first axis."""
    return {
        path: W(f"stack {words[0]}", **words[1]) if isinstance(words, tuple) else words
        for path, words in expected.items()
    }


FEED_FORWARD = {
    "Linear": Case(
        lambda key: nn.Linear(3, 5, key=key),
        (f32(2, 3),),
        {"weight": W("out in", bias="bias", input_shape=(2, 3)), "bias": "bias"},
    ),
    "Linear without a bias": Case(
        lambda key: nn.Linear(3, 5, use_bias=False, key=key),
        (f32(2, 3),),
        {"weight": "out in"},
    ),
    # A scalar is an axis of length 1, in the weight and in what it is applied to.
    "Linear of scalars": Case(
        lambda key: nn.Linear("scalar", 5, key=key), (f32(2),), LINEAR
    ),
    "Linear to scalars": Case(
        lambda key: nn.Linear(3, "scalar", key=key), (f32(2, 3),), LINEAR
    ),
    "Linear between scalars": Case(
        lambda key: nn.Linear("scalar", "scalar", key=key), (f32(2),), LINEAR
    ),
    "Linear on sequences": Case(
        lambda key: nn.Linear(3, 5, key=key), (f32(2, 7, 3),), LINEAR, at_positions
    ),
    "MLP": Case(
        lambda key: nn.MLP(3, 5, 7, 3, key=key),
        (f32(2, 3),),
        dense("layers/0", "layers/1", "layers/2", "layers/3"),
    ),
    "MLP without layers in between": Case(
        lambda key: nn.MLP(3, 5, 7, 0, key=key), (f32(2, 3),), dense("layers/0")
    ),
    "MLP between scalars": Case(
        lambda key: nn.MLP("scalar", "scalar", 7, 1, use_bias=False, key=key),
        (f32(2),),
        {"layers/0/weight": W("out in", bias=None), **dense("layers/1")},
    ),
    # Activations with parameters are copied for each neuron of each layer. A layer
    # takes its copy by its number, which is no index that comes with the data.
    "MLP with learnt activations": Case(
        lambda key: nn.MLP(
            3, 5, 7, 2, nn.PReLU(), final_activation=nn.PReLU(), key=key
        ),
        (f32(2, 3),),
        {
            **dense("layers/0", "layers/1", "layers/2"),
            "activation/negative_slope": "scale",
            "final_activation/negative_slope": "scale",
        },
    ),
    "MLP that is scanned": Case(
        lambda key: nn.MLP(3, 5, 7, 4, scan=True, key=key),
        (f32(2, 3),),
        {
            **dense("layers/0", "layers/2"),
            **under("layers/1", stacked(LINEAR)),
        },
    ),
    "MLP that is scanned with learnt activations": Case(
        lambda key: nn.MLP(3, 5, 7, 4, nn.PReLU(), scan=True, key=key),
        (f32(2, 3),),
        {
            **dense("layers/0", "layers/2"),
            **under("layers/1", stacked(LINEAR)),
            "activation/negative_slope": "scale",
        },
    ),
    "PReLU": Case(lambda key: nn.PReLU(), (f32(2, 3),), {"negative_slope": "scale"}),
    "PReLU of channels": Case(
        lambda key: nn.PReLU(jnp.ones((3, 1))),
        (f32(2, 3, 5),),
        {"negative_slope": "scale"},
    ),
    "Sequential, with layers that have no parameters": Case(
        keys(
            lambda a, b: nn.Sequential(
                [
                    nn.Conv2d(2, 3, 3, key=a),
                    nn.Lambda(nn.PReLU()),
                    nn.MaxPool2d(2, 2),
                    nn.AvgPool2d(2),
                    nn.Identity(),
                    nn.Dropout(0.5),
                    nn.AdaptiveAvgPool2d((2, 1)),
                    nn.Lambda(jnp.ravel),
                    nn.Linear(6, 5, key=b),
                ]
            ),
            2,
        ),
        (f32(2, 2, 13, 11), KEY),
        {
            **under("layers/0", conv(2)),
            "layers/1/fn/negative_slope": "scale",
            **dense("layers/8"),
        },
        dropping,
    ),
}

CONVOLUTIONS = {
    "Conv": Case(
        lambda key: nn.Conv(4, 2, 3, (2, 1, 3, 2), key=key),
        (f32(2, 2, 3, 4, 5, 6),),
        conv(4),
    ),
    "Conv1d": Case(lambda key: nn.Conv1d(3, 5, 2, key=key), (f32(2, 3, 7),), conv(1)),
    "Conv1d without a bias": Case(
        lambda key: nn.Conv1d(3, 5, 2, use_bias=False, key=key),
        (f32(2, 3, 7),),
        {"weight": "out in window"},
    ),
    # 8 positions become 4. Their windows span 9, so that one has to be padded.
    "Conv1d, padded at the end": Case(
        lambda key: nn.Conv1d(3, 5, 3, stride=2, padding="SAME", key=key),
        (f32(2, 3, 8),),
        conv(1, strides=(2,), padding=((0, 1),)),
    ),
    "Conv1d, padded at the beginning": Case(
        lambda key: nn.Conv1d(3, 5, 3, stride=2, padding="SAME_LOWER", key=key),
        (f32(2, 3, 8),),
        conv(1, strides=(2,), padding=((1, 0),)),
    ),
    # Such data are padded beforehand, with more than zeros.
    "Conv1d, padded by reflection": Case(
        lambda key: nn.Conv1d(3, 5, 3, padding=1, padding_mode="REFLECT", key=key),
        (f32(2, 3, 7),),
        conv(1),
    ),
    "Conv2d": Case(
        lambda key: nn.Conv2d(3, 5, (2, 4), key=key), (f32(2, 3, 7, 6),), conv(2)
    ),
    "Conv2d with everything": Case(
        lambda key: nn.Conv2d(
            3, 5, (2, 4), (2, 1), ((0, 1), (2, 0)), dilation=(1, 2), key=key
        ),
        (f32(2, 3, 7, 9),),
        conv(2, strides=(2, 1), padding=((0, 1), (2, 0)), dilation=(1, 2)),
    ),
    "Conv2d, padded around": Case(
        lambda key: nn.Conv2d(
            3, 5, 3, padding="SAME", padding_mode="CIRCULAR", key=key
        ),
        (f32(2, 3, 7, 6),),
        conv(2),
    ),
    "Conv2d in groups": Case(
        lambda key: nn.Conv2d(6, 4, (2, 3), groups=2, key=key),
        (f32(2, 6, 7, 5),),
        conv(2, groups=2),
    ),
    "Conv2d by depth": Case(
        lambda key: nn.Conv2d(3, 6, (2, 3), padding=(1, 0), groups=3, key=key),
        (f32(2, 3, 7, 5),),
        conv(2, groups=3, padding=((1, 1), (0, 0))),
    ),
    "Conv2d of pixels": Case(
        lambda key: nn.Conv2d(3, 5, 1, key=key), (f32(2, 3, 7, 6),), conv(2)
    ),
    "Conv3d": Case(
        lambda key: nn.Conv3d(3, 5, (2, 3, 4), stride=(1, 2, 3), key=key),
        (f32(2, 3, 5, 6, 7),),
        conv(3, strides=(1, 2, 3)),
    ),
    # A stride of a transposed convolution spreads its input. Paddings are what is left
    # of the dilated window less one, and output_padding comes on top at the end.
    "ConvTranspose": Case(
        lambda key: nn.ConvTranspose(1, 3, 5, 4, stride=3, key=key),
        (f32(2, 3, 7),),
        conv(1, input_dilation=(3,), padding=((3, 3),)),
    ),
    "ConvTranspose1d": Case(
        lambda key: nn.ConvTranspose1d(3, 5, 3, dilation=2, padding=1, key=key),
        (f32(2, 3, 7),),
        conv(1, dilation=(2,), padding=((3, 3),)),
    ),
    "ConvTranspose2d": Case(
        lambda key: nn.ConvTranspose2d(
            3, 5, (2, 3), stride=(2, 3), output_padding=(1, 0), padding=(0, 1), key=key
        ),
        (f32(2, 3, 7, 6),),
        conv(2, input_dilation=(2, 3), padding=((1, 2), (1, 1))),
    ),
    "ConvTranspose2d in groups": Case(
        lambda key: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, key=key),
        (f32(2, 4, 7, 5),),
        conv(2, groups=2, input_dilation=(2, 2), padding=((1, 1), (2, 2))),
    ),
    "ConvTranspose2d without a bias": Case(
        lambda key: nn.ConvTranspose2d(3, 5, 2, use_bias=False, key=key),
        (f32(2, 3, 7, 6),),
        {"weight": W("out in window window", padding=((1, 1), (1, 1)))},
    ),
    # The forward convolution has one position of padding, at the end. What is left is
    # (2, 1); of it each whole stride wraps around, and the rest is zeros.
    "ConvTranspose2d, padded around": Case(
        lambda key: nn.ConvTranspose2d(
            3, 5, 3, stride=2, padding="SAME", padding_mode="CIRCULAR", key=key
        ),
        (f32(2, 3, 7, 6),),
        conv(2, input_dilation=(2, 2), padding=((0, 1), (0, 1))),
    ),
    "ConvTranspose3d": Case(
        lambda key: nn.ConvTranspose3d(3, 5, (1, 2, 3), stride=(1, 2, 1), key=key),
        (f32(2, 3, 4, 5, 6),),
        conv(3, input_dilation=(1, 2, 1), padding=((0, 0), (1, 1), (2, 2))),
    ),
}

EMBEDDINGS = {
    "Embedding": Case(
        lambda key: nn.Embedding(7, 3, key=key), (ids(2),), {"weight": "embedding"}
    ),
    "Embedding of sequences": Case(
        lambda key: nn.Embedding(7, 3, key=key),
        (ids(2, 5),),
        {"weight": "embedding"},
        at_positions,
    ),
    # The tied weight is stored once, in the embedding, which has a unit for each token.
    "Shared embedding": Case(
        keys(
            lambda a, b: nn.Shared(
                (nn.Embedding(7, 3, key=a), nn.Linear(3, 7, key=b)),
                lambda pair: pair[1].weight,
                lambda pair: pair[0].weight,
            ),
            2,
        ),
        (ids(2, 5),),
        {
            "pytree/0/weight": W("embedding: out in", bias="pytree/1/bias"),
            "pytree/1/bias": "bias",
        },
        tied,
    ),
    # Here it is a layer that was stored the other way around: inputs, then units.
    "Shared embedding of a transpose": Case(
        keys(
            lambda a, b: nn.Shared(
                (nn.Linear(7, 3, use_bias=False, key=a), nn.Linear(3, 7, key=b)),
                lambda pair: pair[1].weight,
                lambda pair: pair[0].weight.T,
            ),
            2,
        ),
        (f32(2, 3),),
        {
            "pytree/0/weight": W("in out", bias="pytree/1/bias"),
            "pytree/1/bias": "bias",
        },
        lambda model, state, x: jax.vmap(model()[1])(x),
    ),
}

ATTENTION = {
    "MultiheadAttention": Case(
        lambda key: nn.MultiheadAttention(
            2, 3, 5, 5, output_size=7, qk_size=4, vo_size=6, key=key
        ),
        (f32(2, 8, 3), f32(2, 9, 5)),
        {
            "query_proj/weight": "out in",
            "key_proj/weight": "out in",
            "value_proj/weight": "out in",
            "output_proj/weight": "out in",
        },
        attending,
    ),
    "MultiheadAttention with biases": Case(
        lambda key: nn.MultiheadAttention(
            2,
            3,
            5,
            5,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            qk_size=4,
            vo_size=6,
            key=key,
        ),
        (f32(2, 8, 3), f32(2, 9, 5)),
        dense("query_proj", "key_proj", "value_proj", "output_proj"),
        attending,
    ),
    # Rotations have no parameters: they are constants of the network.
    "MultiheadAttention with rotated heads": Case(
        lambda key: (
            nn.MultiheadAttention(2, 3, qk_size=4, vo_size=6, key=key),
            nn.RotaryPositionalEmbedding(4),
        ),
        (f32(2, 8, 3),),
        {
            "0/query_proj/weight": "out in",
            "0/key_proj/weight": "out in",
            "0/value_proj/weight": "out in",
            "0/output_proj/weight": "out in",
        },
        rotating,
    ),
}

NORMS = {
    "LayerNorm": Case(lambda key: nn.LayerNorm(3), (f32(2, 3),), NORM),
    "LayerNorm over two axes": Case(
        lambda key: nn.LayerNorm((3, 5)), (f32(2, 3, 5),), NORM
    ),
    "LayerNorm without a bias": Case(
        lambda key: nn.LayerNorm(3, use_bias=False), (f32(2, 3),), {"weight": "scale"}
    ),
    "LayerNorm without a scale": Case(
        lambda key: nn.LayerNorm(3, use_weight=False), (f32(2, 3),), {"bias": "bias"}
    ),
    "RMSNorm": Case(lambda key: nn.RMSNorm(3), (f32(2, 3),), NORM),
    "RMSNorm without a bias": Case(
        lambda key: nn.RMSNorm((3, 5), use_bias=False),
        (f32(2, 3, 5),),
        {"weight": "scale"},
    ),
    "GroupNorm": Case(lambda key: nn.GroupNorm(2, 6), (f32(2, 6, 5, 7),), NORM),
    "BatchNorm": Case(
        lambda key: nn.BatchNorm(3, "batch", mode="batch"),
        (f32(2, 3, 5),),
        NORM,
        stateful,
    ),
    "BatchNorm at inference": Case(
        lambda key: nn.BatchNorm(3, "batch", mode="batch", inference=True),
        (f32(2, 3, 5),),
        NORM,
        stateful,
    ),
    "BatchNorm by moving averages": Case(
        lambda key: nn.BatchNorm(3, "batch", mode="ema"),
        (f32(2, 3),),
        NORM,
        stateful,
    ),
    "BatchNorm by moving averages at inference": Case(
        lambda key: nn.BatchNorm(3, "batch", mode="ema", inference=True),
        (f32(2, 3),),
        NORM,
        stateful,
    ),
    # The norm's bias is added to what was normalized, which is no layer's own result.
    "BatchNorm after layers": Case(
        keys(
            lambda a, b: nn.Sequential(
                [
                    nn.Linear(3, 5, key=a),
                    nn.BatchNorm(5, "batch", mode="batch"),
                    nn.Linear(5, 7, use_bias=False, key=b),
                    nn.BatchNorm(7, "batch", mode="ema"),
                ]
            ),
            2,
        ),
        (f32(2, 3),),
        {
            **dense("layers/0"),
            **under("layers/1", NORM),
            "layers/2/weight": W("out in", bias=None),
            **under("layers/3", NORM),
        },
        with_state,
    ),
    # The vectors of the direction are weights, their lengths a number for each unit.
    "WeightNorm": Case(
        lambda key: nn.WeightNorm(nn.Linear(3, 5, key=key)),
        (f32(2, 3),),
        {**COMPOSED, "g": "scale"},
    ),
    "WeightNorm of the whole": Case(
        lambda key: nn.WeightNorm(nn.Linear(3, 5, key=key), axis=None),
        (f32(2, 3),),
        {**COMPOSED, "g": "scale"},
    ),
    "WeightNorm of a convolution": Case(
        lambda key: nn.WeightNorm(nn.Conv2d(3, 5, (2, 4), stride=2, key=key)),
        (f32(2, 3, 7, 6),),
        {**under("layer", conv(2, strides=(2, 2), combined=True)), "g": "scale"},
    ),
    # The weight is divided by a number: its largest singular value, as the weight and
    # the vectors of the state have it. Products with these vectors are what makes the
    # number, and no calls of the layer.
    "SpectralNorm": Case(
        keys(lambda a, b: nn.SpectralNorm(nn.Linear(3, 5, key=a), "weight", key=b), 2),
        (f32(2, 3),),
        COMPOSED,
        stateful,
    ),
    "SpectralNorm with the new state": Case(
        keys(
            lambda a, b: nn.SpectralNorm(nn.Linear(3, 5, key=a), "weight", 2, key=b), 2
        ),
        (f32(2, 3),),
        COMPOSED,
        with_state,
    ),
    "SpectralNorm at inference": Case(
        keys(
            lambda a, b: nn.SpectralNorm(
                nn.Linear(3, 5, key=a), "weight", inference=True, key=b
            ),
            2,
        ),
        (f32(2, 3),),
        COMPOSED,
        stateful,
    ),
    "SpectralNorm of a convolution": Case(
        keys(
            lambda a, b: nn.SpectralNorm(
                nn.Conv2d(3, 5, (2, 4), key=a), "weight", key=b
            ),
            2,
        ),
        (f32(2, 3, 7, 6),),
        under("layer", conv(2, combined=True)),
        stateful,
    ),
}

# Gates of a cell are units beside each other. An LSTM adds its bias to the sum of two
# products, which is neither's own result, so that no bias is asked for. A GRU has two:
# one is added to all gates of the inputs, the other to a third of the hidden ones.
GRU = {
    "weight_ih": W("out in", bias="bias"),
    "weight_hh": W("out in", bias=None),
    "bias": "bias",
    "bias_n": "bias",
}
LSTM = {"weight_ih": W("out in"), "weight_hh": W("out in"), "bias": "bias"}


def over(steps, expected):
    """A cell over time: only what is applied to hidden states is called again."""
    words, fields = expected["weight_hh"]
    return {**expected, "weight_hh": W(words, **fields, calls=steps)}


RECURRENT = {
    "GRUCell": Case(lambda key: nn.GRUCell(3, 5, key=key), (f32(2, 3), f32(2, 5)), GRU),
    "GRUCell over time": Case(
        lambda key: nn.GRUCell(3, 5, key=key), (f32(2, 7, 3),), over(7, GRU), unrolled
    ),
    "GRUCell without biases": Case(
        lambda key: nn.GRUCell(3, 5, use_bias=False, key=key),
        (f32(2, 7, 3),),
        over(7, {"weight_ih": W("out in"), "weight_hh": W("out in")}),
        unrolled,
    ),
    "LSTMCell": Case(
        lambda key: nn.LSTMCell(3, 5, key=key),
        (f32(2, 3), (f32(2, 5), f32(2, 5))),
        LSTM,
    ),
    "LSTMCell over time": Case(
        lambda key: nn.LSTMCell(3, 5, key=key),
        (f32(2, 7, 3),),
        over(7, LSTM),
        unrolled,
    ),
    # What the upper cell computes comes back to it, but not to what feeds it.
    "GRUCells on top of each other": Case(
        keys(
            lambda a, b: (nn.GRUCell(3, 5, key=a), nn.GRUCell(5, 4, key=b)),
            2,
        ),
        (f32(2, 7, 3),),
        {**under("0", over(7, GRU)), **under("1", over(7, GRU))},
        unrolled_two,
    ),
}


def block(key):
    """A layer of what is scanned, as wide at its end as at its beginning."""
    a, b = jax.random.split(key)
    return nn.Sequential(
        [
            nn.LayerNorm(3),
            nn.Linear(3, 7, key=a),
            nn.Lambda(jax.nn.relu),
            nn.Linear(7, 3, use_bias=False, key=b),
        ]
    )


class SelfAttention(eqx.Module):
    """Attention as a function of one argument."""

    attention: nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x)


STACKED = {
    "Layers that are scanned": Case(
        stack(block, 5),
        (f32(2, 3),),
        {
            **under("layers/0", NORM),
            **under("layers/1", stacked(LINEAR)),
            "layers/3/weight": W("stack out in", bias=None),
        },
        scanned,
    ),
    "Convolutions that are scanned": Case(
        stack(lambda key: nn.Conv2d(3, 3, (5, 3), padding=(2, 1), key=key), 4),
        (f32(2, 3, 7, 6),),
        stacked(conv(2, padding=((2, 2), (1, 1)))),
        scanned,
    ),
    "Attention that is scanned": Case(
        stack(lambda key: nn.MultiheadAttention(2, 6, key=key), 4),
        (f32(3, 7, 6),),
        {
            "query_proj/weight": "stack out in",
            "key_proj/weight": "stack out in",
            "value_proj/weight": "stack out in",
            "output_proj/weight": "stack out in",
        },
        lambda model, state, x: scanned(SelfAttention(model), state, x),
    ),
    "An ensemble of MLPs": Case(
        stack(lambda key: nn.MLP(3, 5, 7, 1, key=key), 4),
        (f32(4, 2, 3),),
        {
            **under("layers/0", stacked(LINEAR)),
            **under("layers/1", stacked(LINEAR)),
        },
        ensemble,
    ),
    "An ensemble of embeddings": Case(
        stack(lambda key: nn.Embedding(7, 3, key=key), 4),
        (ids(4, 2),),
        {"weight": "embedding"},
        ensemble,
    ),
    "An ensemble of norms": Case(
        stack(lambda key: nn.LayerNorm(3), 4), (f32(4, 2, 3),), NORM, ensemble
    ),
    # What JAX makes of convolutions under a map has a group for each member, but each
    # member's convolution has the groups that it has by itself.
    "An ensemble of convolutions": Case(
        stack(lambda key: nn.Conv2d(3, 5, (2, 4), stride=2, key=key), 6),
        (f32(6, 2, 3, 7, 8),),
        stacked(conv(2, strides=(2, 2))),
        ensemble,
    ),
    "An ensemble of convolutions in groups": Case(
        stack(lambda key: nn.Conv1d(6, 4, 3, groups=2, key=key), 5),
        (f32(5, 2, 6, 7),),
        stacked(conv(1, groups=2)),
        ensemble,
    ),
    "An ensemble of transposed convolutions": Case(
        stack(lambda key: nn.ConvTranspose1d(3, 5, 4, stride=2, key=key), 6),
        (f32(6, 2, 3, 7),),
        stacked(conv(1, input_dilation=(2,), padding=((3, 3),))),
        ensemble,
    ),
    "An ensemble of recurrent cells": Case(
        stack(lambda key: nn.GRUCell(3, 5, key=key), 4),
        (f32(4, 2, 7, 3),),
        stacked(over(7, GRU)),
        lambda cells, state, xs: eqx.filter_vmap(
            lambda cell, xs: unrolled(cell, state, xs)
        )(cells, xs),
    ),
}

CASES = (
    FEED_FORWARD | CONVOLUTIONS | EMBEDDINGS | ATTENTION | NORMS | RECURRENT | STACKED
)

POOLS = [name for name in dir(nn) if "Pool" in name]
EXCEPTIONS = {
    **dict.fromkeys(POOLS, "No pooling has parameters."),
    "StatefulLayer": "It is abstract.",
    "StateIndex": "It holds no array once states are taken out of the model.",
}


def model_of(case):
    """The shapes of a case's model, and of the state that it starts with."""
    return eqx.filter_eval_shape(nn.make_with_state(case.make), KEY)


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    case = CASES[name]
    check(wr.trace_network(case.call, *model_of(case), *case.inputs), case.expected)


def classes_in(node):
    """The classes of a module and of all modules in it."""
    if isinstance(node, eqx.Module):
        yield type(node)
        node = list(vars(node).values())
    if isinstance(node, list | tuple):
        for part in node:
            yield from classes_in(part)


def test_every_layer_is_here():
    """A layer that a later Equinox adds has to come into the table."""
    public = {
        name
        for name, value in vars(nn).items()
        if inspect.isclass(value) and issubclass(value, eqx.Module)
    }
    here = {
        kind.__name__ for case in CASES.values() for kind in classes_in(model_of(case))
    }
    assert public - here <= EXCEPTIONS.keys() <= public


def test_arrays_are_traced_as_their_shapes():
    """A model as it is trained, whose activation is a function among its leaves."""
    model = nn.MLP(3, 5, 7, 1, key=KEY)
    net = wr.trace_network(lambda m, x: jax.vmap(m)(x), model, jnp.ones((2, 3)))
    check(net, dense("layers/0", "layers/1"))
    assert [layer.path for layer in net.layers] == [
        ".layers[0].weight",
        ".layers[1].weight",
    ]


def test_shared_data_leave_the_first_layer_of_an_ensemble_open():
    """On the same data, members are no different from more units of one layer.

    The layers after it have a batch of their own for each member.
    """
    members = eqx.filter_eval_shape(
        stack(lambda key: nn.MLP(3, 5, 7, 1, key=key), 4), KEY
    )

    def call(members, x):
        one = eqx.filter_vmap(
            lambda model, x: jax.vmap(model)(x), in_axes=(eqx.if_array(0), None)
        )
        return one(members, x)

    net = wr.trace_network(call, members, f32(2, 3))
    first, second = net.layers
    assert (first.input_axes, second.stack_axes) == ((2,), (0,))
    assert any(first.path in sentence for sentence in net.open)
    assert not any(second.path in sentence for sentence in net.open)
    net = wr.trace_network(call, members, f32(2, 3), stack=0)
    check(
        net,
        {**under("layers/0", stacked(LINEAR)), **under("layers/1", stacked(LINEAR))},
    )
    assert not net.open
