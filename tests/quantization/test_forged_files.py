"""Files under a valid checksum that no `save_packed` has written are refused."""

import copy
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

KERNEL, STACKED, BIAS = "['Dense']['kernel']", "['Layers']['kernel']", "['bias']"


def network(levels="ternary"):
    """A kernel, stacked ones, and leaves of other kinds."""
    rng = np.random.default_rng(0)
    params = {
        "Dense": {"kernel": jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)},
        "Layers": {"kernel": jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)},
    }
    dims = {"Dense": {"kernel": Dims(0, 1)}, "Layers": {"kernel": Dims(1, 2)}}
    volume = {"Dense": 0.5, "Layers": jnp.array([0.5, 0.25]).reshape(2, 1, 1)}
    packed = wr.pack(params, volume, levels, dims=dims)
    return packed | {"bias": jnp.ones(5), "flags": jnp.array([True, False])}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def content(path):
    """What a file says of itself, and its tensors."""
    with safetensors.safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["weightreg.packed"])
    return about, safetensors.numpy.load_file(path)


def sign(path, about, tensors):
    """Writes a file with a checksum by the rule in `save_packed`'s docstring."""
    about["checksum"] = "0" * 64
    data = safetensors.numpy.save(tensors, {"weightreg.packed": json.dumps(about)})
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(b"0" * 64, digest, 1))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("forged") / "network.safetensors"


@pytest.fixture(scope="module")
def original(path):
    wr.save_packed(network(), path)
    return content(path)


@pytest.fixture
def forged(path, original):
    """Returns a function that forges a file by a change to what it says and holds."""

    def write(change):
        about, tensors = copy.deepcopy(original)
        change(about, tensors)
        sign(path, about, tensors)
        return path

    return write


def test_the_rule_of_the_checksum_is_the_documented_one(forged):
    path = forged(lambda about, tensors: None)
    assert_same(wr.load_packed(path), network())


@pytest.mark.parametrize(
    "name, change, words",
    [
        (KERNEL, {"levels": "octal"}, "levels 'octal'"),
        (KERNEL, {"levels": 2}, "levels 2"),
        (KERNEL, {"levels": ["ternary"]}, "levels"),
        (KERNEL, {"levels": "binary"}, "bits"),
        (KERNEL, {"levels": None}, "dtype"),
        (KERNEL, {"dtype": "nonsense"}, "'nonsense'"),
        (KERNEL, {"dtype": "f4"}, "dtype"),
        (KERNEL, {"dtype": "int32", "scale": 0.0}, "dtype int32"),
        (KERNEL, {"dtype": "float8_e4m3fn"}, "dtype float8"),
        (KERNEL, {"dtype": None}, "dtype"),
        (KERNEL, {"shape": [7, 7]}, "bits"),
        (KERNEL, {"shape": [-9, -5]}, r"shape \(-9, -5\)"),
        (KERNEL, {"shape": [9.0, 5.0]}, "shape"),
        (KERNEL, {"shape": [9, 5, True]}, "shape"),
        (KERNEL, {"shape": "95"}, "shape"),
        (KERNEL, {"shape": None}, "None"),
        (KERNEL, {"stack_axes": None}, "None"),
        (KERNEL, {"stack_axes": "x"}, "stack_axes"),
        (KERNEL, {"stack_axes": [7]}, r"stack_axes \(7,\), for a weight of 3 axes"),
        (KERNEL, {"stack_axes": [-1]}, "stack_axes"),
        (STACKED, {"stack_axes": [0.0]}, "stack_axes"),
        (STACKED, {"stack_axes": [False]}, "stack_axes"),
        (STACKED, {"stack_axes": [0, 0]}, "stack_axes"),
        (STACKED, {"stack_axes": [1, 0]}, "stack_axes"),
        (KERNEL, {"input_axes": None}, "None"),
        (KERNEL, {"input_axes": [1]}, "bits"),
        (KERNEL, {"input_axes": [0, 1]}, "bits"),
        (KERNEL, {"input_axes": [1, 0]}, "input_axes"),
        (KERNEL, {"input_axes": [0.0]}, "input_axes"),
        (KERNEL, {"input_axes": [False]}, "input_axes"),
        (KERNEL, {"input_axes": [-2]}, "input_axes"),
        (STACKED, {"input_axes": [2]}, r"input_axes \(2,\), for layers of 2 axes"),
        (STACKED, {"scale": [0.5]}, "reshape"),
        (STACKED, {"scale": [0.5, 0.25, 0.5]}, "reshape"),
        (STACKED, {"scale": [[0.5], [0.25]]}, "scale"),
        (STACKED, {"scale": [0.5, float("nan")]}, "not finite"),
        (KERNEL, {"scale": float("inf")}, "not finite"),
        (KERNEL, {"scale": [0.5]}, "scale"),
        (KERNEL, {"scale": None}, "not finite"),
        (KERNEL, {"scale": "0.5"}, "scale"),
        (KERNEL, {"scale": True}, "scale"),
        (KERNEL, {"scale": 0.1}, "scale is 0.1, where 0.10000000149"),
        (KERNEL, {"keys": ["Layers", "kernel"]}, "keys"),
        (KERNEL, {"keys": "Dense"}, "keys"),
        (KERNEL, {"keys": [1]}, "keys"),
        (KERNEL, {"keys": []}, "keys"),
        (KERNEL, {"keys": 0}, "int"),
        (KERNEL, {"keys": None}, "is in no dict"),
        (KERNEL, {"more": 0}, "more"),
        (BIAS, {"dtype": "int32"}, "int32, but the tensor's F32"),
        (BIAS, {"dtype": "float16"}, "float16, but the tensor's F32"),
        (BIAS, {"shape": [5.0]}, "shape"),
        (BIAS, {"shape": [1, 5]}, "shape"),
        (BIAS, {"scale": 1.0}, "scale"),
    ],
)
def test_entries_that_are_never_written(forged, name, change, words):
    path = forged(lambda about, tensors: about["leaves"][name].update(change))
    message = (
        rf"network\.safetensors is no packed network: .*{re.escape(name)}.*{words}"
    )
    with pytest.raises(ValueError, match=f"(?s){message}"):
        wr.load_packed(path)


