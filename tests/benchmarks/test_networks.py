"""The networks: their convolutions, shapes, and how residual ones start."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax
from quick import jit as quick
from shapes import count, flat, shapes_of

import weightreg as wr
from benchmarks import models, networks

RESNETS = ("resnet", "resnet_convex")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomized(params, scale=0.3):
    """The same tree with normal numbers, so that nothing is zero."""
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        np.float32(scale) * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


@pytest.mark.parametrize(
    ("strides", "window", "shape", "features"),
    [
        (1, 3, (7, 8, 8, 3), 4),  # as tiles
        (1, 5, (1, 7, 9, 1), 4),
        (1, 3, (3, 1, 2, 2), 4),
        (1, 3, (7, 5, 6, 3), 20),  # as shifts
        (1, 5, (5, 7, 9, 1), 20),
        (1, 1, (2, 3, 4, 2), 4),
        (2, 3, (2, 8, 6, 3), 4),
        (2, 5, (2, 7, 9, 2), 4),
        (2, 1, (2, 7, 8, 3), 4),
    ],
)
def test_the_convolution_is_flaxs(strides, window, shape, features):
    x = normal(*shape)
    plain = nn.Conv(features, (window, window), strides)
    ours = networks.Convolution(features, window, strides)
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
    model, x = networks.UnstridedCNN((4, 20), 10), normal(2, 5, 6)
    params = randomized(shapes_of(model, 1, 5, 6))
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
    got = quick(networks.by_tiles, static_argnums=2)(x, kernel, tile)
    expected = quick(networks.by_shifts)(x, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_may_lack_its_bias_and_start_otherwise():
    layer = networks.Convolution(4, use_bias=False, kernel_init=nn.initializers.ones)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))["params"]
    assert list(params) == ["kernel"] and np.all(params["kernel"] == 1)


def test_runs_in_a_loop_on_several_devices_do_not_mix():
    """As the population runs them."""
    model, x = networks.UnstridedCNN((3, 20), 10), normal(6, 5, 6)
    params = randomized(shapes_of(model, 1, 5, 6))
    rows = [jax.tree.map(lambda p, i=i: p * i, params) for i in range(4)]

    gradient = jax.grad(lambda p: jnp.sum(models.logits(model, {"params": p}, x) ** 2))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("runs",))
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


def test_a_wide_resnet_has_the_paper_s_shapes():
    """WRN-28-10 in the form of eq. 16: four blocks in a group, ten times the width."""
    params = shapes_of(networks.ResNet(10, blocks=4, width=10), 1, 32, 32, 3)
    expected, channels = [], 3
    for features in (160, 320, 640):
        for i in range(4):
            expected += [(3, 3, channels if i == 0 else features, features)]
            expected += [(3, 3, features, features)]
            if i == 0:
                expected += [(1, 1, channels, features)]
        channels = features
    expected += [(640, 10)]
    assert [layer.shape for layer in wr.weight_layers(params)] == expected
    # Four shifts and a scale a block, one shift more for each of three shortcuts and
    # one less for the first, which has no ReLU; two shifts and a bias in the end.
    scalars = 12 * 5 + 3 - 1 + 2
    assert count(params) == sum(math.prod(k) for k in expected) + scalars + 10


def test_groups_after_the_first_halve_the_resolution():
    model, x = networks.ResNet(10), normal(1, 7, 7)
    run = lambda x: model.init_with_output(  # noqa: E731
        jax.random.key(0), x, capture_intermediates=True, mutable=True
    )
    _, state = jax.eval_shape(run, x)
    blocks = [state["intermediates"][f"Block_{i}"]["__call__"][0] for i in range(6)]
    sides = [7, 7, 4, 4, 2, 2]
    channels = [16, 16, 32, 32, 64, 64]
    expected = [(1, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert [block.shape for block in blocks] == expected


class Started:
    """A small residual network as it starts, and its gradient."""

    def __init__(self, convex):
        self.convex = convex
        model = networks.ResNet(10, blocks=1, convex=convex)
        x, y = normal(8, 8, 8), jnp.arange(8)
        self.params = quick(model.init)(jax.random.key(0), x)["params"]

        def loss(params):
            logits = models.logits(model, {"params": params}, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), logits

        self.loss = quick(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module", params=[False, True], ids=RESNETS)
def started(request):
    return Started(request.param)


def test_fixup_starts_at_zero_with_scaled_branches(started):
    (_, logits), _ = started.loss(started.params)
    assert np.all(logits == 0)
    for path, leaf in flat(started.params).items():
        last = path.startswith("Block") and "Convolution_1/" in path
        if last or path.startswith("Dense") or path.endswith(("bias", "logits")):
            assert np.all(leaf == 0), path
        elif path.endswith("/scale"):
            assert leaf == 1
        else:
            depth = 3 if "Convolution_0/" in path else 1
            # Fixup's L^(-1/(2m-2)) with m = 2, on branches and not on shortcuts
            expected = math.sqrt(2 / math.prod(leaf.shape[:-1])) * depth**-0.5
            assert np.std(leaf) == pytest.approx(expected, rel=0.2), path
            assert np.max(np.abs(leaf)) <= math.sqrt(3) * expected


@pytest.mark.parametrize(
    ("features", "strides", "convex"),
    [(4, 1, False), (6, 1, False), (4, 2, False), (4, 1, True), (6, 2, True)],
)
def test_a_block_starts_as_its_shortcut(features, strides, convex):
    h = normal(2, 5, 6, 4)
    block = networks.Block(features, strides, depth=3, convex=convex, activate=True)
    params = quick(block.init)(jax.random.key(0), h)["params"]
    shortcut = h
    if (features, strides) != (4, 1):
        shortcut = h[:, ::strides, ::strides] @ params["Convolution_2"]["kernel"][0, 0]
    else:
        assert "Convolution_2" not in params
    expected = shortcut / 2 if convex else shortcut
    got = quick(block.apply)({"params": params}, h)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convex", [False, True])
def test_two_blocks_by_hand(convex):
    """Equations 16 and 19, with Fixup's scalars."""
    x = normal(2, 4, 5, 3)
    first = networks.Block(6, 1, depth=2, convex=convex, activate=False)
    second = networks.Block(6, 1, depth=2, convex=convex, activate=True)
    one = randomized(shapes_of(first, 1, 4, 5, 3))
    two = randomized(shapes_of(second, 1, 4, 5, 6))

    def convolution(params, i, h):
        kernel = params[f"Convolution_{i}"]["kernel"]
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=names
        )

    def shifts(params):
        return iter([params[f"Shift_{i}"]["bias"] for i in range(4)])

    def aggregated(params, h, residual):
        residual = params["scale"] * residual
        if not convex:
            return h + residual
        a = jax.nn.softmax(params["ConvexSum_0"]["convex_logits"])[0]
        assert 0.1 < a < 0.9 and a != 0.5
        return a * h + (1 - a) * residual

    b = shifts(one)
    residual = convolution(one, 0, x + next(b))
    residual = convolution(one, 1, nn.relu(residual + next(b)) + next(b))
    h = aggregated(one, convolution(one, 2, x + next(b)), residual)
    b = shifts(two)
    residual = convolution(two, 0, nn.relu(h + next(b)) + next(b))
    residual = convolution(two, 1, nn.relu(residual + next(b)) + next(b))
    expected = aggregated(two, h, residual)
    got = quick(second.apply)({"params": two}, quick(first.apply)({"params": one}, x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_what_starts_at_zero_learns(started):
    """Zero layers one after the other, and in the end all."""
    params, moved, losses = started.params, [], []
    for _ in range(4):
        (loss, _), grads = started.loss(params)
        kernels = {k: g for k, g in flat(grads).items() if k.endswith("/kernel")}
        moved.append({k for k, g in kernels.items() if np.any(g != 0)})
        losses.append(float(loss))
        params = jax.tree.map(
            lambda p, g: np.asarray(p) - np.float32(0.1) * np.asarray(g), params, grads
        )
    assert moved[0] == {"Dense_0/kernel"}
    assert {f"Block_{i}/Convolution_1/kernel" for i in range(3)} <= moved[1]
    assert moved[2] == moved[3] == set(kernels)
    assert losses == sorted(losses, reverse=True)


def test_the_balance_of_convex_blocks_is_learnt(started):
    is_balance = lambda path: path.endswith("/convex_logits")  # noqa: E731
    start = [v for k, v in flat(started.params).items() if is_balance(k)]
    assert len(start) == (3 if started.convex else 0)
    assert all(jax.nn.softmax(balance)[0] == 0.5 for balance in start)
    _, grads = started.loss(randomized(started.params))
    assert all(np.any(g != 0) for k, g in flat(grads).items() if is_balance(k))


def test_images_may_lack_the_axis_of_channels():
    x = normal(2, 3, 4)
    np.testing.assert_array_equal(networks.as_images(x), x[..., None])
    np.testing.assert_array_equal(networks.as_images(x[..., None]), x[..., None])


NORMED = {
    "mlp_norm": networks.NormMLP((16,), 10),
    "resnet_norm": networks.NormResNet(10, (1, 2), 4),
    "bottleneck": networks.NormResNet(10, (1, 1), 4, 1, True),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_normalization_follows_every_kernel(name):
    """Hence the scale of no unit's weights changes the outputs, the last one's too."""
    model, x = NORMED[name], 10 * normal(16, 8, 8, 3)
    variables = quick(model.init)(jax.random.key(0), x[:1])
    rng = np.random.default_rng(0)
    run = quick(lambda v: models.training_logits(model, v, x))
    logits, after = run(variables)
    scaled = jax.tree.map(
        lambda p: p * rng.uniform(1, 4, p.shape[-1]) if p.ndim > 1 else p,
        variables["params"],
    )
    got, _ = run({**variables, "params": scaled})
    np.testing.assert_allclose(got, logits, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(jnp.mean(logits, 0), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(logits, 0), 1, rtol=1e-3)
    assert after.keys() == {"batch_stats"}
    before = jax.tree.leaves(variables["batch_stats"])
    moved = zip(before, jax.tree.leaves(after), strict=True)
    assert all(np.abs(a - b).max() > 0 for a, b in moved)
    inference = quick(functools.partial(models.logits, model))(
        {**variables, **after}, x
    )
    assert inference.shape == (16, 10) and np.abs(inference - logits).max() > 0.01


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 5, 7, 2), (3, 1, 2, 1)])
def test_the_usual_convolution_is_flaxs(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain = nn.Conv(4, (3, 3), strides=2, bias_init=nn.initializers.normal())
    variables = quick(plain.init)(jax.random.key(0), x)
    ours = networks.Convolution(4)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    made = jax.eval_shape(ours.init, jax.random.key(0), x)
    assert shapes(made) == shapes(variables)
    got, expected = ours.apply(variables, x), plain.apply(variables, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
