"""The Parseval step and convex sums against independent references and theory."""

import functools
import math

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

from weightreg._weissi._parseval import convex_sum, initial_logits, parseval

pytestmark = quick.everything

LOW = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
DTYPES = [*LOW, np.dtype(np.float32), np.dtype(np.float64)]

# Shape, dims, and the axes as (stacked, inputs, outputs).
LAYOUTS = {
    "wide": ((3, 8), None, ((), (0,), (1,))),
    "tall": ((8, 3), None, ((), (0,), (1,))),
    "convolution": ((3, 3, 2, 5), None, ((), (0, 1, 2), (3,))),
    "equinox": ((7, 4), Dims(1, 0), ((), (1,), (0,))),
    "attention": ((6, 2, 5), Dims(0, (1, 2)), ((), (0,), (1, 2))),
    "attention out": ((2, 5, 6), Dims((0, 1), 2), ((), (0, 1), (2,))),
    "scanned": ((3, 4, 6), Dims(1, 2), ((0,), (1,), (2,))),
    "stacked": ((5, 2, 4, 3), Dims((1,), (2,)), ((0, 3), (1,), (2,))),
}


def wide(x):
    return np.asarray(x).astype(np.float64)


def step_of(w, axes, beta):
    """The step on a float64 array, singular value by singular value."""
    stacked, inputs, outputs = axes
    order = (*stacked, *outputs, *inputs)
    moved = np.transpose(w, order)
    n, m = len(stacked), len(stacked) + len(outputs)
    rows, columns = math.prod(moved.shape[n:m]), math.prod(moved.shape[m:])
    out = np.empty((math.prod(moved.shape[:n]), rows, columns))
    for i, matrix in enumerate(moved.reshape(out.shape)):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        out[i] = u @ np.diag(s + beta * s * (1 - s**2)) @ v
    return np.transpose(out.reshape(moved.shape), np.argsort(order))


@functools.partial(jax.jit, static_argnums=3)
def step(p, u, beta, dims=None):
    tx = parseval(beta, dims=dims)
    updates, _ = tx.update([u], tx.init([p]), [p])
    return updates[0]


def stepped(p, u, beta, dims=None):
    return optax.apply_updates(p, step(p, u, beta, dims))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([LOW[0], *DTYPES[2:]]),
    p_scale=st.sampled_from([0.0, 1e-30, 1e-3, 0.3, 2.0, 100.0]),
    u_scale=st.sampled_from([0.0, 1e-30, 1e-3, 0.3]),
    beta=st.sampled_from([0.0, 1e-30, 1e-4, 0.1, 0.5, 1.0]),
)
def test_the_step_equals_that_of_the_singular_values(
    seed, layout, dtype, p_scale, u_scale, beta
):
    shape, dims, axes = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    p = (rng.normal(size=shape) * p_scale).astype(dtype)
    u = (rng.normal(size=shape) * u_scale).astype(dtype)
    with jax.enable_x64(True):
        got = step(jnp.asarray(p), jnp.asarray(u), beta, dims)
    assert got.dtype == dtype
    p, u = wide(p), wide(u)
    w = p + u
    expected = step_of(w, axes, beta) - p
    eps = float(np.finfo(np.promote_types(dtype, np.float32)).eps)
    # Rounding of the sum and of the cube, and of the increment that is returned.
    size = np.abs(w).max() + beta * np.linalg.norm(w.ravel()) ** 3
    atol = 8 * eps * size + 2e-14 * size + 1e-37
    rtol = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(wide(got), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_200_steps_after_sgd_equal_numpy(scheduled, dtype):
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(7, 5)), rng.normal(size=(200, 7, 5))
    betas = 0.05 / (1 + np.arange(200) / 50) if scheduled else np.full(200, 0.05)
    expected = w.copy()
    for g, beta in zip(grads, betas, strict=True):
        expected = expected - 0.01 * g
        expected = (1 + beta) * expected - beta * expected @ expected.T @ expected
    with jax.enable_x64(dtype == "float64"):
        beta = (lambda count: jnp.asarray(betas)[count]) if scheduled else 0.05
        tx = optax.chain(optax.sgd(0.01), parseval(beta))
        params = jnp.asarray(w, dtype)

        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        grads = jnp.asarray(grads, dtype)
        (got, state), _ = jax.jit(lambda c, g: jax.lax.scan(body, c, g))(start, grads)
        assert state[1].count == 200 and state[1].count.dtype == jnp.int32
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    s = np.linalg.svd(expected, compute_uv=False)
    assert np.abs(s - 1).max() < 0.3 < np.abs(np.linalg.norm(w) - 1)


