"""What every layer of flax.nnx has in a trace, by hand from the layer's formula."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import quick
from flax import nnx
from traced import W, bare, check, check_complete, dense, ids, x

import weightreg as wr

pytestmark = quick.everything


@dataclasses.dataclass
class Case:
    make: Callable
    inputs: list
    expected: dict
    static: dict = dataclasses.field(default_factory=dict)
    # Arrays that are in no variable have to be there when the module is split.
    abstract: bool = True


def trace(case):
    make = lambda: case.make(nnx.Rngs(params=0, dropout=1))  # noqa: E731
    model = nnx.eval_shape(make) if case.abstract else make()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, *inputs, **static):
        model = nnx.merge(graph, params, rest)
        return model(*inputs, **static), nnx.state(model, nnx.Not(nnx.Param))

    return wr.trace_network(fn, params, rest, *case.inputs, **case.static)


class Attend(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)

    def __call__(self, h):
        return self.embed.attend(h)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.dense(self.embed(tokens)))


class Decoder(nnx.Module):
    """Attention to what its cache has, which is for 9 tokens."""

    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 5, 6, decode=True, rngs=rngs)
        self.attend.init_cache((3, 9, 5))

    def __call__(self, h):
        return self.attend(h)


class Dropping(nnx.Module):
    """Attention whose key for dropout is an input of the network."""

    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(
            2, 5, 6, dropout_rate=0.5, decode=False, rngs=rngs, keep_rngs=False
        )

    def __call__(self, h, key):
        return self.attend(h, deterministic=False, rngs=nnx.Rngs(dropout=key))


class Cell(nnx.Module):
    """One step of a cell, whose state is an input of the network."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, h):
        carry = self.cell.initialize_carry(h.shape, nnx.Rngs(0))
        carry = jax.tree.map(lambda c: c + h.mean(), carry)
        return self.cell(carry, h)


class Stacked(nnx.Module):
    """Members of one layer's kind, whose axis is the first of every leaf."""

    def __init__(self, rngs, make, members):
        split = nnx.split_rngs(splits=members)
        self.layer = split(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


class Ensemble(Stacked):
    def __call__(self, h):
        return nnx.vmap(lambda layer, h: layer(h))(self.layer, h)


class Deep(Stacked):
    def __call__(self, h):
        step = lambda h, layer: nnx.relu(layer(h))  # noqa: E731
        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(h, self.layer)


class Shared(nnx.Module):
    """A layer that every step of a scan over depth has."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, h):
        step = lambda h, layer: nnx.relu(layer(h))  # noqa: E731
        axes = (nnx.Carry, None)
        return nnx.scan(step, length=3, in_axes=axes, out_axes=nnx.Carry)(h, self.layer)


class Loop(nnx.Module):
    """A layer that is called as often as the data wants it."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, h):
        below = lambda state: state[1].sum() < 1  # noqa: E731
        step = lambda state: (state[0], state[0](state[1]))  # noqa: E731
        return nnx.while_loop(below, step, (self.layer, h))[1]


class Fori(Loop):
    """A layer that is called three times over."""

    def __call__(self, h):
        step = lambda i, state: (state[0], state[0](state[1]))  # noqa: E731
        return nnx.fori_loop(0, 3, step, (self.layer, h))[1]


class Wrapped(nnx.Module):
    """A layer that a transformation of functions calls."""

    def __init__(self, rngs, transform):
        self.layer = nnx.Linear(3, 5, rngs=rngs)
        self.transform = transform

    def __call__(self, h):
        return self.transform(lambda layer, h: layer(h))(self.layer, h)


class Heads(nnx.Module):
    """Heads, of which the data picks one."""

    def __init__(self, rngs):
        self.heads = nnx.List(
            [nnx.Linear(3, 5, rngs=rngs), nnx.Linear(3, 5, use_bias=False, rngs=rngs)]
        )

    def __call__(self, h):
        branches = [lambda heads, h, i=i: heads[i](h) for i in (0, 1)]
        return nnx.switch((h.sum() > 0).astype(int), branches, self.heads, h)


class Merged(nnx.Module):
    """LoRA whose product is added to the kernel, which is applied once."""

    def __init__(self, rngs):
        self.base = nnx.Linear(3, 5, rngs=rngs)
        self.lora = nnx.LoRA(3, 2, 5, rngs=rngs)

    def __call__(self, h):
        kernel = self.base.kernel + self.lora.lora_a @ self.lora.lora_b
        return h @ kernel + self.base.bias


class Twice(nnx.Module):
    """One layer in depth, or side by side."""

    def __init__(self, rngs, deep):
        self.layer = nnx.Linear(3, 3, rngs=rngs)
        self.deep = deep

    def __call__(self, h):
        if self.deep:
            return self.layer(nnx.relu(self.layer(h)))
        return self.layer(h) * self.layer(h + 1)


class Tokens(nnx.Module):
    """Leaves that a vision transformer has beside its layers, and a layer in vain."""

    def __init__(self, rngs):
        self.vain = nnx.Linear(3, 4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 3)))
        self.position = nnx.Param(jnp.zeros((1, 8, 3)))
        self.layer_scale = nnx.Param(jnp.zeros(3))

    def __call__(self, h):
        self.vain(h)
        token = jnp.tile(self.token[...], (len(h), 1, 1))
        h = jnp.concatenate([token, h], axis=1)
        return (h + self.position) * self.layer_scale


