"""States, checkpoints and packed networks of earlier versions still load.

The files in ``tests/data`` were written at commit 5a8b5f9 by `OPTIMIZERS` and `packed`,
after three of the steps that `step_of` makes. ``states.npz`` holds the leaves that were
saved, and the parameters after three steps more.
"""

import dataclasses
import functools
import pathlib
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
import weightreg.linen
import weightreg.nnx

DATA = pathlib.Path(__file__).parent / "data"
HALF = wr.he_volume(0.5)


def schedule(count):
    return 1.0 - 0.05 * count


OPTIMIZERS = {
    "volumize": optax.chain(optax.adam(1e-2), wr.volumize(HALF, schedule)),
    "volumized": wr.volumized(optax.adam(1e-2), HALF, schedule),
    "volumized_laprop": wr.volumized_laprop(1e-2, volume=0.3, alpha=0.9),
    "quantize_every": optax.chain(
        optax.sgd(1e-2, momentum=0.9), wr.quantize_every(5, "ternary", HALF)
    ),
    "add_weissi": optax.chain(wr.add_weissi(schedule, 1e-3), optax.sgd(1e-2)),
    "add_weissi_spectral": optax.chain(
        wr.add_weissi(1e-3, 1e-3, norm="spectral"), optax.sgd(1e-2)
    ),
    "add_shifted_l2": optax.chain(wr.add_shifted_l2(schedule, 1e-3), optax.sgd(1e-2)),
    "parseval": optax.chain(optax.sgd(1e-2), wr.parseval(schedule)),
}


def fresh():
    """Other parameters than were saved, of the same shapes, with their states."""
    shapes = {"Dense_0": ((6, 5), (5,)), "Dense_1": ((5, 3), (3,))}
    params = {
        k: {"kernel": jnp.full(kernel, 0.5), "bias": jnp.full(bias, 0.5)}
        for k, (kernel, bias) in shapes.items()
    }
    return {
        name: {"params": params, "state": tx.init(params)}
        for name, tx in OPTIMIZERS.items()
    }


def from_bytes():
    return flax.serialization.from_bytes(
        fresh(), (DATA / "states.msgpack").read_bytes()
    )


def from_checkpoint():
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(DATA / "states.orbax", abstract)


@functools.cache
def step_of(name):
    @quick.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
        updates, state = OPTIMIZERS[name].update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def known():
    return dict(np.load(DATA / "states.npz"))


def leaves(name, kind):
    count = sum(key.startswith(f"{name}/{kind}/") for key in known())
    return [known()[f"{name}/{kind}/{i}"] for i in range(count)]


@quick.everything
@pytest.mark.parametrize("load", [from_bytes, from_checkpoint])
def test_states_load_and_go_on(load):
    for name, saved in load().items():
        chex.assert_trees_all_equal(jax.tree.leaves(saved), leaves(name, "saved"))
        params, state = jax.tree.map(jnp.asarray, (saved["params"], saved["state"]))
        for _ in range(3):
            params, state = step_of(name)(params, state)
        chex.assert_trees_all_equal_structs(state, saved["state"])
        later = leaves(name, "later")
        chex.assert_trees_all_close(jax.tree.leaves(params), later, rtol=1e-5)


@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_packed_networks_load(levels):
    packed = wr.load_packed(DATA / f"{levels}.safetensors")
    values = np.load(DATA / "packed.npz")
    found = jax.tree_util.tree_leaves_with_path(wr.unpack(packed))
    assert len(found) == 3
    for path, leaf in found:
        expected = values[f"{levels}{jax.tree_util.keystr(path)}"]
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected)
    like = {
        "Dense_0": {"kernel": jnp.ones((9, 5)), "bias": jnp.ones(5)},
        "Layers": {"kernel": jnp.ones((3, 4, 5), jnp.bfloat16)},
    }
    again = wr.load_packed(DATA / f"{levels}.safetensors", like=like)
    chex.assert_trees_all_equal(again, packed)
    dims = {
        "Dense_0": {"kernel": Dims(0, 1), "bias": None},
        "Layers": {"kernel": Dims(1, 2)},
    }
    volume = {"Dense_0": 0.1, "Layers": jnp.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)}
    repacked = wr.pack(wr.unpack(packed), volume, levels, dims=dims)
    chex.assert_trees_all_equal(repacked, packed)


