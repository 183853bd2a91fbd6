"""What every layer of flax.linen has in a trace, by hand from the layer's formula."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from traced import W, bare, check, check_complete, dense, ids, x

import weightreg as wr

pytestmark = quick.everything

KEY = jax.random.key(0)


@dataclasses.dataclass
class Case:
    module: nn.Module
    inputs: list
    expected: dict
    static: dict = dataclasses.field(default_factory=dict)
    # A decoder's cache is as long as the inputs that it is initialized with.
    first: list | None = None


def trace(case):
    init = lambda *inputs: case.module.init(KEY, *inputs, **case.static)  # noqa: E731
    rest = dict(jax.eval_shape(init, *(case.first or case.inputs)))
    params = rest.pop("params")

    def fn(params, rest, *inputs, **static):
        variables = {"params": params, **rest}
        return case.module.apply(variables, *inputs, **static, mutable=list(rest))

    return wr.trace_network(fn, params, rest, *case.inputs, **case.static)


class Attend(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.Embed(5, 3, name="embed").attend(h)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 3, name="embed")
        return embed.attend(nn.Dense(3, name="dense")(embed(tokens)))


class OneHot(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3, use_bias=False, name="dense")(jax.nn.one_hot(tokens, 5))


class Dropping(nn.Module):
    """Attention whose key for dropout is an input of the network."""

    @nn.compact
    def __call__(self, h, key):
        attend = nn.MultiHeadDotProductAttention(
            2, qkv_features=6, dropout_rate=0.5, deterministic=False, name="attend"
        )
        return attend(h, dropout_rng=key)


class Cell(nn.Module):
    """One step of a cell, whose state is an input of the network."""

    cell: nn.RNNCellBase

    def __call__(self, h):
        carry = self.cell.initialize_carry(KEY, h.shape)
        carry = jax.tree.map(lambda c: c + h.mean(), carry)
        return self.cell(carry, h)


class LearntCarry(nn.Module):
    @nn.compact
    def __call__(self, h):
        carry = self.param("carry", nn.initializers.zeros, (2, 5))
        return nn.RNN(nn.SimpleCell(5, name="cell"))(h, initial_carry=carry)


class Deep(nn.Module):
    """A scan over depth, where every step has its own layer or all have one."""

    axes: dict

    @nn.compact
    def __call__(self, h):
        step = lambda layer, h, _: (nn.relu(layer(h)), None)  # noqa: E731
        split = {"params": "variable_axes" in self.axes}
        scan = nn.scan(step, length=3, split_rngs=split, **self.axes)
        return scan(nn.Dense(5, name="dense"), h, None)[0]


class Timewise(nn.Module):
    """A scan over time with one layer, whose result its next call does not see."""

    @nn.compact
    def __call__(self, h):
        step = lambda layer, total, h: (total + h.sum(), layer(h))  # noqa: E731
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(nn.Dense(5, name="dense"), 0.0, h)


class While(nn.Module):
    @nn.compact
    def __call__(self, h):
        layer = nn.Dense(5, name="dense")
        if self.is_initializing():
            return layer(h)
        below = lambda layer, h: h.sum() < 1  # noqa: E731
        return nn.while_loop(below, lambda layer, h: layer(h), layer, h)


class Cond(nn.Module):
    """A layer that one branch or the other calls, which is once."""

    @nn.compact
    def __call__(self, h):
        calls = lambda layer, h: layer(h)  # noqa: E731
        flips = lambda layer, h: -layer(h)  # noqa: E731
        return nn.cond(h.sum() > 0, calls, flips, nn.Dense(5, name="dense"), h)


class Switch(nn.Module):
    """Heads, of which the data picks one."""

    def setup(self):
        self.heads = [nn.Dense(5), nn.Dense(5, use_bias=False)]

    def __call__(self, h):
        branches = [lambda m, h, i=i: m.heads[i](h) for i in (0, 1)]
        if self.is_initializing():
            return [branch(self, h) for branch in branches]
        return nn.switch((h.sum() > 0).astype(int), branches, self, h)


class Transposed(nn.Module):
    """A dense layer whose kernel is stored with the units first."""

    @nn.compact
    def __call__(self, h):
        flip = lambda tree: jax.tree.map(jnp.transpose, tree)  # noqa: E731
        mapped = nn.map_variables(
            nn.Dense, "params", flip, flip, init=self.is_initializing()
        )
        return mapped(5, name="dense")(h)


class Standardized(nn.Module):
    """A convolution whose kernel has no mean and a variance of one for each unit."""

    @nn.compact
    def __call__(self, h):
        standardize = lambda tree: jax.tree.map(  # noqa: E731
            lambda k: jax.nn.standardize(k, axis=(0, 1)), tree
        )
        mapped = nn.map_variables(
            nn.Conv, "params", standardize, init=self.is_initializing()
        )
        return mapped(5, (4,), use_bias=False, name="conv")(h)


class Twice(nn.Module):
    """One layer in depth, or side by side."""

    deep: bool

    @nn.compact
    def __call__(self, h):
        layer = nn.Dense(h.shape[-1], name="dense")
        return layer(nn.relu(layer(h))) if self.deep else layer(h) * layer(h + 1)


class Residual(nn.Module):
    """The bias is added to the layer's result; so is the input, which is no bias."""

    @nn.compact
    def __call__(self, h):
        return h + nn.Dense(3, name="dense")(h)


