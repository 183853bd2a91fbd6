"""Equivalent norms against the paper's formulas in NumPy, at float64."""

import functools
import itertools
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

pytestmark = quick.everything

FORMS = list(itertools.product(("unit", "layer"), (True, False)))
DIMS = {
    "dense": Dims(0, 1),
    "conv": Dims((0, 1, 2), 3),
    "heads": Dims(0, (1, 2)),
    "scanned": Dims(1, 2),
    "torch": Dims(1, 0),
    "bias": None,
}
SHAPES = {
    "dense": (5, 3),
    "conv": (3, 2, 2, 4),
    "heads": (6, 2, 3),
    "scanned": (3, 4, 2),
    "torch": (3, 5),
    "bias": (3,),
}


def tree(seed=0, scale=1.0, mean=0.0):
    rng = np.random.default_rng(seed)
    return {k: scale * (mean + rng.normal(size=s)) for k, s in SHAPES.items()}


def matrices(name, leaf):
    """The kernel matrices (inputs, outputs) of a leaf, one a layer."""
    if name == "conv":
        return [leaf.reshape(-1, leaf.shape[-1])]
    if name == "heads":
        return [leaf.reshape(leaf.shape[0], -1)]
    if name == "torch":
        return [leaf.T]
    return list(leaf) if name == "scanned" else [leaf]


def formula(w, scope, center, alpha):
    """Eqs. 20 to 23 for one matrix; the units of eqs. 21 and 22 one by one."""
    if scope == "layer":
        w = w - w.mean() if center else w
        return np.sqrt(alpha) * w / np.linalg.norm(w)
    units = [u - u.mean() if center else u for u in w.T]
    m = len(units)
    return np.stack([np.sqrt(alpha / m) * u / np.linalg.norm(u) for u in units], 1)


