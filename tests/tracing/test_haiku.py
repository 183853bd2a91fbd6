"""What `weightreg.trace_network` finds in every layer of Haiku that has parameters.

The table is written by hand, from what the layers compute: Haiku stores inputs first,
then units, with the window of a convolution before both (and units before inputs in a
transposed one). States and keys are inputs of what is traced; new states are dropped.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from traced import W, check, ids
from traced import x as f32

import weightreg as wr

pytestmark = quick.everything

KEY = jax.random.key(0)
SCALING = hk.initializers.VarianceScaling()


class Case(NamedTuple):
    """What is transformed, what it is called with, and what each parameter is."""

    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    expected: dict[str, Any]


def linear(*names):
    """Linear layers with biases."""
    table = {}
    for name in names:
        table |= {f"{name}/w": W("in out", bias=f"{name}/b"), f"{name}/b": "bias"}
    return table


def conv(name, window, words="in out", **fields):
    """A convolution with a bias, with as many axes of its window."""
    kernel = W(" ".join(["window"] * window + [words]), bias=f"{name}/b", **fields)
    return {f"{name}/w": kernel, f"{name}/b": "bias"}


def norm(name):
    """What normalizes data and then scales and shifts them."""
    return {f"{name}/scale": "scale", f"{name}/offset": "bias"}


def applied(make, **options):
    """Make a layer and call it."""
    return lambda *inputs: make()(*inputs, **options)


DENSE = {
    "Linear": Case(
        applied(lambda: hk.Linear(5)),
        (f32(2, 3),),
        {
            "linear/w": W("in out", bias="linear/b", input_shape=(2, 3)),
            "linear/b": "bias",
        },
    ),
    "Linear without a bias": Case(
        applied(lambda: hk.Linear(5, with_bias=False)),
        (f32(2, 3),),
        {"linear/w": "in out"},
    ),
    "Linear on one example": Case(
        applied(lambda: hk.Linear(5)), (f32(3),), linear("linear")
    ),
    "Linear on sequences": Case(
        applied(lambda: hk.Linear(5)), (f32(2, 7, 3),), linear("linear")
    ),
    "Linear on merged axes": Case(
        lambda x: hk.BatchApply(hk.Linear(5))(x), (f32(2, 7, 3),), linear("linear")
    ),
    "Bias": Case(applied(hk.Bias), (f32(2, 3, 5),), {"bias/b": "bias"}),
    "Bias that is a number": Case(
        applied(lambda: hk.Bias(bias_dims=[])), (f32(2, 3, 5),), {"bias/b": "bias"}
    ),
    "Bias that is subtracted": Case(
        applied(lambda: hk.Bias(bias_dims=[-1]), multiplier=-1.0),
        (f32(2, 3, 5),),
        {"bias/b": "bias"},
    ),
    "Bias of a layer": Case(
        lambda x: hk.Bias(bias_dims=[-1])(hk.Linear(5, with_bias=False)(x)),
        (f32(2, 7, 3),),
        {"linear/w": W("in out", bias="bias/b"), "bias/b": "bias"},
    ),
    # Such a bias is one of positions, and none of the layer's units.
    "Bias of positions": Case(
        lambda x: hk.Bias(bias_dims=[1])(hk.Linear(5, with_bias=False)(x)),
        (f32(2, 7, 3),),
        {"linear/w": W("in out", bias=None), "bias/b": "bias"},
    ),
    "MLP": Case(
        applied(lambda: hk.nets.MLP([7, 5, 4])),
        (f32(2, 3),),
        linear("mlp/~/linear_0", "mlp/~/linear_1", "mlp/~/linear_2"),
    ),
    "MLP with dropout": Case(
        lambda x: hk.nets.MLP([7, 5])(x, 0.5, hk.next_rng_key()),
        (f32(2, 3),),
        linear("mlp/~/linear_0", "mlp/~/linear_1"),
    ),
    "MLP and its reverse": Case(
        lambda x: _autoencoder(hk.nets.MLP([7, 5]), x),
        (f32(2, 3),),
        linear(
            "mlp/~/linear_0",
            "mlp/~/linear_1",
            "mlp/~reverse/mlp_reversed/~/linear_0",
            "mlp/~reverse/mlp_reversed/~/linear_1",
        ),
    ),
    "Sequential, with layers that have no parameters": Case(
        applied(
            lambda: hk.Sequential(
                [
                    hk.Conv2D(3, 3),
                    jax.nn.relu,
                    hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID"),
                    hk.AvgPool((2, 2, 1), (2, 2, 1), "VALID"),
                    hk.Reshape((2, 6)),
                    hk.Flatten(),
                    hk.Linear(5),
                ]
            )
        ),
        (f32(2, 9, 10, 2),),
        {**conv("conv2_d", 2, padding=((1, 1), (1, 1))), **linear("linear")},
    ),
}

CONVOLUTIONS = {
    "ConvND": Case(
        applied(lambda: hk.ConvND(4, 3, (2, 1, 3, 2), padding="VALID")),
        (f32(2, 3, 4, 5, 6, 2),),
        conv("conv_nd", 4, padding=((0, 0),) * 4),
    ),
    # 8 positions become 4. Their windows span 9, so that one has to be padded.
    "Conv1D": Case(
        applied(lambda: hk.Conv1D(5, 3, stride=2)),
        (f32(2, 8, 3),),
        conv("conv1_d", 1, strides=(2,), padding=((0, 1),), input_shape=(2, 8, 3)),
    ),
    "Conv1D without a bias": Case(
        applied(lambda: hk.Conv1D(5, 2, with_bias=False)),
        (f32(2, 8, 3),),
        {"conv1_d/w": "window in out"},
    ),
    "Conv1D, causal": Case(
        applied(lambda: hk.Conv1D(5, 3, rate=2, padding=hk.pad.causal)),
        (f32(2, 8, 3),),
        conv("conv1_d", 1, dilation=(2,), padding=((4, 0),)),
    ),
    "Conv1D on one example": Case(
        applied(lambda: hk.Conv1D(5, 2, padding="VALID")),
        (f32(8, 3),),
        conv("conv1_d", 1, padding=((0, 0),)),
    ),
    "Conv2D": Case(
        applied(
            lambda: hk.Conv2D(
                5, (2, 4), stride=(2, 1), rate=(1, 2), padding=((0, 1), (2, 0))
            )
        ),
        (f32(2, 7, 9, 3),),
        conv("conv2_d", 2, strides=(2, 1), dilation=(1, 2), padding=((0, 1), (2, 0))),
    ),
    # Data have their channels first then, but kernels are the same.
    "Conv2D with channels first": Case(
        applied(lambda: hk.Conv2D(5, (2, 4), padding="VALID", data_format="NCHW")),
        (f32(2, 3, 7, 9),),
        conv("conv2_d", 2, padding=((0, 0), (0, 0))),
    ),
    "Conv2D in groups": Case(
        applied(lambda: hk.Conv2D(4, (2, 3), feature_group_count=2)),
        (f32(2, 7, 5, 6),),
        conv("conv2_d", 2, groups=2, padding=((0, 1), (1, 1))),
    ),
    # A mask is a constant, and no other parameter that makes the weight.
    "Conv2D with a mask": Case(
        applied(lambda: hk.Conv2D(5, (2, 4), mask=np.ones((2, 4, 3, 5), np.float32))),
        (f32(2, 7, 9, 3),),
        conv("conv2_d", 2, padding=((0, 1), (1, 2))),
    ),
    "Conv3D": Case(
        applied(lambda: hk.Conv3D(5, (2, 3, 4), (1, 2, 3), padding="VALID")),
        (f32(2, 5, 6, 7, 3),),
        conv("conv3_d", 3, strides=(1, 2, 3), padding=((0, 0),) * 3),
    ),
    # A stride of a transposed convolution spreads its input. "VALID" keeps every result
    # that depends on the input, with the window less one on either side. "SAME" keeps
    # stride times as many results as there are inputs: window and stride less two are
    # on both sides together, the greater half on the left, up to the window less one.
    "ConvNDTranspose": Case(
        applied(lambda: hk.ConvNDTranspose(1, 5, 4, stride=3, padding="VALID")),
        (f32(2, 7, 3),),
        conv(
            "conv_nd_transpose",
            1,
            "out in",
            input_dilation=(3,),
            padding=((3, 3),),
        ),
    ),
    "Conv1DTranspose": Case(
        applied(lambda: hk.Conv1DTranspose(5, 3, stride=2)),
        (f32(2, 7, 3),),
        conv("conv1_d_transpose", 1, "out in", input_dilation=(2,), padding=((2, 1),)),
    ),
    "Conv2DTranspose": Case(
        applied(lambda: hk.Conv2DTranspose(5, (2, 3), stride=(2, 3))),
        (f32(2, 7, 6, 3),),
        conv(
            "conv2_d_transpose",
            2,
            "out in",
            input_dilation=(2, 3),
            padding=((1, 1), (2, 2)),
        ),
    ),
    "Conv2DTranspose without a bias": Case(
        applied(
            lambda: hk.Conv2DTranspose(
                5, (2, 3), padding="VALID", with_bias=False, data_format="NCHW"
            )
        ),
        (f32(2, 3, 7, 6),),
        {"conv2_d_transpose/w": W("window window out in", padding=((1, 1), (2, 2)))},
    ),
    "Conv3DTranspose": Case(
        applied(lambda: hk.Conv3DTranspose(5, (1, 2, 3), (1, 2, 1), padding="VALID")),
        (f32(2, 4, 5, 6, 3),),
        conv(
            "conv3_d_transpose",
            3,
            "out in",
            input_dilation=(1, 2, 1),
            padding=((0, 0), (1, 1), (2, 2)),
        ),
    ),
    # Each channel has its own units, which have one input channel.
    "DepthwiseConv1D": Case(
        applied(lambda: hk.DepthwiseConv1D(2, 4, stride=2, padding="VALID")),
        (f32(2, 8, 3),),
        conv("depthwise_conv1_d", 1, groups=3, strides=(2,), padding=((0, 0),)),
    ),
    "DepthwiseConv2D": Case(
        applied(lambda: hk.DepthwiseConv2D(2, (2, 3), padding=((1, 0), (0, 2)))),
        (f32(2, 7, 6, 3),),
        conv("depthwise_conv2_d", 2, groups=3, padding=((1, 0), (0, 2))),
    ),
    "DepthwiseConv2D with channels first": Case(
        applied(
            lambda: hk.DepthwiseConv2D(
                1, (2, 3), padding="VALID", rate=(2, 1), data_format="NCHW"
            )
        ),
        (f32(2, 5, 7, 6),),
        conv(
            "depthwise_conv2_d", 2, groups=5, dilation=(2, 1), padding=((0, 0), (0, 0))
        ),
    ),
    "DepthwiseConv3D": Case(
        applied(lambda: hk.DepthwiseConv3D(2, (2, 3, 1))),
        (f32(2, 7, 6, 5, 3),),
        conv("depthwise_conv3_d", 3, groups=3, padding=((0, 1), (1, 1), (0, 0))),
    ),
    # One convolution along each axis. The first has the stride, the second the bias.
    "SeparableDepthwiseConv2D": Case(
        applied(
            lambda: hk.SeparableDepthwiseConv2D(2, (2, 3), stride=2, padding="VALID")
        ),
        (f32(2, 7, 9, 3),),
        {
            "separable_depthwise_conv2_d/~/depthwise_conv2_d/w": W(
                "window window in out", groups=3, strides=(2, 2), bias=None
            ),
            **conv(
                "separable_depthwise_conv2_d/~/depthwise_conv2_d_1",
                2,
                groups=6,
                padding=((0, 0), (0, 0)),
            ),
        },
    ),
}


def _autoencoder(mlp, x):
    code = mlp(x)
    return mlp.reverse()(code)


def _tied(tokens):
    embed = hk.Embed(7, 3)
    return jnp.tanh(embed(tokens)) @ embed.embeddings.T


def _spectral(x):
    weight = hk.get_parameter("w", (3, 5), init=SCALING)
    return x @ hk.SpectralNorm()(weight)


EMBEDDINGS_AND_NORMS = {
    "Embed": Case(
        applied(lambda: hk.Embed(7, 3)), (ids(2, 5),), {"embed/embeddings": "embedding"}
    ),
    # A row is picked by a product, and so it is a layer with an input for each token.
    "Embed by one-hot vectors": Case(
        applied(lambda: hk.Embed(7, 3, lookup_style="ONE_HOT")),
        (ids(2, 5),),
        {"embed/embeddings": "in out"},
    ),
    "Embed that is tied": Case(
        _tied, (ids(2, 5),), {"embed/embeddings": "embedding: out in"}
    ),
    # The nearest of the columns is found by products with all of them, and looked up.
    "VectorQuantizer": Case(
        lambda x: hk.nets.VectorQuantizer(3, 5, 0.25)(x, True)["quantize"],
        (f32(2, 4, 3),),
        {"vector_quantizer/embeddings": "embedding: in out"},
    ),
    "BatchNorm": Case(
        applied(lambda: hk.BatchNorm(True, True, 0.9), is_training=True),
        (f32(2, 7, 3),),
        norm("batch_norm"),
    ),
    "BatchNorm at inference": Case(
        lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=hk.running_init()),
        (f32(2, 7, 3),),
        norm("batch_norm"),
    ),
    "BatchNorm with channels first": Case(
        applied(
            lambda: hk.BatchNorm(True, False, 0.9, data_format="NC..."),
            is_training=True,
        ),
        (f32(2, 3, 7),),
        {"batch_norm/scale": "scale"},
    ),
    "GroupNorm": Case(
        applied(lambda: hk.GroupNorm(2)), (f32(2, 7, 6),), norm("group_norm")
    ),
    "GroupNorm with channels first": Case(
        applied(lambda: hk.GroupNorm(2, data_format="NC...")),
        (f32(2, 6, 7, 5),),
        norm("group_norm"),
    ),
    "InstanceNorm": Case(
        applied(lambda: hk.InstanceNorm(True, True)),
        (f32(2, 7, 5, 3),),
        norm("instance_norm"),
    ),
    "LayerNorm": Case(
        applied(lambda: hk.LayerNorm(-1, True, True)), (f32(2, 3),), norm("layer_norm")
    ),
    "LayerNorm over two axes": Case(
        applied(lambda: hk.LayerNorm((1, 2), True, True, param_axis=(1, 2))),
        (f32(2, 7, 3),),
        norm("layer_norm"),
    ),
    "LayerNorm without a scale": Case(
        applied(lambda: hk.LayerNorm(-1, False, True)),
        (f32(2, 3),),
        {"layer_norm/offset": "bias"},
    ),
    "RMSNorm": Case(
        applied(lambda: hk.RMSNorm(-1)), (f32(2, 3),), {"rms_norm/scale": "scale"}
    ),
    # The norm's offset is added to what was normalized, which is no layer's own result.
    "BatchNorm after a layer": Case(
        lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), True),
        (f32(2, 3),),
        {**linear("linear"), **norm("batch_norm")},
    ),
    # The weight is divided by a number: its largest singular value, as the weight and
    # the vector of the state have it. Products with this vector are what makes the
    # number, and no calls of the layer.
    "SpectralNorm": Case(_spectral, (f32(2, 3),), {"~/w": W("in out", combined=True)}),
}

ATTENTION = {
    "MultiHeadAttention": Case(
        applied(
            lambda: hk.MultiHeadAttention(
                2, 3, w_init=SCALING, value_size=5, model_size=11
            )
        ),
        (f32(2, 4, 7), f32(2, 6, 9), f32(2, 6, 8)),
        linear(
            "multi_head_attention/query",
            "multi_head_attention/key",
            "multi_head_attention/value",
            "multi_head_attention/linear",
        ),
    ),
    "MultiHeadAttention without biases": Case(
        lambda x: hk.MultiHeadAttention(2, 3, w_init=SCALING, with_bias=False)(x, x, x),
        (f32(2, 4, 7),),
        {
            "multi_head_attention/query/w": "in out",
            "multi_head_attention/key/w": "in out",
            "multi_head_attention/value/w": "in out",
            "multi_head_attention/linear/w": "in out",
        },
    ),
}


def unrolled(make, **options):
    """A core over time, with a batch of sequences."""

    def run(xs, *more):
        core = make()
        examples = xs.shape[1 if options.get("time_major", True) else 0]
        xs = (xs, *more) if more else xs
        return hk.dynamic_unroll(core, xs, core.initial_state(examples), **options)[0]

    return run


def step(make):
    """One step of a core."""

    def run(x, state):
        return make()(x, state)[0]

    return run


def written_out(xs):
    """A core over time, step by step, without a loop in what is computed."""
    core = hk.LSTM(5)
    return hk.static_unroll(core, xs, core.initial_state(xs.shape[1]))[0]


def called(steps, table, *names):
    """The same layers, some of which are called again at each step."""
    again = {name: W(table[name][0], **table[name][1], calls=steps) for name in names}
    return {**table, **again}


def gru(steps):
    """A GRU, whose `w_h` is applied twice a step.

    Its first two thirds make the gates, and its last third is applied to what the reset
    gate leaves of the hidden state. Biases are added to sums of two products, which are
    neither's own result, so that none is asked for.
    """
    return {
        "gru/w_i": "in out",
        "gru/w_h": W("in out", calls=2 * steps),
        "gru/b": "bias",
    }


VANILLA = linear("vanilla_rnn/linear", "vanilla_rnn/linear_1")
LSTM = linear("lstm/linear")


def conv_lstm(window):
    """Convolutions that make the gates of an LSTM, over 4 steps."""
    name = f"conv{window}_dlstm"
    table = {
        **conv(f"{name}/input_to_hidden", window),
        **conv(f"{name}/hidden_to_hidden", window),
    }
    return called(4, table, f"{name}/hidden_to_hidden/w")


RECURRENT = {
    "VanillaRNN": Case(step(lambda: hk.VanillaRNN(5)), (f32(2, 3), f32(2, 5)), VANILLA),
    "VanillaRNN over time": Case(
        unrolled(lambda: hk.VanillaRNN(5)),
        (f32(4, 2, 3),),
        called(4, VANILLA, "vanilla_rnn/linear_1/w"),
    ),
    "VanillaRNN with one bias, back in time": Case(
        unrolled(
            lambda: hk.VanillaRNN(5, double_bias=False),
            time_major=False,
            reverse=True,
            unroll=2,
        ),
        (f32(2, 4, 3),),
        {
            **linear("vanilla_rnn/linear"),
            "vanilla_rnn/linear_1/w": W("in out", bias=None, calls=4),
        },
    ),
    # One product makes all gates from inputs and hidden state, beside each other.
    "LSTM": Case(
        step(lambda: hk.LSTM(5)), (f32(2, 3), hk.LSTMState(f32(2, 5), f32(2, 5))), LSTM
    ),
    "LSTM over time": Case(
        unrolled(lambda: hk.LSTM(5)), (f32(4, 2, 3),), called(4, LSTM, "lstm/linear/w")
    ),
    "LSTM over time, step by step": Case(
        written_out, (f32(4, 2, 3),), called(4, LSTM, "lstm/linear/w")
    ),
    "LSTM with resets": Case(
        unrolled(lambda: hk.ResetCore(hk.LSTM(5))),
        (f32(4, 2, 3), jax.ShapeDtypeStruct((4, 2), bool)),
        called(4, LSTM, "lstm/linear/w"),
    ),
    "GRU": Case(step(lambda: hk.GRU(5)), (f32(2, 3), f32(2, 5)), gru(steps=1)),
    "GRU over time": Case(unrolled(lambda: hk.GRU(5)), (f32(4, 2, 3),), gru(steps=4)),
    "Conv1DLSTM": Case(
        unrolled(lambda: hk.Conv1DLSTM((6,), 5, 2)), (f32(4, 2, 6, 3),), conv_lstm(1)
    ),
    "Conv2DLSTM": Case(
        unrolled(lambda: hk.Conv2DLSTM((6, 7), 5, (2, 3))),
        (f32(4, 2, 6, 7, 3),),
        conv_lstm(2),
    ),
    "Conv3DLSTM": Case(
        unrolled(lambda: hk.Conv3DLSTM((6, 7, 8), 5, (1, 2, 3))),
        (f32(4, 2, 6, 7, 8, 3),),
        conv_lstm(3),
    ),
    # What the upper core computes comes back to it, but not to what feeds it.
    "DeepRNN": Case(
        unrolled(lambda: hk.DeepRNN([hk.LSTM(5), jax.nn.relu, hk.GRU(7)])),
        (f32(4, 2, 3),),
        {**called(4, LSTM, "lstm/linear/w"), **gru(steps=4)},
    ),
    "DeepRNN with skips": Case(
        unrolled(
            lambda: hk.deep_rnn_with_skip_connections([hk.LSTM(5), hk.VanillaRNN(7)])
        ),
        (f32(4, 2, 3),),
        {
            **called(4, LSTM, "lstm/linear/w"),
            **called(4, VANILLA, "vanilla_rnn/linear_1/w"),
        },
    ),
    "IdentityCore and a layer": Case(
        unrolled(lambda: hk.DeepRNN([hk.IdentityCore(), hk.Linear(5)])),
        (f32(4, 2, 3),),
        linear("linear"),
    ),
}


def _block(x):
    """A layer of a stack, as wide at its end as at its beginning."""
    y = hk.LayerNorm(-1, True, True)(x)
    return x + hk.Linear(3)(jax.nn.relu(hk.Linear(5)(y)))


def _scaled_block(x, scale):
    """The same with an input for each layer, and a result of each."""
    y = _block(x * scale)
    return y, y.sum()


def _ensemble(x):
    """Members that are mapped over, with a batch for each."""
    member = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 7])(x)))
    start = hk.lift(jax.vmap(member.init), name="ensemble")
    keys = jax.random.split(hk.next_rng_key(), len(x))
    return jax.vmap(member.apply)(start(keys, x), x)


def _branches(x, which):
    """Two layers, of which data choose one; both have their parameters before that."""
    yes, no = hk.Linear(5, name="yes"), hk.Linear(5, name="no")
    if hk.running_init():
        return yes(x) + no(x)
    return hk.cond(which, yes, no, x)


def _counted(x):
    """A layer that is called before a loop, and 4 times in it."""
    layer = hk.Linear(3)
    return hk.fori_loop(0, 4, lambda _, x: jnp.tanh(layer(x)), layer(x))


def _until(x):
    """A layer that is called until its results are small, and once before."""
    layer = hk.Linear(3)
    x = layer(x)
    if hk.running_init():
        return x
    return hk.while_loop(lambda x: (x > 1).any(), lambda x: jnp.tanh(layer(x)), x)


def _layers_of(name):
    """What `_block` has, stacked in one tree."""
    return {
        **norm(f"{name}/layer_norm"),
        f"{name}/linear/w": W("stack in out", bias=f"{name}/linear/b"),
        f"{name}/linear/b": "bias",
        f"{name}/linear_1/w": W("stack in out", bias=f"{name}/linear_1/b"),
        f"{name}/linear_1/b": "bias",
    }


TRANSFORMED = {
    "layer_stack": Case(
        lambda x: hk.layer_stack(4)(_block)(x),
        (f32(2, 3),),
        _layers_of("__layer_stack_no_per_layer"),
    ),
    "layer_stack with inputs for each layer": Case(
        lambda x, scales: hk.layer_stack(4, with_per_layer_inputs=True)(_scaled_block)(
            x, scales
        ),
        (f32(2, 3), f32(4)),
        _layers_of("__layer_stack_with_per_layer"),
    ),
    "layer_stack of convolutions": Case(
        lambda x: hk.layer_stack(4, name="stack")(lambda x: hk.Conv1D(3, 2)(x))(x),
        (f32(2, 7, 3),),
        {
            "stack/conv1_d/w": W(
                "stack window in out", bias="stack/conv1_d/b", padding=((0, 1),)
            ),
            "stack/conv1_d/b": "bias",
        },
    ),
    "An ensemble that is lifted": Case(
        _ensemble,
        (f32(4, 2, 3),),
        {
            "ensemble/mlp/~/linear_0/w": W(
                "stack in out", bias="ensemble/mlp/~/linear_0/b"
            ),
            "ensemble/mlp/~/linear_0/b": "bias",
            "ensemble/mlp/~/linear_1/w": W(
                "stack in out", bias="ensemble/mlp/~/linear_1/b"
            ),
            "ensemble/mlp/~/linear_1/b": "bias",
        },
    ),
    "remat": Case(
        lambda x: hk.remat(hk.nets.MLP([5, 7]))(x),
        (f32(2, 3),),
        linear("mlp/~/linear_0", "mlp/~/linear_1"),
    ),
    "vmap over data": Case(
        lambda x: hk.vmap(hk.Linear(5), split_rng=False)(x),
        (f32(2, 3),),
        linear("linear"),
    ),
    "cond": Case(
        _branches,
        (f32(2, 3), jax.ShapeDtypeStruct((), bool)),
        linear("yes", "no"),
    ),
    "fori_loop": Case(_counted, (f32(2, 3),), called(5, linear("linear"), "linear/w")),
    "while_loop": Case(
        _until, (f32(2, 3),), called(None, linear("linear"), "linear/w")
    ),
}


def kernel(strides=1, **fields):
    """A kernel of a network with batch norms, whose convolutions have no biases."""
    words = "window window in out"
    return W(words, bias=None, strides=(strides, strides), **fields)


def resnet(norms, blocks):
    """A ResNet: strides of kernels by their names, and names of norms, by block."""
    table = {
        "res_net/~/initial_conv/w": kernel(2, padding=((2, 3), (2, 3))),
        **norm(f"res_net/~/{norms}"),
        **linear("res_net/~/logits"),
    }
    for place, (kernels, names) in blocks.items():
        path = "res_net/~/block_group_{}/~/block_{}/~".format(*place)
        for name, stride in kernels.items():
            table[f"{path}/{name}/w"] = kernel(stride)
        for name in names:
            table |= norm(f"{path}/{name}")
    return table


def bottleneck(stride):
    """A block of the first version: it strides in its 3x3 kernel and its shortcut."""
    kernels = {"conv_0": 1, "conv_1": stride, "conv_2": 1, "shortcut_conv": stride}
    return kernels, ("batchnorm_0", "batchnorm_1", "batchnorm_2", "shortcut_batchnorm")


def plain(stride):
    """A block of the second version, whose shortcut comes from its first norm."""
    kernels = {"conv_0": stride, "conv_1": 1, "shortcut_conv": stride}
    return kernels, ("batchnorm_0", "batchnorm_1")


def straight():
    """The same where the shortcut is the block's input as it is."""
    return {"conv_0": 1, "conv_1": 1}, ("batchnorm_0", "batchnorm_1")


