"""Losses against independent references, special cases and extreme values."""

import dataclasses
import decimal
import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from weightreg._robustness import _losses
from weightreg._robustness._losses import generalized_cross_entropy, max_mahalanobis

pytestmark = quick.everything

LOW = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
DTYPES = [*LOW, np.dtype(np.float32), np.dtype(np.float64)]
# Zero, subnormal numbers, and normal ones.
QS = [0.0, 5e-324, 1e-40, 1e-37, 1e-30, 1e-8, 1e-3, 0.1, 0.5, 0.7, 0.99, 1.0]


def gce_of(logits, label, q):
    """One example, in 60 digits."""
    with decimal.localcontext(prec=60, Emin=-(10**9), Emax=10**9):
        z = [decimal.Decimal(float(x)) for x in logits]
        total = sum((x - z[label]).exp() for x in z)  # one over the probability
        if q == 0:
            return float(total.ln())
        q = decimal.Decimal(float(q))
        return float((1 - (-q * total.ln()).exp()) / q)


def gce_gradient_of(logits, label, q):
    """By the logits, in float64: that of cross-entropy times ``p_y ** q``."""
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    power = math.exp(q * (z[label] - z.max() - math.log(np.exp(z - z.max()).sum())))
    return power * (p - np.eye(len(z))[label])


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(loss, z, *args):
    """Losses, and the gradient of their sum by ``z``."""
    value, pull = jax.vjp(lambda z: loss(z, *args), z)
    return value, pull(jnp.ones_like(value))[0]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(30, 12), (2, 3, 2), (1,)]),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 10.0, 300.0, 1e4]),
    q=st.one_of(st.sampled_from(QS), st.floats(0, 1)),
)
def test_gce_equals_the_reference(seed, dtype, shape, scale, q):
    rng = np.random.default_rng(seed)
    *batch, classes = shape
    z = (rng.normal(size=shape) * scale).astype(dtype)
    y = rng.integers(0, classes, size=batch)
    wide = np.promote_types(dtype, np.float32)
    with jax.enable_x64(True):
        got, gradient = pulled_back(generalized_cross_entropy, z, y, q)
    assert got.dtype == wide and got.shape == y.shape
    assert gradient.dtype == dtype and gradient.shape == z.shape
    eps = float(np.finfo(wide).eps)
    q = float(wide.type(q)) if abs(q) > 1e-37 else 0.0  # those are flushed to zero
    for i in np.ndindex(*batch):
        expected = gce_of(z[i], y[i], q)
        np.testing.assert_allclose(got[i], expected, rtol=20 * eps, atol=4 * eps)
        spread = max(1.0, abs(gce_of(z[i], y[i], 0)))  # p**q rounds as q log p does
        tolerance = 20 * eps * spread + float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(gradient[i], np.float64),
            gce_gradient_of(z[i], y[i], q),
            rtol=0,
            atol=tolerance,
        )


@quick.bits
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gce_without_q_is_cross_entropy(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        z = jnp.asarray(rng.normal(size=(50, 7)) * 4, dtype)
        y = jnp.asarray(rng.integers(0, 7, 50))
        optaxs = optax.softmax_cross_entropy_with_integer_labels
        eps = float(jnp.finfo(dtype).eps)
        for q in (0, jnp.float32(0)):
            got = pulled_back(generalized_cross_entropy, z, y, q)
            for ours, theirs in zip(got, pulled_back(optaxs, z, y), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=9 * eps, atol=9 * eps)
        with jax.disable_jit():
            log_p = np.asarray(jax.nn.log_softmax(z))[np.arange(50), y]
            exactly = generalized_cross_entropy(z, y, 0)
        np.testing.assert_array_equal(exactly, -log_p)  # to the bit


def test_no_examples_at_all():
    z, y = jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)
    for loss in (generalized_cross_entropy, max_mahalanobis(3, 3)):
        assert loss(z, y).shape == (0,)


def test_gce_at_one_is_half_the_absolute_error():
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(50, 7))), jnp.asarray(rng.integers(0, 7, 50))
    error = jnp.abs(jax.nn.softmax(z) - jax.nn.one_hot(y, 7)).sum(-1)
    np.testing.assert_allclose(generalized_cross_entropy(z, y, 1.0), error / 2, 1e-5)