def test_it_is_gradient_descent_on_the_distance_to_orthonormal_rows():
    p = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    energy = lambda w: 0.3 / 4 * jnp.sum((w.T @ w - jnp.eye(4)) ** 2)  # noqa: E731
    other = lambda w: 0.3 / 4 * jnp.sum((w @ w.T - jnp.eye(6)) ** 2)  # noqa: E731
    got = step(p, jnp.zeros_like(p), 0.3)
    with jax.default_matmul_precision("highest"):
        for function in (energy, other):  # they differ by a constant
            expected = -jax.grad(function)(p)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (3, 3, 2, 7), (3, 3, 2, 30)])
def test_it_ends_at_orthonormal_rows_or_columns(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(math.prod(shape[:-1]), shape[-1]))
    start = jnp.asarray(matrix / np.linalg.norm(matrix, 2) * 1.8, jnp.float32)
    apply = lambda _, w: stepped(w, jnp.zeros_like(w), 0.4)  # noqa: E731
    w = jax.jit(lambda w: jax.lax.fori_loop(0, 300, apply, w))(start.reshape(shape))
    rows = np.asarray(w).reshape(matrix.shape).T  # a unit each
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    # and at the nearest such matrix, for no singular value has changed its sign
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(rows.T, u @ v, atol=1e-4)
    still = step(w, jnp.zeros_like(w), 0.4)
    np.testing.assert_allclose(still, 0, atol=1e-6)


def iterated(s, beta, steps):
    """What many steps make of given singular values, in float64."""
    with jax.enable_x64(True):
        u, v = (np.linalg.qr(np.random.default_rng(i).normal(size=(len(s),) * 2))[0]
                for i in range(2))  # fmt: skip
        w = jnp.asarray(u @ np.diag(s) @ v)
        apply = lambda _, w: w + step(w, jnp.zeros_like(w), beta)  # noqa: E731
        return np.linalg.svd(jax.lax.fori_loop(0, steps, apply, w), compute_uv=False)


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.9])
def test_the_basin_is_what_the_docstring_says(beta):
    bound = math.sqrt(1 + 2 / beta)
    s = np.append(np.linspace(0, bound, 82)[1:-1], [1e-3, bound * 0.9999])
    np.testing.assert_allclose(iterated(s, beta, 1500), 1, atol=1e-9)
    # Beyond, the weights grow. (Alone: rounding mixes singular values apart by 1e30.)
    grown = jnp.array([[bound * 1.001]])
    for _ in range(60 if beta > 0.2 else 200):
        grown = stepped(grown, jnp.zeros_like(grown), beta)
    assert not jnp.isfinite(grown)


def test_the_exceptions_of_the_basin():
    one = lambda s, beta: stepped(jnp.array([[s]]), jnp.zeros((1, 1)), beta)  # noqa: E731
    assert one(3.0, 0.25) == -3 and one(-3.0, 0.25) == 3  # the bound
    assert one(3.0, 0.125) == 0  # sqrt(1 + 1 / beta)
    assert one(0.0, 0.5) == 0 and one(1.0, 0.5) == 1 and one(-1.0, 0.5) == -1
    # Among others, 0 stays but for rounding, which grows by 1 + beta a step.
    singular = iterated(np.array([0.0, 0.5, 2.0]), 0.2, 50)
    np.testing.assert_allclose(singular, [1, 1, 0], atol=1e-8)


