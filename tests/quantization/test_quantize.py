"""Quantization against NumPy in float64, at thresholds and at extreme values."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Dims

import weightreg as wr

LOW = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
DTYPES = [*LOW, np.dtype(np.float32), np.dtype(np.float64)]
QUANTIZERS = {"binary": wr.binarize, "ternary": wr.ternarize}
compiled = {
    levels: jax.jit(quantize, static_argnames=("mask",))
    for levels, quantize in QUANTIZERS.items()
}


def reference(w, volume, levels):
    """The rule, weight by weight, in Python's own numbers."""
    out = []
    for x in np.asarray(w, np.float64).ravel().tolist():
        if levels == "binary":
            out.append(volume if x >= 0 else -volume)
        elif x > volume / 2:
            out.append(volume)
        else:
            out.append(-volume if x < -volume / 2 else 0.0)
    return np.array(out).reshape(np.shape(w))


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("levels", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_are_exact(dtype, levels):
    """At 0 and at V/2, and at the nearest numbers on either side."""
    with jax.enable_x64(dtype == np.float64):
        for volume in (0.1, 0.5, 3.0, 1e-3):
            volume = float(dtype.type(volume))
            edges = [dtype.type(x) for x in (0.0, volume / 2, volume)]
            info = ml_dtypes.finfo(dtype)
            above = [
                np.nextafter(x, dtype.type(np.inf)) if x else dtype.type(info.tiny)
                for x in edges
            ]
            below = [np.nextafter(x, dtype.type(-np.inf)) for x in edges[1:]]
            row = np.array([*edges, *above, *below, info.max, np.inf], dtype)
            w = np.stack([row, -row])
            got = compiled[levels]({"w": jnp.asarray(w)}, volume)["w"]
            expected = reference(w, volume, levels).astype(dtype)
            np.testing.assert_array_equal(np.asarray(got), expected)
            assert got.dtype == dtype
            eager = QUANTIZERS[levels]({"w": jnp.asarray(w)}, volume)["w"]
            same_bits(got, eager)


NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=150)
@given(
    w=st.lists(NUMBERS, min_size=12, max_size=12),
    volume=st.floats(2.0**-90, 2.0**99, width=32),
    near=st.lists(st.sampled_from([0, 0.25, 0.5, 1, 2]), min_size=6, max_size=6),
    levels=st.sampled_from(list(QUANTIZERS)),
)
def test_any_weights_and_volume(w, volume, near, levels):
    """Half of the weights are near thresholds, where the others would hardly be."""
    row = np.float32([*w, *(x * volume for x in near), *(-x * volume for x in near)])
    params = {"w": jnp.asarray(row.reshape(4, 6))}
    got = compiled[levels](params, volume)["w"]
    np.testing.assert_array_equal(got, reference(params["w"], volume, levels))
    same_bits(compiled[levels]({"w": got}, volume)["w"], got)  # once is enough
    distance = wr.level_distances({"w": got}, volume, levels)
    assert distance == {"['w']": 0.0}


def test_what_is_no_number_is_not_hidden():
    w = {"w": jnp.array([[jnp.nan, 1.0, -jnp.inf]])}
    for levels, quantize in QUANTIZERS.items():
        np.testing.assert_array_equal(quantize(w, 0.5)["w"], [[jnp.nan, 0.5, -0.5]])
        assert np.isnan(wr.level_distances(w, 0.5, levels)["['w']"])
    tx = wr.quantize_every(1, "binary", 0.5)
    updates, _ = tx.update(w, tx.init(w), {"w": jnp.ones((1, 3))})
    assert jnp.isnan(updates["w"][0, 0])


def test_rules_masks_and_other_leaves():
    params = {
        "a": {"kernel": jnp.array([[0.1, -0.2], [0.3, 0.0]]), "bias": jnp.array([7.0])},
        "b": {"kernel": jnp.full((3, 3, 2, 6), -0.01), "scale": jnp.ones((2, 2))},
        "steps": jnp.arange(4).reshape(2, 2),
        "hole": None,
    }
    got = wr.binarize(params, wr.he_volume(0.5))
    expected = dict(params)
    expected["a"] = dict(
        params["a"], kernel=np.sqrt(3) / 2 * np.array([[1, -1], [1, 1]])
    )
    fan = 0.5 * np.sqrt(6 / (6 * 9))
    expected["b"] = dict(params["b"], kernel=np.full((3, 3, 2, 6), -fan))
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    chex.assert_trees_all_equal_structs(got, params)
    mask = {"a": True, "b": False, "steps": False}
    got = wr.ternarize(params, {"a": 4.0, "b": None, "steps": None}, mask=mask)
    chex.assert_trees_all_equal(got["a"]["bias"], jnp.array([4.0]))
    chex.assert_trees_all_equal(got["b"], params["b"])
    for tree in ({}, None, {"a": None}, {"bias": jnp.ones(3)}):
        chex.assert_trees_all_equal(wr.binarize(tree, 0.5), tree)
    empty = {"kernel": jnp.zeros((0, 3))}
    assert wr.binarize(empty, wr.he_volume(0.5))["kernel"].shape == (0, 3)
    assert wr.level_distances(empty, 0.5, "binary") == {"['kernel']": 0.0}


