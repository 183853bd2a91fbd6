"""What tests of `weightreg.trace_network` share: tables written by hand, and a check.

A table maps the path of every parameter, short as "Dense_0/kernel", to its role or,
for weights, to one word an axis of the leaf as stored:

    "in out"            a dense kernel: contracted axes are "in", units are "out",
    "window in out"     a convolution's kernel,
    "stack in out"      members (of an ensemble, a scan over depth) come first,
    "in -"              "-" is an axis that is none of these,
    "embedding: out in" an embedding that is looked up and multiplied with too,
    "bias", "scale", "embedding", "unused", "other (scan)"   leaves that are no weights.

W("in out", bias="Dense_0/bias", calls=2) adds fields of the layer; it is the tuple
("in out", {"bias": "Dense_0/bias", "calls": 2}). A field that is `...` is left open.
"""

import inspect
import math
import re

import jax
from optax.contrib import MuonDimensionNumbers

ROLES = ("bias", "scale", "embedding", "unused")


def x(*shape, dtype="float32"):
    """An array as far as a trace needs it."""
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape):
    """Tokens as far as a trace needs them."""
    return x(*shape, dtype="int32")


def W(words, **fields):
    """Say more of a weight than its axes."""
    return words, fields


def dense(name="", words="in out", **fields):
    """Expect a kernel of Flax and its bias."""
    kernel, bias = (f"{name}/{leaf}".strip("/") for leaf in ("kernel", "bias"))
    return {kernel: W(words, bias=bias, **fields), bias: "bias"}


def bare(name, words="in out", **fields):
    """Expect a kernel of Flax that has no bias, beside others that do."""
    return {f"{name}/kernel": W(words, bias=None, **fields)}


def short(path):
    """Drop the brackets and dots of a path as jax.tree_util.keystr prints it."""
    return None if path is None else "/".join(re.findall(r"[^\[\]'.]+", path))


def check(net, expected):
    """Compare all roles, and of each layer its axes and what they imply, with a table.

    Calls and groups are 1, strides and dilations of convolutions are 1, and nothing is
    combined unless the table says otherwise (`combined` is compared as a bool, since
    which primitives do it is up to the framework). Biases are compared where they are
    given, and are None in tables without any.
    """
    specs = {p: s if isinstance(s, tuple) else (s, {}) for p, s in expected.items()}
    roles = {path: _role(words) for path, (words, _) in specs.items()}
    _same({short(path): role for path, role in net.roles.items()}, roles)
    default = {} if "bias" in roles.values() else {"bias": None}
    wanted = {
        path: _wanted(words, {**default, **fields})
        for path, (words, fields) in specs.items()
        if "weight" in roles[path]
    }
    layers = {short(layer.path): layer for layer in net.layers}
    assert len(layers) == len(net.layers), "a layer is listed twice"
    assert layers.keys() == wanted.keys()
    for path, fields in wanted.items():
        _same(_found(layers[path], fields), fields, path)
    for layer in net.layers:
        assert (layer.window, layer.fan_in, layer.fan_out) == _sizes(layer), layer
    assert _muon(net.dims) == [
        (layer.input_axes, layer.output_axes)
        for layer in sorted(net.layers, key=lambda layer: layer.index)
    ]


def _same(found, wanted, *of):
    """Say which entries differ; pytest does not for modules that are no tests."""
    differ = {
        key: (found.get(key), wanted.get(key))
        for key in found.keys() | wanted.keys()
        if found.get(key, ...) != wanted.get(key, ...)
    }
    assert not differ, f"{of} found, and wanted: {differ}"


def check_complete(package, base, cases, without):
    """Compare a package's layers with those that are in a table, or need not be.

    A case is called after its layer, with what is special about it after a colon.
    """
    classes = {n: v for n, v in vars(package).items() if inspect.isclass(v)}
    public = {name for name, value in classes.items() if issubclass(value, base)}
    assert public == public & {name.split(":")[0] for name in cases} | without.keys()


def _role(words):
    if words in ROLES or words.startswith("other ("):
        return words
    return "embedding, weight" if words.startswith("embedding:") else "weight"


def _wanted(words, fields):
    words = words.removeprefix("embedding:").split()
    axes = {
        name: tuple(i for i, word in enumerate(words) if word == name)
        for name in ("window", "in", "out", "stack")
    }
    assert set(words) <= {*axes, "-"}, f"{words} are no words of the table"
    ones = (1,) * len(axes["window"])
    defaults = {"calls": 1, "groups": 1, "combined": False}
    if ones:
        defaults |= {"strides": ones, "dilation": ones, "input_dilation": ones}
    return {
        "rank": len(words),
        "input_axes": axes["window"] + axes["in"],
        "output_axes": axes["out"],
        "stack_axes": axes["stack"],
        "convolves": bool(ones),
        **{f: v for f, v in (defaults | fields).items() if v is not ...},
    }


def _found(layer, fields):
    special = {
        "rank": len(layer.shape),
        "bias": short(layer.bias),
        "combined": bool(layer.combined),
    }
    return {f: special[f] if f in special else getattr(layer, f) for f in fields}


def _sizes(layer):
    def size(axes):
        return math.prod(layer.shape[axis] for axis in axes)

    window = size(layer.input_axes[: len(layer.strides)]) if layer.convolves else 1
    fan_in = size(layer.input_axes)
    return window, fan_in, size(layer.output_axes) * window // layer.groups


def _muon(dims):
    leaves = jax.tree.leaves(
        dims, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers)
    )
    return [tuple(leaf) for leaf in leaves if isinstance(leaf, MuonDimensionNumbers)]