@pytest.mark.parametrize("beta", [1e-4, 0.1, 0.4, 0.7])
def test_the_rate_and_the_overshoot(beta):
    with jax.enable_x64(True):
        near = jnp.array([[1 + 1e-5]])
        left = np.asarray(stepped(near, jnp.zeros((1, 1)), beta)) - 1
    np.testing.assert_allclose(left / 1e-5, 1 - 2 * beta, rtol=1e-3)
    s = jnp.linspace(0, 1, 1001)[:, None]
    after = jax.vmap(lambda s: stepped(s[None], jnp.zeros((1, 1)), beta))(s).ravel()
    assert bool(jnp.all(after <= 1 + 1e-6)) == (beta <= 0.5)


def test_only_weights_move():
    params = {
        "kernel": 2 * jnp.eye(2),
        "bias": jnp.full(2, 2.0),
        "scan": {"bias": 2 * jnp.ones((3, 2))},
        "n": jnp.int32(3),
        "none": None,
    }
    updates = jax.tree.map(lambda p: p + 1, params)
    tx = parseval(0.1)
    got, _ = tx.update(updates, tx.init(params), params)
    w = 4 * np.eye(2) + 1
    expected = 1.1 * w - 0.1 * w @ w.T @ w - 2 * np.eye(2)
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-5)
    del got["kernel"], updates["kernel"]
    assert jax.tree.leaves(got) == jax.tree.leaves(updates)  # the same objects


def test_mask_and_dims_choose_and_describe_the_leaves():
    kernel = 2 * jnp.ones((3, 2, 4))
    params = {"a": kernel, "b": kernel, "c": kernel}
    zeros = jax.tree.map(jnp.zeros_like, params)
    dims = {"a": Dims(1, 2), "b": Dims((0, 1), 2), "c": None}
    tx = parseval(0.1, dims=dims)
    got, _ = tx.update(zeros, tx.init(params), params)
    for name, axes in (("a", ((0,), (1,), (2,))), ("b", ((), (0, 1), (2,)))):
        expected = step_of(np.asarray(kernel, float), axes, 0.1) - kernel
        np.testing.assert_allclose(got[name], expected, rtol=1e-5)
    assert not np.allclose(got["a"], got["b"])
    np.testing.assert_array_equal(got["c"], 0)
    tx = parseval(0.1, mask={"a": True, "b": False, "c": False}, dims=dims)
    masked, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(masked["a"], got["a"])
    np.testing.assert_array_equal(masked["b"], 0)
    last = parseval(0.1, mask=lambda p: {k: k != "c" for k in p}, dims=dims)
    got, _ = last.update(zeros, last.init(params), params)
    assert np.all(got["a"] != 0) and not np.any(got["c"])


@pytest.mark.parametrize("shape", [(500, 3), (3, 500), (5, 5, 20, 3), (2, 2, 125, 3)])
def test_the_gram_matrix_is_the_smaller_one_in_full_precision(shape):
    p, tx = jnp.zeros(shape), parseval(0.1)
    jaxpr = jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(p)
    equations = list(equations_of(jaxpr.jaxpr))
    sizes = [math.prod(v.aval.shape) for e in equations for v in e.outvars]
    assert 9 in sizes and max(sizes) == math.prod(shape)
    precisions = [e.params.get("precision") for e in equations]
    assert precisions.count((jax.lax.Precision.HIGHEST,) * 2) == 2


def equations_of(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations_of(inner)


@quick.bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_zero_leaves_the_updates_as_they_are(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        p = jnp.asarray(rng.normal(size=(4, 5, 3)) * [1, 1e4, 1e-4], dtype)
        p = p.at[0, 0, 0].set(jnp.inf).at[1, 1, 1].set(float(jnp.finfo(dtype).max))
        u = jnp.asarray(rng.normal(size=p.shape), dtype)
        for beta in (0, 0.0, jnp.float32(0), lambda count: 0.0 * count):
            tx = parseval(beta, dims=Dims((0, 1), 2))
            for update in (tx.update, jax.jit(tx.update)):
                got, _ = update(u, tx.init(p), p)
                np.testing.assert_array_equal(got, u)


@pytest.mark.parametrize(
    ("p_dtype", "u_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")],
)
def test_updates_keep_a_dtype_of_their_own(p_dtype, u_dtype):
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(6, 4)), p_dtype)
    u = jnp.asarray(rng.normal(size=(6, 4)), u_dtype)
    got = step(p, u, 0.3)
    assert got.dtype == u_dtype
    p, u = wide(p), wide(u)
    expected = step_of(p + u, ((), (0,), (1,)), 0.3) - p
    rtol = float(ml_dtypes.finfo(u_dtype).eps)
    np.testing.assert_allclose(wide(got), expected, rtol=rtol, atol=1e-5)


