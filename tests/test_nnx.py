"""The nnx module against linen's, by hand, under transforms and in training."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import weightreg as wr
import weightreg.linen
import weightreg.nnx
from weightreg.nnx import ConvexSum

RNG = np.random.default_rng(0)
H, R, G = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(3, 6, 4)))


def with_logits(*logits):
    layer = ConvexSum()
    layer.convex_logits[...] = jnp.array(logits)
    return layer


def test_it_starts_at_the_mean_of_the_branches():
    layer = ConvexSum()
    assert isinstance(layer.convex_logits, nnx.Param)
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == {"convex_logits"}
    assert layer.convex_logits[...].shape == (2,)
    assert layer.convex_logits[...].dtype == jnp.float32
    np.testing.assert_allclose(layer(H, R), (H + R) / 2, rtol=1e-6)


@pytest.mark.parametrize("initial", [0.1, 0.9, 1e-6])
def test_it_starts_where_it_is_told(initial):
    expected = initial * H + (1 - initial) * R
    np.testing.assert_allclose(ConvexSum(initial)(H, R), expected, atol=1e-6)
    abstract = nnx.eval_shape(lambda: ConvexSum(initial))
    assert abstract.convex_logits.shape == (2,)


@pytest.mark.parametrize("logits", [(0.0, 0.0), (0.7, -0.4), (-3.0, 8.0), (1e30, 0.0)])
def test_linen_and_nnx_give_the_same_numbers(logits):
    variables = {"params": {"convex_logits": jnp.array(logits)}}
    linen = weightreg.linen.ConvexSum()
    expected = linen.apply(variables, H, R)
    np.testing.assert_array_equal(with_logits(*logits)(H, R), expected)
    loss = lambda layer: jnp.sum(G * layer(H, R))  # noqa: E731
    got = nnx.grad(loss)(with_logits(*logits))["convex_logits"][...]
    of = lambda v: jnp.sum(G * linen.apply(v, H, R))  # noqa: E731
    expected = jax.grad(of)(variables)["params"]["convex_logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    from_linen = weightreg.linen.ConvexSum(0.3).init(jax.random.key(0), H, R)
    start = from_linen["params"]["convex_logits"]
    np.testing.assert_array_equal(ConvexSum(0.3).convex_logits[...], start)


def test_the_derivative_by_hand():
    @nnx.jit
    @nnx.grad
    def grad(layer):
        return jnp.sum(G * layer(H, R))

    a = 1 / (1 + math.exp(-1.1))
    slope = a * (1 - a) * jnp.sum(G * (H - R))
    got = grad(with_logits(0.7, -0.4))["convex_logits"][...]
    np.testing.assert_allclose(got, [slope, -slope], rtol=1e-4)


def test_jit_split_merge_and_clone():
    layer = with_logits(0.7, -0.4)
    expected = layer(H, R)
    np.testing.assert_allclose(nnx.jit(lambda m: m(H, R))(layer), expected, rtol=1e-6)
    definition, state = nnx.split(layer)
    np.testing.assert_array_equal(nnx.merge(definition, state)(H, R), expected)
    run = jax.jit(lambda state: nnx.merge(definition, state)(H, R))
    np.testing.assert_allclose(run(state), expected, rtol=1e-6)
    np.testing.assert_array_equal(nnx.clone(layer)(H, R), expected)


def test_the_dtype_may_be_told():
    layer = ConvexSum(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert layer.convex_logits[...].dtype == jnp.float16
    assert layer(H, R).dtype == jnp.bfloat16
    assert ConvexSum()(H.astype(jnp.bfloat16), R.astype(jnp.bfloat16)).dtype == H.dtype


class Block(nnx.Module):
    def __init__(self, key):
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(key))
        self.sum = ConvexSum(0.75)

    def __call__(self, h):
        return self.sum(h, nnx.relu(self.dense(h)))


def stacked():
    keys = jax.random.split(jax.random.key(0), 3)
    return nnx.vmap(Block, in_axes=0, out_axes=0)(keys)


def test_under_vmap_the_logits_are_stacked_and_still_no_weight():
    state = nnx.state(stacked(), nnx.Param)
    logits = state["sum"]["convex_logits"][...]
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 0], 0.75, rtol=1e-6)
    expected = {
        "dense": {"bias": False, "kernel": True},
        "sum": {"convex_logits": False},
    }
    assert nnx.to_pure_dict(wr.weight_mask(state)) == expected
    assert wr.weight_mask(nnx.to_pure_dict(state)) == expected
    assert [layer.shape for layer in wr.weight_layers(state)] == [(3, 4, 4)]


def test_scanned_blocks_equal_a_loop():
    blocks = stacked()
    spread = jnp.array([[1.0, 0.0], [-2.0, 0.5], [0.0, 0.0]])
    blocks.sum.convex_logits[...] = spread

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(h, block):
        return block(h)

    h = np.asarray(H, np.float64)
    for i in range(3):
        kernel, bias = blocks.dense.kernel[i], blocks.dense.bias[i]
        r = np.maximum(h @ np.asarray(kernel, float) + np.asarray(bias, float), 0)
        a = 1 / (1 + math.exp(spread[i, 1] - spread[i, 0]))
        h = a * h + (1 - a) * r
    np.testing.assert_allclose(forward(H, blocks), h, rtol=1e-4, atol=1e-5)


def test_training_learns_the_balance():
    """Towards 0.8 of one branch, by Adam under volumization, which leaves it alone."""
    target = 0.8 * H + 0.2 * R
    layer = ConvexSum()
    tx = wr.volumized_adam(0.05, volume=0.01, alpha=0.0)
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda layer: jnp.mean((layer(H, R) - target) ** 2)
        )(layer)
        optimizer.update(layer, grads)
        return loss

    losses = [step(layer, optimizer) for _ in range(200)]
    assert losses[-1] < 1e-3 * losses[0]
    a, b = jax.nn.softmax(layer.convex_logits[...])
    np.testing.assert_allclose([a, b], [0.8, 0.2], atol=5e-3)


def test_training_a_stack_leaves_the_box_to_the_weights():
    blocks = stacked()
    tx = optax.chain(optax.sgd(0.01), wr.volumize(0.1, 0.0))
    optimizer = nnx.Optimizer(blocks, tx, wrt=nnx.Param)
    before = blocks.sum.convex_logits[...]
    grads = nnx.grad(lambda b: jnp.sum(nnx.vmap(lambda b: b(H))(b) ** 2))(blocks)
    optimizer.update(blocks, grads)
    moved = blocks.sum.convex_logits[...] - before
    by_hand = -0.01 * grads["sum"]["convex_logits"][...]
    np.testing.assert_allclose(moved, by_hand, rtol=1e-4, atol=1e-6)
    assert np.abs(blocks.sum.convex_logits[...]).max() > 0.3
    assert np.abs(blocks.dense.kernel[...]).max() <= np.float32(0.1)


def test_errors():
    with pytest.raises(
        ValueError, match=r"residual must have the shape of h, \(6, 4\)"
    ):
        ConvexSum()(H, R[:1])
    with pytest.raises(ValueError, match="initial must be between 0 and 1, but is 0"):
        ConvexSum(0)
    with pytest.raises(TypeError, match="initial must be a number, not None"):
        ConvexSum(None)
    with pytest.raises(ValueError, match="Dtype must be inexact"):
        ConvexSum(dtype=jnp.int32)(H, R)


def test_flax_is_imported_by_these_two_files_only():
    """And they are called as its packages without being in their way."""
    code = """
import sys, weightreg
assert not any(name.split(".")[0] == "flax" for name in sys.modules), "flax"
import weightreg.nnx, weightreg.linen
from flax import linen, nnx
assert issubclass(weightreg.nnx.ConvexSum, nnx.Module)
assert issubclass(weightreg.linen.ConvexSum, linen.Module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