def as_jax(params, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


@pytest.mark.parametrize(("scope", "center"), FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_equals_the_formula(scope, center, dtype):
    with jax.enable_x64(True):
        enc = quick.jit(wr.equivalent_norm(scope, center, 2.0, dims=DIMS))
        eps = float(jnp.finfo(dtype).eps)
        for seed, mean in itertools.product(range(4), (0.0, 1.0)):
            params = as_jax(tree(seed, mean=mean), dtype)
            got = enc(params)
            chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
            np.testing.assert_array_equal(got.pop("bias"), params.pop("bias"))
            for name, leaf in got.items():
                exact = np.asarray(params[name], np.float64)
                rows = zip(
                    matrices(name, np.asarray(leaf, np.float64)),
                    matrices(name, exact),
                    strict=True,
                )
                for mapped, stored in rows:
                    want = formula(stored, scope, center, 2.0)
                    np.testing.assert_allclose(mapped, want, atol=8 * eps)
                    assert np.sum(mapped**2) == pytest.approx(2, rel=8 * eps)


@functools.cache  # compiled once a form and dtype
def compiled(form):
    enc = wr.equivalent_norm(*form)
    return jax.jit(lambda w: (enc(w), jax.grad(lambda w: jnp.sum(enc(w)[0]))(w)))


@quick.bits
@settings(deadline=None, max_examples=150)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    power=st.integers(-36, 36),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_size_and_mean_gives_the_norm(form, dtype, power, offset, seed):
    """Also where squares are out of range, and where means all but hide the rest."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** min(power, 36 - math.log10(max(offset, 1)))
    w = jnp.asarray(scale * (offset + rng.normal(size=(7, 3))), dtype)
    exact = np.asarray(w, np.float64)
    scope, center = form
    groups = exact.T if scope == "unit" else [exact]
    share = np.mean([np.ptp(g) > 0 or not center for g in groups])
    got, slope = (np.asarray(a, np.float64) for a in compiled(form)(w))
    assert np.sum(got**2) == pytest.approx(share, rel=8 * float(jnp.finfo(dtype).eps))
    assert not np.any(np.isnan(slope))


@pytest.mark.parametrize(("scope", "center"), FORMS)
def test_scale_and_mean_change_nothing_and_gradients_are_orthogonal(scope, center):
    with jax.enable_x64(True):
        params = as_jax(tree(), jnp.float64)
        enc = wr.equivalent_norm(scope, center, dims=DIMS)
        mapped = quick.jit(enc)
        for scale in (1e-100, 0.3, 1e100):
            scaled = {k: v * (scale if k != "bias" else 1) for k, v in params.items()}
            chex.assert_trees_all_close(mapped(scaled), mapped(params), rtol=1e-12)
        target = as_jax(tree(1), jnp.float64)
        grads = quick.jit(
            jax.grad(lambda p: optax.tree.vdot(jax.tree.map(jnp.sin, enc(p)), target))
        )
        for name, g in grads(params).items():
            if name == "bias":
                continue
            both = (matrices(name, np.asarray(x)) for x in (g, params[name]))
            for gradient, stored in zip(*both, strict=True):
                along = gradient * stored
                axis = 0 if scope == "unit" else None
                size = np.linalg.norm(gradient) * np.linalg.norm(stored)
                assert np.all(np.abs(along.sum(axis)) < 1e-13 * size)
                if center:
                    total = np.abs(gradient.sum(axis))
                    assert np.all(total < 1e-13 * np.linalg.norm(gradient))


@pytest.mark.parametrize(("scope", "center"), FORMS)
def test_derivatives_of_both_orders_and_modes(scope, center):
    """Against those of the formula as one would write it."""

    def naive(params):
        mapped = {}
        for name in ("dense", "conv"):
            w = params[name]
            axes = tuple(range(w.ndim - (scope == "unit")))
            if center:
                w = w - w.mean(axes, keepdims=True)
            m = w.shape[-1] if scope == "unit" else 1
            size = jnp.sqrt(jnp.sum(w**2, axes, keepdims=True))
            mapped[name] = jnp.sqrt(params["alpha"] / m) * w / size
        return mapped

    def ours(params):
        weights = {k: v for k, v in params.items() if k != "alpha"}
        return wr.equivalent_norm(scope, center, params["alpha"])(weights)

    with jax.enable_x64(True):
        params = as_jax({k: tree()[k] for k in ("dense", "conv")}, jnp.float64)
        params["alpha"] = jnp.array(1.7)
        target = as_jax({k: tree(1)[k] for k in ("dense", "conv")}, jnp.float64)

        def loss(f):
            return lambda p: optax.tree.vdot(jax.tree.map(jnp.sin, f(p)), target)

        for derivative in (
            jax.grad,
            lambda f: lambda p: jax.jvp(f, (p,), (p,))[1],
            lambda f: jax.grad(lambda p: optax.tree.norm(jax.grad(f)(p), squared=True)),
            lambda f: jax.jvp(jax.grad(f), (params,), (params,))[1] and jax.grad(f),
        ):
            got, want = (quick.jit(derivative(loss(f)))(params) for f in (ours, naive))
            chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scope", "center"), FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dead_units_and_layers_are_mapped_to_zero(scope, center, dtype):
    """So are their derivatives, whatever comes back from what follows."""
    rng = np.random.default_rng(0)
    back = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    dead = np.stack([np.zeros(4), np.full(4, 0.1), np.full(4, -3e33)], 1)
    dead = dead if center else 0 * dead
    if scope == "unit":
        w = np.concatenate([dead, rng.normal(size=(4, 1))], 1)
    else:
        w = np.full((4, 4), dead[0, 1])
    w = jnp.asarray(w, dtype)
    enc = wr.equivalent_norm(scope, center, alpha=100.0)
    loss = lambda w: jnp.sum(back * jnp.sin(enc(w).astype("float32")))  # noqa: E731
    along = jnp.asarray(1000 * back, dtype)
    slope = jax.grad(loss)
    images = {
        "value": enc(w),
        "forward": quick.jit(lambda w: jax.jvp(enc, (w,), (along,))[1])(w),
        "reverse": quick.jit(slope)(w),
        "second": quick.jit(lambda w: jax.jvp(slope, (w,), (along,))[1])(w),
    }
    parts = 3 if scope == "unit" else 4
    for name, image in images.items():
        chex.assert_tree_all_finite(image)
        np.testing.assert_array_equal(image[:, :parts], 0.0, err_msg=name)
    if scope == "unit":
        sums = jnp.sum(images["value"].astype("float32") ** 2)
        np.testing.assert_allclose(sums, 25, rtol=0.01)
        assert jnp.all(images["reverse"][:, 3] != 0)


def test_alpha_may_be_traced_and_learnt():
    params = as_jax(tree())
    enc = wr.equivalent_norm(alpha=0.5, learn=True, dims=DIMS)
    trained = enc.init(params)
    np.testing.assert_allclose(jnp.exp(trained.log_alpha), 0.5, rtol=1e-6)
    fixed = wr.equivalent_norm(alpha=0.5, dims=DIMS)
    assert fixed.init(params) is params
    chex.assert_trees_all_close(enc(trained), fixed(params), rtol=1e-6)

    def norms(trained):
        return sum(jnp.sum(enc(trained)[k] ** 2) for k in ("dense", "conv"))

    grads = quick.jit(jax.grad(norms))(trained)
    np.testing.assert_allclose(grads.log_alpha, 2 * 0.5, rtol=1e-5)
    tx = optax.adamw(0.1, mask=wr.weight_mask)  # alpha is no weight: not decayed
    updates, _ = tx.update(grads, tx.init(trained), trained)
    assert not wr.weight_mask(trained).log_alpha
    assert updates.log_alpha == pytest.approx(-0.1, rel=1e-4)
    with pytest.raises(TypeError, match="LearntNorm that init returns"):
        enc(params)

    with jax.enable_x64(True):
        exact = as_jax(tree(), jnp.float64)
        start = wr.equivalent_norm(alpha=0.7, learn=True, dims=DIMS).init(exact)
        assert float(start.log_alpha) == pytest.approx(math.log(0.7), rel=1e-15)
    for alpha in (1e40, 1e-40):  # out of the range of float32, unlike its root
        for learn in (False, True):
            enc = wr.equivalent_norm(alpha=alpha, learn=learn, dims=DIMS)
            got = np.asarray(quick.jit(enc)(enc.init(params))["dense"], np.float64)
            assert np.sum(got**2) == pytest.approx(alpha, rel=1e-4)

    grid = jax.vmap(lambda a: wr.equivalent_norm(alpha=a, dims=DIMS)(params)["dense"])
    sums = jnp.sum(grid(jnp.array([0.5, 1.0, 2.0])) ** 2, (1, 2))
    np.testing.assert_allclose(sums, [0.5, 1, 2], rtol=1e-6)


@quick.bits
def test_folding_changes_no_bit():
    """The map inside of the compiled network, and applied once before."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 1, 16), "b": (16 * 64, 33), "c": (33, 10)}
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)

    def network(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["a"], (1, 1), "SAME", dimension_numbers=layout
        )
        x = jax.nn.relu(x).reshape(x.shape[0], -1)
        return jax.nn.relu(x @ params["b"]) @ params["c"]

    for (scope, center), mean in zip(FORMS, (0.0, 2.0, 2.0, 0.0), strict=True):
        params = {
            k: jnp.asarray(mean + rng.normal(size=s), jnp.float32)
            for k, s in shapes.items()
        }
        enc = wr.equivalent_norm(scope, center)
        mapped = jax.jit(lambda p, x, enc=enc: network(enc(p), x))(params, x)
        for fold in (enc, jax.jit(enc)):
            np.testing.assert_array_equal(jax.jit(network)(fold(params), x), mapped)


def test_a_thousand_layers():
    leaves = {f"Dense_{i}": {"kernel": jnp.eye(4) + i} for i in range(1000)}
    enc = wr.equivalent_norm()
    chex.assert_trees_all_equal_shapes(jax.eval_shape(enc, leaves), leaves)
    # Compiled they take a minute, unlike these.
    stack = jnp.stack([layer["kernel"] for layer in leaves.values()])
    few, traces = [*stack[:20], stack[20:]], []
    dims = [Dims(0, 1)] * 20 + [Dims(1, 2)]

    @quick.jit
    def run(params):
        traces.append(1)
        return wr.equivalent_norm(dims=dims)(params)

    got = run(run(few))
    for kernel in (*got[:20], *got[20]):
        np.testing.assert_allclose(np.sum(np.square(kernel)), 1.0, rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_kept(axis_type, cpu_mesh):
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("y", "x")))
    for scope, center in FORMS:
        enc = wr.equivalent_norm(scope, center)
        loss = lambda w, enc=enc: jnp.sum(jnp.sin(enc(w)))  # noqa: E731
        both = quick.jit(lambda w, enc=enc, loss=loss: (enc(w), jax.grad(loss)(w)))
        with jax.set_mesh(mesh):
            got, slope = both(placed)
        whole, its_slope = both(w)
        np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(slope, its_slope, rtol=1e-4, atol=1e-6)
        assert got.sharding.is_equivalent_to(placed.sharding, 2)


