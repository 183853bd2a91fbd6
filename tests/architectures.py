"""Eleven whole networks, with the role of each parameter written by hand.

They are built as users build them, but small, and of sizes that differ wherever an
architecture lets them, so that axes that are mixed up show. Nothing is computed here:
parameters and inputs are shapes.

The words of a table are explained in `traced`. Tables of modules are made by `conv`,
`norm` and the like, and put together by `join` and `under`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from traced import W, bare, dense
from traced import x as shape


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network's call, of shapes, and what there is to know about its parameters."""

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    table: dict[str, Any]


def join(*tables):
    """One table of several. No parameter may be in two of them."""
    joined = {path: spec for table in tables for path, spec in table.items()}
    assert len(joined) == sum(map(len, tables))
    return joined


def under(module, *tables):
    """The table of a module: paths and biases get its name in front."""

    def renamed(spec):
        if not isinstance(spec, tuple) or not spec[1].get("bias"):
            return spec
        return W(spec[0], **{**spec[1], "bias": f"{module}/{spec[1]['bias']}"})

    inner = join(*tables).items()
    return {f"{module}/{path}": renamed(spec) for path, spec in inner}


def conv(name, layer=dense, **fields):
    return layer(name, "window window in out", **fields)


def norm(name):
    return {f"{name}/scale": "scale", f"{name}/bias": "bias"}


def of_linen(model, x, table):
    """The call of a linen network that has no state."""
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return Architecture(lambda p, x: model.apply({"params": p}, x), params, (x,), table)


def mlp():
    model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(11), nn.relu, nn.Dense(3)])
    table = join(dense("layers_0"), dense("layers_2"), dense("layers_4"))
    return of_linen(model, shape(2, 7), table)