def test_distances_against_numpy():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 4, 3))
    params = {"a": jnp.asarray(w[0]), "layers": jnp.asarray(w, jnp.float32)}
    stacked = {"a": Dims(0, 1), "layers": Dims(reduction_axis=1, output_axis=2)}
    for levels in QUANTIZERS:
        got = wr.level_distances(params, 0.7, levels, dims=stacked)
        gap = np.abs(w - reference(w, 0.7, levels)).mean((1, 2)) / 0.7
        np.testing.assert_allclose(got["['layers']"], gap, rtol=1e-5)
        np.testing.assert_allclose(got["['a']"], gap[0], rtol=1e-5)
    evenly = {"w": jnp.linspace(-1, 1, 4002)[1:-1].reshape(2, 2000)}
    for levels, expected in (("binary", 0.5), ("ternary", 0.25)):
        got = wr.level_distances(evenly, 1.0, levels)["['w']"]
        np.testing.assert_allclose(got, expected, rtol=1e-3)
    zeros = {"w": jnp.array([[0.0, 0.0]])}
    assert wr.level_distances(zeros, 0.0, "binary")["['w']"] == 0
    assert wr.level_distances({"w": jnp.ones((1, 2))}, 0.0, "binary")["['w']"] == np.inf
    half = {"w": jnp.asarray(w[0], jnp.bfloat16)}
    assert wr.level_distances(half, 0.7, "binary")["['w']"].dtype == jnp.float32