def rename(old, new, **entry):
    """Moves a leaf, whose entry may say so or not."""

    def change(about, tensors):
        tensors[new] = tensors.pop(old)
        about["leaves"][new] = about["leaves"].pop(old) | entry

    return change


def spare(name, byte):
    def change(about, tensors):
        tensors[name].flat[-1] |= byte

    return change


def says(**changes):
    return lambda about, tensors: about.update(changes)


def unflag(about, tensors):
    data = tensors["['flags']"].view(np.uint8)
    data[:] = 2


def lose_sign_rule(about, tensors):
    """Sets the signs of weights that are 0."""
    tensors[KERNEL][1] |= ~tensors[KERNEL][0]
    tensors[KERNEL][1, :, -1] &= 0x80


@pytest.mark.parametrize(
    "change, words",
    [
        (rename(BIAS, "['Dense']", keys=["Dense"]), r"leaf at \['Dense'\] and another"),
        (
            rename(BIAS, "['Dense']['kernel']['b']", keys=["Dense", "kernel", "b"]),
            r"leaf at \['Dense'\]\['kernel'\] and another one below",
        ),
        (rename(BIAS, "['b']"), r"\['b'\] .*keys are \['bias'\]"),
        (rename(BIAS, "['bias'].value", keys=None), "is in no dict"),
        (rename(BIAS, KERNEL + ".value", keys=None), r"kernel'\]\.value .*two of them"),
        (spare(KERNEL, 1), r"\['Dense'\]\['kernel'\] .*belong to no weight"),
        (spare(STACKED, 2), r"\['Layers'\]\['kernel'\] .*belong to no weight"),
        (lose_sign_rule, "belong to no weight"),
        (unflag, r"\['flags'\] .*neither 0 nor 1"),
        (says(leaves={}), "not what it has"),
        (says(leaves=[]), "not what it has"),
        (says(leaves={"['other']": {"levels": None}}), "not what it has"),
        (says(dicts=1), "dicts is 1"),
        (says(dicts=None), "dicts is None"),
        (says(more=0), "it says version, checksum, dicts, leaves, more"),
        (says(version=1), "input_axes, of which version 1 knows nothing"),
        (says(version=3), "version 3.*reads 1 and 2"),
        (says(version="1"), "version '1'"),
        (says(version=1.0), "version 1.0"),
        (says(version=True), "version True"),
        (lambda about, tensors: about["leaves"].pop(BIAS), "not what it has"),
        (lambda about, tensors: tensors.pop(BIAS), "not what it has"),
        (lambda about, tensors: about["leaves"].update({BIAS: None}), r"\['bias'\]"),
    ],
)
def test_files_that_are_never_written(forged, change, words):
    path = forged(change)
    with pytest.raises(ValueError, match=rf"(?s)network\.safetensors is .*{words}"):
        wr.load_packed(path)


def test_what_only_looks_like_a_file(path):
    for data in (
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        safetensors.numpy.save({"w": np.ones(3)}),
        b"something else",
        b"",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="no packed network"):
            wr.load_packed(path)
    about = {"version": 2, "dicts": True, "leaves": {}}
    sign(path, about, {})
    with pytest.raises(ValueError, match="not what it has"):
        wr.load_packed(path)
    with pytest.raises(FileNotFoundError):
        wr.load_packed(path.with_name("nowhere"))