class _Residual(nn.Module):
    """A basic block of ResNet-18, with batch normalization."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        normalize = lambda: nn.BatchNorm(use_running_average=False)  # noqa: E731
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False, name="first")(x)
        y = nn.relu(normalize()(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False, name="second")(y)
        y = normalize()(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="short")(x)
            x = normalize()(x)
        return nn.relu(x + y)


class _ResNet18(nn.Module):
    """ResNet-18 with a normalization after its last layer too, as ENC wants it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (7, 7), (2, 2), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, width in enumerate((3, 5, 7, 9)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                x = _Residual(width, stride, name=f"block{stage}{block}")(x)
        x = nn.Dense(4, name="head")(x.mean((1, 2)))
        return nn.BatchNorm(use_running_average=False)(x)


def resnet18():
    """In training, where the running statistics are inputs and results."""

    def block(name, stride):
        table = join(
            conv("first", bare, strides=(stride, stride)),
            conv("second", bare),
            norm("BatchNorm_0"),
            norm("BatchNorm_1"),
        )
        if stride == 1:
            return under(name, table)
        short = conv("short", bare, strides=(2, 2))
        return under(name, table, short, norm("BatchNorm_2"))

    table = join(
        conv("stem", bare, strides=(2, 2)),
        norm("BatchNorm_0"),
        *(
            block(f"block{stage}{number}", 2 if stage and not number else 1)
            for stage in range(4)
            for number in range(2)
        ),
        dense("head"),
        norm("BatchNorm_1"),
    )
    model, x = _ResNet18(), shape(2, 32, 32, 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def train(params, statistics, x):
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, mutable=["batch_stats"])

    inputs = variables["batch_stats"], x
    return Architecture(train, variables["params"], inputs, table)


class _ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(11, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = self.param("token", nn.initializers.zeros, (1, 1, x.shape[-1]))
        token = jnp.broadcast_to(token, (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1)
        x += self.param("positions", nn.initializers.zeros, (1, *x.shape[1:]))
        for _ in range(2):
            x = _Encoder()(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x[:, 0]))


class _Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(3, qkv_features=15, name="attention")(y)
        y = nn.Dense(13)(nn.LayerNorm()(x))
        return x + nn.Dense(11)(nn.gelu(y))


def vit():
    attention = under(
        "attention",
        *(dense(name, "in out out") for name in ("query", "key", "value")),
        dense("out", "in in out"),
    )
    layers = dense("Dense_0"), dense("Dense_1"), norm("LayerNorm_0")
    block = join(attention, *layers, norm("LayerNorm_1"))
    table = join(
        conv("patches", strides=(4, 4)),
        {"token": "other (concatenate)", "positions": "bias"},
        under("_Encoder_0", block),
        under("_Encoder_1", block),
        norm("LayerNorm_0"),
        dense("head"),
    )
    return of_linen(_ViT(), shape(2, 12, 12, 2), table)


class _Decoder(nnx.Module):
    """A block of a GPT, whose queries, keys and values come from one layer."""

    def __init__(self, rngs):
        self.before = nnx.LayerNorm(11, rngs=rngs)
        self.qkv = nnx.Linear(11, 3 * 14, rngs=rngs)
        self.out = nnx.Linear(14, 11, rngs=rngs)
        self.between = nnx.LayerNorm(11, rngs=rngs)
        self.up = nnx.Linear(11, 17, rngs=rngs)
        self.down = nnx.Linear(17, 11, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(
            self.qkv(self.before(x)).reshape(*x.shape[:2], 3, 2, 7), 2, 0
        )
        mask = nnx.make_causal_mask(x[..., 0])
        heads = nnx.dot_product_attention(q, k, v, mask=mask)
        x += self.out(heads.reshape(*x.shape[:2], 14))
        return x + self.down(jax.nn.gelu(self.up(self.between(x))))


class _GPT(nnx.Module):
    """Two blocks that are scanned, and an embedding that is the last layer too."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(13, 11, rngs=rngs)
        self.positions = nnx.Embed(7, 11, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(_Decoder))(rngs)
        self.norm = nnx.LayerNorm(11, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        axes = (nnx.Carry, 0)
        through = nnx.scan(lambda x, block: block(x), in_axes=axes, out_axes=nnx.Carry)
        return self.tokens.attend(self.norm(through(x, self.blocks)))


def gpt():
    block = (
        norm("before"),
        norm("between"),
        *(dense(name, "stack in out") for name in ("qkv", "out", "up", "down")),
    )
    table = join(
        {"tokens/embedding": "embedding: out in"},
        {"positions/embedding": "bias"},  # looked up by no data
        under("blocks", *block),
        norm("norm"),
    )
    model = nnx.eval_shape(lambda: _GPT(nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    run = lambda params, tokens: nnx.merge(graph, params)(tokens)  # noqa: E731
    return Architecture(run, params, (shape(2, 7, dtype=jnp.int32),), table)


class _UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (3, 5):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(7, (3, 3))(x))
        for width in (5, 3):
            x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = jnp.concatenate([x, skips.pop()], -1)
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Conv(2, (1, 1))(x)


def unet():
    """Upsampling dilates what is convolved, and not the kernel."""
    table = join(
        *(conv(f"Conv_{i}") for i in range(6)),
        *(conv(f"ConvTranspose_{i}", input_dilation=(2, 2)) for i in range(2)),
    )
    return of_linen(_UNet(), shape(2, 8, 8, 2), table)


class _LSTM(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(13, 7)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(5, name="cell"))(x)
        return nn.Dense(3)(x[:, -1])


def lstm():
    """Only the layers of the hidden state are fed with what they have given."""
    cell = under(
        "cell",
        *(bare(f"i{gate}") for gate in "ifgo"),
        *(dense(f"h{gate}", calls=9) for gate in "ifgo"),
    )
    table = join({"Embed_0/embedding": "embedding"}, cell, dense("Dense_0"))
    return of_linen(_LSTM(), shape(2, 9, dtype=jnp.int32), table)


class _Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(11, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        for _ in range(2):
            x = _Mixing()(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


class _Mixing(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(7)(y)))
        x += y.swapaxes(1, 2)
        y = nn.gelu(nn.Dense(13)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[2])(y)


def mixer():
    layers = [dense(f"Dense_{i}") for i in range(4)]
    block = join(*layers, norm("LayerNorm_0"), norm("LayerNorm_1"))
    table = join(
        conv("patches", strides=(4, 4)),
        under("_Mixing_0", block),
        under("_Mixing_1", block),
        norm("LayerNorm_0"),
        dense("head"),
    )
    return of_linen(_Mixer(), shape(2, 12, 12, 2), table)


class _ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(5, (4, 4), (4, 4), name="stem")(x))
        x = _Depthwise()(x)
        x = nn.Conv(7, (2, 2), (2, 2), name="down")(nn.LayerNorm()(x))
        x = _Depthwise()(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class _Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.Conv(width, (3, 3), feature_group_count=width)(x)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(y)))
        y = nn.Dense(width)(y)
        return x + self.param("scale_of_layer", nn.initializers.ones, (width,)) * y


def convnext():
    def block(width):
        return join(
            conv("Conv_0", groups=width),
            norm("LayerNorm_0"),
            dense("Dense_0"),
            dense("Dense_1"),
            {"scale_of_layer": "scale"},
        )

    table = join(
        conv("stem", strides=(4, 4)),
        under("_Depthwise_0", block(5)),
        conv("down", strides=(2, 2)),
        under("_Depthwise_1", block(7)),
        *(norm(f"LayerNorm_{i}") for i in range(3)),
        dense("head"),
    )
    return of_linen(_ConvNeXt(), shape(2, 16, 16, 2), table)


class _Fixup(nn.Module):
    """A block of a wide residual network with Fixup, of shifts that are numbers."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        shift = lambda name: self.param(name, nn.initializers.zeros, (1,))  # noqa: E731
        strides = (self.stride, self.stride)
        x = nn.relu(x + shift("before_first"))
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False, name="first")(x)
        y = nn.relu(y + shift("after_first")) + shift("before_second")
        y = nn.Conv(self.width, (3, 3), use_bias=False, name="second")(y)
        y *= self.param("multiplier", nn.initializers.ones, (1,))
        y += shift("after_second")
        return y + nn.Conv(self.width, (1, 1), strides, use_bias=False, name="short")(x)


class _WRN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), use_bias=False, name="stem")(x)
        x += self.param("after_stem", nn.initializers.zeros, (1,))
        x = _Fixup(5, 1)(x)
        x = _Fixup(7, 2)(x)
        x = _Fixup(9, 2)(x)
        x = nn.relu(x).mean((1, 2))
        x += self.param("before_head", nn.initializers.zeros, (1,))
        return nn.Dense(4, name="head")(x)


