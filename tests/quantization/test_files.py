"""Packed networks as files: exact, readable by others, and never wrong unnoticed."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import stat
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
from weightreg._core._packed_weight import PackedWeight


def weights(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def network(levels="binary", dtype=jnp.float32):
    params = {
        "Dense_0": {"kernel": weights((9, 5), dtype), "bias": weights((5,), dtype)},
        "Layers": {
            "kernel": weights((3, 4, 5), dtype),
            "scale": weights((3, 4), dtype),
        },
    }
    none = {"bias": None, "scale": None}
    dims = {"Dense_0": Dims(0, 1), "Layers": {"kernel": Dims(1, 2)}}
    dims = {
        k: {"kernel": d if isinstance(d, Dims) else d["kernel"]}
        for k, d in dims.items()
    }
    dims["Dense_0"]["bias"], dims["Layers"]["scale"] = none.values()
    volume = {"Dense_0": 0.1, "Layers": jnp.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)}
    return wr.pack(params, volume, levels, dims=dims)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_leaves(a, b):
    assert_same(*(jax.tree.leaves(tree, is_leaf=is_packed) for tree in (a, b)))


def is_packed(node):
    return isinstance(node, PackedWeight)


def saved(tmp_path, packed, name="network.safetensors"):
    path = tmp_path / name
    wr.save_packed(packed, path)
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_round_trips(tmp_path, levels, dtype):
    with jax.enable_x64(dtype == "float64"):
        packed = network(levels, jnp.dtype(dtype))
        path = saved(tmp_path, packed)
        assert_same(wr.load_packed(path), packed)
        assert_same(wr.load_packed(str(path), like=packed), packed)
        like = jax.eval_shape(lambda: wr.unpack(packed))
        assert_same(wr.load_packed(path, like=like), packed)
        assert_same(wr.unpack(wr.load_packed(path)), wr.unpack(packed))
        data = path.read_bytes()
        wr.save_packed(packed, path)
        assert path.read_bytes() == data  # the same network is the same file


def test_other_leaves_are_kept_as_they_are(tmp_path):
    tree = {
        "kernel": weights((1, 1)),
        "empty": weights((0, 3)),
        "number": jnp.float32(-0.0),
        "count": jnp.arange(3),
        "flags": jnp.array([True, False]),
        "keys": jax.random.key_data(jax.random.key(3)),
        "small": jnp.array([0.5, jnp.nan, jnp.inf], jnp.float8_e4m3fn),
        "numpy": np.ones(2, np.int8),
        "a b/c'\"é\\": {"": jnp.array([1e-45, jnp.nan, -jnp.inf])},
    }
    mask = {**dict.fromkeys(tree, False), "kernel": True, "empty": True}
    packed = wr.pack(tree, 1e-30, "ternary", mask=mask)
    assert_same(
        wr.load_packed(saved(tmp_path, packed)), jax.tree.map(jnp.asarray, packed)
    )
    plain = {"bias": jnp.ones(3)}  # a network of which nothing is packed
    assert_same(wr.load_packed(saved(tmp_path, plain)), plain)


def test_the_order_of_bytes_in_memory_does_not_matter(tmp_path):
    a = np.arange(12, dtype=np.float32)
    tree = {
        "transposed": np.asfortranarray(a.reshape(3, 4)),
        "backwards": a[::-2],
        "broadcast": np.broadcast_to(np.float32(3), (2, 2)),
        "big": a.astype(">f4"),
    }
    got = wr.load_packed(saved(tmp_path, tree))
    native = jax.tree.map(lambda x: x.astype(np.float32), tree)
    chex.assert_trees_all_equal(got, native)
    kernel = {"w": jnp.asarray(a.reshape(3, 4))}
    packed = wr.pack(kernel, 0.5, "binary")
    turned = dataclasses.replace(packed["w"], bits=np.asarray(packed["w"].bits)[::-1])
    assert_same(wr.load_packed(saved(tmp_path, {"w": turned})), packed)


@jax.tree_util.register_pytree_with_keys_class
class Alike:
    """A node both of whose leaves have one path."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("w"), c) for c in self.children], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_paths_that_print_alike_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"packed has two leaves .*\.w"):
        wr.save_packed(Alike(weights((2, 2)), weights((2, 2))), tmp_path / "file")
    path = saved(tmp_path, Alike(weights((2, 2))))
    with pytest.raises(ValueError, match=r"like has two leaves .*\.w"):
        wr.load_packed(path, like=Alike(weights((2, 2)), weights((2, 2))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Wrapper:
    """A node with one leaf that is no box of Flax's, so that it has to stay."""

    value: jax.Array


def test_trees_that_are_no_dicts_need_one_like_them(tmp_path):
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    for tree in (state, FrozenDict({"a": {"w": weights((2, 3))}}), [weights((2, 3))],
                 weights((2, 3)), {"a": weights((2, 3)), "hole": None, "empty": {}},
                 {1: weights((2, 3))}, {"a": Wrapper(weights((2, 3)))}):  # fmt: skip
        packed = wr.pack(tree, 0.5, "binary")
        path = saved(tmp_path, packed)
        assert_same(wr.load_packed(path, like=packed), packed)
        assert_same_leaves(wr.load_packed(path, like=tree), packed)
        if not isinstance(tree, nnx.State):
            assert_same(wr.load_packed(path, like=tree), packed)
        with pytest.raises(ValueError, match="something else than dicts: pass like="):
            wr.load_packed(path)


class Boxed(nn.Module):
    """A network with kernels in boxes, one below another layer, and a bias in none."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
        return nn.Sequential([nn.Dense(5, kernel_init=init), nn.Dense(2)])(x)


def boxed_and_plain(kind):
    """Parameters in boxes, and the same ones without."""
    if kind == "linen":
        params = Boxed().init(jax.random.key(0), jnp.ones((1, 9)))["params"]
        return params, nn.meta.unbox(params)
    state = nnx.state(nnx.Linear(9, 5, rngs=nnx.Rngs(0)), nnx.Param)
    variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return state, jax.tree.map(lambda v: v[...], state, is_leaf=variable)


def put(node, weight):
    """A packed weight in the box that a node may be."""
    return jax.tree.structure(node).unflatten([weight])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_boxes_make_no_difference(tmp_path, kind):
    boxed, plain = boxed_and_plain(kind)
    packed = wr.pack(plain, 0.5, "ternary")
    is_box = lambda node: hasattr(node, "add_axis")  # noqa: E731
    # Packed weights in boxes, as pack made them once, and in their place.
    within = jax.tree.map(put, boxed, packed, is_leaf=is_box)
    beside = jax.tree.map(
        lambda node, leaf: leaf if is_packed(leaf) else put(node, leaf),
        boxed, packed, is_leaf=is_box,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: boxed)
    for i, tree in enumerate((packed, within, beside, wr.pack(boxed, 0.5, "ternary"))):
        path = saved(tmp_path, tree, f"{kind}{i}")
        for like, expected in (
            (plain, packed),
            (packed, packed),
            (within, within),
            (beside, beside),
            (boxed, beside),
            (shapes, beside),
        ):
            assert_same(wr.load_packed(path, like=like), expected)
        if kind == "linen":
            assert_same(wr.load_packed(path), packed)
        else:
            with pytest.raises(ValueError, match="something else than dicts"):
                wr.load_packed(path)
    with pytest.raises(ValueError, match=r"lacks \['kernel'\]"):
        wr.load_packed(path, like={"kernel": boxed})


def test_what_a_file_says_to_others(tmp_path):
    """Read with safetensors alone; weights are 32 and 16 times smaller than float32."""
    kernels = {"a": weights((128, 64)), "b": weights((64, 16))}
    size = sum(k.nbytes for k in kernels.values())
    for levels, fewer in (("binary", 32), ("ternary", 16)):
        packed = wr.pack({**kernels, "bias": jnp.ones(7)}, 0.1, levels)
        path = saved(tmp_path, packed)
        with safetensors.safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == ["['a']", "['b']", "['bias']"]
            bits = [file.get_tensor(f"['{name}']") for name in kernels]
            about = json.loads(file.metadata()["weightreg.packed"])
        assert fewer * sum(b.nbytes for b in bits) == size
        assert path.stat().st_size < size / fewer + 2000
        np.testing.assert_array_equal(bits[0], packed["a"].bits)
        assert about["version"] == 2
        assert about["leaves"]["['b']"] == {
            "keys": ["b"],
            "dtype": "float32",
            "shape": [64, 16],
            "levels": levels,
            "scale": float(np.float32(0.1)),
            "stack_axes": [],
            "input_axes": [0],
        }
        assert about["leaves"]["['bias']"]["levels"] is None


def test_one_changed_byte_is_enough(tmp_path):
    path = saved(tmp_path, network("ternary"))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    flips = rng.integers(1, 256, len(data))
    for i, flip in enumerate(flips.tolist()):
        path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"network\.safetensors"):
            wr.load_packed(path)
    # The case of the checksum's own digits is a change, too.
    place = data.index(b"checksum") + 16
    letter = next(i for i in range(place, place + 64) if data[i : i + 1].isalpha())
    upper = data[:letter] + data[letter : letter + 1].upper() + data[letter + 1 :]
    path.write_bytes(upper)
    with pytest.raises(ValueError, match="damaged"):
        wr.load_packed(path)


def test_missing_and_additional_bytes(tmp_path):
    path = saved(tmp_path, network())
    data = path.read_bytes()
    for n in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match=r"network\.safetensors"):
            wr.load_packed(path)
    for other in (data + b"\0", data[1:], b"\0" + data, data + data, b""):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"network\.safetensors"):
            wr.load_packed(path)


def test_another_network_than_expected(tmp_path):
    params = wr.unpack(network())
    path = saved(tmp_path, network())
    fewer = {"Dense_0": params["Dense_0"]}
    more = {**params, "Dense_1": params["Dense_0"]}
    shape = {**params, "Dense_0": {**params["Dense_0"], "kernel": jnp.ones((5, 9))}}
    dtype = {**params, "Dense_0": {**params["Dense_0"], "bias": jnp.ones(5, jnp.int32)}}
    for like, words in (
        (fewer, r"has, and like has not, \['Layers'\]\['kernel'\]"),
        (more, r"lacks \['Dense_1'\]\['bias'\]"),
        (shape, r"\['Dense_0'\]\['kernel'\] it has float32\[9, 5\].*float32\[5, 9\]"),
        (dtype, r"\['Dense_0'\]\['bias'\] it has float32\[5\].*int32\[5\]"),
        ([jnp.ones(3)], "lacks"),
        ({}, "has, and like has not"),
        (wr.pack(shape, 0.5, "binary"), r"float32\[5, 9\]"),
        (network("ternary"), r"binary float32\[9, 5\].*ternary float32\[9, 5\]"),
        (wr.pack(params, 0.5, "binary"), "stacked along"),
        (jax.tree.map(lambda x: 1.0, params), r"no array \(float\)"),
    ):
        with pytest.raises(ValueError, match=words):
            wr.load_packed(path, like=like)


def test_what_cannot_be_saved_leaves_the_file_alone(tmp_path, monkeypatch):
    path = saved(tmp_path, network())
    data = path.read_bytes()
    nan = wr.pack({"w": jnp.array([[jnp.nan]])}, 0.5, "binary")
    to_infinity = jax.jit(lambda v: wr.pack({"w": jnp.ones((2, 2))}, v, "binary"))
    for packed, error, words in (
        (nan, ValueError, r"scale that is not finite at \['w'\]"),
        (to_infinity(np.inf), ValueError, r"scale that is not finite at \['w'\]"),
        (jax.eval_shape(network), TypeError, r"ShapeDtypeStruct at \['Dense_0'\]"),
        ({}, ValueError, "no leaves"),
        ({"a": "text"}, TypeError, r"str at \['a'\]"),
        ({"a": 1.5}, TypeError, r"float at \['a'\]"),
        ({"key": jax.random.key(0)}, TypeError, r"at \['key'\]"),
        ({"a": jnp.ones(3, jnp.int4)}, TypeError, "safetensors cannot hold"),
    ):
        with pytest.raises(error, match=words):
            wr.save_packed(packed, path)
    with pytest.raises(TypeError, match="path must be the path of a file, not dict"):
        wr.save_packed(path, network())
    with pytest.raises(TypeError, match="path must"):
        wr.load_packed(3)

    path.chmod(0o600)
    write, modes = pathlib.Path.open, []

    @contextlib.contextmanager
    def interrupted(self, mode):
        with write(self, mode) as file:
            yield file
            modes.append(stat.S_IMODE(self.stat().st_mode))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "open", interrupted)
        wr.save_packed(network("ternary"), path)
    assert modes == [0o600]  # nor could others read what had been written
    assert path.read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    chex.assert_trees_all_equal(wr.load_packed(path), network())


def test_packed_weights_that_pack_does_not_make_are_not_saved(tmp_path):
    """Or they were lost: no file that holds them is loaded."""
    good = wr.pack({"w": weights((9, 5))}, 0.5, "ternary")["w"]
    for change, words in (
        ({"levels": "octal"}, "levels 'octal'"),
        ({"shape": (-9, -5)}, r"shape \(-9, -5\)"),
        ({"stack_axes": (1, 0)}, r"stack_axes \(1, 0\), for a weight of 4 axes"),
        ({"input_axes": (2,)}, r"input_axes \(2,\), for layers of 2 axes"),
        ({"bits": good.bits[:1]}, r"bits uint8\[1, 5, 2\] instead of uint8\[2, 5, 2\]"),
        ({"bits": good.bits.astype(jnp.int8)}, r"bits int8\[2, 5, 2\] .*"),
        ({"bits": good.bits | 1}, "bits that are set and belong to no weight"),
        ({"scale": good.scale.astype(jnp.int32)}, "of dtype int32"),
    ):
        with pytest.raises(ValueError, match=rf"packed has .*{words} at \['w'\]"):
            wr.save_packed({"w": dataclasses.replace(good, **change)}, tmp_path / "w")
    assert not [*tmp_path.iterdir()]
    wr.save_packed({"w": good}, tmp_path / "w")


def test_loops_and_stacks_of_packed_networks(tmp_path):
    """Whose bits have fewer axes, or more, than those that `pack` has stacked."""
    packed = network("ternary")["Layers"]["kernel"]
    for change in (
        lambda x: x[1],
        lambda x: x[:0],
        lambda x: jnp.stack([x, x]),
        lambda x: jnp.stack([x, x])[:0],
    ):
        tree = {"w": jax.tree.map(change, packed)}
        assert_same(wr.load_packed(saved(tmp_path, tree)), tree)


def test_threads_that_save_to_one_path(tmp_path):
    path = tmp_path / "network"
    trees = [{"w": jnp.full(2**18, value, jnp.uint8)} for value in range(3)]
    wr.save_packed(trees[0], path)

    def save(tree):
        for _ in range(40):
            wr.save_packed(tree, path)
            assert wr.load_packed(path)["w"][-1] in range(3)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(save, trees))
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_keeps_its_permissions(tmp_path):
    tree = {"w": jnp.ones(3)}
    mask = os.umask(0o027)
    try:
        path = saved(tmp_path, tree, "n" * 250)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for mode in (0o600, 0o444, 0o777):
        path.chmod(mode)
        wr.save_packed(tree, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    link = tmp_path / "link"
    link.symlink_to(path)
    wr.save_packed({"w": jnp.zeros(3)}, link)
    assert link.is_symlink() and not wr.load_packed(path)["w"].any()


def test_what_is_no_file_is_neither_replaced_nor_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths of sockets must be short
    os.mkfifo("fifo")
    os.symlink("fifo", "link")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("socket")
    for name, kind in (
        ("fifo", "a FIFO"),
        ("link", "a FIFO"),
        ("folder", "a folder"),
        ("socket", "a device or a socket"),
        ("/dev/null", "a device or a socket"),
    ):
        before = os.stat(name)
        for call in (lambda n=name: wr.save_packed(network(), n),
                     lambda n=name: wr.load_packed(n)):  # fmt: skip
            with pytest.raises(ValueError, match=rf"path .* but .*\w is {kind}"):
                call()
        assert os.path.samestat(os.stat(name), before)
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory(tmp_path):
    """Besides the network, saving and loading hold its bytes once, and a few more."""

    def peak_of(call):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # peaks begin anew
        before, result = status()["VmRSS"], call()
        return (status()["VmHWM"] - before) / size, result

    def status():
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        found = (line.split() for line in lines if line.startswith("Vm"))
        return {name.rstrip(":"): 1024 * int(kb) for name, kb, _ in found}

    size, path = 2**26, tmp_path / "network"  # so large that nothing is kept for later
    tree = {"w": np.ones(size, np.uint8)}
    wr.save_packed({"w": tree["w"][:9]}, path)
    wr.load_packed(path)  # all that is imported and compiled on the way
    saving, _ = peak_of(lambda: wr.save_packed(tree, path))
    del tree
    loading, tree = peak_of(lambda: wr.load_packed(path))
    assert tree["w"].size == size
    assert 0.9 < saving < 2.3 and 1.5 < loading < 2.3


def test_numbers_that_jax_would_narrow(tmp_path):
    with jax.enable_x64(True):
        path = saved(tmp_path, network(dtype=jnp.float64))
    with pytest.raises(ValueError, match=r"float64.*jax_enable_x64"):
        wr.load_packed(path)


def test_without_safetensors(tmp_path, monkeypatch):
    path = saved(tmp_path, network())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: wr.save_packed(network(), path), lambda: wr.load_packed(path)):
        with pytest.raises(ImportError, match=r"pip install 'weightreg\[files\]'"):
            call()
