"""What the tree alone tells: the table of the page, row by row, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import weightreg as wr
from weightreg._core._names import READINGS

pytestmark = quick.everything


def leaf(path, shape, *beside):
    """A tree with a leaf, and others in its module: a name and a shape each."""
    *modules, name = path.split("/")
    tree = {name: jnp.ones(shape), **{n: jnp.ones(s) for n, s in beside}}
    for module in reversed(modules):
        tree = {module: tree}
    return tree


# A name, a shape, what is beside it; then one word an axis: a stack, input or unit, and
# "w" for a window's.
KNOWN = {
    "anonymous": ("a", (3, 4), [], "i u"),
    "anonymous b": ("b", (3, 4), [("a", (2, 3))], "i u"),
    "dense": ("kernel", (3, 4), [("bias", (4,))], "i u"),
    "dense without a bias": ("kernel", (3, 4), [], "i u"),
    "square": ("kernel", (4, 4), [("bias", (4,))], "i u"),
    "units first": ("kernel", (4, 3), [("bias", (4,))], "u i"),
    "Haiku": ("linear/w", (3, 4), [("b", (4,))], "i u"),
    "numbered": ("w1", (3, 4), [("b1", (4,)), ("w2", (4, 5)), ("b2", (5,))], "i u"),
    "Equinox": ("weight", (4, 3), [("bias", (4,))], "u i"),
    "Equinox, square": ("weight", (4, 4), [("bias", (4,))], "u i"),
    "weight as Flax would": ("weight", (3, 4), [("bias", (4,))], "i u"),
    "embedding": ("Embed_0/embedding", (9, 4), [], "i u"),
    "query": ("kernel", (6, 2, 3), [("bias", (2, 3))], "i u u"),
    "scanned": ("kernel", (3, 8, 8), [("bias", (3, 8))], "s i u"),
    "scanned, units first": ("kernel", (3, 8, 5), [("bias", (3, 8))], "s u i"),
    "scanned along 1": ("kernel", (8, 3, 5), [("bias", (5, 3))], "i s u"),
    "scanned Equinox": ("weight", (3, 8, 5), [("bias", (3, 8))], "s u i"),
    "scanned query": ("kernel", (3, 8, 2, 4), [("bias", (3, 2, 4))], "s i u u"),
    "scanned image": ("kernel", (3, 5, 5, 2, 4), [("bias", (3, 4))], "s w w i u"),
    "Conv": ("Conv_0/kernel", (5, 6, 7), [("bias", (7,))], "w i u"),
    "Conv without a bias": ("Conv_0/kernel", (5, 6, 7), [], "w i u"),
    "image": ("kernel", (3, 3, 6, 7), [("bias", (7,))], "w w i u"),
    "image without a bias": ("kernel", (3, 3, 6, 7), [], "w w i u"),
    "pointwise": ("kernel", (1, 1, 6, 7), [("bias", (7,))], "w w i u"),
    "image of Haiku, channels first": (
        "w",
        (3, 3, 6, 7),
        [("b", (7, 1, 1))],
        "w w i u",
    ),
    "image of Equinox": ("weight", (7, 6, 3, 3), [("bias", (7, 1, 1))], "u i w w"),
    "transposed": ("kernel", (3, 3, 5, 2), [("bias", (5,))], "w w u i"),
    "a bias of something else": ("kernel", (4, 3), [("bias", (5,))], "i u"),
    "Inception": ("Conv_0/kernel", (1, 7, 4, 3), [], "w w i u"),
    "pointwise Equinox": ("weight", (8, 3, 1), [("bias", (8, 1))], "u i w"),
    "Equinox, one channel": ("weight", (8, 1, 3), [("bias", (8, 1))], "u i w"),
    "Equinox, MNIST": ("weight", (3, 1, 4, 4), [("bias", (3, 1, 1))], "u i w w"),
    "LoRA beside a kernel": ("b", (2, 8), [("a", (6, 2)), ("kernel", (6, 8))], "i u"),
    "heads to heads": ("kernel", (2, 3, 4, 5), [("bias", (4, 5))], "i i u u"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_axes_that_a_tree_tells(name):
    path, shape, beside, words = KNOWN[name]
    tree = leaf(path, shape, *beside)
    found = {layer.path.split("'")[-2]: layer for layer in wr.weight_layers(tree)}
    layer = found[path.split("/")[-1]]
    axes = lambda kinds: {a for a, w in enumerate(words.split()) if w in kinds}  # noqa: E731
    assert set(layer.input_axes) == axes("wi")
    assert set(layer.output_axes) == axes("u")
    assert set(layer.stack_axes) == axes("s")
    assert layer.convolves == ("w" in words)
    assert layer.window == np.prod([shape[a] for a in axes("w")], initial=1)
    assert layer.fan_in == np.prod([shape[a] for a in axes("wi")])
    assert layer.fan_out == np.prod([shape[a] for a in axes("wu")])
    assert set(layer.input_axes[: len(axes("w"))]) == axes("w")
    assert f"['{path.split('/')[-1]}']" in next(iter(wr.taken(tree))) or len(found) > 1


SHIFTS = {
    "Haiku's batch norm": ("batch_norm/offset", (1, 1, 1, 4), []),
    "Haiku's bias, channels first": ("conv2_d/b", (4, 1, 1), [("w", (3, 3, 2, 4))]),
    "Haiku's bias alone": ("bias_1/b", (3, 5), []),
    "Haiku's stacked bias": ("layer_stack/linear/b", (3, 5), [("w", (3, 5, 5))]),
    "linen's weight norm, scanned": ("WeightNorm_0/Dense_0/kernel/scale", (3, 5), []),
    "Equinox's LayerNorm, stacked": ("norm/weight", (3, 5), [("bias", (3, 5))]),
    "Equinox's LayerNorm of images": ("weight", (4, 8, 8), [("bias", (4, 8, 8))]),
    "Keras' gamma": ("layer_normalization/gamma", (2, 5), []),
    "a class token": ("cls_token", (1, 1, 8), []),
    "weight norm": ("weight_g", (1, 1, 5), [("weight_v", (32, 8, 5))]),
    "positions": ("pos_embedding", (1, 5, 8), []),
    "LayerScale": ("block/layer_scale_2", (1, 1, 8), []),
    "numbered": ("b3", (2, 4), [("w3", (2, 3, 4))]),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_and_scales_are_known_by_their_names(name):
    path, shape, beside = SHIFTS[name]
    tree = leaf(path, shape, *beside)
    out = wr.left_out(tree)
    assert any(where.endswith(f"['{path.rsplit('/')[-1]}']") for where in out) or (
        "['WeightNorm_0']['Dense_0']['kernel']['scale']" in out
    )
    same = wr.volumize(0.0, 0.0)  # to zero with all weights
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = same.update(zeros, same.init(tree), tree)
    for where, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(jnp.all(update == 0)) == (jax.tree_util.keystr(where) in out)


AMBIGUOUS = {
    "three axes": ("kernel", (6, 2, 3), []),
    "a bias that fits twice": ("kernel", (8, 8, 8), [("bias", (8, 8))]),
    "weight without a bias": ("weight", (4, 3), []),
    "a window that is not square": ("kernel", (4, 3, 5, 6), []),
    "Gemma": ("kv_einsum/w", (2, 1, 8, 4), []),
    "DenseGeneral": ("DenseGeneral_0/kernel", (2, 2, 4, 5), []),
    "depthwise of Keras": ("depthwise_conv2d/kernel", (3, 3, 8, 1), []),
    "depthwise": ("depthwise_kernel", (3, 3, 4, 2), []),
    "einsum": ("Einsum_0/kernel", (4, 2, 5), []),
    "scanned Dense without a bias": ("Dense_0/kernel", (4, 6, 7), []),
    "transposed and square": ("ConvTranspose_0/kernel", (3, 3, 4, 4), [("bias", (4,))]),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_a_tree_leaves_open_is_asked_for_where_it_matters(name):
    path, shape, beside = AMBIGUOUS[name]
    tree = leaf(path, shape, *beside)
    *_, last = path.split("/")
    message = rf"\['{last}'\], of shape .* which the tree does not tell.*trace_network"
    grads = jax.tree.map(jnp.ones_like, tree)
    for call in (
        wr.weight_layers,
        lambda p: wr.he_volume(0.5, "avg")(p) and wr.weight_layers(p),
        wr.equivalent_norm(),
        lambda p: wr.add_weissi(0.0, 1.0, norm=(2, 1)).init(p),
    ):
        with pytest.raises(ValueError, match=message):
            call(tree)
    tx = optax.chain(optax.sgd(1.0), wr.volumize(0.5, 0.0))
    tx.update(grads, tx.init(tree), tree)
    assert wr.taken(tree)  # lists the readings, and never asks


def test_a_method_asks_for_what_it_depends_on_alone():
    """A matrix that may be turned round has one Frobenius norm and one spectral."""
    tree = {"weight": jnp.ones((4, 3))}
    assert float(wr.weight_energy(tree)) == pytest.approx(12)
    spectral = wr.weight_energy(tree, norm="spectral", exponents=1)
    assert float(spectral) == pytest.approx(12**0.5)
    for method in (wr.he_volume(1.0), wr.weight_layers):
        with pytest.raises(
            ValueError, match=r"inputs 1, units 0; or inputs 0, units 1"
        ):
            method(tree)
    last = {"proj": {"kernel": jnp.ones((2, 3, 6)), "bias": jnp.ones(6)}}
    assert wr.he_volume(1.0, "in")(last)["proj"]["kernel"] == 1.0
    assert wr.equivalent_norm()(last)
    with pytest.raises(
        ValueError, match=r"\['proj'\]\['kernel'\].* 0 are a window; or"
    ):
        wr.he_volume(1.0)(last)  # attention's last projection, or a convolution
    with pytest.raises(ValueError, match="weissi has to know"):
        wr.weight_energy({"kernel": jnp.ones((3, 4, 5))})  # a stack has more norms


def test_one_leaf_that_is_turned_round_makes_the_square_ones_open():
    """As in GPT-2 of Hugging Face's Flax, of which some kernels are square."""
    turned = {"kernel": jnp.ones((24, 8)), "bias": jnp.ones(24)}
    square = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    assert len(wr.weight_layers({"c_proj": square})) == 1
    assert wr.he_volume(0.5)({"c_attn": turned, "c_proj": square})  # fans agree
    with pytest.raises(ValueError, match="'c_proj'"):
        wr.equivalent_norm()({"c_attn": turned, "c_proj": square})