def test_trees_of_all_kinds():
    assert wr.equivalent_norm()({}) == {}
    hole = {"a": None, "b": optax.MaskedNode(), "n": jnp.arange(6).reshape(2, 3)}
    chex.assert_trees_all_equal(wr.equivalent_norm()(hole), hole)
    empty = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((3, 0))}
    chex.assert_trees_all_equal(wr.equivalent_norm()(empty), empty)
    params = {"a": jnp.eye(3), "b": jnp.eye(3)}
    masked = wr.equivalent_norm(mask={"a": True, "b": False})(params)
    np.testing.assert_array_equal(masked["b"], params["b"])
    assert jnp.any(masked["a"] != params["a"])


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ({"scope": "row"}, ValueError, "scope must be one of .*'row'"),
        ({"center": 1}, TypeError, "center must be a boolean, not 1"),
        ({"learn": "yes"}, TypeError, "learn must be a boolean"),
        ({"alpha": 0.0}, ValueError, "alpha must be positive"),
        ({"alpha": -1.0}, ValueError, "alpha must be"),
        ({"alpha": math.inf}, ValueError, "alpha must be"),
        ({"alpha": math.nan}, ValueError, "alpha must be"),
        ({"alpha": jnp.ones(2)}, TypeError, "alpha must be a scalar"),
    ],
)
def test_what_is_no_form_is_refused(given_, error, message):
    with pytest.raises(error, match=message):
        wr.equivalent_norm(**given_)