NORM = {"scale": "scale", "bias": "bias"}


def heads(name=""):
    layers = {"query": "in out out", "key": "in out out", "value": "in out out"}
    layers["out"] = "in in out"
    return {
        path: spec
        for layer, words in layers.items()
        for path, spec in dense(f"{name}/{layer}".strip("/"), words).items()
    }


def lstm(cell, calls=1):
    """Expect biases at the gates' recurrent layers only, as their sum needs one."""
    return {
        path: spec
        for gate in ("i", "f", "g", "o")
        for path, spec in {
            **bare(f"{cell}/i{gate}" + "_" * (gate == "f")),
            **dense(f"{cell}/h{gate}", calls=calls),
        }.items()
    }


def optimized(cell, calls=1):
    """Expect one kernel for all four gates, which is stored as that."""
    return {**bare(f"{cell}/dense_i"), **dense(f"{cell}/dense_h", calls=calls)}


def simple(cell, calls=1):
    return {**dense(f"{cell}/dense_i"), **bare(f"{cell}/dense_h", calls=calls)}


gru = simple


def linear(*args, **kwargs):
    return lambda rngs: nnx.Linear(*args, **kwargs, rngs=rngs)


def conv(*args, **kwargs):
    return lambda rngs: nnx.Conv(*args, **kwargs, rngs=rngs)


def rnn(cell, *args, **kwargs):
    return lambda rngs: nnx.RNN(cell(*args, rngs=rngs), **kwargs)


def attention(*args, **kwargs):
    return lambda rngs: nnx.MultiHeadAttention(*args, decode=False, **kwargs, rngs=rngs)


# A name is that of the class, and after a colon what of it is tried.
# The scales of nnx.WeightNorm are trained since Flax 0.12.12, and before are not.
TRAINED = nnx.state(
    nnx.WeightNorm(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), nnx.Param
)
SCALES = {"scales/(/kernel/,)": "scale"} if "scales" in TRAINED else {}