def wrn():
    """One number that is added to all units is no layer's own bias."""

    def block(stride):
        shifts = "before_first", "after_first", "before_second", "after_second"
        return join(
            conv("first", bare, strides=(stride, stride)),
            conv("second", bare),
            conv("short", bare, strides=(stride, stride)),
            dict.fromkeys(shifts, "bias"),
            {"multiplier": "scale"},
        )

    table = join(
        conv("stem", bare),
        {"after_stem": "bias", "before_head": "bias"},
        under("_Fixup_0", block(1)),
        under("_Fixup_1", block(2)),
        under("_Fixup_2", block(2)),
        dense("head"),
    )
    return of_linen(_WRN(), shape(2, 8, 8, 2), table)


class _CNN(eqx.Module):
    """Convolutions and a dense network of Equinox, for one image."""

    convolutions: list
    head: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convolutions = [
            eqx.nn.Conv2d(2, 3, (3, 5), key=keys[0]),
            eqx.nn.Conv2d(3, 5, 3, stride=2, key=keys[1]),
        ]
        self.head = eqx.nn.MLP(5 * 2 * 1, 3, 7, 2, key=keys[2])

    def __call__(self, x):
        for layer in self.convolutions:
            x = jax.nn.relu(layer(x))
        return self.head(x.ravel())


def equinox():
    """Kernels are (out, in) and (out, in, *window)."""

    def layer(path, words, **fields):
        weight = W(words, bias=f"{path}/bias", **fields)
        return {f"{path}/weight": weight, f"{path}/bias": "bias"}

    kernel = "out in window window"
    table = join(
        layer("convolutions/0", kernel),
        layer("convolutions/1", kernel, strides=(2, 2)),
        *(layer(f"head/layers/{i}", "out in") for i in range(3)),
    )
    model = eqx.filter_eval_shape(_CNN, jax.random.key(0))
    # Optimizers take no functions, of which the module holds some.
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    params, rest = eqx.partition(model, is_shape)
    run = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)  # noqa: E731
    return Architecture(run, params, (shape(2, 2, 7, 8),), table)


def _attentive(x):
    """A convolution, attention over its positions, and a dense layer."""
    x = jax.nn.relu(hk.Conv2D(11, (3, 5), stride=2)(x))
    x = x.reshape(len(x), -1, x.shape[-1])
    y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    start = hk.initializers.VarianceScaling()
    x += hk.MultiHeadAttention(3, 5, w_init=start, value_size=7, model_size=11)(y, y, y)
    return hk.Linear(2)(x.mean(1))


def haiku():
    def layer(path, words="in out", **fields):
        return {f"{path}/w": W(words, bias=f"{path}/b", **fields), f"{path}/b": "bias"}

    names = "query", "key", "value", "linear"
    table = join(
        layer("conv2_d", "window window in out", strides=(2, 2)),
        {"layer_norm/scale": "scale", "layer_norm/offset": "bias"},
        *(layer(f"multi_head_attention/{name}") for name in names),
        layer("linear"),
    )
    network = hk.without_apply_rng(hk.transform(_attentive))
    x = shape(2, 9, 9, 2)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    return Architecture(network.apply, params, (x,), table)


ARCHITECTURES = {
    "MLP": mlp,
    "ResNet-18": resnet18,
    "ViT": vit,
    "GPT": gpt,
    "U-Net": unet,
    "LSTM": lstm,
    "MLP-Mixer": mixer,
    "ConvNeXt": convnext,
    "WRN with Fixup": wrn,
    "Equinox": equinox,
    "Haiku": haiku,
}
