"""Increments land where they should, whatever the rounding."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

import weightreg as wr
from weightreg._volumization._box import confine, round_to

LOW = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


DTYPES = [*LOW, np.dtype(np.float32), np.dtype(np.float64)]


def step(p, u, volume, alpha):
    """One update and its application, in two programs as a user may have them."""
    tx = wr.volumize(volume, alpha)
    updates, _ = jax.jit(tx.update)(u, tx.init(p), p)
    return optax.apply_updates(p, updates), updates


@jax.jit
def update(p, u, volume, alpha):
    """Compiled once for all numbers of an example."""
    tx = wr.volumize(volume, alpha)
    return tx.update(u, tx.init(p), p)[0]


@jax.jit
def descend(p, g, lr, volume):
    """``p - lr * g`` and its projection in one program."""
    tx = optax.chain(optax.sgd(lr), wr.volumize(volume, 0.0))
    updates, _ = tx.update(g, tx.init(p), p)
    return optax.apply_updates(p, updates)


def step_in_one(p, u, volume, alpha):
    """The same in one program, where XLA fuses the sum with what comes before."""
    tx = wr.volumize(volume, alpha)
    return jax.jit(lambda p, u: optax.apply_updates(p, tx.update(u, tx.init(p), p)[0]))(
        p, u
    )


magnitudes = st.sampled_from([1e-30, 1e-8, 1e-3, 1.0, 30.0, 1e4, 1e30])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lands_on_the_best_value_that_any_increment_reaches(dtype):
    """Against all 65,536 increments of a 16-bit type, one by one."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    rng = np.random.default_rng(0)
    n = 60
    p = (rng.normal(size=n) * rng.choice([1e-2, 1, 30], n)).astype(dtype)
    u = (rng.normal(size=n) * rng.choice([1e-3, 1, 20], n)).astype(dtype)
    clipped = 0
    for volume in (0.0, 1e-3, 0.1, 0.3, 0.5, 1.0, 2.7):
        wall = dtype.type(volume)
        with np.errstate(over="ignore"):
            reachable = (every[None, :] + p[:, None]).astype(np.float32)
        reachable[np.abs(reachable) > np.float32(wall)] = 0.0  # 0 is always reached
        proposed = p + u
        best = np.where(proposed > 0, reachable.max(1), reachable.min(1)).astype(dtype)
        outside = np.abs(proposed) > wall
        expected = np.where(outside, best, proposed)
        w, _ = step(jnp.asarray(p)[None], jnp.asarray(u)[None], volume, 0.0)
        np.testing.assert_array_equal(np.asarray(w)[0], expected)
        clipped += outside.sum()
    assert clipped > 100


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_rounds_as_a_cast_does(dtype, wide):
    """In a compiled program too, and to float16's subnormal numbers, as NumPy casts."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20_000) * 2.0 ** rng.integers(-26, 16, 20_000)).astype(wide)
    with jax.enable_x64(wide == np.float64), np.errstate(over="ignore"):
        expected = x.astype(dtype).astype(wide)
        rounded = jax.jit(lambda x: round_to(x, dtype))(x)
        slope = jax.grad(lambda x: round_to(x, dtype).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(rounded, expected)
    np.testing.assert_array_equal(slope, 1.0)


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    p_scale=magnitudes,
    u_scale=magnitudes,
    volume=st.one_of(
        st.just(0.0),
        magnitudes,
        st.floats(1e-6, 100.0),
        st.integers(-10, 10).map(lambda k: 2.0**k),
    ),
)
@example(0, np.dtype(np.float16), 1e-3, 1e-30, 1e-8)  # The wall rounds to 0.
def test_no_weight_is_outside_after_a_projection(seed, dtype, p_scale, u_scale, volume):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        with np.errstate(over="ignore"):
            p = jnp.asarray((rng.normal(size=(8, 16)) * p_scale).astype(dtype))
            u = jnp.asarray((rng.normal(size=(8, 16)) * u_scale).astype(dtype))
            wall = np.asarray(volume).astype(dtype)
        updates = update(p, u, jnp.asarray(volume), jnp.asarray(0.0))
        w = optax.apply_updates(p, updates)
        assert w.dtype == updates.dtype == dtype
        finite = np.isfinite(np.asarray(p, np.float64))
        finite &= np.isfinite(np.asarray(u, np.float64))
        assert np.all(np.abs(np.asarray(w)) <= wall, where=finite)

        # Inside, nothing changes; from the box, the wall is reached but for the ties
        # that rounding to even takes away.
        proposed = np.asarray(optax.apply_updates(p, u))
        inside = np.abs(proposed) <= wall
        np.testing.assert_array_equal(np.asarray(w)[inside], proposed[inside])
        starts_inside = np.abs(np.asarray(p)) <= wall
        same_side = np.sign(np.asarray(p)) == np.sign(proposed)
        on_wall = np.abs(np.asarray(w)) >= np.nextafter(wall, dtype.type(0))
        normal = float(wall) > float(ml_dtypes.finfo(dtype).tiny) * 2**12
        if normal:
            assert np.all(on_wall[starts_inside & same_side & ~inside & finite])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_weight_is_outside_where_subnormal_increments_are_lost(dtype):
    """CPUs flush them: of two normal numbers this close, none reaches the other."""
    tiny = float(jnp.finfo(dtype).tiny)
    p, wall = jnp.asarray([1.5 * tiny, -1.5 * tiny], dtype), 1.25 * tiny
    w, _ = step(p[None], jnp.zeros((1, 2), dtype), wall, 0.0)
    assert jnp.all(jnp.abs(w) <= jnp.asarray(wall, dtype))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    lr=st.floats(1e-3, 2.0),
    volume=st.floats(1e-3, 1.0),
)
def test_no_weight_is_outside_when_xla_fuses_the_product(seed, dtype, lr, volume):
    """``p + lr * g`` in one program, where XLA may round once instead of twice."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        p = jnp.asarray(rng.uniform(-1, 1, (32, 32)).astype(dtype) * dtype.type(volume))
        g = jnp.asarray(rng.normal(size=(32, 32)).astype(dtype))
        w = np.asarray(descend(p, g, lr, volume))
        assert np.all(np.abs(w) <= np.asarray(volume).astype(dtype))