@pytest.mark.parametrize("levels", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_quantizing_step_lands_on_levels(dtype, levels):
    """Exactly, from V / 2 to 2 V on the level's side, and always at 0.

    All others to within a rounding of the weight or the update.
    """
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(0)
        p = jnp.asarray(rng.uniform(-1, 1, size=(30, 40)), dtype)
        u = jnp.asarray(rng.normal(size=p.shape) * 0.05, dtype)
        volume = 0.51
        tx = wr.quantize_every(1, levels, volume)
        updates, _ = jax.jit(tx.update)({"w": u}, tx.init({"w": p}), {"w": p})
        assert updates["w"].dtype == dtype
        got = optax.apply_updates({"w": p}, updates)["w"]
        # Which side of a threshold it is on may hang on how the sum was rounded.
        proposed = np.asarray(p, np.float64) + np.asarray(u, np.float64)
        clear = np.abs(np.abs(proposed) - (0 if levels == "binary" else 0.255)) > 0.02
        expected = QUANTIZERS[levels]({"w": p + u}, volume)["w"]
        near = (jnp.sign(p) == jnp.sign(expected)) & (2 * jnp.abs(p) >= volume)
        near = np.asarray(near | (expected == 0))  # none is above 2 V
        exact = np.asarray(got == expected)
        assert exact[clear & near].all() and (clear & near).sum() > 400
        # And those of the other sign stop short by a rounding, if they must.
        past = np.abs(np.asarray(got, np.float64)) - np.asarray(
            jnp.abs(expected), np.float64
        )
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert past[clear].max() <= 0 and past[clear].min() > -2 * eps


def test_the_schedule_and_what_lies_between():
    params, u = {"w": jnp.array([[0.3, -0.2]])}, {"w": jnp.array([[0.01, 0.3]])}
    tx = wr.quantize_every(3, "binary", lambda count: 0.5 + count)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(1, 8):
        updates, state = update(u, state, params)
        assert state.count == step
        if step % 3:
            same_bits(updates["w"], u["w"])
        else:  # the schedule is told the steps before
            new = optax.apply_updates(params, updates)
            np.testing.assert_allclose(new["w"], [[step - 0.5, step - 0.5]])
    with pytest.raises(ValueError, match="params"):
        tx.update(u, state)


def test_training_goes_on_from_quantized_weights():
    """By hand: momentum is kept, and the next step starts at a level."""
    params, grads = {"w": jnp.array([[0.25, -0.5]])}, {"w": jnp.array([[1.0, -2.0]])}
    tx = optax.chain(
        optax.sgd(0.125, momentum=0.5), wr.quantize_every(2, "ternary", 0.5)
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"][0]

    _, w = jax.jit(lambda c: jax.lax.scan(step, c, length=3))((params, tx.init(params)))
    # Traces 1, 1.5, 1.75: 0.25 - 0.125, - 0.1875, quantized to 0, - 0.21875.
    np.testing.assert_array_equal(w[:, 0], [0.125, 0.0, -0.21875])
    # -0.5 + 0.25, + 0.375, to 0, + 0.4375.
    np.testing.assert_array_equal(w[:, 1], [-0.25, 0.0, 0.4375])


def test_traced_steps_levels_of_a_population_and_derivatives():
    params = {"w": jnp.array([[0.3, -0.1]])}

    def go(steps, volume):
        tx = wr.quantize_every(steps, "ternary", volume)
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)["w"][0]

    got = jax.jit(jax.vmap(go))(jnp.array([1, 2]), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(got, [[0.5, 0.0], [0.6, -0.2]], rtol=1e-6)
    by_volume = jax.jacobian(lambda v: go(1, v))(0.5)
    np.testing.assert_allclose(by_volume, [1.0, 0.0])
    by_weights = jax.grad(lambda p: wr.binarize(p, 0.5)["w"].sum())(params)
    np.testing.assert_array_equal(by_weights["w"], 0.0)
    injected = optax.inject_hyperparams(wr.quantize_every)(2, "binary", 0.5)
    state = injected.init(params)
    updates, state = injected.update(params, state, params)
    chex.assert_trees_all_equal(updates, params)
    state.hyperparams["volume"] = jnp.asarray(0.25)
    updates, _ = injected.update(params, state, params)
    np.testing.assert_allclose((params["w"] + updates["w"])[0], [0.25, -0.25])


def test_updates_too_narrow_to_reach_a_level_are_widened():
    params, u = {"w": jnp.array([[0.15, -0.1]])}, {"w": jnp.zeros((1, 2), jnp.bfloat16)}
    tx = wr.quantize_every(1, "binary", 0.1)
    updates, _ = tx.update(u, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)["w"], np.float32([[0.1, -0.1]])
    )


@dataclasses.dataclass
class Wrong:
    """A call that is refused, and what the error says."""

    call: object
    error: type
    words: str


P = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
WRONG = {
    "negative": Wrong(lambda: wr.binarize(P, -0.5), ValueError, "volume.*-0.5"),
    "nan": Wrong(lambda: wr.ternarize(P, np.nan), ValueError, "volume.*nan"),
    "infinite": Wrong(
        lambda: wr.binarize(P, np.inf), ValueError, r"\['layer'\]\['kernel'\].*finite"
    ),
    "vanishing": Wrong(
        lambda: wr.binarize(jax.tree.map(jnp.float16, P), 1e-9),
        ValueError,
        r"\['layer'\]\['kernel'\].*not vanish.*1e-09",
    ),
    "on construction": Wrong(
        lambda: wr.quantize_every(2, "binary", -1.0), ValueError, "volume.*-1"
    ),
    "packed": Wrong(
        lambda: wr.binarize(wr.pack(P, 0.5, "binary"), 0.5), ValueError, "unpack them"
    ),
    "packed in a chain": Wrong(
        lambda: wr.volumize(0.5, 0.9).init(wr.pack(P, 0.5, "binary")),
        ValueError,
        "unpack them",
    ),
    "many steps": Wrong(
        lambda: wr.quantize_every(2**31, "binary", 0.5), ValueError, "less than 2.*31"
    ),
    "several levels": Wrong(
        lambda: wr.pack(P, 0.5, np.array(["binary"] * 2)), ValueError, "levels"
    ),
    "out of range": Wrong(
        lambda: wr.binarize(jax.tree.map(jnp.float16, P), 1e5),
        ValueError,
        r"\['layer'\]\['kernel'\].*finite in float16.*100000",
    ),
    "none": Wrong(lambda: wr.binarize(P, None), TypeError, "volume.*None"),
    "schedule": Wrong(
        lambda: wr.binarize(P, optax.linear_schedule(1, 0.5, 9)), TypeError, "schedule"
    ),
    "scheduled rule": Wrong(
        lambda: wr.binarize(P, wr.he_volume(optax.linear_schedule(1, 0.5, 9))),
        TypeError,
        r"\['layer'\]\['kernel'\].*schedule",
    ),
    "tree": Wrong(lambda: wr.binarize(P, {"other": 1.0}), ValueError, "volume.*other"),
    "shape": Wrong(
        lambda: wr.binarize(P, jnp.ones(2)), ValueError, r"kernel.*\(2,\)|\(2,\)"
    ),
    "dtype": Wrong(
        lambda: wr.binarize({"w": jnp.ones((2, 2), jnp.float8_e4m3fn)}, 0.5),
        TypeError,
        r"binarize cannot handle \['w'\].*float8",
    ),
    "levels": Wrong(
        lambda: wr.quantize_every(2, "quaternary", 0.5), ValueError, "levels.*quatern"
    ),
    "levels of distances": Wrong(
        lambda: wr.level_distances(P, 0.5, 2), ValueError, "levels.*2"
    ),
    "no steps": Wrong(
        lambda: wr.quantize_every(0, "binary", 0.5), ValueError, "steps.*0"
    ),
    "no jax steps": Wrong(
        lambda: wr.quantize_every(jnp.int32(-1), "binary", 0.5), ValueError, "steps.*-1"
    ),
    "half steps": Wrong(
        lambda: wr.quantize_every(1.5, "binary", 0.5), TypeError, "steps.*1.5"
    ),
    "steps of floats": Wrong(
        lambda: wr.quantize_every(jnp.float32(2), "binary", 0.5), TypeError, "steps"
    ),
    "at init": Wrong(
        lambda: wr.quantize_every(2, "binary", np.inf).init(P), ValueError, "finite"
    ),
    "updates": Wrong(
        lambda: wr.quantize_every(1, "binary", 0.5).update(
            {"w": jnp.ones((2, 1))},
            wr.quantize_every(1, "binary", 0.5).init({"w": jnp.ones((1, 2))}),
            {"w": jnp.ones((1, 2))},
        ),
        ValueError,
        r"updates has shape \(2, 1\) at \['w'\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    wrong = WRONG[name]
    with pytest.raises(wrong.error, match=f"(?s){wrong.words}"):
        wrong.call()


def test_rank_promotion_may_be_forbidden():
    params = {"w": jnp.array([[0.3, -0.1], [0.2, 0.1]])}
    with jax.numpy_rank_promotion("raise"):
        got = wr.binarize(params, jnp.array([0.5, 1.0]))["w"]
        np.testing.assert_array_equal(got, [[0.5, -1.0], [0.5, 1.0]])
        tx = wr.quantize_every(1, "binary", jnp.array([[0.5], [1.0]]))
        quick.jit(tx.update)(params, tx.init(params), params)


def test_volumes_are_rounded_once_and_compared_exactly():
    """Also where XLA might keep more bits, or a half of V has too few."""
    w = jnp.array([[0.05005, 0.0503]], jnp.bfloat16)  # half of V rounded, the next
    got = jax.jit(lambda v: wr.ternarize({"w": w}, v * 1.0)["w"])(jnp.float32(0.0999))
    same_bits(got, np.array([[0.0, 0.10009765625]], LOW[0]))
    least = 2.0**-24
    w = jnp.array([[2 * least, least]], jnp.float16)
    got = compiled["ternary"]({"w": w}, 3 * least)["w"]
    same_bits(got, np.array([[3 * least, 0]], np.float16))


def test_sums_are_rounded_before_they_are_compared():
    """A bfloat16 weight and a finer update: at V / 2 after rounding, above before."""
    params, u = {"w": jnp.array([[0.25]], jnp.bfloat16)}, {"w": jnp.array([[1e-4]])}
    tx = wr.quantize_every(1, "ternary", 0.5)
    updates, _ = jax.jit(tx.update)(u, tx.init(params), params)
    assert optax.apply_updates(params, updates)["w"] == 0


@pytest.mark.parametrize("wrong", [Dims((0, 0), 1), Dims((0, 7), 1), Dims((), 1)])
def test_axes_that_a_weight_does_not_have_are_refused(wrong):
    params = {"k": jnp.ones((3, 4))}
    for call in (
        lambda: wr.binarize(params, 0.5, dims={"k": wrong}),
        lambda: wr.level_distances(params, 0.5, "binary", dims={"k": wrong}),
        lambda: wr.quantize_every(2, "binary", 0.5, dims={"k": wrong}).init(params),
        lambda: wr.pack(params, 0.5, "binary", dims={"k": wrong}),
    ):
        with pytest.raises(ValueError, match=r"dims gives .* for \['k'\]"):
            call()