def test_arithmetic_of_16_bits_is_in_float32():
    """In bfloat16 the cube alone would be off by some percent."""
    p = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)) / 8, jnp.bfloat16)
    got, p = wide(step(p, jnp.zeros_like(p), 0.5)), wide(p)
    expected = step_of(p, ((), (0,), (1,)), 0.5) - p
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=2e-6)


def test_derivatives_are_those_of_the_rule():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        p, u, g, d = jnp.asarray(rng.normal(size=(4, 5, 3)))
        loss = lambda p, u, beta: jnp.sum(g * (p + step(p, u, beta)))  # noqa: E731
        w = p + u
        for beta in (0.0, 0.3):  # the search for beta may start at none
            by_p, by_u, by_beta = jax.grad(loss, (0, 1, 2))(p, u, beta)
            cube = g @ w.T @ w + w @ g.T @ w + w @ w.T @ g
            expected = (1 + beta) * g - beta * cube
            np.testing.assert_allclose(by_u, expected, rtol=1e-11)
            np.testing.assert_allclose(by_p, expected, rtol=1e-11)
            np.testing.assert_allclose(by_beta, jnp.sum(g * (w - w @ w.T @ w)))
            _, along = jax.jvp(lambda p: loss(p, u, beta), (p,), (d,))  # noqa: B023
            np.testing.assert_allclose(along, jnp.sum(d * expected), rtol=1e-11)


def test_compiles_once_and_maps_over_traced_betas():
    p = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    traces = []

    @jax.jit
    def run(p, beta):
        traces.append(1)
        return step(p, 0 * p, beta, Dims(1, 2))

    betas = jnp.array([0.0, 1e-4, 0.5])
    mapped = jax.jit(jax.vmap(run, (None, 0)))(p, betas)
    for beta, got in zip(betas, mapped, strict=True):
        np.testing.assert_allclose(got, run(p, beta), rtol=1e-5, atol=1e-7)
    assert len(traces) == 1
    each = jax.vmap(lambda p: step(p, 0 * p, 0.5))(p)  # axes as one layer sees them
    np.testing.assert_allclose(each, mapped[2], rtol=1e-5, atol=1e-7)