class Tokens(nn.Module):
    """Leaves that a vision transformer has beside its layers, and a layer in vain."""

    @nn.compact
    def __call__(self, h):
        zeros = nn.initializers.zeros
        nn.Dense(4, name="vain")(h)
        token = self.param("token", zeros, (1, 1, 3))
        h = jnp.concatenate([jnp.tile(token, (len(h), 1, 1)), h], axis=1)
        h = h + self.param("position", zeros, (1, 8, 3))
        return h * self.param("layer_scale", zeros, (3,))


BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
NORM = {"scale": "scale", "bias": "bias"}
HEADS = {
    **dense("query", "in out out"),
    **dense("key", "in out out"),
    **dense("value", "in out out"),
    **dense("out", "in in out"),
}


def lstm(cell, calls=1):
    """Expect biases at the gates' recurrent layers only, as their sum needs one."""
    return {
        k: v
        for gate in "ifgo"
        for k, v in {
            **bare(f"{cell}/i{gate}"),
            **dense(f"{cell}/h{gate}", calls=calls),
        }.items()
    }


def simple(cell, calls=1):
    return {**dense(f"{cell}/i"), **bare(f"{cell}/h", calls=calls)}


def gru(cell, calls=1):
    return {
        **dense(f"{cell}/ir"),
        **dense(f"{cell}/iz"),
        **dense(f"{cell}/in"),
        **bare(f"{cell}/hr", calls=calls),
        **bare(f"{cell}/hz", calls=calls),
        **dense(f"{cell}/hn", calls=calls),
    }


def mgu(cell, calls=1):
    return {
        **dense(f"{cell}/if"),
        **dense(f"{cell}/in"),
        **bare(f"{cell}/hf", calls=calls),
        **dense(f"{cell}/hn", calls=calls),
    }


def under(name, table):
    """Expect a table of a submodule."""

    def moved(spec):
        if isinstance(spec, str) or not spec[1].get("bias"):
            return spec
        return W(spec[0], **{**spec[1], "bias": f"{name}/{spec[1]['bias']}"})

    return {f"{name}/{path}": moved(spec) for path, spec in table.items()}