NETS = {
    "ResNet": Case(
        applied(
            lambda: hk.nets.ResNet((1, 1, 1, 1), 9, channels_per_group=(4, 8, 12, 16)),
            is_training=True,
        ),
        (f32(2, 32, 32, 3),),
        resnet(
            "initial_batchnorm",
            {
                (0, 0): bottleneck(1),
                (1, 0): bottleneck(2),
                (2, 0): bottleneck(2),
                (3, 0): bottleneck(2),
            },
        ),
    ),
    "ResNet of the second version, at inference": Case(
        lambda x: hk.nets.ResNet(
            (1, 2, 1, 1),
            9,
            resnet_v2=True,
            bottleneck=False,
            channels_per_group=(4, 6, 10, 12),
            use_projection=(False, True, True, True),
            initial_conv_config={"output_channels": 4},
        )(x, is_training=hk.running_init()),
        (f32(2, 32, 32, 3),),
        resnet(
            "final_batchnorm",
            {
                (0, 0): straight(),
                (1, 0): plain(2),
                (1, 1): straight(),
                (2, 0): plain(2),
                (3, 0): plain(2),
            },
        ),
    ),
    "MobileNetV1": Case(
        applied(lambda: hk.nets.MobileNetV1((2,), (5,), 9), is_training=True),
        (f32(2, 32, 32, 3),),
        {
            "mobile_net_v1/conv2_d/w": kernel(2),
            **norm("mobile_net_v1/batch_norm"),
            "mobile_net_v1/mobile_net_v1_block/depthwise_conv/w": kernel(
                2, groups=32, padding=((1, 1), (1, 1))
            ),
            **norm("mobile_net_v1/mobile_net_v1_block/batch_norm"),
            "mobile_net_v1/mobile_net_v1_block/pointwise_conv/w": kernel(),
            **norm("mobile_net_v1/mobile_net_v1_block/batch_norm_1"),
            **linear("mobile_net_v1/logits"),
        },
    ),
}