# Weights in `version-1` files, which b42137d has written: the first layout of bits.
FIRST = {
    "conv": ((3, 3, 2, 5), "float32"),
    "query": ((6, 2, 4), "bfloat16"),
    "out": ((2, 4, 6), "float16"),
    "equinox": ((7, 9), "float32"),
    "layers": ((3, 11, 4), "float32"),
    "middle": ((5, 3, 4), "float32"),
    "two": ((2, 5, 3, 9), "bfloat16"),
    "empty": ((0, 3), "float32"),
}


@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_files_of_the_first_layout_load_bit_for_bit(levels, tmp_path):
    values = np.load(DATA / "version-1.npz")
    like = {name: jax.ShapeDtypeStruct(*kind) for name, kind in FIRST.items()}
    like["bias"] = jax.ShapeDtypeStruct((3,), "float32")
    packed = wr.load_packed(DATA / f"version-1-{levels}.safetensors", like=like)
    for name, leaf in wr.unpack(packed).items():
        expected = values[f"{levels}/{name}"]
        got = np.asarray(leaf, np.float32)
        assert got.tobytes() == expected.tobytes() and leaf.dtype == like[name].dtype
    assert packed["layers"].bits.shape[-2:] == (4, 2)  # in rows, as those of today
    wr.save_packed(packed, tmp_path / "today")
    chex.assert_trees_all_equal(wr.load_packed(tmp_path / "today"), packed)


def in_one_row(packed):
    """The bits of a weight as they lay in the first layout, with one axis less."""
    shape = (*packed.scale.shape, -1)
    planes = jnp.moveaxis(wr.unpack(packed), packed.stack_axes, range(len(shape) - 1))
    bits = jnp.packbits((planes < 0).reshape(shape), -1)[..., None, :]
    return dataclasses.replace(packed, bits=bits)


def test_states_of_the_first_layout_are_refused():
    packed = wr.load_packed(DATA / "version-1-binary.safetensors")
    data = (DATA / "version-1-binary.msgpack").read_bytes()
    with pytest.raises(ValueError, match=r"input_axes.*load_packed"):
        flax.serialization.from_bytes(packed, data)
    kernel = wr.pack({"w": jnp.ones((8, 8))}, 0.5, "binary")["w"]
    old = in_one_row(kernel)
    # Checkpoints are refused by their shapes, which differ where sizes do not.
    assert old.bits.size == kernel.bits.size
    with pytest.raises(ValueError, match=r"bits of shape \(1, 8\).*\(1, 8, 1\)"):
        wr.unpack({"w": old})


def small(levels="ternary"):
    params = {
        "one": {"kernel": jnp.asarray(RNG.normal(size=(5, 7)), jnp.bfloat16)},
        "stack": jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32),
        "bias": jnp.ones(5),
    }
    dims = {"one": Dims(0, 1), "stack": Dims(1, 2), "bias": None}
    return wr.pack(params, 0.5, levels, dims=dims)


RNG = np.random.default_rng(0)
FORMS = {
    "bytes": lambda x, like: flax.serialization.from_bytes(
        like, flax.serialization.to_bytes(x)
    ),
    "state dict": lambda x, like: flax.serialization.from_state_dict(
        like, flax.serialization.to_state_dict(x)
    ),
    "messages": lambda x, like: flax.serialization.from_state_dict(
        like,
        flax.serialization.msgpack_restore(
            flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(x))
        ),
    ),
    "pickle": lambda x, like: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_trees_come_back(form):
    packed = small()
    zeros = jax.tree.map(jnp.zeros_like, packed)
    trained = TrainState(0, apply_fn=None, params=packed, tx=None, opt_state=())
    for tree, like in ((packed, zeros), (trained, trained.replace(params=zeros))):
        got = FORMS[form](tree, like)
        chex.assert_trees_all_equal(got, tree)
        assert jax.tree.structure(got) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(
        wr.unpack(FORMS[form](packed, zeros)), wr.unpack(packed)
    )


