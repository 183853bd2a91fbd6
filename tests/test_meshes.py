"""Weights that devices split: what is computed where, and what devices tell each other.

The kernels of one tree are split in all the ways that are common, over a mesh of four
by two: along inputs or units over the data axis, as FSDP does, along units and then
inputs over the model axis, as tensor parallelism does, both at once, and not at all.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import quick
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
SIDE = 256
KERNELS = {
    "Dense_0": PartitionSpec("data"),
    "Dense_1": PartitionSpec(None, "data"),
    "Dense_2": PartitionSpec(None, "model"),
    "Dense_3": PartitionSpec("model"),
    "Dense_4": PartitionSpec("data", "model"),
    "Dense_5": PartitionSpec(),
}
SPECS = {
    name: {"kernel": spec, "bias": PartitionSpec(*spec[1:])}
    for name, spec in KERNELS.items()
}
# Sums over a split axis are told for every unit, some of them in four parts. The least
# shard of a kernel has eight times as many numbers. Sums of layers may be told at once.
UNITS = 4 * SIDE
WEIGHT = SIDE * SIDE
LAYERS = 4 * len(KERNELS)
HALF = wr.he_volume(0.5)

LINKS = {
    "volumize": (wr.volumize(HALF, 0.9), 0),
    "volumized(adam)": (wr.volumized(optax.adam(0.1), HALF, 0.9), 0),
    "volumized(sgd)": (wr.volumized(optax.sgd(0.1, momentum=0.9), HALF, 0.9), 0),
    "volumized_laprop": (wr.volumized_laprop(0.1, volume=HALF, alpha=0.9), 0),
    "quantize_every": (wr.quantize_every(1, "ternary", HALF), 0),
    "add_weissi": (wr.add_weissi(0.1, 0.1), LAYERS),
    "add_weissi(log)": (wr.add_weissi(0.1, 0.1, log=True), LAYERS),
    "add_weissi(2, 1)": (wr.add_weissi(0.1, 0.1, norm=(2, 1)), UNITS),
    "add_weissi(spectral)": (wr.add_weissi(0.1, 0.1, norm="spectral"), UNITS),
    "add_shifted_l2": (wr.add_shifted_l2(0.1, 0.1), UNITS),
    "parseval": (wr.parseval(0.1), WEIGHT),  # whose Gram matrices need whole weights
}
# Each weight's own number is all that these need.
ELEMENTWISE = [name for name, (_, most) in LINKS.items() if not most]


def pulled(enc):
    """What comes back of numbers that have little to do with the weights."""
    along = lambda params: jax.tree.map(lambda w: jnp.sin(40 * w), params)  # noqa: E731
    return lambda params: jax.vjp(enc, params)[1](along(params))[0]


def numbers(params):
    """All that tells a few numbers of a network, in one program."""
    chain = [params["Dense_0"]["kernel"], params["Dense_3"]["kernel"]]
    return {
        "energy": wr.weight_energy(params),
        "log energy": wr.log_weight_energy(params),
        "complexity": wr.layer_complexity(params),
        "decay": wr.minimum_weight_decay(params),
        "distances": wr.level_distances(params, HALF, "ternary"),
        "gbr": wr.gbr_bounds(chain),
        "gradient": wr.input_gradient_bound(chain),
    }


MAPS = {
    "equivalent_norm": (wr.equivalent_norm(), UNITS),
    "vjp(equivalent_norm)": (pulled(wr.equivalent_norm()), UNITS),
    "vjp(equivalent_norm(layer))": (pulled(wr.equivalent_norm("layer")), UNITS),
    "grad(weissi)": (jax.grad(wr.weissi(0.1, 0.1)), LAYERS),
    "grad(shifted_l2)": (jax.grad(wr.shifted_l2(0.1, 0.1)), UNITS),
    "binarize": (lambda params: wr.binarize(params, HALF), 0),
    "ternarize": (lambda params: wr.ternarize(params, HALF), 0),
    "balance_scales": (wr.balance_scales, LAYERS),
    "numbers": (numbers, UNITS),
}


def network():
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(SIDE, SIDE)) / 16, jnp.float32),
            "bias": jnp.asarray(rng.normal(size=SIDE), jnp.float32),
        }
        for name in KERNELS
    }


def shardings(mesh):
    return jax.tree.map(functools.partial(NamedSharding, mesh), SPECS)


def split_alike(tree, mesh):
    """How many arrays are split as the parameters are by whose paths theirs end."""
    leaves = jax.tree_util.tree_leaves_with_path
    params = dict(leaves(jax.eval_shape(network)))
    found = 0
    for path, leaf in leaves(tree):
        for end, sharding in leaves(shardings(mesh)):
            if path[-len(end) :] == end and leaf.shape == params[end].shape:
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
                found += 1
    return found


def abstract(mesh, tree):
    """Shapes of arrays that are split as the parameters by whose paths theirs end."""
    leaves = jax.tree_util.tree_leaves_with_path
    params = dict(leaves(jax.eval_shape(network)))

    def place(path, x):
        where = NamedSharding(mesh, PartitionSpec())
        for end, sharding in leaves(shardings(mesh)):
            if path[-len(end) :] == end and x.shape == params[end].shape:
                where = sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, tree)


def close(got, expected, rtol=1e-5):
    """With a tolerance relative to the largest number of each array."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.max(np.abs(y)))


