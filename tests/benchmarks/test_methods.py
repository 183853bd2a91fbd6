"""Methods: what they do, and how they are searched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.methods import BASES, METHODS, at_edge, trials

NETWORK = {
    "Dense_0": {"kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.ones(2)},
    "Dense_1": {"kernel": jnp.array([[2.0, 1], [-1, 3]]), "bias": jnp.ones(2)},
}


# Without those that are another method at hyperparameters of their own.
OWN = [name for name, method in METHODS.items() if not method.like]


ON_TWO = [(name, base) for name in OWN for base in ("adam", "momentum")]


@pytest.mark.parametrize(
    ("name", "base"),
    [*(pair for pair in ON_TWO if "box" not in pair[0]), ("volumization", "laprop")],
)
def test_every_hyperparameter_acts_and_only_weights_are_regularized(name, base):
    space = METHODS[name].whole_space(base, NETWORK)
    if fixed := METHODS[name].fixed:
        space = {k: (value, 100 * value or 0.1) for k, value in fixed.items()}
    if "one_minus_alpha" in space:
        space["one_minus_alpha"] = (1e-4, 1.0)

    def trained(hyper):
        params = jax.tree.map(lambda p: p.astype("float64"), NETWORK)
        grads = [jax.tree.map(lambda p, c=c: c * p, params) for c in (1.0, -0.5)]
        # In two steps of an epoch nothing is quantized yet.
        tx = METHODS[name].build(hyper, base, "Dense_1/kernel", epoch=2)
        new, state = params, tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, new)
            new = optax.apply_updates(new, updates)
        return new

    middle = {k: float(np.sqrt(low * high)) for k, (low, high) in space.items()}
    for parameter, (_, high) in space.items():
        with jax.enable_x64(True):  # where no rounding is an effect
            one, other = trained(middle), trained(middle | {parameter: high})
        one, other = one["Dense_0"], other["Dense_0"]
        assert np.abs(one["kernel"] - other["kernel"]).max() > 1e-9
        unchanged = bool(np.all(one["bias"] == other["bias"]))
        assert unchanged == (parameter != "learning_rate")


def test_what_is_like_another_method_is_that_method_at_its_hyperparameters():
    like = [
        (method, METHODS[method.like]) for method in METHODS.values() if method.like
    ]
    assert like
    for method, other in like:
        assert not other.like and method.fixed is not None
        names = other.fixed or other.whole_space("adam", NETWORK)
        assert set(method.fixed) == set(names)
        shown = {"label", "fixed", "fixed_for", "like"}
        for field in {f.name for f in dataclasses.fields(method)} - shown:
            one, same = getattr(method, field), getattr(other, field)
            assert one is same or one == same
        assert set(method.fixed_for) <= set(BASES)


def test_methods_are_told_apart():
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels)


def test_weissi_may_lack_one_of_its_terms():
    """As in the ablation, where the other term's gradient alone is left."""

    def moved(name, **changed):
        fixed = {**METHODS[name].fixed, **changed}
        tx = METHODS[name].build(fixed, "momentum", "Dense_1/kernel")
        params = jax.tree.map(lambda p: p.astype("float32"), NETWORK)
        still = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(tx.update)(still, tx.init(params), params)
        return updates["Dense_0"]["kernel"]

    energy = moved("weissi_wrn_energy", energy=1e-4)
    complexity = moved("weissi_wrn_complexity")
    both = moved("weissi_wrn_convex", energy=1e-4)
    assert np.abs(energy).max() > 0 and np.abs(complexity).max() > 0
    np.testing.assert_allclose(energy + complexity, both, rtol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_trials_fill_the_space_of_every_method_alike(name):
    space = METHODS[name].whole_space("adam", NETWORK)
    tried = trials(space, 64)
    assert len(tried) == 64 and tried == trials(space, 64)
    for parameter, (low, high) in space.items():
        places = [np.log(t[parameter] / low) / np.log(high / low) for t in tried]
        assert np.all(np.histogram(places, 4, (0, 1))[0] >= 14)


def test_the_edge_of_a_range_is_told():
    space = {"learning_rate": (1e-4, 1e-2), "strength": (1e-2, 1e2)}
    middle = {"learning_rate": 1e-3, "strength": 1.0}
    assert at_edge(space, middle) == []
    assert at_edge(space, middle | {"strength": 1.01e-2}) == ["strength"]


def test_an_energy_that_no_strength_outweighs_is_refused():
    deep = {f"Dense_{i}": jnp.full((4, 4), 1e3) for i in range(100)}
    with pytest.raises(ValueError, match="compare weissi_log"):
        METHODS["weissi"].whole_space("adam", deep)
