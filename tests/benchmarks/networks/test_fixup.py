"""Wide residual networks by Fixup: their shapes, and how they start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import normal, randomized
from flax import linen as nn
from quick import jit as quick
from shapes import count, flat, shapes_of

import weightreg as wr
from benchmarks import models, networks
from benchmarks.networks.fixup import Block

RESNETS = ("resnet", "resnet_convex")


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
    # The usual one has 36,479,194: a first convolution to 16 channels, hence 13 more of
    # them before the first group, and normalizations in place of the scalars.
    norms = 2 * (16 + 160 + sum(7 * n for n in (160, 320, 640)) + 320 + 640)
    more = 3 * 9 * 16 + 13 * 160 * (9 + 1) + norms - scalars
    assert count(params) == 36_479_194 - more


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
    block = Block(features, strides, depth=3, convex=convex, activate=True)
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
    first = Block(6, 1, depth=2, convex=convex, activate=False)
    second = Block(6, 1, depth=2, convex=convex, activate=True)
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