def test_state_and_wrappers():
    params = {"kernel": jnp.full((3, 3), 0.5), "bias": jnp.full(3, 0.5)}
    decay = lambda count: 0.5 / (count + 1)  # noqa: E731
    tx = parseval(decay)
    zeros = jax.tree.map(jnp.zeros_like, params)
    body = lambda state, _: (tx.update(zeros, state, params)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(body, tx.init(params), length=2)  # its type never changes
    assert state.count == 2
    first, state = tx.update(zeros, tx.init(params), params, nobody_expects=1)
    second, _ = tx.update(zeros, state, params)
    np.testing.assert_allclose(second["kernel"], first["kernel"] / 2, rtol=1e-6)
    chex.assert_trees_all_equal_structs(
        optax.tree.map_params(tx, jnp.sin, state), state
    )

    injected = optax.inject_hyperparams(parseval)(beta=decay)
    got, state = injected.update(zeros, injected.init(params), params)
    chex.assert_trees_all_close(got, first)
    got, _ = injected.update(zeros, state, params)
    chex.assert_trees_all_close(got, second)

    masked = optax.masked(tx, {"kernel": True, "bias": False})
    got, _ = masked.update(zeros, masked.init(params), params)
    chex.assert_trees_all_close(got, first)
    every = optax.MultiSteps(tx, 2)
    got, state = every.update(zeros, every.init(params), params)
    chex.assert_trees_all_equal(got, zeros)
    got, _ = every.update(zeros, state, params)
    chex.assert_trees_all_close(got, first)


@pytest.mark.parametrize("params", [{}, (), {"a": None}, {"b": jnp.ones(3)}])
def test_trees_without_weights(params):
    tx = parseval(0.1)
    got, state = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(got, params)
    assert state.count == 1


def test_weights_without_elements():
    p = jnp.zeros((0, 3))
    assert step(p, p, 0.1).shape == (0, 3)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_keeps_the_sharding_of_eight_devices(axis_type, cpu_mesh):
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    cases = [
        ((8, 4), None, ("x", "y")),
        ((3, 3, 2, 8), None, (None, None, "y", "x")),
        ((4, 6, 2), Dims(1, 2), ("x", None, "y")),
    ]
    rng = np.random.default_rng(0)
    for shape, dims, names in cases:
        p = jnp.asarray(rng.normal(size=shape), jnp.float32)
        u = jnp.asarray(rng.normal(size=shape), jnp.float32)
        expected = step(p, u, 0.3, dims)
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, PartitionSpec(*names))
            p, u = jax.device_put(p, sharding), jax.device_put(u, sharding)
            got = step(p, u, 0.3, dims)
        assert got.sharding.is_equivalent_to(sharding, len(shape))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_each_device_has_the_gram_matrices_of_its_own_layers(cpu_mesh):
    mesh = cpu_mesh((4, 2), ("x", "y"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        p = jax.device_put(jnp.ones((4, 6, 2)), PartitionSpec("x", None, "y"))
        jaxpr = jax.make_jaxpr(lambda p: step(p, p, 0.3, Dims(1, 2)))(p)
    outputs = [v.aval for e in equations_of(jaxpr.jaxpr) for v in e.outvars]
    (gram,) = {aval.sharding.spec for aval in outputs if aval.shape == (4, 2, 2)}
    assert gram == PartitionSpec("x", None, None)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_derivatives_of_weights_on_eight_devices(axis_type, cpu_mesh):
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    p = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    grad = jax.jit(jax.grad(lambda p, beta: jnp.sum(step(p, p, beta) ** 2), (0, 1)))
    expected = grad(p, 0.3)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
        got = grad(jax.device_put(p, sharding), 0.3)
    assert got[0].sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_close(jax.device_get(got), expected, rtol=1e-4)


def test_inside_shard_map_whole_weights_are_stepped(cpu_mesh):
    mesh = cpu_mesh((8,), ("x",))
    p = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 3)), jnp.float32)
    run = lambda p: step(p, 0 * p, 0.1, Dims(1, 2))  # noqa: E731
    spec = PartitionSpec("x")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(sharded(p), run(p), rtol=1e-5, atol=1e-6)


P = jnp.ones((2, 2))


@pytest.mark.parametrize(
    ("beta", "error", "match"),
    [
        (-1e-4, ValueError, "beta must be at least 0 and finite, but is -0.0001"),
        (math.nan, ValueError, "beta must be at least 0 and finite, but is nan"),
        (math.inf, ValueError, "beta must be at least 0 and finite, but is inf"),
        (jnp.float32(-1), ValueError, "beta must be at least 0"),
        ("x", TypeError, "beta must be a scalar or a schedule, not 'x'"),
        (None, TypeError, "beta must be a scalar or a schedule, not None"),
        (True, TypeError, "beta must be a scalar or a schedule, not True"),
        (1j, TypeError, "beta must be a scalar"),
        (jnp.ones(2), TypeError, "beta must be a scalar"),
    ],
)
def test_beta_is_checked_on_construction(beta, error, match):
    with pytest.raises(error, match=match):
        parseval(beta)


def test_a_traced_beta_is_checked_for_what_is_known():
    with pytest.raises(TypeError, match="beta must be a scalar"):
        step(P, P, jnp.ones(2))
    tx = parseval(lambda count: jnp.ones(2))
    with pytest.raises(ValueError, match="beta must be a scalar, but has shape"):
        tx.update(P, tx.init(P), P)
    tx = parseval(lambda count: None)
    with pytest.raises(TypeError, match="beta must be a schedule"):
        tx.update(P, tx.init(P), P)


