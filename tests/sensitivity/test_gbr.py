"""GBR, its estimate by random projections, and what bounds it."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linear(kernel, x):
    return jnp.tensordot(x, kernel, axes=x.ndim)


def relu_network(params, x):
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


def mlp(seed, sizes, scale=1.0):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    return [jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in pairs]


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4), (1, 1)])
def test_linear_networks_have_the_norm_of_their_weights(shape):
    """In forward mode where there are fewer inputs than outputs, else in reverse."""
    kernel = normal(*shape)
    f = functools.partial(linear, kernel)
    x = normal(7, *shape[:-1], seed=1)
    want = float(np.sum(np.asarray(kernel, np.float64) ** 2))
    for batch_size in (None, 1, 3, 100):
        got = quick.jit(lambda x, b=batch_size: wr.jacobian_norms(f, x, batch_size=b))(
            x
        )
        np.testing.assert_allclose(got, np.full(7, want), rtol=1e-6)
    np.testing.assert_allclose(wr.gbr(f, x, batch_size=2), want, rtol=1e-6)


@pytest.mark.parametrize("inputs", [2, 9])
def test_norms_are_those_of_the_jacobian(inputs):
    params = mlp(1, (inputs, 8, 4))
    x = normal(6, inputs, seed=1)
    f = functools.partial(relu_network, params)
    jacobians = jax.vmap(jax.jacrev(f))(x)
    want = np.sum(np.asarray(jacobians, np.float64) ** 2, (1, 2))
    np.testing.assert_allclose(wr.jacobian_norms(f, x), want, rtol=1e-5)
    np.testing.assert_allclose(wr.gbr(f, x), want.mean(), rtol=1e-5)


def test_the_usual_three_functions():
    params, labels = mlp(2, (5, 8, 3)), jnp.array([0, 2, 1, 1])
    x = normal(4, 5, seed=1)
    f = functools.partial(relu_network, params)
    logits, jacobians = jax.vmap(f)(x), jax.vmap(jax.jacrev(f))(x)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    jacobians = np.asarray(jacobians, np.float64)
    softmax = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    both = np.einsum("bij,bjk->bik", softmax, jacobians)
    got = wr.jacobian_norms(wr.probabilities(f), x)
    np.testing.assert_allclose(got, np.sum(both**2, (1, 2)), rtol=1e-4)
    got = wr.jacobian_norms(wr.label_probability(f), x, labels)
    rows = both[np.arange(4), labels]
    np.testing.assert_allclose(got, np.sum(rows**2, 1), rtol=1e-3)


def test_random_projections_are_unbiased_and_know_their_error():
    """Over 1,000 repetitions: mean, spread, and how often the error is exceeded."""
    params = mlp(3, (6, 8, 5))
    x = normal(3, 6, seed=1)
    f = functools.partial(relu_network, params)
    exact = np.asarray(wr.jacobian_norms(f, x), np.float64)

    @functools.partial(quick.jit, static_argnums=1)
    def repeated(keys, probes):
        def one(key):
            norms = wr.jacobian_norms(f, x, probes=probes, key=key)
            return norms, wr.gbr(f, x, probes=probes, key=key)

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(0), 1000)
    few, _ = repeated(keys, 3)  # variances of few differ by how one divides
    np.testing.assert_allclose(
        np.mean(np.square(few.standard_error), 0), np.var(few.mean, 0), rtol=0.2
    )
    norms, whole = repeated(keys, 40)
    for found, want in ((norms, exact), (whole, exact.mean())):
        means, errors = np.asarray(found.mean), np.asarray(found.standard_error)
        spread = means.std(0)
        assert np.all(np.abs(means.mean(0) - want) < 4 * spread / math.sqrt(1000))
        np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), spread, rtol=0.1)
        inside = np.mean(np.abs(means - want) < 2 * errors, 0)
        assert np.all((inside > 0.9) & (inside < 0.98))


def test_examples_have_projections_of_their_own():
    f = functools.partial(linear, jnp.eye(6))
    x = jnp.zeros((5, 6))
    found = wr.jacobian_norms(f, x, probes=2, key=jax.random.key(1))
    assert len(set(np.asarray(found.mean).tolist())) == 5
    batched = wr.jacobian_norms(f, x, probes=2, key=jax.random.key(1), batch_size=2)
    chex.assert_trees_all_close(found, batched, rtol=1e-6)


def test_it_can_be_a_penalty():
    """Its gradient by the weights is the closed form's, and training lowers it."""
    kernel = normal(4, 3, seed=1)
    x = normal(8, 4, seed=1)
    penalty = lambda k: wr.gbr(functools.partial(linear, k), x)  # noqa: E731
    np.testing.assert_allclose(jax.grad(penalty)(kernel), 2 * kernel, rtol=1e-5)
    params, tx = mlp(4, (4, 16, 3)), optax.sgd(1e-3)

    @quick.jit
    def step(params, state):
        loss = lambda p: wr.gbr(functools.partial(relu_network, p), x)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_extremes():
    for scale in (1e-25, 1e-19, 1e18):
        kernel = jnp.full((3, 2), scale)
        got = wr.jacobian_norms(functools.partial(linear, kernel), jnp.ones((1, 3)))
        want = 6 * float(np.float32(scale)) ** 2
        np.testing.assert_allclose(
            got, want if want > 1e-38 else 0, rtol=1e-5, atol=1e-38
        )
    half = functools.partial(linear, jnp.full((3, 2), 300.0, jnp.float16))
    got = wr.jacobian_norms(half, jnp.ones((1, 3), jnp.float16))
    assert got.dtype == jnp.float32 and got[0] == 540_000  # no float16
    slope = jax.grad(lambda k: wr.gbr(functools.partial(linear, k), jnp.ones((1, 3))))
    np.testing.assert_array_equal(slope(jnp.zeros((3, 2))), 0.0)


