"""What `trace_network` reads off whole networks, and what methods make of it.

The references are NumPy's, in double precision, and know what an axis means from the
tables in `architectures` alone. `MISTAKES` shows that they would tell if one was wrong.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from architectures import ARCHITECTURES
from traced import check, short

import weightreg as wr

pytestmark = quick.everything

RATE, MOMENTUM, SHARE, V = 0.1, 0.9, 0.99, 0.5
ENERGY, COMPLEXITY = 1e-3, 1e-3
BOX = wr.he_volume(V)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """An architecture, what is read off it, and numbers for its parameters.

    Tests of one architecture follow each other, so that each is traced once.
    """
    built = ARCHITECTURES[request.param]()
    net = wr.trace_network(built.fn, built.params, *built.inputs)
    return built, net, *draw(built.params)


def draw(shapes):
    """Random parameters, of which a good part is outside of the box, and gradients."""
    rng = np.random.default_rng(0)

    def one(leaf):
        values = np.asarray(rng.normal(size=leaf.shape, scale=0.5))
        values.flat[0] = 0  # which has a sign of its own
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(one, shapes), jax.tree.map(one, shapes)


def flat(params):
    """The leaves by the paths of the tables."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    keys = [jax.tree_util.keystr(path).removesuffix(".value") for path, _ in leaves]
    return {
        short(key): np.asarray(leaf)
        for key, (_, leaf) in zip(keys, leaves, strict=True)
    }


class Told:
    """What a line of a table says of a weight, all of it about axes."""

    def __init__(self, words, groups=1):
        where = lambda *names: tuple(i for i, w in enumerate(words) if w in names)  # noqa: E731
        self.inputs, self.units = where("window", "in"), where("out")
        self.own, self.reached = where("window", "in", "out"), where("window", "out")
        self.groups = groups

    def volume(self, w):
        """He's: units times window, of one group; stacked layers do not count."""
        fan_out = math.prod(w.shape[a] for a in self.reached) // self.groups
        return V * math.sqrt(6 / fan_out)


def weights(table):
    """The lines of a table that are about weights, as `Told`."""
    told = {}
    for path, spec in table.items():
        words, fields = spec if isinstance(spec, tuple) else (spec, {})
        words = words.removeprefix("embedding:").split()
        if "in" in words:
            told[path] = Told(words, fields.get("groups", 1))
    return told


def stepped(params, grads, table):
    """The parameters after a step of volumized SGD, and their momentum."""
    told, gradients, after, momentum = weights(table), flat(grads), {}, {}
    for path, w in flat(params).items():
        gradient = gradients[path].astype(np.float64)
        w = w.astype(np.float64) - RATE * gradient
        wall = told[path].volume(w) if path in told else np.inf
        excess = np.maximum(np.abs(w) - wall, 0)
        after[path] = w - (1 - SHARE) * np.sign(w) * excess
        momentum[path] = np.where(excess > 0, SHARE * gradient, gradient)
    return after, momentum


def penalty(params, table):
    """The logarithmic penalty, to which stacked layers are several."""
    leaves, total = flat(params), 0.0
    for path, told in weights(table).items():
        w = leaves[path].astype(np.float64)
        norms = np.sqrt(np.sum(w**2, told.own))
        sums = np.sum(np.abs(w), told.own)
        total += np.sum(2 * ENERGY * np.log(norms) + COMPLEXITY * sums / norms)
    return total


def equalized(params, table):
    """Parameters whose units are centred and all of the same norm."""
    mapped = {path: w.astype(np.float64) for path, w in flat(params).items()}
    for path, told in weights(table).items():
        w = mapped[path] - np.mean(mapped[path], told.inputs, keepdims=True)
        units = math.prod(w.shape[a] for a in told.units)
        norms = np.sqrt(np.sum(w**2, told.inputs, keepdims=True))
        mapped[path] = w / (math.sqrt(units) * norms)
    return mapped


