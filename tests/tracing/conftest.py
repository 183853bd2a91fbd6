"""Whatever is traced for the tables of layers is read from the tree alone as well."""

import jax
import pytest

import weightreg as wr
from weightreg._core._arguments import leaf_path
from weightreg._core._weights import _options

TABLES = ("test_the_layer_is_traced_as_its_formula_says", "test_layer")
# What the table of names and ranks says of these layers is not what they do, and the
# page "What is a weight?" says so.
OTHERWISE = {
    "Einsum: heads from one": "read as stacked by the bias, and its heads are units",
    "nnx Einsum: units first": "an einsum that is not called one",
    "Embed: attend": "embeddings are read as looked up",
    "Embed: tied": "embeddings are read as looked up",
    "Embed that is tied": "embeddings are read as looked up",
    "RNN: learnt carry": "an anonymous matrix is read as (inputs, units)",
    "vmap ensemble, members last": "read as attention by the bias",
}


def readings(params):
    """What the tree alone tells, by path: layers, or nothing for what is no weight."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [leaf_path(path) for path, _ in leaves]
    arrays = [hasattr(leaf, "dtype") for _, leaf in leaves]
    found = zip(paths, arrays, _options(params, None, None), strict=True)
    return {path: own.layers if own else None for path, array, own in found if array}


def axes(layer):
    """Everything of a layer that methods go by."""
    sizes = layer.window, layer.fan_in, layer.fan_out * layer.groups
    return layer.input_axes, layer.output_axes, layer.stack_axes, layer.convolves, sizes


def agrees(params, net):
    """What the tree alone says is what the trace says. It may be silent."""
    try:
        found = readings(params)
    except ValueError as error:
        assert "may be a weight, or something" in str(error)
        return
    layers = {layer.path: layer for layer in net.layers}
    for path, options in found.items():
        if net.roles[path] == "embedding":  # which methods may or may not count
            continue
        assert (options is not None) == (path in layers), (path, net.roles[path])
        if options is not None and len(options) == 1:
            assert axes(options[0]) == axes(layers[path]), (path, options[0])


@pytest.fixture(autouse=True)
def compared(request, monkeypatch):
    """Compares both ways of reading for every layer of the tables."""
    if getattr(request.node, "originalname", "") not in TABLES:
        yield
        return
    traced = wr.trace_network
    name = request.node.callspec.params["name"]
    library = request.node.path.stem.removeprefix("test_")

    def trace_network(fn, params, *inputs, **static):
        net = traced(fn, params, *inputs, **static)
        if {name, f"{library} {name}"} & OTHERWISE.keys():
            with pytest.raises(AssertionError):
                agrees(params, net)
        else:
            agrees(params, net)
        return net

    monkeypatch.setattr(wr, "trace_network", trace_network)
    yield
