"""FGSM and PGD against Foolbox on one network, at the same settings."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import eagerpy as ep
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import weightreg as wr
from benchmarks import data

with warnings.catch_warnings():
    # Foolbox 3.3.4 imports what SciPy has moved, and nothing else that is deprecated
    warnings.filterwarnings(
        "ignore",
        message=r"Please import `gaussian_filter` from the `scipy\.ndimage` namespace",
        category=DeprecationWarning,
    )
    import foolbox

pytestmark = quick.everything

STEPS = 12
EPSILONS = (0.02, 0.1, 0.2)
TOLERANCES = {"float32": 5e-7, "float64": 1e-12}
FGSM = {
    "linf": foolbox.attacks.LinfFastGradientAttack,
    "l2": foolbox.attacks.L2FastGradientAttack,
}
PGD = {
    "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
    "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
}


def logits(params, x):
    hidden = jax.nn.relu(x @ params["v"] + params["a"])
    return hidden @ params["w"] + params["b"]


def losses(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


@functools.cache
def trained():
    """A small network, and what it is tested on."""
    digits = data.load("digits")
    x, y = jnp.asarray(digits.x_train), jnp.asarray(digits.y_train)
    keys = jax.random.split(jax.random.key(0), 300)
    params = {
        "v": jax.random.normal(keys[0], (64, 32)) / 8,
        "a": jnp.zeros(32),
        "w": jax.random.normal(keys[1], (32, 10)) / 6,
        "b": jnp.zeros(10),
    }
    tx = optax.adam(5e-3)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(x))
        mean = lambda p: losses(p, x[rows], y[rows]).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(mean)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, _ = jax.device_get(run((params, tx.init(params))))
    return params, digits.x_test, digits.y_test


class Problem(NamedTuple):
    """A network as Foolbox takes it and as we do, and inputs to attack it at."""

    model: foolbox.JAXModel
    loss: Callable
    x: jax.Array
    y: jax.Array
    tolerance: float


@functools.cache  # compiled once for all tests
def problem_in(dtype):
    params, x, y = trained()
    params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x))
    network = functools.partial(logits, params)

    def loss(x, y):
        # In float32 the gradient of Optax's cross-entropy is off by 1e-3 of its length
        # where the network is sure, so that signs differ; it is not what is compared
        if x.dtype == jnp.float32:
            return ep.crossentropy(ep.astensor(network(x)), ep.astensor(y)).raw
        return losses(params, x, y)

    model = foolbox.JAXModel(jax.jit(network), bounds=(0, 1))
    return Problem(model, jax.jit(loss), x, jnp.asarray(y), TOLERANCES[dtype])


@pytest.fixture(params=TOLERANCES)
def problem(request):
    trained()  # in float32, whichever test is first
    with jax.enable_x64(request.param == "float64"):
        yield problem_in(request.param)


@functools.partial(jax.jit, static_argnames=("attack", "loss", "norm"))
def ours(attack, loss, x, y, epsilon, norm, **settings):
    return attack(loss, x, y, epsilon, norm=norm, **settings)


def squares(x, y):
    """As a loss, highest far from y: PGD without steps returns where it starts."""
    return jnp.sum((x - y) ** 2, axis=-1)


def watched(attack, start, points):
    """Foolbox's attack from a given start, keeping where it has taken gradients."""

    class Watched(attack):
        def get_random_start(self, x0, epsilon):
            return type(x0)(start)

        def value_and_grad(self, loss_fn, x):
            points.append(x.raw)
            return super().value_and_grad(loss_fn, x)

    return Watched


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("norm", FGSM)
def test_fgsm_finds_the_same_points(problem, norm, epsilon):
    model, loss, x, y, tolerance = problem
    _, theirs, success = FGSM[norm]()(model, x, y, epsilons=epsilon)
    got = ours(wr.fgsm, loss, x, y, epsilon, norm)
    assert got.dtype == theirs.dtype == x.dtype
    np.testing.assert_allclose(got, theirs, rtol=0, atol=tolerance)
    assert np.any((got > 0) & (got < 1) & (got != x))
    np.testing.assert_array_equal(model(got).argmax(-1) != y, success)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(
    ("norm", "random"), (("linf", False), ("linf", True), ("l2", False))
)
def test_pgd_finds_the_strongest_point_of_the_same_path(problem, norm, random, epsilon):
    """Foolbox returns the last point of its path, which may not be the strongest."""
    model, loss, x, y, tolerance = problem
    key, start, size = None, x, epsilon / 4
    if random:
        key = jax.random.key(0)
        start = ours(wr.pgd, squares, x, x, epsilon, norm, steps=0, key=key)
        assert np.mean(start != x) > 0.7  # the rest were at a bound and stay there
    points = []
    attack = watched(PGD[norm], start, points)(
        abs_stepsize=size, rel_stepsize=None, steps=STEPS, random_start=random
    )
    _, last, success = attack(model, x, y, epsilons=epsilon)
    settings = {"steps": STEPS, "step_size": size, "key": key}
    got = ours(wr.pgd, loss, x, y, epsilon, norm, **settings)

    path = np.stack([x, *points, last])
    values = np.stack([loss(point, y) for point in path])
    distances = np.abs(path - got).max(-1)
    strong = values >= values.max(0) - 10 * tolerance
    # Of points that are equally strong, rounding decides which is found
    assert np.all(distances.min(0) <= tolerance)
    assert np.all(loss(got, y) >= values.max(0) - 10 * tolerance)
    # In the L2 norm most paths end where they are strongest
    assert norm == "l2" or 0 < np.mean(strong[-1]) < 1
    ends = np.all(~strong | (np.abs(path - last).max(-1) <= tolerance), axis=0)
    assert np.any(ends) or x.dtype == jnp.float32
    np.testing.assert_allclose(got[ends], last[ends], rtol=0, atol=tolerance)
    assert np.sum(model(got).argmax(-1) == y) <= np.sum(~success)