def test_gce_defaults_to_the_papers_q():
    z, y = jnp.log(jnp.array([[0.5, 0.5], [1.0, 3.0]])), jnp.array([0, 1])
    expected = [(1 - 0.5**0.7) / 0.7, (1 - 0.75**0.7) / 0.7]
    np.testing.assert_allclose(generalized_cross_entropy(z, y), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
@pytest.mark.parametrize("q", QS)
def test_gce_is_finite_for_logits_of_any_size(scale, q):
    z = jnp.array([[scale, -scale, 0.0], [-scale, scale, 0.0], [scale] * 3])
    y = jnp.array([1, 0, 2])
    loss, gradient = pulled_back(generalized_cross_entropy, z, y, q)
    q = q if q > 1e-38 else 0.0
    far = 2 * scale if q * scale < 1e-20 else -math.expm1(-q * 2 * scale) / q
    if scale == 3e38 and q < 1:  # such a difference of logits is infinite in float32
        far = 1 / q if q else np.inf
    near = gce_of([0, 0, 0], 0, q)
    np.testing.assert_allclose(loss, [far, far, near], rtol=2e-6)
    assert np.all(np.isfinite(gradient))
    weight = 1.0 if q == 0 else math.exp(-q * 2 * scale)
    third = np.array([1, 1, -2]) / 3 * 3.0**-q
    expected = [[weight, -weight, 0], [-weight, weight, 0], third]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_gce_of_classes_that_are_taken_out():
    z = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, 0.0]])
    y = jnp.array([0, 1])
    for q, expected in ((0.5, [2 - 2 * 0.5**0.5, 2.0]), (0.0, [math.log(2), np.inf])):
        got, gradient = pulled_back(generalized_cross_entropy, z, y, q)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        weight = np.array([[0.5**q], [0.0 if q else 1.0]])
        expected = weight * np.array([[-0.5, 0, 0.5], [0.5, -1, 0.5]])
        np.testing.assert_allclose(gradient, expected, atol=1e-7)
    by_q = jax.jacfwd(lambda q: generalized_cross_entropy(z, y, q))(0.5)
    np.testing.assert_allclose(by_q[1], -1 / 0.5**2, rtol=1e-6)