CASES = {
    "Linear": Case(linear(3, 5), [x(2, 3)], dense(input_shape=(2, 3))),
    "Linear: no bias": Case(
        linear(3, 5, use_bias=False), [x(2, 3)], {"kernel": "in out"}
    ),
    "Linear: one example": Case(linear(3, 5), [x(3)], dense()),
    "Linear: a sequence": Case(linear(3, 5), [x(2, 7, 3)], dense()),
    "Linear: one unit": Case(linear(3, 1), [x(2, 3)], dense()),
    "Linear: bfloat16": Case(linear(3, 5, dtype=jnp.bfloat16), [x(2, 3)], dense()),
    "LinearGeneral": Case(
        lambda rngs: nnx.LinearGeneral(3, (5, 7), rngs=rngs),
        [x(2, 3)],
        dense("", "in out out"),
    ),
    "LinearGeneral: several axes": Case(
        lambda rngs: nnx.LinearGeneral((3, 6), (5, 7), axis=(1, -1), rngs=rngs),
        [x(2, 3, 4, 6)],
        dense("", "in in out out", input_shape=(2, 3, 4, 6)),
    ),
    "LinearGeneral: batch axis": Case(
        lambda rngs: nnx.LinearGeneral(3, 5, batch_axis={0: 2}, rngs=rngs),
        [x(2, 4, 3)],
        dense("", "stack in out"),
    ),
    "Einsum": Case(
        lambda rngs: nnx.Einsum("abc,cde->abde", (5, 6, 7), (6, 7), rngs=rngs),
        [x(3, 4, 5)],
        dense("", "in out out"),
    ),
    # Heads are units where the data has none, and a stack where it has.
    "Einsum: heads from one": Case(
        lambda rngs: nnx.Einsum("nta,hab->nthb", (8, 3, 5), (8, 5), rngs=rngs),
        [x(2, 4, 3)],
        dense("", "out in out"),
    ),
    "Einsum: heads apart": Case(
        lambda rngs: nnx.Einsum("nhta,hab->nhtb", (8, 3, 5), (8, 5), rngs=rngs),
        [x(2, 8, 4, 3)],
        dense("", "stack in out"),
    ),
    "Einsum: units first": Case(
        lambda rngs: nnx.Einsum("na,ba->nb", (5, 3), rngs=rngs),
        [x(2, 3)],
        {"kernel": "out in"},
    ),
    "Conv": Case(
        conv(3, 5, (4,)),
        [x(2, 9, 3)],
        dense("", "window in out", padding=((1, 2),), input_shape=(2, 9, 3)),
    ),
    "Conv: 2-D": Case(
        conv(3, 5, (3, 2)),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", padding=((1, 1), (0, 1))),
    ),
    "Conv: 3-D": Case(
        conv(3, 5, (2, 3, 4), padding="VALID"),
        [x(2, 6, 7, 8, 3)],
        dense("", "window window window in out", padding=((0, 0),) * 3),
    ),
    "Conv: one image": Case(
        conv(3, 5, (3, 2)), [x(8, 9, 3)], dense("", "window window in out")
    ),
    "Conv: strides": Case(
        conv(3, 5, (3, 2), strides=(2, 3)),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", strides=(2, 3), padding=((0, 1), (0, 0))),
    ),
    "Conv: dilation": Case(
        conv(3, 5, (3, 2), kernel_dilation=(2, 3), padding="VALID"),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", dilation=(2, 3), padding=((0, 0), (0, 0))),
    ),
    "Conv: input dilation": Case(
        conv(3, 5, (3, 2), input_dilation=(2, 1), padding=((1, 0), (2, 3))),
        [x(2, 8, 9, 3)],
        dense(
            "", "window window in out", input_dilation=(2, 1), padding=((1, 0), (2, 3))
        ),
    ),
    "Conv: grouped": Case(
        conv(4, 6, (3, 2), feature_group_count=2),
        [x(2, 8, 9, 4)],
        dense("", "window window in out", groups=2, fan_in=12, fan_out=18),
    ),
    "Conv: depthwise": Case(
        conv(3, 6, (4,), feature_group_count=3),
        [x(2, 9, 3)],
        dense("", "window in out", groups=3, fan_in=4, fan_out=8),
    ),
    # Padding that is not of zeros is done to the data first.
    "Conv: circular": Case(
        conv(3, 5, (3, 2), padding="CIRCULAR"),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", padding=((0, 0), (0, 0))),
    ),
    "Conv: causal": Case(
        conv(3, 5, (3,), padding="CAUSAL"), [x(2, 9, 3)], dense("", "window in out")
    ),
    "Conv: mask": Case(
        conv(3, 5, (4,), mask=nnx.Variable(jnp.ones((4, 3, 5)))),
        [x(2, 9, 3)],
        dense("", "window in out"),
    ),
    "ConvTranspose": Case(
        lambda rngs: nnx.ConvTranspose(3, 5, (4,), strides=(2,), rngs=rngs),
        [x(2, 9, 3)],
        dense("", "window in out", input_dilation=(2,), padding=((2, 2),)),
    ),
    "ConvTranspose: valid": Case(
        lambda rngs: nnx.ConvTranspose(
            3, 5, (4, 3), strides=(2, 1), padding="VALID", rngs=rngs
        ),
        [x(2, 8, 9, 3)],
        dense(
            "", "window window in out", input_dilation=(2, 1), padding=((3, 3), (2, 2))
        ),
    ),
    # It is the transpose of a convolution from 5 channels to 3, and stored as that.
    "ConvTranspose: transposed kernel": Case(
        lambda rngs: nnx.ConvTranspose(
            3, 5, (4, 2), strides=(2, 3), transpose_kernel=True, rngs=rngs
        ),
        [x(2, 8, 9, 3)],
        dense("", "window window out in", input_dilation=(2, 3)),
    ),
    "ConvTranspose: circular": Case(
        lambda rngs: nnx.ConvTranspose(
            3, 5, (4,), strides=(2,), padding="CIRCULAR", rngs=rngs
        ),
        [x(2, 9, 3)],
        dense("", "window in out", input_dilation=(2,)),
    ),
    "Embed": Case(
        lambda rngs: nnx.Embed(5, 3, rngs=rngs),
        [ids(2, 7)],
        {"embedding": "embedding"},
    ),
    "Embed: attend": Case(Attend, [x(2, 3)], {"embed/embedding": "out in"}),
    "Embed: tied": Case(
        Tied,
        [ids(2, 7)],
        {
            "embed/embedding": W("embedding: out in", bias=None, input_shape=(2, 7, 3)),
            **dense("dense"),
        },
    ),
    "MultiHeadAttention": Case(attention(2, 5, 6, 7), [x(3, 4, 5)], heads()),
    "MultiHeadAttention: no biases": Case(
        attention(2, 5, 6, use_bias=False),
        [x(3, 4, 5)],
        {
            "query/kernel": "in out out",
            "key/kernel": "in out out",
            "value/kernel": "in out out",
            "out/kernel": "in in out",
        },
    ),
    "MultiHeadAttention: cross": Case(
        attention(2, 5, 6, in_kv_features=8), [x(3, 4, 5), x(3, 9, 8)], heads()
    ),
    "MultiHeadAttention: grouped queries": Case(
        attention(4, 5, 12, num_kv_heads=2), [x(3, 6, 5)], heads()
    ),
    "MultiHeadAttention: causal": Case(
        attention(2, 5, 6), [x(3, 4, 5)], heads(), {"is_causal": True}
    ),
    "MultiHeadAttention: normalized": Case(
        attention(2, 5, 6, normalize_qk=True),
        [x(3, 4, 5)],
        {**heads(), "query_ln/scale": "scale", "key_ln/scale": "scale"},
    ),
    "MultiHeadAttention: decode": Case(Decoder, [x(3, 1, 5)], heads("attend")),
    # The key is a variable beside the parameters, and one that is passed.
    "MultiHeadAttention: dropout": Case(
        attention(2, 5, 6, dropout_rate=0.5),
        [x(3, 4, 5)],
        heads(),
        {"deterministic": False},
    ),
    "MultiHeadAttention: dropout of a key": Case(
        Dropping,
        [x(3, 4, 5), jax.eval_shape(lambda: jax.random.key(0))],
        heads("attend"),
    ),
    "BatchNorm": Case(lambda rngs: nnx.BatchNorm(3, rngs=rngs), [x(2, 4, 6, 3)], NORM),
    "BatchNorm: inference": Case(
        lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        [x(2, 4, 6, 3)],
        NORM,
        {"use_running_average": True},
    ),
    "LayerNorm": Case(lambda rngs: nnx.LayerNorm(3, rngs=rngs), [x(2, 4, 3)], NORM),
    "RMSNorm": Case(
        lambda rngs: nnx.RMSNorm(3, rngs=rngs), [x(2, 4, 3)], {"scale": "scale"}
    ),
    "GroupNorm": Case(
        lambda rngs: nnx.GroupNorm(6, 2, rngs=rngs), [x(2, 4, 5, 6)], NORM
    ),
    "InstanceNorm": Case(
        lambda rngs: nnx.InstanceNorm(3, rngs=rngs), [x(2, 4, 5, 3)], NORM
    ),
    "WeightNorm": Case(
        lambda rngs: nnx.WeightNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs),
        [x(2, 3)],
        dense("layer_instance", combined=True, input_shape=(2, 3)) | SCALES,
        abstract=False,
    ),
    "WeightNorm: convolution": Case(
        lambda rngs: nnx.WeightNorm(nnx.Conv(3, 5, (4,), rngs=rngs), rngs=rngs),
        [x(2, 9, 3)],
        dense("layer_instance", "window in out", combined=True) | SCALES,
        abstract=False,
    ),
    "WeightNorm: no scale": Case(
        lambda rngs: nnx.WeightNorm(
            nnx.Linear(3, 5, rngs=rngs), use_scale=False, rngs=rngs
        ),
        [x(2, 3)],
        dense("layer_instance", combined=True),
    ),
    # The singular vector that it keeps is no data that the layer is applied to; whether
    # a division by a number of the kernel's own is a combination is left open.
    "SpectralNorm": Case(
        lambda rngs: nnx.SpectralNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs),
        [x(2, 3)],
        dense("layer_instance", combined=..., input_shape=(2, 3)),
        {"update_stats": True},
    ),
    "SpectralNorm: inference": Case(
        lambda rngs: nnx.SpectralNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs),
        [x(2, 3)],
        dense("layer_instance", combined=..., input_shape=(2, 3)),
        {"update_stats": False},
    ),
    "PReLU": Case(lambda rngs: nnx.PReLU(), [x(2, 3)], {"negative_slope": "scale"}),
    "LSTMCell": Case(
        lambda rngs: Cell(nnx.LSTMCell(3, 5, rngs=rngs)), [x(2, 3)], lstm("cell")
    ),
    "OptimizedLSTMCell": Case(
        lambda rngs: Cell(nnx.OptimizedLSTMCell(3, 5, rngs=rngs)),
        [x(2, 3)],
        optimized("cell"),
    ),
    "GRUCell": Case(
        lambda rngs: Cell(nnx.GRUCell(3, 5, rngs=rngs)), [x(2, 3)], gru("cell")
    ),
    "SimpleCell": Case(
        lambda rngs: Cell(nnx.SimpleCell(3, 5, rngs=rngs)), [x(2, 3)], simple("cell")
    ),
    # A recurrent layer's result comes to its next call, an input layer's does not.
    "RNN": Case(rnn(nnx.LSTMCell, 3, 5), [x(2, 7, 3)], lstm("cell", calls=7)),
    "RNN: OptimizedLSTMCell": Case(
        rnn(nnx.OptimizedLSTMCell, 3, 5), [x(2, 7, 3)], optimized("cell", calls=7)
    ),
    "RNN: GRUCell": Case(rnn(nnx.GRUCell, 3, 5), [x(2, 7, 3)], gru("cell", calls=7)),
    "RNN: time first, in reverse": Case(
        rnn(nnx.SimpleCell, 3, 5, time_major=True, reverse=True),
        [x(7, 2, 3)],
        simple("cell", calls=7),
    ),
    "Bidirectional": Case(
        lambda rngs: nnx.Bidirectional(
            rnn(nnx.SimpleCell, 3, 5)(rngs), rnn(nnx.GRUCell, 3, 4)(rngs)
        ),
        [x(2, 7, 3)],
        {
            **simple("forward_rnn/cell", calls=7),
            **gru("backward_rnn/cell", calls=7),
        },
    ),
    # The low-rank layer is two layers that are applied to data one after the other.
    "LoRA": Case(
        lambda rngs: nnx.LoRA(3, 2, 5, rngs=rngs),
        [x(4, 3)],
        {"lora_a": "in out", "lora_b": "in out"},
    ),
    "LoRA: a base module": Case(
        lambda rngs: nnx.LoRA(3, 2, 5, base_module=linear(3, 5)(rngs), rngs=rngs),
        [x(4, 3)],
        {
            "lora_a": W("in out", bias=None),
            "lora_b": W("in out", bias=None),
            **dense("base_module"),
        },
    ),
    "LoRA: merged": Case(
        Merged,
        [x(4, 3)],
        {
            **dense("base", combined=True),
            "lora/lora_a": W("in out", combined=True, bias=...),
            "lora/lora_b": W("in out", combined=True, bias=...),
        },
    ),
    "LoRALinear": Case(
        lambda rngs: nnx.LoRALinear(3, 5, lora_rank=2, rngs=rngs),
        [x(4, 3)],
        {
            **dense(),
            "lora/lora_a": W("in out", bias=None),
            "lora/lora_b": W("in out", bias=None),
        },
    ),
    "Sequential": Case(
        lambda rngs: nnx.Sequential(
            nnx.Linear(3, 5, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(5, 4, use_bias=False, rngs=rngs),
        ),
        [x(2, 3)],
        {**dense("layers/0"), **bare("layers/3")},
    ),
    # What a norm adds to a convolution's result is the norm's bias.
    "Sequential: a norm": Case(
        lambda rngs: nnx.Sequential(
            nnx.Conv(3, 5, (4,), use_bias=False, rngs=rngs),
            nnx.BatchNorm(5, rngs=rngs),
        ),
        [x(2, 9, 3)],
        {
            **bare("layers/0", "window in out"),
            "layers/1/scale": "scale",
            "layers/1/bias": "bias",
        },
    ),
    "jit": Case(lambda rngs: Wrapped(rngs, nnx.jit), [x(2, 3)], dense("layer")),
    "remat": Case(lambda rngs: Wrapped(rngs, nnx.remat), [x(2, 3)], dense("layer")),
    "vmap over data": Case(
        lambda rngs: Wrapped(rngs, lambda fn: nnx.vmap(fn, in_axes=(None, 0))),
        [x(2, 3)],
        dense("layer"),
    ),
    "vmap ensemble": Case(
        lambda rngs: Ensemble(rngs, lambda rngs: nnx.Linear(3, 5, rngs=rngs), 4),
        [x(4, 2, 3)],
        dense("layer", "stack in out"),
    ),
    "vmap ensemble of convolutions": Case(
        lambda rngs: Ensemble(rngs, lambda rngs: nnx.Conv(3, 5, (6,), rngs=rngs), 4),
        [x(4, 2, 9, 3)],
        dense("layer", "stack window in out", fan_in=18, fan_out=30),
    ),
    "scan over depth": Case(
        lambda rngs: Deep(rngs, lambda rngs: nnx.Linear(5, 5, rngs=rngs), 3),
        [x(2, 5)],
        dense("layer", "stack in out", input_shape=(2, 5)),
    ),
    "scan over depth, shared": Case(Shared, [x(2, 5)], dense("layer", calls=3)),
    "while_loop": Case(Loop, [x(2, 5)], dense("layer", calls=None)),
    "fori_loop": Case(Fori, [x(2, 5)], dense("layer", calls=3)),
    "switch": Case(Heads, [x(2, 3)], {**dense("heads/0"), **bare("heads/1")}),
    "bridge": Case(
        lambda rngs: nnx.bridge.lazy_init(
            nnx.bridge.ToNNX(nn.Dense(5), rngs=rngs), jnp.zeros((2, 3))
        ),
        [x(2, 3)],
        dense(),
    ),
    "called twice": Case(
        lambda rngs: Twice(rngs, deep=True), [x(2, 3)], dense("layer", calls=2)
    ),
    "side by side": Case(
        lambda rngs: Twice(rngs, deep=False), [x(2, 3)], dense("layer")
    ),
    "tokens": Case(
        Tokens,
        [x(2, 7, 3)],
        {
            "vain/kernel": "unused",
            "vain/bias": "unused",
            "token": "other (concatenate)",
            "position": "bias",
            "layer_scale": "scale",
        },
    ),
}