def test_convolutions_beside_stacked_scales_are_open():
    kernel = {"query": {"kernel": jnp.ones((3, 3, 2, 4))}}
    assert wr.weight_layers(kernel)[0].convolves
    with pytest.raises(ValueError, match=r"a window; or .*layers 0, inputs 1"):
        wr.weight_layers({**kernel, "norm": {"scale": jnp.ones((3, 8))}})


def test_leaves_that_may_be_weights_or_not_are_asked_for():
    for tree in (
        {"position": jnp.ones((1, 5, 8))},
        {
            "norm": {"weight": jnp.ones((3, 5))},
            "dense": {"weight": jnp.ones((3, 5, 5))},
        },
    ):
        for call in (wr.weight_mask, wr.left_out, wr.volumize(0.5, 0.0).init):
            with pytest.raises(ValueError, match="may be a weight, or something"):
                call(tree)
        assert wr.weight_mask(tree, mask=False)


def test_attention_of_flax_is_known_by_the_names_of_its_modules():
    shapes = {n: ((64, 8, 8), (8, 8)) for n in ("query", "key", "value")}
    shapes["out"] = (8, 8, 64), (64,)
    tree = {
        n: {"kernel": jnp.ones(w), "bias": jnp.ones(b)} for n, (w, b) in shapes.items()
    }
    volumes = wr.he_volume(0.5)(tree)
    for name in shapes:
        assert volumes[name]["kernel"] == 0.5 * (6 / 64) ** 0.5
    *_, out = sorted(
        wr.weight_layers(tree), key=lambda x: x.path == "['out']['kernel']"
    )
    assert (out.input_axes, out.output_axes, out.window) == ((0, 1), (2,), 1)


def test_readings_are_of_all_axes_once():
    for (ndim, _, _), readings in READINGS.items():
        for reading in readings:
            own = (*reading.inputs, *reading.outputs)
            assert len(set(own)) == len(own)
            assert set(own) <= set(range(ndim))
            assert set(reading.bias) == set(range(ndim)) - set(reading.inputs)