# A name is that of the class, and after a colon what of it is tried.
CASES = {
    "Dense": Case(nn.Dense(5), [x(2, 3)], dense(input_shape=(2, 3))),
    "Dense: no bias": Case(
        nn.Dense(5, use_bias=False), [x(2, 3)], {"kernel": "in out"}
    ),
    "Dense: one example": Case(nn.Dense(5), [x(3)], dense()),
    "Dense: a sequence": Case(nn.Dense(5), [x(2, 7, 3)], dense()),
    "Dense: one unit": Case(nn.Dense(1), [x(2, 3)], dense()),
    "Dense: one input": Case(nn.Dense(5), [x(2, 1)], dense()),
    "Dense: bfloat16": Case(nn.Dense(5, dtype="bfloat16"), [x(2, 3)], dense()),
    "Dense: boxed": Case(
        nn.Dense(5, kernel_init=BOXED),
        [x(2, 3)],
        dense(),
    ),
    "DenseGeneral": Case(nn.DenseGeneral((5, 7)), [x(2, 3)], dense("", "in out out")),
    "DenseGeneral: several axes": Case(
        nn.DenseGeneral((5, 7), axis=(1, -1)),
        [x(2, 3, 4, 6)],
        dense("", "in in out out", input_shape=(2, 3, 4, 6)),
    ),
    # Axes are contracted in the order of the kernel, whatever theirs in the data.
    "DenseGeneral: axes in reverse": Case(
        nn.DenseGeneral(5, axis=(-1, 1)), [x(2, 3, 4)], dense("", "in in out")
    ),
    "DenseGeneral: batch dims": Case(
        nn.DenseGeneral(5, batch_dims=(0,)), [x(2, 4, 3)], dense("", "stack in out")
    ),
    "DenseGeneral: two batch dims": Case(
        nn.DenseGeneral((5, 7), batch_dims=(0, 1)),
        [x(2, 4, 6, 3)],
        dense("", "stack stack in out out"),
    ),
    "Einsum": Case(
        nn.Einsum((5, 6, 7), "abc,cde->abde"), [x(3, 4, 5)], dense("", "in out out")
    ),
    # Heads are units where the data has none, and a stack where it has.
    "Einsum: heads from one": Case(
        nn.Einsum((8, 3, 5), "nta,hab->nthb"), [x(2, 4, 3)], dense("", "out in out")
    ),
    "Einsum: heads apart": Case(
        nn.Einsum((8, 3, 5), "nhta,hab->nhtb"),
        [x(2, 8, 4, 3)],
        dense("", "stack in out"),
    ),
    "Einsum: units first": Case(
        nn.Einsum((5, 3), "na,ba->nb"), [x(2, 3)], dense("", "out in")
    ),
    "Einsum: the kernel's axes leave in reverse": Case(
        nn.Einsum((5, 3, 7), "na,bac->ncb", use_bias=False),
        [x(2, 3)],
        {"kernel": "out in out"},
    ),
    "Conv": Case(
        nn.Conv(5, (4,)),
        [x(2, 9, 3)],
        dense("", "window in out", padding=((1, 2),), input_shape=(2, 9, 3)),
    ),
    "Conv: no bias": Case(
        nn.Conv(5, (4,), use_bias=False), [x(2, 9, 3)], {"kernel": "window in out"}
    ),
    "Conv: 2-D": Case(
        nn.Conv(5, (3, 2)),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", padding=((1, 1), (0, 1))),
    ),
    "Conv: 3-D": Case(
        nn.Conv(5, (2, 3, 4), padding="VALID"),
        [x(2, 6, 7, 8, 3)],
        dense("", "window window window in out", padding=((0, 0),) * 3),
    ),
    "Conv: 1x1": Case(
        nn.Conv(5, (1, 1)), [x(2, 8, 9, 3)], dense("", "window window in out")
    ),
    "Conv: one image": Case(
        nn.Conv(5, (3, 2)), [x(8, 9, 3)], dense("", "window window in out")
    ),
    "Conv: two batch axes": Case(
        nn.Conv(5, (3, 2)), [x(2, 4, 8, 9, 3)], dense("", "window window in out")
    ),
    "Conv: strides": Case(
        nn.Conv(5, (3, 2), strides=(2, 3)),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", strides=(2, 3), padding=((0, 1), (0, 0))),
    ),
    "Conv: dilation": Case(
        nn.Conv(5, (3, 2), kernel_dilation=(2, 3), padding="VALID"),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", dilation=(2, 3), padding=((0, 0), (0, 0))),
    ),
    "Conv: input dilation": Case(
        nn.Conv(5, (3, 2), input_dilation=(2, 1), padding=((1, 0), (2, 3))),
        [x(2, 8, 9, 3)],
        dense(
            "", "window window in out", input_dilation=(2, 1), padding=((1, 0), (2, 3))
        ),
    ),
    "Conv: grouped": Case(
        nn.Conv(6, (3, 2), feature_group_count=2),
        [x(2, 8, 9, 4)],
        dense("", "window window in out", groups=2, fan_in=12, fan_out=18),
    ),
    "Conv: depthwise": Case(
        nn.Conv(6, (4,), feature_group_count=3),
        [x(2, 9, 3)],
        dense("", "window in out", groups=3, fan_in=4, fan_out=8),
    ),
    # Padding that is not of zeros is done to the data first.
    "Conv: circular": Case(
        nn.Conv(5, (3, 2), padding="CIRCULAR"),
        [x(2, 8, 9, 3)],
        dense("", "window window in out", padding=((0, 0), (0, 0))),
    ),
    "Conv: reflect": Case(
        nn.Conv(5, (3,), padding="REFLECT"),
        [x(2, 9, 3)],
        dense("", "window in out", padding=((0, 0),)),
    ),
    "Conv: causal": Case(
        nn.Conv(5, (3,), padding="CAUSAL"), [x(2, 9, 3)], dense("", "window in out")
    ),
    "Conv: mask": Case(
        nn.Conv(5, (4,), mask=np.tril(np.ones((4, 3, 5), "float32"))),
        [x(2, 9, 3)],
        dense("", "window in out"),
    ),
    # Every position has a matrix of its own, which patches of the input meet.
    "ConvLocal": Case(
        nn.ConvLocal(5, (2,), padding="VALID"), [x(2, 9, 3)], dense("", "stack in out")
    ),
    "ConvLocal: 2-D": Case(
        nn.ConvLocal(5, (3, 2), strides=(2, 1)),
        [x(2, 6, 7, 3)],
        dense("", "stack stack in out"),
    ),
    "ConvTranspose": Case(
        nn.ConvTranspose(5, (4,), strides=(2,)),
        [x(2, 9, 3)],
        dense("", "window in out", input_dilation=(2,), padding=((2, 2),)),
    ),
    "ConvTranspose: valid": Case(
        nn.ConvTranspose(5, (4, 3), strides=(2, 1), padding="VALID"),
        [x(2, 8, 9, 3)],
        dense(
            "", "window window in out", input_dilation=(2, 1), padding=((3, 3), (2, 2))
        ),
    ),
    "ConvTranspose: dilation": Case(
        nn.ConvTranspose(5, (2,), kernel_dilation=(3,)),
        [x(2, 9, 3)],
        dense("", "window in out", dilation=(3,)),
    ),
    # It is the transpose of a convolution from 5 channels to 3, and stored as that.
    "ConvTranspose: transposed kernel": Case(
        nn.ConvTranspose(5, (4, 2), strides=(2, 3), transpose_kernel=True),
        [x(2, 8, 9, 3)],
        dense("", "window window out in", input_dilation=(2, 3)),
    ),
    "ConvTranspose: circular": Case(
        nn.ConvTranspose(5, (4,), strides=(2,), padding="CIRCULAR"),
        [x(2, 9, 3)],
        dense("", "window in out", input_dilation=(2,)),
    ),
    "Embed": Case(nn.Embed(5, 3), [ids(2, 7)], {"embedding": "embedding"}),
    "Embed: attend": Case(Attend(), [x(2, 3)], {"embed/embedding": "out in"}),
    "Embed: tied": Case(
        Tied(),
        [ids(2, 7)],
        {
            "embed/embedding": W("embedding: out in", bias=None, input_shape=(2, 7, 3)),
            **dense("dense"),
        },
    ),
    "Embed: one-hot": Case(OneHot(), [ids(2, 7)], {"dense/kernel": "in out"}),
    "MultiHeadDotProductAttention": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=7),
        [x(3, 4, 5)],
        HEADS,
    ),
    "MultiHeadDotProductAttention: no biases": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6, use_bias=False),
        [x(3, 4, 5)],
        {
            "query/kernel": "in out out",
            "key/kernel": "in out out",
            "value/kernel": "in out out",
            "out/kernel": "in in out",
        },
    ),
    "MultiHeadDotProductAttention: cross": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6),
        [x(3, 4, 5), x(3, 9, 8), x(3, 9, 11)],
        HEADS,
    ),
    "MultiHeadDotProductAttention: normalized": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6, normalize_qk=True),
        [x(3, 4, 5)],
        {**HEADS, "query_ln/scale": "scale", "key_ln/scale": "scale"},
    ),
    "MultiHeadDotProductAttention: decode": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=6, decode=True),
        [x(3, 1, 5)],
        HEADS,
        first=[x(3, 9, 5)],
    ),
    "MultiHeadDotProductAttention: dropout": Case(
        Dropping(),
        [x(3, 4, 5), jax.eval_shape(lambda: KEY)],
        under("attend", HEADS),
    ),
    "MultiHeadAttention": Case(
        nn.MultiHeadAttention(2, qkv_features=6), [x(3, 4, 5)], HEADS
    ),
    "BatchNorm": Case(nn.BatchNorm(use_running_average=False), [x(2, 4, 6, 3)], NORM),
    "BatchNorm: inference": Case(
        nn.BatchNorm(), [x(2, 4, 6, 3)], NORM, {"use_running_average": True}
    ),
    "LayerNorm": Case(nn.LayerNorm(), [x(2, 4, 3)], NORM),
    "LayerNorm: two axes": Case(
        nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)), [x(2, 4, 3)], NORM
    ),
    "RMSNorm": Case(nn.RMSNorm(), [x(2, 4, 3)], {"scale": "scale"}),
    "GroupNorm": Case(nn.GroupNorm(2), [x(2, 4, 5, 6)], NORM),
    "InstanceNorm": Case(nn.InstanceNorm(), [x(2, 4, 5, 3)], NORM),
    "WeightNorm": Case(
        nn.WeightNorm(nn.Dense(5)),
        [x(2, 3)],
        {
            **dense("layer_instance", combined=True),
            "layer_instance/kernel/scale": "scale",
        },
    ),
    "WeightNorm: convolution": Case(
        nn.WeightNorm(nn.Conv(5, (4,))),
        [x(2, 9, 3)],
        {
            **dense("layer_instance", "window in out", combined=True),
            "layer_instance/kernel/scale": "scale",
        },
    ),
    "WeightNorm: one length": Case(
        nn.WeightNorm(nn.Dense(5, use_bias=False), feature_axes=None),
        [x(2, 3)],
        {
            "layer_instance/kernel": W("in out", combined=True),
            "layer_instance/kernel/scale": "scale",
        },
    ),
    "WeightNorm: no scale": Case(
        nn.WeightNorm(nn.Dense(5), use_scale=False),
        [x(2, 3)],
        dense("layer_instance", combined=True),
    ),
    # The singular vector that it keeps is no data that the layer is applied to; whether
    # a division by a number of the kernel's own is a combination is left open.
    "SpectralNorm": Case(
        nn.SpectralNorm(nn.Dense(5)),
        [x(2, 3)],
        dense("layer_instance", combined=..., input_shape=(2, 3)),
        {"update_stats": True},
    ),
    "SpectralNorm: inference": Case(
        nn.SpectralNorm(nn.Dense(5)),
        [x(2, 3)],
        dense("layer_instance", combined=..., input_shape=(2, 3)),
        {"update_stats": False},
    ),
    "SpectralNorm: convolution": Case(
        nn.SpectralNorm(nn.Conv(5, (4,))),
        [x(2, 9, 3)],
        dense("layer_instance", "window in out", combined=...),
        {"update_stats": True},
    ),
    "PReLU": Case(nn.PReLU(), [x(2, 3)], {"negative_slope": "scale"}),
    "LSTMCell": Case(Cell(nn.LSTMCell(5)), [x(2, 3)], lstm("cell")),
    # Its kernels are concatenated first, each to its own units as in the LSTMCell.
    "OptimizedLSTMCell": Case(Cell(nn.OptimizedLSTMCell(5)), [x(2, 3)], lstm("cell")),
    "GRUCell": Case(Cell(nn.GRUCell(5)), [x(2, 3)], gru("cell")),
    "MGUCell": Case(Cell(nn.MGUCell(5)), [x(2, 3)], mgu("cell")),
    "SimpleCell": Case(Cell(nn.SimpleCell(5)), [x(2, 3)], simple("cell")),
    "SimpleCell: residual": Case(
        Cell(nn.SimpleCell(5, residual=True)), [x(2, 3)], simple("cell")
    ),
    "ConvLSTMCell": Case(
        Cell(nn.ConvLSTMCell(5, (3,))),
        [x(2, 9, 4)],
        {
            **dense("cell/ih", "window in out", padding=((1, 1),)),
            **dense("cell/hh", "window in out", padding=((1, 1),)),
        },
    ),
    # A recurrent layer's result comes to its next call, an input layer's does not.
    "RNN": Case(nn.RNN(nn.LSTMCell(5)), [x(2, 7, 3)], lstm("cell", calls=7)),
    "RNN: OptimizedLSTMCell": Case(
        nn.RNN(nn.OptimizedLSTMCell(5)), [x(2, 7, 3)], lstm("cell", calls=7)
    ),
    "RNN: GRUCell": Case(nn.RNN(nn.GRUCell(5)), [x(2, 7, 3)], gru("cell", calls=7)),
    "RNN: MGUCell": Case(nn.RNN(nn.MGUCell(5)), [x(2, 7, 3)], mgu("cell", calls=7)),
    "RNN: time first, unrolled in part": Case(
        nn.RNN(nn.SimpleCell(5), time_major=True, unroll=2),
        [x(7, 2, 3)],
        simple("cell", calls=7),
    ),
    "RNN: in reverse": Case(
        nn.RNN(nn.SimpleCell(5), reverse=True), [x(2, 7, 3)], simple("cell", calls=7)
    ),
    "RNN: ConvLSTMCell": Case(
        nn.RNN(nn.ConvLSTMCell(5, (3,))),
        [x(2, 6, 9, 4)],
        {
            **dense("cell/ih", "window in out"),
            **dense("cell/hh", "window in out", calls=6),
        },
    ),
    "RNN: one on another": Case(
        nn.Sequential([nn.RNN(nn.SimpleCell(5)), nn.RNN(nn.SimpleCell(4))]),
        [x(2, 7, 3)],
        {**simple("layers_0/cell", calls=7), **simple("layers_1/cell", calls=7)},
    ),
    "RNN: learnt carry": Case(
        LearntCarry(),
        [x(2, 7, 3)],
        {**simple("cell", calls=7), "carry": "other (scan)"},
    ),
    "Bidirectional": Case(
        nn.Bidirectional(nn.RNN(nn.SimpleCell(5)), nn.RNN(nn.GRUCell(4))),
        [x(2, 7, 3)],
        {
            **simple("forward_rnn/cell", calls=7),
            **gru("backward_rnn/cell", calls=7),
        },
    ),
    "Sequential": Case(
        nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4, use_bias=False)]),
        [x(2, 3)],
        {**dense("layers_0"), **bare("layers_2")},
    ),
    # What a norm adds to a convolution's result is the norm's bias.
    "Sequential: a norm": Case(
        nn.Sequential(
            [nn.Conv(5, (4,), use_bias=False), nn.BatchNorm(use_running_average=False)]
        ),
        [x(2, 9, 3)],
        {**bare("layers_0", "window in out"), **under("layers_1", NORM)},
    ),
    "Fp8DirectDotGeneralOp": Case(
        # The product is scaled by data before the bias is added to it.
        nn.Dense(5, dot_general_cls=nn.Fp8DirectDotGeneralOp),
        [x(2, 3)],
        {"kernel": W("in out", bias=None), "bias": "bias"},
    ),
    "jit": Case(nn.jit(nn.Dense)(5), [x(2, 3)], dense()),
    "remat": Case(nn.remat(nn.Dense)(5), [x(2, 3)], dense()),
    "vmap over data": Case(
        nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(
            5
        ),
        [x(2, 3)],
        dense(),
    ),
    "vmap ensemble": Case(
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5),
        [x(4, 2, 3)],
        dense("", "stack in out"),
    ),
    "vmap ensemble, members last": Case(
        nn.vmap(nn.Dense, variable_axes={"params": -1}, split_rngs={"params": True})(5),
        [x(4, 2, 3)],
        dense("", "in out stack"),
    ),
    "vmap ensemble of convolutions": Case(
        nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})(
            5, (6,)
        ),
        [x(4, 2, 9, 3)],
        dense("", "stack window in out", fan_in=18, fan_out=30),
    ),
    "scan over depth": Case(
        Deep({"variable_axes": {"params": 0}}),
        [x(2, 5)],
        dense("dense", "stack in out", input_shape=(2, 5)),
    ),
    "scan over depth, stack in the middle": Case(
        Deep({"variable_axes": {"params": 1}}),
        [x(2, 5)],
        dense("dense", "in stack out"),
    ),
    "scan over depth, shared": Case(
        Deep({"variable_broadcast": "params"}), [x(2, 5)], dense("dense", calls=3)
    ),
    "scan over time": Case(Timewise(), [x(7, 2, 3)], dense("dense")),
    "remat_scan": Case(
        nn.remat_scan(nn.Dense, lengths=(2, 4))(5),
        [x(3, 5)],
        dense("", "stack stack in out"),
    ),
    "while_loop": Case(While(), [x(2, 5)], dense("dense", calls=None)),
    "cond": Case(Cond(), [x(2, 3)], dense("dense")),
    "switch": Case(Switch(), [x(2, 3)], {**dense("heads_0"), **bare("heads_1")}),
    "map_variables": Case(Transposed(), [x(2, 3)], dense("dense", "out in")),
    "map_variables: standardization": Case(
        Standardized(), [x(2, 9, 3)], {"conv/kernel": W("window in out", combined=True)}
    ),
    "called twice": Case(Twice(deep=True), [x(2, 3)], dense("dense", calls=2)),
    "side by side": Case(Twice(deep=False), [x(2, 3)], dense("dense")),
    "residual": Case(Residual(), [x(2, 3)], dense("dense")),
    "tokens": Case(
        Tokens(),
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
    "Dropout": "has no parameters",
    "Fp8DotGeneral": "is another name of Fp8DirectDotGeneralOp",
    "Fp8DotGeneralOp": "is deprecated, and has no parameters",
    "Fp8Einsum": "has no parameters",
    "Module": "is abstract",
    "NANOOFp8DotGeneralOp": "has no parameters",
    "RNNCellBase": "is abstract",
    "SelfAttention": "is deprecated for MultiHeadDotProductAttention",
}


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_traced_as_its_formula_says(name):
    check(trace(CASES[name]), CASES[name].expected)