CASES = (
    DENSE
    | CONVOLUTIONS
    | EMBEDDINGS_AND_NORMS
    | ATTENTION
    | RECURRENT
    | TRANSFORMED
    | NETS
)

RESNETS = [name for name in dir(hk.nets) if name.startswith("ResNet") and name[6:]]
EXCEPTIONS = {
    **dict.fromkeys(RESNETS, "It is a ResNet of a set size."),
    "Module": "It is abstract.",
    "RNNCore": "It is abstract.",
    "EMAParamsTree": "It adds parameters to a state of their shape, as biases are.",
    "VectorQuantizerEMA": "Its embeddings are state.",
    "SNParamsTree": "It is applied to trees of parameters, in a test of its own.",
}


def traced(case):
    """The network, of shapes alone."""
    f = hk.transform_with_state(case.fn)
    params, state = jax.eval_shape(f.init, KEY, *case.inputs)
    return wr.trace_network(
        lambda params, *inputs: f.apply(params, *inputs)[0],
        params,
        state,
        KEY,
        *case.inputs,
    )


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    check(traced(CASES[name]), CASES[name].expected)


def classes_in(case):
    """The classes of all modules that are made for a case."""
    seen = set()

    def see(method, args, kwargs, context):
        seen.add(type(context.module).__name__)
        return method(*args, **kwargs)

    def watched(*inputs):
        with hk.intercept_methods(see):
            return case.fn(*inputs)

    jax.eval_shape(hk.transform_with_state(watched).init, KEY, *case.inputs)
    return seen