def derivatives_by_q(q, log_p):
    """The first and second of ``(1 - p^q) / q`` in 60 digits; their limits at 0."""
    with decimal.localcontext(prec=60):
        q, log_p = decimal.Decimal(q), decimal.Decimal(log_p)
        if q < 1e-20:
            return float(-(log_p**2) / 2), float(-(log_p**3) / 3)
        power = (q * log_p).exp()
        first = -log_p * power / q - (1 - power) / q**2
        second = -(log_p**2) * power / q + 2 * log_p * power / q**2
        return float(first), float(second + 2 * (1 - power) / q**3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gce_derivatives_by_q(dtype):
    qs = np.array([0, 1e-30, 1e-9, 1e-4, 0.01, 0.24, 0.26, 0.7, 1], dtype)
    log_ps = np.array([-1e-3, -0.3, -2, -40], dtype)
    q, log_p = (x.ravel() for x in np.meshgrid(qs, log_ps))
    expected = np.array(
        [derivatives_by_q(*map(float, x)) for x in zip(q, log_p, strict=True)]
    )
    loss = lambda q, log_p: _losses._lost_power(log_p, q)  # noqa: E731
    tolerance = 20 * np.finfo(dtype).eps
    with jax.enable_x64(dtype == "float64"):
        for differentiate in (jax.grad, jax.jacfwd):
            got = quick.jit(jax.vmap(differentiate(loss)))(q, log_p)
            np.testing.assert_allclose(got, expected[:, 0], rtol=tolerance)
        got = quick.jit(jax.vmap(jax.grad(jax.grad(loss))))(q, log_p)
        np.testing.assert_allclose(got, expected[:, 1], rtol=20 * tolerance)


def test_gce_hessian():
    """``p^q (diag(s) - s s^T - q (s - e) (s - e)^T)`` for the softmax ``s``."""
    z, y, qs = np.random.default_rng(0).normal(size=4), 2, np.array([0, 1e-6, 0.3, 1])
    s, e = np.exp(z) / np.exp(z).sum(), np.eye(4)[y]
    with jax.enable_x64(True):
        hessian = jax.hessian(lambda z, q: generalized_cross_entropy(z, y, q))
        got = quick.jit(jax.vmap(hessian, (None, 0)))(z, qs)
    for q, h in zip(qs, got, strict=True):
        inner = np.diag(s) - np.outer(s, s) - q * np.outer(s - e, s - e)
        np.testing.assert_allclose(h, s[y] ** q * inner, rtol=1e-12, atol=1e-14)


def test_gce_is_continuous_where_the_series_ends():
    with jax.enable_x64(True):
        q, edge = 0.25, -0.5 / 0.25
        below, above = jnp.nextafter(edge, -9.0), jnp.nextafter(edge, 9.0)
        losses = [_losses._lost_power(x, jnp.float64(q)) for x in (below, above)]
        np.testing.assert_allclose(*losses, rtol=1e-15)
        np.testing.assert_allclose(losses[0], -math.expm1(-0.5) / q, rtol=1e-15)


def test_gce_under_vmap_equals_a_loop():
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(6, 5))), jnp.asarray(rng.integers(0, 5, 6))
    qs = jnp.array([0.0, 1e-9, 0.3, 1.0])
    mapped = jax.vmap(lambda q: generalized_cross_entropy(z, y, q))(qs)
    one = jax.vmap(generalized_cross_entropy, in_axes=(0, 0, None))(z, y, 0.3)
    for q, got in zip(qs, mapped, strict=True):
        expected = generalized_cross_entropy(z, y, q)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(one, mapped[2], rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_gce_along_any_axis(axis):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(4, 5, 6)))
    moved = jnp.moveaxis(z, axis, -1)
    y = jnp.asarray(rng.integers(0, moved.shape[-1], moved.shape[:-1]))
    with jax.numpy_rank_promotion("raise"):
        got = generalized_cross_entropy(z, y, axis=axis)
    np.testing.assert_allclose(got, generalized_cross_entropy(moved, y), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_labels_of_any_integer_dtype_and_of_no_class(dtype):
    top = np.iinfo(dtype).max
    y = jnp.asarray([0, 299 if top > 299 else 2, top], dtype)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 300)))
    loss = generalized_cross_entropy(z, y)
    assert np.isnan(loss[2]) == (top >= 300)
    np.testing.assert_allclose(
        loss[:2], generalized_cross_entropy(z[:2], y[:2].astype(int)), rtol=1e-6
    )
    near = max_mahalanobis(300, 300)
    assert np.isnan(near(z, y)[2]) == (top >= 300)
    assert np.all(np.isfinite(near(z, y)[:2]))


def test_labels_outside_give_nan_and_only_for_their_examples():
    """Neither the last class, as NumPy's -1 would be, nor no loss at all."""
    z, y = jnp.zeros((4, 3)), jnp.array([-1, 3, 2, -3])
    expected = [True, True, False, True]
    for loss in (generalized_cross_entropy, max_mahalanobis(3, 3)):
        np.testing.assert_array_equal(np.isnan(quick.jit(loss)(z, y)), expected)


def test_nan_logits_stay_in_their_examples():
    z = jnp.array([[jnp.nan, 0.0], [0.0, 0.0]])
    got = np.isnan(generalized_cross_entropy(z, jnp.array([0, 0])))
    np.testing.assert_array_equal(got, [True, False])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_losses_keep_the_sharding_of_the_batch(axis_type, cpu_mesh):
    mesh = cpu_mesh((8,), ("x",), axis_type)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(16, 3)).astype(np.float32)
    y = rng.integers(0, 3, 16).astype(np.int32)
    near = max_mahalanobis(3, 3)
    for loss in (generalized_cross_entropy, near, lambda z, y: near.logits(z) ** 2):
        expected = loss(z, y)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, PartitionSpec("x"))
            sharded = jax.device_put(z, rows), jax.device_put(y, rows)
            got, gradient = pulled_back(loss, *sharded)
        assert got.sharding.is_equivalent_to(rows, got.ndim)
        assert gradient.sharding.is_equivalent_to(rows, 2)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