def init(name, params):
    """A fresh state, in which power iterations start from ones, without a warm-up."""
    tx = LINKS[name][0]
    if "spectral" not in name:
        return tx.init(params)
    ones = lambda x: jnp.ones_like(x) if x.ndim == 0 else jnp.full_like(x, 1 / 16)  # noqa: E731
    return jax.tree.map(ones, jax.eval_shape(tx.init, params))


def jit(name):
    return jax.jit if name in ELEMENTWISE else quick.jit  # bits are as users compile


@functools.cache
def alone(name):
    """What a link makes on one device: updates, and the state after them."""
    params = network()
    return jit(name)(LINKS[name][0].update)(params, init(name, params), params)


@TYPES
@pytest.mark.parametrize(
    "name",
    [n if n in ELEMENTWISE else pytest.param(n, marks=quick.everything) for n in LINKS],
)
def test_no_weight_moves_between_devices_in_a_step(name, axis_type, cpu_mesh):
    """States and updates are split as the weights are, and are those of one device."""
    (tx, most), mesh = LINKS[name], cpu_mesh((4, 2), ("data", "model"), axis_type)
    with jax.set_mesh(mesh):
        params = jax.device_put(network(), shardings(mesh))
        state = init(name, params)
        step = jit(name)(tx.update).lower(params, state, params).compile()
        updates, after = step(params, state, params)
    moved = meshes.collectives(step.as_text())
    assert max(moved.values(), default=0) <= most, moved
    assert split_alike(updates, mesh) == 12
    assert split_alike(after, mesh) == split_alike(state, mesh)
    if name in ELEMENTWISE:
        chex.assert_trees_all_equal((updates, after), alone(name))
    else:
        close((updates, after), alone(name))


@quick.everything
@TYPES
@pytest.mark.parametrize("name", MAPS)
def test_no_weight_moves_between_devices_in_a_map(name, axis_type, cpu_mesh):
    (run, most), mesh = MAPS[name], cpu_mesh((4, 2), ("data", "model"), axis_type)
    with jax.set_mesh(mesh):
        params = jax.device_put(network(), shardings(mesh))
        compiled = quick.jit(run).lower(params).compile()
        got = compiled(params)
    moved = meshes.collectives(compiled.as_text())
    assert max(moved.values(), default=0) <= most, moved
    if run is not numbers:
        kernels = {name: {"kernel": layer["kernel"]} for name, layer in got.items()}
        assert split_alike(kernels, mesh) == 6  # of a bias the gradient is a constant
    close(got, mapped_alone(name))


@functools.cache
def mapped_alone(name):
    return quick.jit(MAPS[name][0])(network())


def test_what_moves_is_seen(cpu_mesh):
    """Gathered weights, and sums of one that is a result of several."""
    mesh = cpu_mesh((4, 2), ("data", "model"))
    params = jax.device_put(network(), shardings(mesh))

    def moving(params):
        whole = jax.lax.with_sharding_constraint(
            params["Dense_0"]["kernel"], PartitionSpec()
        )
        return whole, jnp.sum(params["Dense_3"]["kernel"], 0), params["Dense_0"]

    with jax.set_mesh(mesh):
        text = quick.jit(moving).lower(params).compile().as_text()
    assert meshes.collectives(text) == {"all-gather": WEIGHT, "all-reduce": SIDE}


def test_layers_of_a_stack_may_be_split_inside_of_shard_map(cpu_mesh):
    """Where each device has whole layers, whose norms are theirs alone."""
    mesh, spec = cpu_mesh((8,), ("layers",)), PartitionSpec("layers")
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 4)), jnp.float32)
    dims = Dims(1, 2)
    tx = optax.chain(
        wr.add_shifted_l2(0.1, 0.1, dims=dims),
        wr.volumize(wr.he_volume(0.1, dims=dims), 0.5),
    )

    def go(w):
        updates, _ = tx.update(w, tx.init(w), w)
        return updates, wr.equivalent_norm(dims=dims)(w)

    spread = jax.shard_map(go, mesh=mesh, in_specs=spec, out_specs=spec)
    chex.assert_trees_all_close(
        quick.jit(spread)(stack), quick.jit(go)(stack), rtol=1e-6
    )


def test_volumes_are_computed_outside_of_a_shard_map_that_splits_weights(cpu_mesh):
    """A shard has the fans of its own shape, which nothing tells from a weight's."""
    mesh, spec = cpu_mesh((8,), ("x",)), PartitionSpec(None, "x")
    params = {"Dense_0": {"kernel": jnp.ones((4, 16))}}
    volumes = wr.he_volume(0.5)(params)

    def step(volume):
        def go(params):
            tx = wr.volumize(volume, 0.5)
            return tx.update(params, tx.init(params), params)[0]

        spread = jax.shard_map(go, mesh=mesh, in_specs=spec, out_specs=spec)
        return quick.jit(spread)(params), quick.jit(go)(params)

    chex.assert_trees_all_equal(*step(volumes))
    of_shards, of_weights = step(wr.he_volume(0.5))
    assert np.all(jax.tree.leaves(of_shards)[0] > jax.tree.leaves(of_weights)[0])