@pytest.mark.parametrize(
    ("p_dtype", "u_dtype"),
    list(itertools.product(["bfloat16", "float16", "float32"], repeat=2)),
)
def test_updates_of_another_dtype_are_exact_too(p_dtype, u_dtype):
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 64)), p_dtype)
    u = jnp.asarray(rng.normal(size=(64, 64)), u_dtype)
    w, updates = step(p, u, 0.3, 0.0)
    assert w.dtype == p.dtype
    assert updates.dtype == jnp.promote_types(p.dtype, u.dtype)
    assert jnp.all(jnp.abs(w) <= jnp.asarray(0.3, p_dtype))
    assert jnp.mean(jnp.abs(w) == jnp.asarray(0.3, p_dtype)) > 0.3
    np.testing.assert_array_equal(w, step_in_one(p, u, 0.3, 0.0))


def equations(jaxpr):
    """The equations of a program and of all programs in it, by their names."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_leaf_is_traced_fast(dtype):
    """NumPy's functions are programs of their own, traced anew for every shape."""
    with jax.enable_x64(True):
        leaves = [jnp.ones((2, n), dtype) for n in range(3, 8)]
        walls = dict.fromkeys(range(5), 0.5)
        program = jax.make_jaxpr(lambda p, u: confine(u, p, walls, 0.9))
        names = list(equations(program(leaves, leaves).jaxpr))
    assert names.count("jit") == names.count("custom_jvp_call") == len(leaves)
    assert len(names) <= 130 * len(leaves)  # of them 60 for roundings to float16