Z, Y = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((Z, Y, -0.1), {}, ValueError, "q must be in [0, 1], but is -0.1"),
        ((Z, Y, 1.1), {}, ValueError, "q must be in [0, 1], but is 1.1"),
        ((Z, Y, math.nan), {}, ValueError, "q must be in [0, 1], but is nan"),
        ((Z, Y, jnp.float32(2)), {}, ValueError, "q must be in [0, 1], but is 2.0"),
        ((Z, Y, "x"), {}, TypeError, "q must be a scalar, not 'x'"),
        ((Z, Y, None), {}, TypeError, "q must be a scalar, not None"),
        ((Z, Y, True), {}, TypeError, "q must be a scalar, not True"),
        ((Z, Y, jnp.ones(4)), {}, TypeError, "q must be a scalar"),
        ((Y, Y), {}, TypeError, "logits must be of a floating dtype, not int32"),
        ((Z, Z), {}, TypeError, "labels must be of an integer dtype, not float32"),
        ((Z, Y > 0), {}, TypeError, "labels must be of an integer dtype, not bool"),
        ((Z, Y[:3]), {}, ValueError, "labels must have shape (4,), one label"),
        ((Z, Y[:, None]), {}, ValueError, "but have (4, 1)"),
        ((Z, Y), {"axis": 0}, ValueError, "labels must have shape (3,)"),
        ((Z, Y), {"axis": 2}, ValueError, "axis must be one of the 2 axes of logits"),
        ((Z, Y), {"axis": -3}, ValueError, "(4, 3), but is -3"),
        ((Z[0, 0], Y[0]), {}, ValueError, "axis must be one of the 0 axes"),
    ],
)
def test_gce_says_what_is_wrong(args, kwargs, error, match):
    with pytest.raises(error, match=re.escape(match)):
        generalized_cross_entropy(*args, **kwargs)


def test_a_traced_q_is_checked_for_what_is_known():
    for q in (jnp.ones(2), jnp.complex64(0.5), jnp.array(True)):
        with pytest.raises(TypeError, match="q must be a scalar"):
            quick.jit(lambda q: generalized_cross_entropy(Z, Y, q))(q)


def centers_of(classes, features):
    """The paper's recursion, entry by entry."""
    mu = np.zeros((classes, features))
    mu[0, 0] = 1.0
    for i in range(1, classes):
        for j in range(i):
            inner = sum(mu[i, k] * mu[j, k] for k in range(j))
            mu[i, j] = -(1 / (classes - 1) + inner) / mu[j, j]
        if i < classes - 1:  # nothing but rounding is left of the last centre's norm
            mu[i, i] = math.sqrt(1 - sum(mu[i, k] ** 2 for k in range(i)))
    return mu


@settings(deadline=None, max_examples=60)
@example(classes=2, more=-1, norm=10.0)
@given(
    classes=st.integers(2, 30),
    more=st.integers(-1, 5),
    norm=st.sampled_from([1e-30, 0.5, 1.0, 10.0, 1e30]),
)
def test_centers_are_a_regular_simplex_by_the_papers_recursion(classes, more, norm):
    features = classes + more
    loss = max_mahalanobis(classes, features, norm)
    assert loss.centers.shape == (classes, features)
    assert loss.centers.dtype == np.float64
    unit = loss.centers / norm
    np.testing.assert_allclose(unit, centers_of(classes, features), atol=1e-13)
    gram = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(gram, 1)
    np.testing.assert_allclose(unit @ unit.T, gram, atol=1e-13)
    np.testing.assert_allclose(unit.sum(0), 0, atol=1e-12)
    assert not np.any(unit[:, classes - 1 :])
    assert not np.any(np.triu(unit, 1))
    assert np.all(np.diag(unit)[: classes - 1] > 0)


