"""Floating-point operations, counted by hand and in traces."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import flops
from benchmarks.settings import Settings


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolved(x, kernel, strides):
    """As networks here do it, with one program for CPU and one for all else."""
    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=(strides, strides),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    twice = lambda x, k: convolve(x, k) + convolve(x, k)  # noqa: E731
    return lax.platform_dependent(x, kernel, cpu=twice, default=convolve)


X, KERNEL = shape(8, 16, 16, 3), shape(3, 3, 3, 5)
# Every pixel of 8 images of 16 by 16 has 5 channels, each of 27 products.
SAME = 2 * 8 * 16 * 16 * 5 * 27


@pytest.mark.parametrize(
    ("fn", "args", "counted"),
    [
        (jnp.matmul, (shape(7, 3), shape(3, 5)), 2 * 7 * 3 * 5),
        (jnp.matmul, (shape(4, 7, 3), shape(4, 3, 5)), 4 * 2 * 7 * 3 * 5),
        (jnp.add, (shape(7, 3), shape(7, 3)), 0),
        # Of the branches for CPU and for all other platforms, the latter's.
        (functools.partial(convolved, strides=1), (X, KERNEL), SAME),
        (functools.partial(convolved, strides=2), (X, KERNEL), SAME / 4),
        (jax.jit(lambda x: jax.checkpoint(jnp.dot)(x, x)), (shape(4, 4),), 2 * 4**3),
        (
            lambda x: lax.scan(lambda c, _: (c @ c, None), x, length=6)[0],
            (shape(4, 4),),
            6 * 2 * 4**3,
        ),
        (
            lambda x: lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x),
            (shape(4, 4),),
            2 * 2 * 4**3,
        ),
    ],
)
def test_products_are_counted(fn, args, counted):
    assert flops.count(fn, *args) == counted


@pytest.mark.parametrize("strides", [1, 2])
def test_each_gradient_of_a_convolution_takes_as_long_as_it(strides):
    def loss(x, kernel):
        return convolved(x, kernel, strides).sum()

    both = flops.count(jax.grad(loss, (0, 1)), X, KERNEL)
    assert both == flops.TRAINING * flops.count(loss, X, KERNEL)
    assert both == 3 * SAME / strides**2


def test_a_loop_of_unknown_length_is_refused():
    loop = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="how often it runs"):
        flops.count(loop, shape(4, 4))
    still = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x - 1, x)  # noqa: E731
    assert flops.count(still, shape(4, 4)) == 0


@pytest.mark.parametrize(
    ("dataset", "model", "billions"),
    [
        ("cifar10", "resnet18", 0.56),
        ("cifar10", "wrn28_10", 5.24),
        ("imagenet", "resnet50_imagenet", 4.1),
        ("cifar10", "vgg16", 0.314),
    ],
)
def test_networks_take_the_published_products(dataset, model, billions):
    settings = Settings.of(dataset, model=model, attacked=0)
    products = flops.forward_flops(settings) / 2
    assert products == pytest.approx(1e9 * billions, rel=0.02)


def mnist(**given):
    return Settings.of("mnist", model="mlp", batch=100, methods=("l2",), **given)


FORWARD = 2 * (784 * 256 + 256 * 10)


def test_an_epoch_is_its_steps_and_its_test():
    examples, tested = 48_000, 10_000
    once = mnist(optimizer="momentum")
    assert flops.forward_flops(once) == FORWARD
    kernels = [leaf.shape for leaf in flops.parameters(once).values() if leaf.ndim > 1]
    assert kernels == [(784, 256), (256, 10)]
    assert flops.epoch_flops(once, "l2") == (3 * examples + tested) * FORWARD
    whole = mnist(whole=True)
    assert flops.epoch_flops(whole, "l2") == (3 * 60_000 + tested) * FORWARD
    few = mnist(examples=250, adversarial=0.1)
    attacked = (3 + 2 * flops.ADVERSARY_STEPS) * 200 + tested
    assert flops.epoch_flops(few, "l2") == attacked * FORWARD


def test_what_parseval_multiplies_is_counted():
    # W W^T W of the layer that is no output, whose smaller side is 256.
    own = 480 * 2 * 2 * 784 * 256 * 256
    without = flops.epoch_flops(mnist(), "l2")
    assert flops.epoch_flops(mnist(), "parseval") == without + own


def test_seconds_are_those_of_a_card_that_was_timed():
    settings = Settings.of("cifar10", model="resnet18", batch=128, whole=True)
    kind = "NVIDIA H100 80GB HBM3"
    seconds = flops.epoch_seconds(settings, "l2", kind)
    tested = 10_000 * 1.112e9 / flops.RATES["H100", "float32"]
    assert seconds == pytest.approx(390 * 5.02e-3 + tested, rel=0.01)
    assert flops.epoch_seconds(settings, "l2", "cpu") is None
    assert flops.epoch_seconds(mnist(), "l2", kind) == 480 * flops.SECONDS_A_STEP
