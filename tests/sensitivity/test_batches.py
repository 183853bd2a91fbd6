"""Batches of examples, and where devices that split the examples find them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import weightreg as wr
from weightreg._sensitivity._batches import map_batches

pytestmark = quick.everything

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(48, 6)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, 48))
KERNEL = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
PROBES = {"probes": 2, "key": jax.random.key(0)}


def probability(x, label):
    return jax.nn.softmax(jnp.tanh(x) @ KERNEL)[label]


MEASURES = {
    "input_gradient_norms": wr.input_gradient_norms,
    "jacobian_norms": wr.jacobian_norms,
    "probes": lambda *args, **kwargs: wr.jacobian_norms(*args, **kwargs, **PROBES),
}


@pytest.mark.parametrize("count", [1, 7, 16, 30, 48])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 13, 47])
def test_batches_are_as_one_in_the_order_of_the_examples(count, size):
    def f(example, more):
        return {"sum": jnp.sum(example) + more["label"], "none": example[:0]}

    xs = X[:count], {"label": LABELS[:count], "nothing": None}
    found = map_batches(f, xs, size)
    chex.assert_trees_all_close(found, jax.vmap(f)(*xs), rtol=1e-6)


@pytest.mark.parametrize("count", [40, 41])
def test_no_batch_is_larger_than_it_may_be(count):
    sizes = []

    @jax.custom_batching.custom_vmap
    def f(x):
        return x

    @f.def_vmap
    def _(size, _, x):
        sizes.append(size)
        return x, True

    map_batches(f, (X[:count, 0],), 12)
    assert sizes == ([8] if count == 40 else [12, 5])


def test_derivatives_by_the_examples():
    def total(x, size):
        return jnp.sum(wr.jacobian_norms(probability, x, LABELS, batch_size=size))

    grad = quick.jit(jax.grad(total), static_argnums=1)
    np.testing.assert_allclose(grad(X, 10), grad(X, None), rtol=1e-4, atol=1e-7)


def moved(compiled):
    """Which collective operations there are, but for sums."""
    names = "all-gather", "all-to-all", "collective-permute", "collective-broadcast"
    return [name for name in names if name in compiled.as_text()]


def split(mesh, *arrays):
    """Arrays whose first axis is split."""
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("d")))


@pytest.mark.parametrize("batch_size", [8, 20, 47, None])
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_no_example_leaves_its_device(axis_type, name, batch_size, cpu_mesh):
    measure = MEASURES[name]
    mesh = cpu_mesh((8,), ("d",), axis_type)
    want = measure(probability, X, LABELS)
    f = lambda x, y: measure(probability, x, y, batch_size=batch_size)  # noqa: E731
    with jax.set_mesh(mesh):
        x, labels = split(mesh, X, LABELS)
        compiled = quick.jit(f).lower(x, labels).compile()
        got = compiled(x, labels)
    assert not moved(compiled)
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.is_equivalent_to(x.sharding, leaf.ndim)
    chex.assert_trees_all_close(got, want, rtol=1e-5)


def test_what_is_gathered_is_seen(cpu_mesh):
    mesh = cpu_mesh((8,), ("d",))
    x, _ = split(mesh, X, LABELS)
    assert moved(quick.jit(lambda x: x[:9].reshape(3, 3, 6)).lower(x).compile())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_any_number_of_devices_and_batches_smaller_than_it(axis_type, cpu_mesh):
    mesh = cpu_mesh((6,), ("d",), axis_type)
    want = wr.jacobian_norms(probability, X, LABELS)
    with jax.set_mesh(mesh):
        x, _ = split(mesh, X, LABELS)
        for size in (4, 20):
            f = functools.partial(wr.jacobian_norms, probability, batch_size=size)
            compiled = quick.jit(f).lower(x, LABELS).compile()  # labels everywhere
            if axis_type == AxisType.Explicit:
                assert not moved(compiled)
            np.testing.assert_allclose(compiled(x, LABELS), want, rtol=1e-5)