def quantized(params, table, levels):
    """Parameters whose weights are at two or three levels, in single precision."""
    nearest = flat(params)
    for path, told in weights(table).items():
        w, scale = nearest[path], np.float32(told.volume(nearest[path]))
        nearest[path] = np.where(w >= 0, scale, -scale)
        if levels == "ternary":
            inside = np.abs(w.astype(np.float64)) <= scale.astype(np.float64) / 2
            nearest[path] = np.where(inside, np.float32(0), nearest[path])
    return nearest


def assert_close(got, wanted):
    """Compares trees with references up to single precision's rounding."""
    got = flat(got)
    assert got.keys() == wanted.keys()
    for path, values in wanted.items():
        np.testing.assert_allclose(
            got[path], values, rtol=2e-6, atol=2e-7, err_msg=path
        )


def test_the_graph_says_what_the_table_says(case):
    built, net, *_ = case
    check(net, built.table)


def test_a_step_stays_in_the_boxes(case):
    built, net, params, grads = case
    tx = wr.volumized(optax.sgd(RATE, momentum=MOMENTUM), BOX, SHARE, dims=net)

    @quick.jit
    def step(params, grads):
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), optax.tree.get(state, "trace")

    for got, wanted in zip(
        step(params, grads), stepped(params, grads, built.table), strict=True
    ):
        assert_close(got, wanted)


def test_the_penalty_counts_every_layer(case):
    built, net, params, _ = case
    weissi = wr.weissi(ENERGY, COMPLEXITY, log=True, dims=net)
    got, wanted = quick.jit(weissi)(params), penalty(params, built.table)
    np.testing.assert_allclose(got, wanted, rtol=3e-6)


def test_every_layer_gets_the_same_norm(case):
    """Where a normalization follows every layer, the network is the same but for it.

    The map does not ask whether it does, so that it has to be right for all others too.
    """
    built, net, params, _ = case
    enc = wr.equivalent_norm(dims=net)
    assert_close(quick.jit(enc)(params), equalized(params, built.table))


@quick.bits
@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_packed_weights_are_at_their_levels(case, levels):
    built, net, params, _ = case
    there_and_back = quick.jit(lambda p: wr.unpack(wr.pack(p, BOX, levels, dims=net)))
    got, wanted = flat(there_and_back(params)), quantized(params, built.table, levels)
    assert got.keys() == wanted.keys()
    for path, values in wanted.items():
        np.testing.assert_array_equal(got[path], values, err_msg=path, strict=True)


CONV = "window window in out"

# Lines of tables, wrong ones in their place, and references that are then the same.
MISTAKES = [
    ("MLP", "layers_0/kernel", "out in", {"penalty"}),
    ("MLP", "layers_0/kernel", "bias", {}),
    ("GPT", "blocks/up/kernel", "in in out", {"step", "pack"}),
    ("GPT", "blocks/up/kernel", "stack out in", {"penalty"}),
    ("GPT", "tokens/embedding", "embedding", {}),
    ("GPT", "positions/embedding", "in out", {}),
    ("ViT", "_Encoder_0/attention/query/kernel", "in in out", {"penalty"}),
    ("ConvNeXt", "_Depthwise_0/Conv_0/kernel", CONV, {"norm", "penalty"}),
    ("Equinox", "convolutions/0/weight", CONV, {"penalty"}),
]


@functools.cache
def numbers_of(name):
    built = ARCHITECTURES[name]()
    return built.table, *draw(built.params)


@pytest.mark.parametrize(("name", "path", "words", "same"), MISTAKES)
def test_the_references_tell_a_wrong_table(name, path, words, same):
    table, params, grads = numbers_of(name)

    def results(table):
        return {
            "step": stepped(params, grads, table)[0][path],
            "penalty": penalty(params, table),
            "norm": equalized(params, table)[path],
            "pack": quantized(params, table, "binary")[path],
        }

    right, wrong = results(table), results({**table, path: words})
    assert set(same) == {
        method
        for method in right
        if np.allclose(wrong[method], right[method], rtol=1e-5, atol=1e-6)
    }