def test_every_layer_is_here():
    """A layer that a later Haiku adds has to come into the table."""
    public = {
        name
        for place in (hk, hk.nets)
        for name, value in vars(place).items()
        if inspect.isclass(value) and issubclass(value, hk.Module)
    }
    here = set().union(*map(classes_in, CASES.values()))
    assert public - here == EXCEPTIONS.keys()


def test_arrays_are_traced_as_their_shapes():
    """Parameters as they are trained, of a network with neither state nor keys."""
    f = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([7, 5])(x)))
    x = jnp.ones((2, 3))
    net = wr.trace_network(f.apply, f.init(KEY, x), x)
    check(net, linear("mlp/~/linear_0", "mlp/~/linear_1"))
    assert net.layers[0].path == "['mlp/~/linear_0']['w']"


def test_spectral_norms_of_a_tree_of_parameters():
    """The network is applied to what another one makes of its parameters."""
    f = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([7, 5])(x)))
    norms = hk.transform_with_state(
        lambda params: hk.SNParamsTree(ignore_regex=".*b$")(params)
    )
    params = jax.eval_shape(f.init, KEY, f32(2, 3))
    _, state = jax.eval_shape(norms.init, KEY, params)

    def apply(params, state, x):
        normalized, _ = norms.apply(None, state, None, params)
        return f.apply(normalized, x)

    expected = linear("mlp/~/linear_0", "mlp/~/linear_1")
    for name in ("mlp/~/linear_0", "mlp/~/linear_1"):
        expected[f"{name}/w"] = W("in out", bias=f"{name}/b", combined=True)
    check(wr.trace_network(apply, params, state, f32(2, 3)), expected)