def test_errors_are_known_wherever_means_are():
    key = jax.random.key(0)
    for scale in (1e-12, 1.0, 1e12):
        f = functools.partial(linear, jnp.full((4, 3), scale))
        found = wr.jacobian_norms(f, jnp.ones((1, 4)), probes=50, key=key)
        np.testing.assert_allclose(found.standard_error / found.mean, 0.2, rtol=0.05)
    half = functools.partial(linear, jnp.full((4, 3), 2e4, jnp.float16))
    found = wr.jacobian_norms(half, jnp.ones((1, 4), jnp.float16), probes=50, key=key)
    assert abs(float(found.mean[0]) - 4.8e9) < 4 * float(found.standard_error[0])


def test_the_second_derivative_at_nothing():
    f = lambda s: wr.gbr(lambda x: s * x, jnp.ones((6, 4)))  # noqa: E731
    assert jax.grad(jax.grad(f))(0.0) == 8  # of 4 s^2


@pytest.mark.parametrize("probes", [None, 2])
def test_memory_does_not_grow_with_the_examples(probes):
    """Nor does that of the gradient, for a penalty."""
    params = mlp(0, (64, 64, 64, 10), scale=0.1)
    key = None if probes is None else jax.random.key(0)

    def penalty(params, x):
        f = functools.partial(relu_network, params)
        found = wr.gbr(f, x, probes=probes, key=key, batch_size=8)
        return found if probes is None else found.mean

    def temporary(count):
        compiled = (
            quick.jit(jax.grad(penalty)).lower(params, normal(count, 64)).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(512) < 1.3 * temporary(64)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("probes", [None, 2])
def test_on_eight_devices(axis_type, probes, cpu_mesh):
    mesh = cpu_mesh((8,), ("d",), axis_type)
    f = functools.partial(relu_network, mlp(0, (6, 8, 3)))
    more = {} if probes is None else {"probes": probes, "key": jax.random.key(0)}
    x = normal(16, 6)
    want = wr.jacobian_norms(f, x, **more)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
        for batch_size in (None, 3, 4, 100):
            got = quick.jit(
                lambda x, b=batch_size: wr.jacobian_norms(f, x, batch_size=b, **more)
            )(split)
            chex.assert_trees_all_close(got, want, rtol=1e-5)
        parts = jax.shard_map(
            lambda x: wr.jacobian_norms(f, x, **more),
            mesh=mesh,
            in_specs=PartitionSpec("d"),
            out_specs=PartitionSpec("d"),
        )
        got = quick.jit(parts)(split)
    if probes is None:
        np.testing.assert_allclose(got, want, rtol=1e-5)
    else:
        exact = wr.jacobian_norms(f, x)
        assert jnp.mean(jnp.abs(got.mean - exact) < 4 * got.standard_error) > 0.5


SIZES = [(1, 1), (4, 3), (2, 6), (1, 5, 1), (3, 4, 2), (6, 1, 3), (2, 5, 4, 3, 6)]


@quick.jit
def three(params, x):
    f = functools.partial(relu_network, params)
    return wr.gbr_bounds(params), wr.gbr(f, x), wr.gbr(wr.probabilities(f), x)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from(SIZES),  # each is compiled once
    power=st.integers(-3, 3),
)
def test_the_chain_of_bounds_holds(seed, sizes, power):
    params = mlp(seed, sizes, scale=10.0**power)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(5, sizes[0])), jnp.float32)
    squares = [np.sum(np.asarray(k, np.float64) ** 2) for k in params]
    bounds, *found = three(params, x)
    want = np.sum(np.log(squares)), len(squares) * np.log(np.mean(squares))
    np.testing.assert_allclose(bounds, want, rtol=1e-5, atol=1e-5)
    assert bounds.log_product <= bounds.log_mean_power + 1e-4
    for value in found:
        assert np.log(max(float(value), 1e-300)) <= bounds.log_product + 1e-4
    if len(params) == 1:
        equal = (np.log(float(found[0])), *bounds)
        np.testing.assert_allclose(equal, equal[0], rtol=1e-5, atol=1e-5)


