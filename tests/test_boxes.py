"""Parameters in boxes that name their axes: what else has these axes keeps the box."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import weightreg as wr
import weightreg.linen
from weightreg._core._arguments import is_box, spread

KEY, X = jax.random.key(0), jnp.ones((2, 6))
AXES = ("data", "model")
RULES = (("rows", "data"), ("columns", "model"))
KERNEL = nn.initializers.lecun_normal()
SPECTRAL = wr.add_weissi(1e-3, 1e-3, norm="spectral")


def linen(init):
    return nn.Dense(8, kernel_init=init)


def module():
    kernel_init = nnx.with_partitioning(KERNEL, AXES)
    with nnx.use_eager_sharding(False):
        return nnx.Linear(6, 8, rngs=nnx.Rngs(0), kernel_init=kernel_init)


PARTITIONED = linen(nn.with_partitioning(KERNEL, AXES))
LOGICAL = linen(nn.with_logical_partitioning(KERNEL, ("rows", "columns")))


def by_name(tree, mesh):
    return nn.get_sharding(tree, mesh)


def by_rules(tree, mesh):
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(tree), mesh, RULES)


def by_variables(tree, mesh):
    specs = nnx.get_partition_spec(tree)
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)


BOXED = {
    "Partitioned": (lambda key: PARTITIONED.init(key, X)["params"], by_name),
    "LogicallyPartitioned": (lambda key: LOGICAL.init(key, X)["params"], by_rules),
    "Variable": (lambda key: nnx.state(module(), nnx.Param), by_variables),
}
MADE = {
    "spectral": SPECTRAL.init,
    "volumized": wr.volumized(optax.adam(0.1), wr.he_volume(0.5), 0.0).init,
    "pack": lambda p: wr.pack(p, wr.he_volume(0.5), "ternary"),
    "binarize": lambda p: wr.binarize(p, wr.he_volume(0.5)),
    "volumes": lambda p: jax.tree.map(jnp.asarray, wr.he_volume(0.5)(p)),
    "exponents": lambda p: jax.tree.map(jnp.asarray, wr.cnn_exponents(p)),
}
KEPT = {"volumized": 2, "binarize": 1}


def boxed(tree):
    """How many kernels of a tree are in boxes."""
    nodes = jax.tree.leaves(tree, is_leaf=is_box)
    shape = (6, 8)
    return sum(is_box(n) and jnp.shape(jax.tree.leaves(n)[0]) == shape for n in nodes)


@quick.everything
@pytest.mark.parametrize("kind", BOXED)
def test_shardings_by_the_names_of_axes_fit_all_that_is_made(kind, cpu_mesh):
    make, shardings_of = BOXED[kind]
    mesh = cpu_mesh((2, 2), AXES)
    for name, of in MADE.items():
        both = lambda key, of=of: of(make(key))  # noqa: E731
        shardings = shardings_of(jax.eval_shape(both, KEY), mesh)
        with jax.set_mesh(mesh):
            got = quick.jit(both, out_shardings=shardings)(KEY)
        assert boxed(got) == KEPT.get(name, 0), name
        split = [x for x in jax.tree.leaves(got) if not x.is_fully_replicated]
        assert len(split) == KEPT.get(name, 0), name


@pytest.mark.parametrize("kind", BOXED)
def test_boxes_change_no_number(kind):
    """Of updates, masks and packed weights, against the same parameters without."""
    params = BOXED[kind][0](KEY)
    plain = {"kernel": jax.tree.leaves(params["kernel"])[0], "bias": jnp.zeros(8)}
    assert jax.tree.structure(wr.weight_mask(params)) == jax.tree.structure(params)
    packed = wr.pack(params, 0.5, "binary")
    bare = wr.pack(plain, 0.5, "binary")
    np.testing.assert_array_equal(packed["kernel"].bits, bare["kernel"].bits)
    assert is_box(packed["bias"]) == is_box(params["bias"])
    got = wr.unpack(packed)["kernel"]
    np.testing.assert_array_equal(got, wr.unpack(bare)["kernel"])
    update = quick.jit(SPECTRAL.update)
    state, expected = map(quick.jit(SPECTRAL.init), (params, plain))
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        updates, state = update(zeros, state, params)
        expected_updates, expected = update(
            jax.tree.map(jnp.zeros_like, plain), expected, plain
        )
        got = jax.tree.leaves(updates["kernel"])[0]
        np.testing.assert_array_equal(got, expected_updates["kernel"])
    np.testing.assert_array_equal(state.vectors["kernel"], expected.vectors["kernel"])


@pytest.mark.parametrize("kind", BOXED)
def test_states_that_were_saved_in_boxes_go_on_in_loops(kind):
    params = BOXED[kind][0](KEY)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = quick.jit(SPECTRAL.init)(params)
    vectors = [optax.MaskedNode(), state.vectors["kernel"]]
    old = state._replace(vectors=jax.tree.structure(params).unflatten(vectors))
    assert is_box(old.vectors["kernel"]) and not is_box(state.vectors["kernel"])

    def loop(state):
        step = lambda s, _: (SPECTRAL.update(zeros, s, params)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, length=3)[0]

    got, expected = quick.jit(loop)(old), quick.jit(loop)(state)
    assert jax.tree.structure(got) == jax.tree.structure(old)
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)


def test_vectors_of_other_weights_are_refused():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    first = {"a": True, "b": False}
    part = wr.add_weissi(1e-3, 1e-3, norm="spectral", mask=first)
    for tx, other, words in (
        (SPECTRAL, part, r"a vector for \['b'\], which is no weight.*init"),
        (part, SPECTRAL, r"no vector for \['b'\], which is a weight.*init"),
    ):
        state = jax.eval_shape(tx.init, params)
        with pytest.raises(ValueError, match=f"state has {words}"):
            other.update(params, state, params)


def test_an_optimizer_of_nnx_names_no_axes_of_vectors():
    make = lambda tx: nnx.Optimizer(module(), tx, wrt=nnx.Param)  # noqa: E731
    for tx, expected in ((SPECTRAL, set()), (optax.adam(0.1), {AXES})):
        state = nnx.state(nnx.eval_shape(lambda tx=tx: make(tx)))
        specs = jax.tree.leaves(nnx.get_partition_spec(state))
        assert {tuple(spec) for spec in specs if tuple(spec)} == expected


def test_what_is_a_box():
    arrays = jnp.ones((2, 3)), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for array in arrays:
        assert is_box(nn.Partitioned(array, AXES))
    assert is_box(nnx.Param(arrays[0]))
    hole = nn.Partitioned(optax.MaskedNode(), AXES)
    packed = nn.Partitioned(wr.pack(arrays[0], 0.5, "binary"), AXES)
    wrapper = jax.tree_util.Partial(jnp.sin, value=1)
    for node in (*arrays, hole, packed, wrapper, {"value": 1}, None, 1.0, packed.value):
        assert not is_box(node)
    params = {"a": nn.Partitioned(arrays[0], AXES), "hole": hole, "b": arrays[0]}
    got = spread(params, {1: "b"}, "other")
    assert got == {"a": "other", "hole": hole, "b": "b"}


def from_bits(model, params, *args):
    with nn.intercept_methods(weightreg.linen.unpack_layers):
        return model.apply({"params": params}, *args)


@pytest.mark.parametrize("model", [PARTITIONED, LOGICAL])
def test_linen_runs_from_bits_in_the_place_of_boxes_and_in_them(model, cpu_mesh):
    params = model.init(KEY, X)["params"]
    packed = wr.pack(params, 0.5, "binary")
    by_hand = packed | {"kernel": params["kernel"].replace(value=packed["kernel"])}
    expected = model.apply({"params": wr.binarize(params, 0.5)}, X)
    run = jax.jit(lambda p: from_bits(model, p, X))
    for tree in (packed, by_hand):
        np.testing.assert_allclose(run(tree), expected, rtol=1e-6)
        with jax.set_mesh(cpu_mesh((2, 2), AXES)), nn.logical_axis_rules(RULES):
            np.testing.assert_allclose(run(tree), expected, rtol=1e-6)
    np.testing.assert_array_equal(
        nn.unbox(packed)["kernel"], wr.unpack(packed)["kernel"]
    )
    assert jnp.allclose(model.apply({"params": packed}, X), expected)  # all at once