def test_errors_name_the_leaf():
    params = {"Dense_0": {"kernel": P, "bias": jnp.ones(2)}}
    tx = parseval(0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="updates must have the structure of params"):
        tx.update({"Dense_0": {"kernel": P}}, state, params)
    wrong = {"Dense_0": {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}}
    match = r"updates has shape \(1, 2\) at \['Dense_0'\]\['kernel'\].*\(2, 2\)"
    with pytest.raises(ValueError, match=match):
        tx.update(wrong, state, params)
    with pytest.raises(ValueError, match=r"\['Dense_0'\]\['bias'\] has shape \(2,\)"):
        parseval(0.1, mask={"Dense_0": True}).init(params)
    with pytest.raises(ValueError, match="mask has an entry at"):
        parseval(0.1, mask={"Dense_0": False, "Dense_1": True}).init(params)
    small = {"kernel": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    with pytest.raises(TypeError, match=r"parseval cannot handle \['kernel'\].*float8"):
        tx.init(small)


def convex_of(h, residual, logits):
    """In float64, by the logistic function."""
    h, residual, (x, y) = (np.asarray(a, np.float64) for a in (h, residual, logits))
    a = 1 / (1 + math.exp(min(y - x, 700)))
    b = 1 / (1 + math.exp(min(x - y, 700)))
    return a * h + b * residual


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.sampled_from(
        [
            *((dtype, dtype, dtype) for dtype in DTYPES),
            *((dtype, dtype, DTYPES[2]) for dtype in (*LOW, DTYPES[3])),
            (DTYPES[0], DTYPES[1], DTYPES[3]),
            (DTYPES[2], DTYPES[0], DTYPES[1]),
            (DTYPES[2], DTYPES[3], DTYPES[0]),
        ]
    ),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    spread=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 10.0, 1e4, 1e30]),
)
def test_convex_sum_equals_the_reference(seed, dtypes, scale, spread):
    rng, shape = np.random.default_rng(seed), (5, 3)
    h_dtype, r_dtype, l_dtype = dtypes
    largest = lambda *dtypes: min(float(ml_dtypes.finfo(d).max) for d in dtypes) / 10  # noqa: E731
    branches = rng.normal(size=(2, *shape)) * min(scale, largest(h_dtype, r_dtype))
    h, residual = branches[0].astype(h_dtype), branches[1].astype(r_dtype)
    logits = (rng.normal(size=2) * min(spread, largest(l_dtype))).astype(l_dtype)
    with jax.enable_x64(True):
        got = jax.jit(convex_sum)(h, residual, logits)
        out = jnp.promote_types(h_dtype, r_dtype)
    assert got.dtype == out and got.shape == shape
    expected = convex_of(h, residual, logits)
    eps = float(ml_dtypes.finfo(out).eps)
    # Neither a nor b is rounded to 16 bits, so that their sum is 1.
    small = float(np.finfo(np.promote_types(l_dtype, np.float32)).eps)
    near = 20 * max(eps * (eps < 1e-3), small if out != np.float64 else 0, 2e-16)
    atol = near * np.abs(branches).max() + 1e-37
    if out == np.float16:
        atol += 6e-8  # its grid near zero
    rtol = eps + (10 * small if out == np.float64 else 0)
    np.testing.assert_allclose(wide(got), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("logits", [(0, 0), (3, -2), (-1.7, 0.4), (1e30, -1e30)])
def test_a_convex_sum_of_one_thing_is_that_thing(logits, dtype):
    h = jnp.asarray(np.random.default_rng(0).normal(size=1000), dtype)
    got = convex_sum(h, h, jnp.array(logits, jnp.float32)).astype(jnp.float32)
    rtol = 3e-7 if dtype == "float32" else 0
    np.testing.assert_allclose(got, h.astype(jnp.float32), rtol=rtol)


def test_known_convex_sums():
    h, residual = jnp.array([4.0, 0.0]), jnp.array([0.0, 8.0])
    balance = lambda *odds: convex_sum(h, residual, jnp.log(jnp.array(odds)))  # noqa: E731
    np.testing.assert_allclose(balance(3.0, 1.0), [3, 2], rtol=1e-6)
    np.testing.assert_allclose(balance(1.0, 3.0), [1, 6], rtol=1e-6)
    np.testing.assert_array_equal(convex_sum(h, residual, jnp.zeros(2)), [2, 4])
    for low, high in ((-1e30, 1e30), (0.0, jnp.inf)):
        ends = convex_sum(h, residual, jnp.array([high, low]))
        np.testing.assert_array_equal(ends, h if high < jnp.inf else [jnp.nan] * 2)
    shifted = convex_sum(h, residual, jnp.array([7.5, 6.25]))
    same = convex_sum(h, residual, jnp.array([1.25, 0.0]))
    np.testing.assert_array_equal(shifted, same)


def test_derivatives_of_a_convex_sum():
    """By the logits: ``a b <g, h - r>`` and minus that."""
    rng = np.random.default_rng(0)
    h, residual, g = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    logits = jnp.array([0.7, -0.4])
    a = 1 / (1 + math.exp(-1.1))
    grad = jax.jit(jax.grad(lambda *args: jnp.sum(g * convex_sum(*args)), (0, 1, 2)))
    by_h, by_residual, by_logits = grad(h, residual, logits)
    np.testing.assert_allclose(by_h, a * g, rtol=1e-5)
    np.testing.assert_allclose(by_residual, (1 - a) * g, rtol=1e-5)
    slope = a * (1 - a) * jnp.sum(g * (h - residual))
    np.testing.assert_allclose(by_logits, [slope, -slope], rtol=1e-4)
    far = grad(h, residual, jnp.array([1e30, -1e30]))
    np.testing.assert_array_equal(far[2], 0)
    batch = jax.vmap(convex_sum, (0, 0, None))(h, residual, logits)
    np.testing.assert_allclose(batch, convex_sum(h, residual, logits), rtol=1e-6)
    layers = jax.vmap(convex_sum, (None, None, 0))(h, residual, jnp.stack([logits] * 3))
    np.testing.assert_allclose(layers[2], convex_sum(h, residual, logits), rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((P, jnp.ones(2), jnp.zeros(2)), ValueError, r"residual.*\(2, 2\).*has \(2,\)"),
        ((P, 1.0, jnp.zeros(2)), ValueError, r"residual must have the shape of h"),
        ((P, P, jnp.zeros(3)), ValueError, r"logits must have shape \(2,\).*\(3,\)"),
        ((P, P, jnp.zeros((1, 2))), ValueError, r"logits must have.*\(1, 2\)"),
        ((P, P, 0.0), ValueError, r"logits must have shape \(2,\)"),
        ((P.astype(int), P, jnp.zeros(2)), TypeError, "h must be of a floating dtype"),
        ((P, P > 0, jnp.zeros(2)), TypeError, "residual must be.*not bool"),
        ((P, P, jnp.zeros(2, int)), TypeError, "logits must be.*not int32"),
    ],
)
def test_convex_sum_says_what_is_wrong(args, error, match):
    with pytest.raises(error, match=match):
        convex_sum(*args)


@pytest.mark.parametrize("initial", [1e-50, 1e-6, 0.1, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_initial_logits_give_the_initial_balance(initial, dtype):
    with jax.enable_x64(dtype == "float64"):
        logits = initial_logits(initial, dtype)
        assert logits.dtype == dtype and logits.shape == (2,)
        np.testing.assert_allclose(logits.sum(), 0, atol=1e-6)
        rtol = 100 * float(jnp.finfo(dtype).eps)
        got, tiny = jax.nn.softmax(logits), float(jnp.finfo(dtype).tiny)
        both = [initial, 1 - initial]
        np.testing.assert_allclose(got, both, rtol=rtol, atol=tiny)
    np.testing.assert_array_equal(initial_logits(0.5, "bfloat16"), 0)


@pytest.mark.parametrize("initial", [0, 1, -0.1, 1.1, math.nan])
def test_initial_balances_that_no_logits_give(initial):
    with pytest.raises(ValueError, match="initial must be between 0 and 1, but is"):
        initial_logits(initial, "float32")
    for wrong in ("x", None, True, jnp.ones(2)):
        with pytest.raises(TypeError, match="initial must be a number"):
            initial_logits(wrong, "float32")
