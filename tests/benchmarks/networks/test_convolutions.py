"""Convolutions are Flax's, however they are computed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal, randomized
from flax import linen as nn
from jax import lax
from quick import jit as quick
from shapes import shapes_of

from benchmarks import models, networks
from benchmarks.networks import convolutions
from benchmarks.networks.convolutions import Convolution


@pytest.mark.parametrize(
    ("strides", "window", "shape", "features", "groups"),
    [
        (1, 3, (7, 8, 8, 3), 4, 1),  # as tiles
        (1, 5, (1, 7, 9, 1), 4, 1),
        (1, 3, (3, 1, 2, 2), 4, 1),
        (1, 3, (7, 5, 6, 3), 20, 1),  # as shifts
        (1, 5, (5, 7, 9, 1), 20, 1),
        (1, 1, (2, 3, 4, 2), 4, 1),
        (2, 3, (2, 8, 6, 3), 4, 1),
        (2, 5, (2, 7, 9, 2), 4, 1),
        (2, 1, (2, 7, 8, 3), 4, 1),
        (1, 3, (6, 5, 4, 6), 4, 2),  # in groups
        (2, 3, (2, 5, 4, 4), 6, 2),
        (1, 5, (6, 5, 4, 3), 3, 3),
        (2, 3, (2, 5, 4, 3), 6, 3),
    ],
)
def test_the_convolution_is_flaxs(strides, window, shape, features, groups):
    x = normal(*shape)
    plain = nn.Conv(features, (window, window), strides, feature_group_count=groups)
    ours = Convolution(features, window, strides, groups=groups)
    params = shapes_of(plain, *shape)
    assert shapes_of(ours, *shape) == params
    params = randomized(params)

    @quick
    def both(params, x):
        results = []
        for module in (ours, plain):
            y, pullback = jax.vjp(module.apply, {"params": params}, x)
            results.append((y, pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape))))
        return results

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-4)


def test_accelerators_are_given_convolutions_and_cpus_products():
    """In the gradient too, as vmap, loops and checkpoints leave it."""
    layers = [Convolution(4), Convolution(20, strides=1), Convolution(20, groups=4)]
    model, x = nn.Sequential(layers), normal(2, 5, 6, 1)
    params = randomized(shapes_of(model, 1, 5, 6, 1))
    loss = jax.checkpoint(lambda p: jnp.sum(models.logits(model, {"params": p}, x)))
    rows = jax.tree.map(lambda p: np.stack([p, p]), params)
    for mapped in (jax.vmap(jax.grad(loss)), lambda p: lax.map(jax.grad(loss), p)):
        traced = jax.jit(mapped).trace(rows)
        for platform in ("cpu", "cuda"):
            program = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("stablehlo.convolution" in program) == (platform != "cpu")


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 9])
def test_tiles_of_any_width_make_the_same(tile):
    x, kernel = normal(2, 5, 7, 3), normal(5, 5, 3, 2)
    got = quick(convolutions.by_tiles, static_argnums=2)(x, kernel, tile)
    expected = quick(convolutions.by_shifts)(x, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_may_lack_its_bias_and_start_otherwise():
    layer = Convolution(4, use_bias=False, kernel_init=nn.initializers.ones)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))["params"]
    assert list(params) == ["kernel"] and np.all(params["kernel"] == 1)


def test_runs_in_a_loop_on_several_devices_do_not_mix(cpu_mesh):
    """As the population runs them."""
    model, x = networks.UnstridedCNN((3, 20), 10), normal(6, 5, 6)
    params = randomized(shapes_of(model, 1, 5, 6))
    rows = [jax.tree.map(lambda p, i=i: p * i, params) for i in range(4)]

    gradient = jax.grad(lambda p: jnp.sum(models.logits(model, {"params": p}, x) ** 2))

    mesh = cpu_mesh((2,), ("runs",))
    runs = jax.sharding.PartitionSpec("runs")
    spread = jax.shard_map(
        lambda rows: jax.lax.map(gradient, rows),
        mesh=mesh,
        in_specs=runs,
        out_specs=runs,
        check_vma=False,
    )
    got = quick(spread)(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
    alone = [quick(gradient)(row) for row in rows]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_groups_divide_the_channels():
    with pytest.raises(ValueError, match=r"groups must divide the 4 .* 6 .* is 4\."):
        shapes_of(Convolution(6, groups=4), 1, 3, 3, 4)