CHANGED = {
    "shape": ({"shape": (7, 5)}, r"shape.*\(5, 7\) in the state, but \(7, 5\)"),
    "levels": ({"levels": "binary"}, "levels.*'ternary' in the state, but 'binary'"),
    "stack_axes": ({"stack_axes": (1,)}, r"stack_axes.*\(\) in the state, but \(1,\)"),
    "input_axes": ({"input_axes": (1,)}, r"input_axes.*\(0,\) in the state, but \(1,"),
    "bits": ({"bits": jnp.zeros((2, 5), jnp.uint8)}, r"bits.*\(2, 7, 1\).*\(2, 5\)"),
    "scale": ({"scale": jnp.float32(1)}, "scale.*bfloat16 in the state.*float32"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_packed_weights_of_another_kind_are_refused(name):
    change, words = CHANGED[name]
    packed = small()
    data = flax.serialization.to_bytes(packed)
    other = dataclasses.replace(packed["one"]["kernel"], **change)
    target = packed | {"one": {"kernel": other}}
    with pytest.raises(ValueError, match=f"{words}.*target"):
        flax.serialization.from_bytes(target, data)


def test_packed_weights_and_others_do_not_take_each_others_place():
    packed = small()
    for state in ({"kernel": jnp.ones((5, 7))}, {"kernel": {"bits": 1}}):
        with pytest.raises(ValueError, match=r"must have.*'stack_axes'.*not packed"):
            flax.serialization.from_state_dict(packed["one"], state)


RUNS = {
    "volumized": wr.volumized(optax.adam(0.1), HALF, 0.9),
    "volumized_laprop": wr.volumized_laprop(0.1, volume=HALF, alpha=0.9),
    "quantize_every": optax.chain(
        optax.sgd(0.1, momentum=0.9), wr.quantize_every(2, "ternary", HALF)
    ),
    "add_weissi": optax.chain(wr.add_weissi(0.1, 0.1), optax.adam(0.1)),
}
SAVED_ON = (2, 2), PartitionSpec("data", "model")
RESTORED_ON = [
    ((4, 2), PartitionSpec("model", "data")),
    ((8, 1), PartitionSpec(None, "data")),
    ((1, 1), PartitionSpec()),
]


@jax.jit
def step(runs):
    """A step of every run from its parameters and its state."""
    stepped = {}
    for name, (params, state) in runs.items():
        grads = jax.tree.map(jnp.sin, params)
        updates, state = RUNS[name].update(grads, state, params)
        stepped[name] = optax.apply_updates(params, updates), state
    return stepped


def steps(runs):
    for _ in range(3):
        runs = step(runs)
    return runs


def test_a_checkpoint_goes_on_where_other_devices_split_it(cpu_mesh, tmp_path):
    """Bit for bit where each weight's own number is all that a step needs."""

    def placed(shape, spec):
        mesh = cpu_mesh(shape, ("data", "model"))
        where = lambda x: NamedSharding(mesh, spec if x.ndim else PartitionSpec())  # noqa: E731
        return functools.partial(jax.tree.map, where)

    params = {"Dense_0": np.random.default_rng(0).normal(size=(16, 8))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    fresh = {name: (params, tx.init(params)) for name, tx in RUNS.items()}
    saved = steps(jax.device_put(fresh, placed(*SAVED_ON)(fresh)))
    expected = jax.device_get(steps(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "mid", saved)
        checkpointer.wait_until_finished()
        for shape, spec in RESTORED_ON:
            shardings = placed(shape, spec)(fresh)
            wanted = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                *(fresh, shardings),
            )
            restored = checkpointer.restore(tmp_path / "mid", wanted)
            assert jax.tree.map(lambda x: x.sharding, restored) == shardings
            chex.assert_trees_all_equal(*jax.device_get((restored, saved)))
            got = jax.device_get(steps(restored))
            chex.assert_trees_all_close(
                got.pop("add_weissi"), expected["add_weissi"], rtol=1e-5, atol=1e-6
            )
            for name, run in got.items():
                chex.assert_trees_all_equal(run, expected[name])