def test_weights_that_centring_would_erase_are_refused():
    with pytest.raises(ValueError, match=r"\['k'\].*one input a unit.*center=False"):
        wr.equivalent_norm()({"k": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="one element a layer"):
        wr.equivalent_norm("layer")({"k": jnp.ones((1, 1))})
    got = wr.equivalent_norm(center=False)({"k": jnp.array([[2.0, -3.0]])})
    np.testing.assert_allclose(got["k"], [[math.sqrt(0.5), -math.sqrt(0.5)]], rtol=1e-6)


def test_maps_of_equal_arguments_are_equal():
    """So that a module which is made anew with one is not traced anew."""
    one, other = (wr.equivalent_norm(alpha=2.0) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == other
    for form in ({}, {"scope": "layer"}, {"center": False}, {"mask": False}):
        assert one != wr.equivalent_norm(**form)
    array = jnp.ones(())
    assert wr.equivalent_norm(alpha=array) == wr.equivalent_norm(alpha=array)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(enc, params):
        traces.append(1)
        return enc(params)

    for enc in (one, other):
        run(enc, jnp.eye(3))
    assert len(traces) == 1


def test_weights_of_eight_bits_are_refused_by_name():
    params = {"k": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    for method in (wr.equivalent_norm(), wr.shifted_l2(0.1, 0.1), wr.gbr_bounds):
        with pytest.raises(TypeError, match=r"cannot handle \['k'\] of dtype float8"):
            method(params)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_means_a_thousand_times_the_spread(scale, ratio):
    rng = np.random.default_rng(0)
    w = jnp.asarray(scale * (ratio + rng.normal(size=(1024, 6))), jnp.float32)
    got = np.asarray(jax.jit(wr.equivalent_norm())(w), np.float64)
    want = formula(np.asarray(w, np.float64), "unit", True, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
