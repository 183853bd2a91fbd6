"""LaProp where it differs from what Optax has, and the three named optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything


def run(tx, grads):
    state = tx.init(grads[0])
    out = []
    for g in grads:
        u, state = jax.jit(tx.update)(g, state, g)
        out.append(np.asarray(u, np.float64))
    return np.array(out), state


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e15])
def test_laprop_does_not_depend_on_the_scale_of_gradients(scale):
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)), jnp.float32)
    reference, _ = run(wr.scale_by_laprop(eps=0.0), grads)
    with jax.enable_x64(True):
        scaled = jnp.asarray(np.asarray(grads, np.float64) * scale)
        u, _ = run(wr.scale_by_laprop(eps=0.0), scaled)
    np.testing.assert_allclose(u, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_laprop_survives_16_bits(dtype):
    """Squares of these gradients underflow in float16; their average must not."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)) * 1e-4, dtype)
    low, state = run(wr.scale_by_laprop(), g)
    exact, _ = run(wr.scale_by_laprop(), g.astype(jnp.float32))
    assert state.nu.dtype == jnp.float32
    assert state.mu.dtype == dtype
    np.testing.assert_allclose(low, exact, atol=0.05)
    assert np.abs(low).max() > 0.5


def test_laprop_gives_zero_for_zero_gradients():
    u, _ = run(wr.scale_by_laprop(eps=0.0), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(u, 0.0)


def test_bias_corrections_make_constant_gradients_constant_steps():
    for decay in (0.0, 0.5, 0.999, 0.9999999):
        u, _ = run(wr.scale_by_laprop(b1=decay, b2=decay), jnp.full((20, 3), 0.3))
        np.testing.assert_allclose(u, 1.0, rtol=1e-5)


def test_laprop_refuses_gradients_of_another_shape():
    tx = wr.scale_by_laprop()
    with pytest.raises(AssertionError, match=r"(?s)a.*shape"):
        tx.update({"a": jnp.ones(1)}, tx.init({"a": jnp.ones(3)}))


def test_laprop_keeps_the_phase_of_complex_gradients():
    g = jnp.array([1 + 1j, 2j, 0])
    tx = wr.scale_by_laprop()
    updates, state = tx.update(g, tx.init(g))
    assert (state.nu.dtype, state.mu.dtype) == (jnp.float32, jnp.complex64)
    np.testing.assert_allclose(updates, [(1 + 1j) / 2**0.5, 1j, 0], rtol=1e-6)


def test_laprop_takes_python_numbers():
    tx = wr.laprop(0.1)
    updates, _ = tx.update(3.0, tx.init(2.0))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-6)


INPUTS = np.array([[1, 0], [3, 0]], np.float32)  # of which the second is unused


@jax.jit
def loss_after_three_steps(b1, b2, volume, alpha):
    tx = wr.volumized_laprop(0.1, b1, b2, eps=1e-8, volume=volume, alpha=alpha)
    params = jnp.array([[2.0], [2.0]])
    state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.sum((INPUTS @ p - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jnp.sum((INPUTS @ params) ** 2) + jnp.sum(params)


derivatives = jax.jit(jax.grad(loss_after_three_steps, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("b2", [0.0, 0.999])
def test_derivatives_by_hyperparameters_are_finite_and_right(b1, b2):
    """Also where gradients are exactly zero, as those of an unused input."""
    with jax.enable_x64(True):
        at = (b1, b2, 0.5, 0.7)
        got = derivatives(*at)
        for i, derivative in enumerate(got):
            h = 1e-6
            up, down = (
                tuple(v + s * (j == i) for j, v in enumerate(at)) for s in (h, -h)
            )
            below = down if at[i] else at  # no decay is negative
            rise = loss_after_three_steps(*up) - loss_after_three_steps(*below)
            slope = rise / (up[i] - below[i])
            np.testing.assert_allclose(derivative, slope, rtol=1e-3, atol=1e-4)


@quick.bits
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (wr.volumized_sgd, lambda lr: optax.sgd(lr, momentum=0.9)),
        (wr.volumized_adam, optax.adam),
        (wr.volumized_laprop, wr.laprop),
    ],
)
def test_named_optimizers_wrap_what_their_names_say(ours, theirs):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(10, 5, 4)), jnp.float32)
    named = ours(0.1, volume=0.5, alpha=0.25)
    wrapped = wr.volumized(theirs(0.1), 0.5, 0.25)
    p, q, s, t = params, params, named.init(params), wrapped.init(params)
    for g in grads:
        u, s = named.update(g, s, p)
        v, t = wrapped.update(g, t, q)
        p, q = p + u, q + v
    np.testing.assert_array_equal(p, q)
    assert jax.tree.structure(s) == jax.tree.structure(t)


@quick.bits
@pytest.mark.parametrize(
    "named", [wr.volumized_sgd, wr.volumized_adam, wr.volumized_laprop]
)
def test_mask_and_dims_arrive(named):
    params = {"a": jnp.ones((2, 8)), "b": jnp.ones((2, 8))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    dims = {"a": Dims(reduction_axis=1, output_axis=0), "b": Dims()}
    rule = wr.he_volume(0.1, fan="in")
    tx = named(0.1, volume=rule, alpha=0.0, mask={"a": True, "b": False}, dims=dims)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(1 + updates["a"], 0.1 * (6 / 8) ** 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_keyword_options_arrive():
    sgd = wr.volumized_sgd(
        0.1, 0.5, volume=1.0, alpha=0.0, nesterov=True, accumulator_dtype="bfloat16"
    )
    adam = wr.volumized_adam(
        0.1, volume=1.0, alpha=0.0, nesterov=True, mu_dtype="bfloat16"
    )
    laprop = wr.volumized_laprop(0.1, volume=1.0, alpha=0.0, mu_dtype="bfloat16")
    p, g = jnp.zeros((2, 2)), jnp.ones((2, 2))
    for tx, name in ((sgd, "trace"), (adam, "mu"), (laprop, "mu")):
        _, state = tx.update(g, tx.init(p), p)
        assert optax.tree.get(state, name).dtype == jnp.bfloat16
    updates, _ = sgd.update(g, sgd.init(p), p)
    np.testing.assert_allclose(updates, -0.15, rtol=1e-2)  # g + 0.5 g
    updates, _ = adam.update(g, adam.init(p), p)
    plain, _ = optax.adam(0.1).update(g, optax.adam(0.1).init(p))
    assert not np.allclose(updates, plain)