WITHOUT = {
    "Dict": "is a container",
    "Dropout": "has no parameters",
    "List": "is a container",
    "Module": "is abstract",
    "RNNCellBase": "is abstract",
}
if hasattr(nnx, "RoPE"):  # since Flax 0.12.12
    WITHOUT["RoPE"] = "has no parameters"


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_traced_as_its_formula_says(name):
    check(trace(CASES[name]), CASES[name].expected)


def test_every_layer_is_in_the_table():
    check_complete(nnx, nnx.Module, CASES, WITHOUT)


def test_the_rest_of_the_state_may_be_closed_over():
    """A network for inference has its running averages as constants."""
    norm = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(norm, nnx.Param, ...)
    apply = lambda params, h: nnx.merge(graph, params, rest)(h)  # noqa: E731
    check(wr.trace_network(apply, params, x(2, 3)), NORM)


def test_paths_and_parameters_may_be_those_of_a_pure_dict():
    layer = nnx.eval_shape(lambda: nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    apply = lambda params, h: nnx.merge(graph, params)(h)  # noqa: E731
    for tree in (params, nnx.to_pure_dict(params)):
        net = wr.trace_network(apply, tree, x(2, 3))
        check(net, dense())
        assert net.roles.keys() == {"['bias']", "['kernel']"}
        assert (net.layers[0].path, net.layers[0].bias) == ("['kernel']", "['bias']")


def test_layers_are_in_the_order_of_their_calls():
    net = trace(CASES["MultiHeadAttention"])
    names = [f"['{name}']['kernel']" for name in ("query", "key", "value", "out")]
    assert [layer.path for layer in net.layers] == names