@pytest.mark.parametrize(("classes", "features"), [(1000, 999), (1000, 2048)])
def test_a_thousand_centers(classes, features):
    centers = max_mahalanobis(classes, features).centers
    gram = centers @ centers.T
    np.testing.assert_allclose(np.diag(gram), 100, rtol=1e-12)
    others = gram[~np.eye(classes, dtype=bool)]
    np.testing.assert_allclose(others, -100 / 999, rtol=1e-10)


def test_known_centers():
    root = math.sqrt(3) / 2
    expected = [[10, 0], [-5, 10 * root], [-5, -10 * root]]
    np.testing.assert_allclose(max_mahalanobis(3, 2).centers, expected, atol=1e-13)
    np.testing.assert_array_equal(max_mahalanobis(2, 1, 3).centers, [[3], [-3]])


def test_centers_that_are_not_what_they_should_be_raise(monkeypatch):
    monkeypatch.setattr(_losses.math, "sqrt", lambda x: x**0.5 + 1e-9)
    with pytest.raises(ArithmeticError, match=r"the 10 centres.*off by"):
        max_mahalanobis(10, 20)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    case=st.sampled_from([((30, 8), 6, 1e4), ((2, 3, 2), 3, 10.0), ((5,), 2, 1e-3)]),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 10.0, 1e4, 1e17]),
)
def test_max_mahalanobis_equals_the_reference(seed, dtype, case, scale):
    shape, classes, norm = case
    rng = np.random.default_rng(seed)
    *batch, features = shape
    with np.errstate(over="ignore"):
        z = (rng.normal(size=shape) * scale).astype(dtype)
    z[~np.isfinite(z.astype(np.float64))] = 0  # float16
    y = rng.integers(0, classes, size=batch)
    wide = np.promote_types(dtype, np.float32)
    with jax.enable_x64(True):
        loss = max_mahalanobis(classes, features, norm)
        got, gradient = map(np.asarray, pulled_back(loss, z, y))
        logits = loss.logits(z)
    assert got.dtype == logits.dtype == wide
    assert got.shape == y.shape and logits.shape == (*batch, classes)
    assert gradient.dtype == dtype

    mu = norm * centers_of(classes, features)
    z = z.astype(np.float64)
    eps = float(np.finfo(wide).eps)
    size = norm + np.abs(z).max(initial=0)
    for i in np.ndindex(*batch):
        difference = z[i] - mu[y[i]]
        expected = math.fsum(difference**2) / 2
        np.testing.assert_allclose(got[i], expected, atol=30 * eps * size**2)
        rounding = float(ml_dtypes.finfo(dtype).eps) * size
        np.testing.assert_allclose(
            gradient[i].astype(np.float64), difference, atol=rounding + 3 * eps * size
        )
        # Differences of logits are those of half the squared distances.
        half = [math.fsum((z[i] - m) ** 2) / 2 for m in mu]
        np.testing.assert_allclose(
            np.asarray(logits[i], np.float64) - float(logits[i][0]),
            half[0] - np.array(half),
            atol=60 * eps * size * norm + 1e-14 * size**2,
        )


def test_logits_give_the_nearest_centre_and_the_papers_softmax():
    rng = np.random.default_rng(0)
    loss = max_mahalanobis(10, 16)
    z = rng.normal(size=(500, 16)) * 5
    distances = ((z[:, None] - loss.centers) ** 2).sum(-1)
    logits = loss.logits(jnp.asarray(z))
    np.testing.assert_array_equal(logits.argmax(-1), distances.argmin(-1))
    expected = jax.nn.softmax(jnp.asarray(-distances / 2))
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(loss.logits(loss.centers).argmax(-1), np.arange(10))


def test_logits_tell_centres_apart_also_far_away():
    """Half the squared distance, 5e15 in float32, is the same for all of them."""
    rng = np.random.default_rng(0)
    loss = max_mahalanobis(10, 16)
    far = np.zeros(16)
    far[12] = 1e8  # orthogonal to all centres
    z = far + loss.centers + rng.normal(size=(10, 16)) * 0.1
    got = loss.logits(jnp.asarray(z)).argmax(-1)
    np.testing.assert_array_equal(got, np.arange(10))