def test_empty_weights_of_impossible_shapes(path):
    wr.save_packed(wr.pack({"w": jnp.ones((0, 3))}, 0.5, "binary"), path)
    about, tensors = content(path)
    for shape in ([0, 2**70], [0, 2**40, 2**40]):
        about["leaves"]["['w']"]["shape"] = shape
        sign(path, about, tensors)
        with pytest.raises(ValueError, match=r"\['w'\] .*shape"):
            wr.load_packed(path)


def test_files_that_name_boxes_load(path, forged):
    """As they were written before boxes were left out of names."""
    boxed = lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))  # noqa: E731
    plain = jax.tree.map(jnp.zeros_like, wr.unpack(network()))

    def change(about, tensors):
        about["dicts"] = False
        for name in list(tensors):
            rename(name, f"{name}.value", keys=None)(about, tensors)

    forged(change)
    for like in (plain, boxed(plain), network()):
        got = wr.load_packed(path, like=like)
        assert_same(jax.tree.leaves(got), jax.tree.leaves(network()))
    assert_same(wr.load_packed(path, like=plain), network())
    with pytest.raises(ValueError, match="something else than dicts"):
        wr.load_packed(path)
    wr.save_packed({"": jnp.ones(3)}, path)
    about, tensors = content(path)
    rename("['']", ".value", keys=None)(about, tensors)  # a box that is all there is
    sign(path, about | {"dicts": False}, tensors)
    assert wr.load_packed(path, like=jnp.ones(3)).shape == (3,)


NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 9, -1, -3, 1.0, 9.0, True, None, "1", 2**70])
SCALES = st.sampled_from([0.5, 0.25, 0.1, -0.5, 0, 1, "1", True, None, 1e300, 1e-300])
WORDS = st.sampled_from(["Dense", "Layers", "kernel", "bias", "", 0, None])
NAMES = st.sampled_from([KERNEL, STACKED, BIAS, "['flags']"])
VALUES = {
    "keys": st.none() | WORDS | st.lists(WORDS, max_size=3),
    "shape": NUMBERS | st.lists(NUMBERS, max_size=4),
    "stack_axes": NUMBERS | st.lists(NUMBERS, max_size=3),
    "input_axes": NUMBERS | st.lists(NUMBERS, max_size=3),
    "scale": SCALES | st.lists(SCALES | st.lists(SCALES, max_size=2), max_size=3),
    "levels": st.sampled_from(["binary", "ternary", None, 2, ["binary"]]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float16", "uint8", "bool", 4]),
    "more": NUMBERS,
}
EDITS = st.one_of(
    *(st.tuples(NAMES, st.just(field), value) for field, value in VALUES.items()),
    st.tuples(NAMES, st.just("take"), st.sampled_from(list(VALUES))),
    st.tuples(NAMES, st.just("entry of"), NAMES),
    st.tuples(NAMES, st.just("tensor of"), NAMES),
    st.tuples(NAMES, st.just("swap"), NAMES),
    st.tuples(NAMES, st.just("byte"), st.integers(0, 255)),
    st.tuples(st.just("dicts"), st.just("dicts"), NUMBERS | st.booleans()),
)


def edit(about, tensors, name, what, value):
    """Makes one change of those that `EDITS` lists."""
    leaves = about["leaves"]
    if what == "dicts":
        about["dicts"] = value
    elif what == "take":
        leaves[name].pop(value, None)
    elif what == "entry of":
        leaves[name] = leaves[value]
    elif what == "tensor of":
        tensors[name] = tensors[value]
    elif what == "swap":
        leaves[name], leaves[value] = leaves[value], leaves[name]
    elif what == "byte":
        tensors[name].view(np.uint8).flat[-1] = value
    else:
        leaves[name] = leaves[name] | {what: value}


# Whoever changes these, and all that depends on them, has made another network.
MEANINGS = {"shape", "stack_axes", "input_axes", "scale", "dtype", "byte", "tensor of"}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(edits=st.lists(EDITS, min_size=1, max_size=2))
def test_forged_files_are_refused_or_say_what_they_are(path, original, edits):
    """What loads is written just so; it is the same network but for other numbers."""
    about, tensors = copy.deepcopy(original)
    for name, what, value in edits:
        edit(about, tensors, name, what, value)
    sign(path, about, tensors)
    try:
        got = wr.load_packed(path, like=None if about["dicts"] else network())
    except ValueError as error:
        assert "network.safetensors" in str(error)
        return
    wr.save_packed(got, path)
    again, held = content(path)
    for name, entry in about["leaves"].items():
        if not about["dicts"] and entry["keys"] is None:  # as trees of others have
            again["leaves"][name]["keys"] = None
    written = [json.dumps(x["leaves"], sort_keys=True) for x in (about, again)]
    assert written[0] == written[1]
    assert all(np.array_equal(held[name], tensors[name]) for name in tensors)
    whole = jax.eval_shape(wr.unpack, got)
    assert len(jax.tree.leaves(whole)) == len(tensors)
    if not MEANINGS & {what for _, what, _ in edits}:
        assert_same(got, network())