def test_every_layer_is_in_the_table():
    check_complete(nn, nn.Module, CASES, WITHOUT)


def test_running_averages_may_be_constants():
    """A network for inference has its statistics closed over."""
    norm = nn.BatchNorm(use_running_average=True)
    variables = norm.init(KEY, jnp.zeros((2, 3)))
    apply = lambda params, h: norm.apply({**variables, "params": params}, h)  # noqa: E731
    check(wr.trace_network(apply, variables["params"], x(2, 3)), NORM)


def test_an_ensemble_that_shares_its_input_leaves_its_stack_open():
    """Members are units of one layer as far as the graph tells."""
    ensemble = nn.vmap(
        nn.Dense,
        in_axes=None,
        axis_size=4,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    net = trace(Case(ensemble(5), [x(2, 3)], {}))
    (layer,) = net.layers
    assert layer.input_axes == (1,)
    assert sorted(layer.output_axes + layer.stack_axes) == [0, 2]
    assert net.open


def test_paths_are_those_of_jax_without_the_box():
    for name in ("Dense", "Dense: boxed"):
        net = trace(CASES[name])
        assert net.roles.keys() == {"['bias']", "['kernel']"}
        assert (net.layers[0].path, net.layers[0].bias) == ("['kernel']", "['bias']")


def test_layers_are_in_the_order_of_their_calls():
    net = trace(CASES["MultiHeadDotProductAttention"])
    names = [f"['{name}']['kernel']" for name in ("query", "key", "value", "out")]
    assert [layer.path for layer in net.layers] == names