def test_max_mahalanobis_at_extremes():
    loss = max_mahalanobis(3, 4)
    np.testing.assert_array_equal(loss(loss.centers, jnp.arange(3)), 0)
    z, y = jnp.full((1, 4), 1e30), jnp.array([0])
    value, gradient = jax.value_and_grad(lambda z: loss(z, y).sum())(z)
    assert value == jnp.inf  # 2e60 is no float32
    np.testing.assert_allclose(gradient, z, rtol=1e-6)
    assert np.all(np.isfinite(loss.logits(z)))


def test_max_mahalanobis_is_a_value():
    loss = max_mahalanobis(np.int64(3), 4, np.float32(2))
    assert loss == max_mahalanobis(3, 4, 2.0) != max_mahalanobis(3, 4, 3.0)
    assert hash(loss) == hash(max_mahalanobis(3, 4, 2.0))
    assert repr(loss) == "MaxMahalanobis(classes=3, features=4, norm=2.0)"
    assert max_mahalanobis(3, 4).norm == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.norm = 3.0
    with pytest.raises(ValueError, match="read-only"):
        loss.centers[0, 0] = 1.0
    traces = []

    @quick.jit
    def run(z, y):
        traces.append(1)
        return loss(z, y), loss.logits(z)

    static = quick.jit(lambda loss, z, y: loss(z, y), static_argnums=0)
    z, y = jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)
    for same in (loss, max_mahalanobis(3, 4, 2.0)):
        np.testing.assert_allclose(static(same, z, y), run(z, y)[0], rtol=1e-6)
    assert len(traces) == 1 and static._cache_size() == 1
    mapped = jax.vmap(loss)(z, y)
    np.testing.assert_allclose(mapped, loss(z, y), rtol=1e-6)


def test_gradient_descent_ends_at_the_centres():
    loss = max_mahalanobis(4, 5)
    y = jnp.arange(4)
    gradient = jax.grad(lambda z: loss(z, y).sum())
    z = jax.random.normal(jax.random.key(0), (4, 5))
    for _ in range(60):
        z = z - 0.3 * gradient(z)
    np.testing.assert_allclose(z, loss.centers, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((1, 5), ValueError, "classes must be 2 or more, but is 1"),
        ((10, 8), ValueError, "features must be 9 or more, but is 8"),
        ((2.0, 5), TypeError, "classes must be an integer, not 2.0"),
        ((True, 5), TypeError, "classes must be an integer, not True"),
        ((2, "x"), TypeError, "features must be an integer, not 'x'"),
        ((2, 5, 0.0), ValueError, "norm must be positive and finite, but is 0.0"),
        ((2, 5, -1), ValueError, "norm must be positive and finite, but is -1.0"),
        ((2, 5, math.inf), ValueError, "norm must be positive and finite"),
        ((2, 5, math.nan), ValueError, "norm must be positive and finite"),
        ((2, 5, "x"), TypeError, "norm must be a number known before tracing"),
        ((2, 5, np.ones(2)), TypeError, "norm must be a number"),
    ],
)
def test_max_mahalanobis_says_what_is_wrong(args, error, match):
    with pytest.raises(error, match=match):
        max_mahalanobis(*args)


def test_max_mahalanobis_says_what_is_wrong_with_its_arguments():
    loss = max_mahalanobis(3, 3)
    with pytest.raises(TypeError, match="norm must be a number known before tracing"):
        quick.jit(lambda norm: max_mahalanobis(2, 5, norm).centers)(1.0)
    for wrong in (jnp.zeros((4, 2)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"z must have shape \(..., 3\)"):
            loss(wrong, Y)
        with pytest.raises(ValueError, match=r"z must have shape \(..., 3\)"):
            loss.logits(wrong)
    with pytest.raises(TypeError, match="z must be of a floating dtype, not int32"):
        loss(Z.astype(int), Y)
    with pytest.raises(TypeError, match="labels must be of an integer dtype"):
        loss(Z, Z[:, 0])
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
        loss(Z, Y[:1])