def test_bounds_of_equal_norms_are_equal():
    params = wr.equivalent_norm("layer", alpha=0.7)(mlp(5, (4, 5, 6, 3)))
    bounds = wr.gbr_bounds(params)
    np.testing.assert_allclose(bounds, 3 * math.log(0.7), rtol=1e-5)


def test_bounds_have_no_range():
    sizes = jnp.concatenate([jnp.full(500, 1e30), jnp.full(300, 1e-30)])
    deep = sizes[:, None, None] * jnp.ones((2, 2))  # 800 layers, stacked
    log = math.log(4e60), math.log(4e-60)
    bounds = quick.jit(lambda w: wr.gbr_bounds(w, dims=Dims(1, 2)))(deep)
    np.testing.assert_allclose(
        bounds.log_product, 500 * log[0] + 300 * log[1], rtol=1e-5
    )
    mean = 800 * (log[0] + math.log(500 / 800))
    np.testing.assert_allclose(bounds.log_mean_power, mean, rtol=1e-5)
    grads = jax.grad(lambda p: wr.gbr_bounds(p).log_product)([jnp.full((2, 2), 1e-30)])
    np.testing.assert_allclose(grads[0], 0.5e30, rtol=1e-5)
    zero = wr.gbr_bounds([jnp.zeros((2, 2)), jnp.ones((2, 2))])
    assert zero.log_product == -jnp.inf
    np.testing.assert_allclose(zero.log_mean_power, 2 * math.log(2), rtol=1e-6)
    assert wr.gbr_bounds([jnp.zeros((2, 2))]).log_mean_power == -jnp.inf
    chex.assert_trees_all_equal(tuple(wr.gbr_bounds({})), (0.0, 0.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((jnp.ones((2, 3)),), {"probes": 3}, ValueError, "probes and key"),
        ((jnp.ones((2, 3)),), {"key": jax.random.key(0)}, ValueError, "probes and key"),
        ((jnp.ones((2, 3)),), {"probes": 1, "key": 0}, ValueError, "probes must be 2"),
        ((jnp.ones((2, 3)),), {"probes": 2.0, "key": 0}, TypeError, "probes must be"),
        ((jnp.ones((2, 3)),), {"batch_size": 0}, ValueError, "batch_size must be 1"),
        ((jnp.ones((2, 3), int),), {}, TypeError, "x must be a floating"),
        ((jnp.ones((2, 3)), jnp.ones(3)), {}, ValueError, "first axis of x"),
    ],
)
@pytest.mark.parametrize("measure", [wr.jacobian_norms, wr.gbr])
def test_wrong_arguments_are_named(measure, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        measure(lambda x, *rest: x, *args, **kwargs)


def test_an_average_over_nothing_is_refused():
    with pytest.raises(ValueError, match="one example at least"):
        wr.gbr(jnp.sin, jnp.ones((0, 3)))
    with pytest.raises(TypeError, match="f must return"):
        wr.jacobian_norms(lambda x: (x, x), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="f must return"):
        key = jax.random.key(0)
        wr.jacobian_norms(lambda x: (x, x), jnp.ones((2, 3)), probes=2, key=key)
