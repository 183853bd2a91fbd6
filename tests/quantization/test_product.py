"""Products with packed weights: every plan against NumPy, and which one is taken."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr
from weightreg._quantization import _product

PLANS = {"sums": _product._sums, "tables": _product._tables}
QUANTIZERS = {"binary": wr.binarize, "ternary": wr.ternarize}
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed_of(shape, levels="binary", dtype="float32", volume=0.5, dims=None):
    dims = dims and {"w": dims}
    return wr.pack({"w": normal(shape, dtype)}, volume, levels, dims=dims)["w"]


def by(plan, x, packed):
    axes = _product._Axes((x.ndim - 1,), (0,))
    run = {"best": _product._best, "unpacked": _product._unpacked}.get(plan)
    if run is not None:
        return run(x, packed, axes)
    return _product._in_rows(x, packed, axes, PLANS[plan])


def assert_near(got, x, packed):
    """Within the error that the docstring states, of which NumPy knows the terms."""
    x, w = np.asarray(x, np.float64), np.asarray(wr.unpack(packed), np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        expected, terms = x @ w, np.abs(x) @ np.abs(w)
        terms = np.where(np.isfinite(terms), terms, np.inf)
    wide = jnp.promote_types(got.dtype, jnp.float32)
    eps, n = jnp.finfo(wide).eps / 2, packed.shape[0]
    own, least = (float(getattr(jnp.finfo(got.dtype), a)) for a in ("eps", "tiny"))
    bound = (n + 1) * float(eps) * terms
    bound = bound + own / 2 * (np.abs(expected) + bound) + least  # the last rounding
    got, most = np.asarray(got, np.float64), float(jnp.finfo(got.dtype).max)
    sure = terms < most / 2  # nor may a sum on the way overflow
    assert np.all(np.abs(got[sure] - expected[sure]) <= bound[sure])
    odd = np.isinf(terms)  # of infinite inputs, and of those that are no numbers
    np.testing.assert_array_equal(got[odd], expected[odd])


EXTREMES = [0.0, -0.0, 1.0, 3e38, -3e38, 6e4, 1e-30, np.inf, -np.inf, np.nan]


@quick.everything
@settings(deadline=None, max_examples=12, derandomize=True)
@example((2,), 9, 3, "float32", "ternary", "sums", [np.inf])
@example((2,), 9, 3, "float32", "ternary", "tables", [np.inf])
@given(
    rows=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    inputs=st.integers(1, 20),
    units=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from(list(QUANTIZERS)),
    plan=st.sampled_from(list(PLANS)),
    extremes=st.lists(st.sampled_from(EXTREMES), max_size=3),
)
def test_plans_are_near(rows, inputs, units, dtype, levels, plan, extremes):
    with jax.enable_x64(dtype == "float64"):
        packed = packed_of((inputs, units), levels, dtype)
        x = np.random.default_rng(1).normal(size=(*rows, inputs))
        x.flat[: len(extremes)] = extremes[: x.size]
        with np.errstate(over="ignore"):
            x = jnp.asarray(x, dtype)
        got = quick.jit(by, static_argnums=0)(plan, x, packed)
        assert got.shape == (*rows, units) and got.dtype == dtype
        assert_near(got, x, packed)


@pytest.mark.parametrize("levels", QUANTIZERS)
@pytest.mark.parametrize("plan", [*PLANS, "best"])
def test_many_inputs_and_units(plan, levels):
    packed, x = packed_of((1027, 1024), levels), 100 * normal((2, 1027), seed=1)
    got = jax.jit(by, static_argnums=0)(plan, x, packed)
    assert_near(got, x, packed)
    # And not as sums in 16 bits would be.
    narrow = jnp.asarray(x, jnp.bfloat16)
    got = jax.jit(by, static_argnums=0)(plan, narrow, packed)
    assert got.dtype == jnp.float32
    assert_near(got, narrow, packed)


SHAPES = {
    "matrix": ((9, 5), 0, Dims(0, 1), (3, 9)),
    "vector": ((9, 5), 0, Dims(0, 1), (9,)),
    "equinox": ((5, 9), 1, Dims(1, 0), (3, 9)),
    "turned": ((5, 9), -1, Dims(0, 1), (3, 9)),  # rows of bits run the other way
    "heads": ((9, 2, 4), 0, Dims(0, (1, 2)), (3, 2, 9)),
    "merging": ((2, 4, 6), (0, 1), Dims((0, 1), 2), (3, 2, 4)),
    "crossed": ((2, 4, 6), (1, 0), Dims((0, 1), 2), (3, 4, 2)),
    "middle": ((5, 9, 2), 1, Dims(1, (0, 2)), (3, 9)),
    "no rows": ((9, 5), 0, Dims(0, 1), (0, 9)),
    "no units": ((9, 0), 0, Dims(0, 1), (3, 9)),
    "no inputs": ((0, 5), 0, Dims(0, 1), (3, 0)),
}


@quick.everything
@pytest.mark.parametrize("name", SHAPES)
def test_axes(name, monkeypatch):
    """Of the weight and of ``x``, also where a plan is taken that needs few units."""
    shape, axis, dims, of_x = SHAPES[name]
    packed, x = packed_of(shape, "ternary", dims=dims), normal(of_x, seed=1)
    axes = axis if isinstance(axis, tuple) else (axis,)
    w = wr.unpack(packed)
    last = tuple(range(x.ndim - len(axes), x.ndim))
    expected = np.tensordot(x, w, (last, axes))
    got = wr.packed_matmul(x, packed, axis)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(_product, "UNITS_OF_TABLES", 1)
    got = _product._dot.__wrapped__(
        x, packed, _product._Axes(last, tuple(a % w.ndim for a in axes))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def taken(x, packed, platform, f=wr.packed_matmul):
    """The plan of a program for a platform: what becomes of bits is in its text."""
    text = jax.jit(f).trace(x, packed).lower(lowering_platforms=(platform,)).as_text()
    if "dot_general" not in text:
        return "sums"
    return "tables" if "while" in text else "unpacked"


@pytest.mark.parametrize("levels", QUANTIZERS)
def test_plans_by_platform_rows_and_units(levels):
    few, many = packed_of((16, 8), levels), packed_of((8, 1024), levels)
    most = {"binary": 16, "ternary": 8}[levels]
    for platform, packed, rows, plan in (
        ("cuda", few, 4, "sums"),
        ("rocm", many, 1, "sums"),
        ("cuda", many, 5, "unpacked"),
        ("cpu", many, most, "tables"),
        ("cpu", many, most + 1, "unpacked"),
        ("cpu", few, 1, "unpacked"),
        ("tpu", many, 1, "unpacked"),
    ):
        x = jnp.ones((rows, packed.shape[0]))
        assert taken(x, packed, platform) == plan, (platform, rows)
        # Of a batch all rows count.
        mapped = jax.vmap(wr.packed_matmul, (0, None))
        assert taken(x, packed, platform, mapped) == plan, (platform, rows)


@quick.everything
def test_transformations():
    packed, x = packed_of((12, 1024), "ternary"), normal((3, 12), seed=1)
    w, f = wr.unpack(packed), lambda x: wr.packed_matmul(x, packed)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    near(jax.jit(f)(x), x @ w)
    near(jax.vmap(f)(x), x @ w)
    near(jax.jvp(f, (x,), (x,))[1], x @ w)
    square = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))  # noqa: E731
    near(square(f)(x), square(lambda x: x @ w)(x))
    near(square(jax.vmap(f))(x), square(lambda x: x @ w)(x))
    stack = jax.tree.map(lambda *a: jnp.stack(a), packed, packed, packed)
    near(jax.vmap(wr.packed_matmul)(x, stack), x @ w)
    near(jax.vmap(wr.packed_matmul, (None, 0))(x, stack)[1], x @ w)
    step = lambda c, p: (c, wr.packed_matmul(x, p))  # noqa: E731
    near(jax.lax.scan(step, None, stack)[1][2], x @ w)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    packed, x = packed_of((16, 1024)), normal((4, 16), seed=1)
    for spec in (("x",), (None, "y")):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        got = jax.jit(wr.packed_matmul)(split, packed)
        np.testing.assert_allclose(got, x @ wr.unpack(packed), rtol=1e-5, atol=1e-5)


WHOLE = packed_of((9, 5))
CUT = jax.tree.map(lambda a: a[0] if a.ndim else a, WHOLE)
WRONG = {
    "no weight": (jnp.ones(9), jnp.ones((9, 5)), 0, TypeError, "packed must be a Pac"),
    "text": ("x", WHOLE, 0, TypeError, "x must be an array of real numbers"),
    "complex": (jnp.ones(9, complex), WHOLE, 0, TypeError, "real numbers"),
    "sizes": (jnp.ones((2, 5)), WHOLE, 0, ValueError, r"\(2, 5\).*axis 0.*\(9, 5\)"),
    "axis": (jnp.ones(9), WHOLE, 2, ValueError, r"axis must.*\(9, 5\).*is 2"),
    "twice": (jnp.ones((9, 9)), WHOLE, (0, 0), ValueError, r"once.*\(0, 0\)"),
    "scalar": (jnp.float32(1), WHOLE, 0, ValueError, r"x has shape \(\)"),
    "cut": (jnp.ones(9), CUT, 0, ValueError, r"bits of shape \(5, 2\)"),
    "stack": (
        jnp.ones(4),
        packed_of((3, 4, 5), dims=Dims(1, 2)),
        0,
        ValueError,
        r"one layer, but has \(3,\) of shape \(4, 5\): use jax.vmap",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    x, packed, axis, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        wr.packed_matmul(x, packed, axis)


def test_bits_of_a_layer_are_all_that_is_held():
    """Where the product is made from them, by what XLA plans for this machine."""
    packed, x = packed_of((1024, 1024)), jnp.ones((1, 1024))
    if jax.default_backend() != "cpu":
        pytest.skip("other plans on a GPU")
    plan = jax.jit(wr.packed_matmul).lower(x, packed).compile().memory_analysis()
    assert plan.temp_size_in_bytes < math.prod(packed.shape)  # a byte for each weight
