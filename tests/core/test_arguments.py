"""What users pass: trees matched to parameters, updates, numbers and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from weightreg._core._arguments import (
    CountState,
    at,
    check_count,
    check_params,
    check_scalar,
    compute_dtype,
    each,
    each_with_update,
    match,
    replaced,
    show_path,
)

HOLES = [None, optax.MaskedNode()]
SMALL = {"a": {"kernel": 1.0, "bias": 2.0}, "b": [3.0, {"kernel": 4.0}]}
LEAVES = ["a.bias", "a.kernel", "b.0", "b.1.kernel"]  # as JAX orders them

keys = st.sampled_from(["Dense_2", "Dense_10", "kernel", "bias", "0"])
nested = st.recursive(
    st.just(0.0),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.sampled_from(HOLES),
    ),
    max_leaves=12,
)


def number(tree):
    """Gives every leaf its own value."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, range(len(leaves)))


@given(params=nested)
def test_a_full_tree_matches_leaf_by_leaf(params):
    count = len(jax.tree.leaves(params))
    assert match("x", number(params), params) == list(range(count))


@given(params=nested, data=st.data())
def test_a_prefix_broadcasts(params, data):
    cuts = iter(range(10**6))

    def cut(node):
        """Replaces some subtrees by values."""
        if jax.tree.leaves(node) and data.draw(st.booleans()):
            return f"cut {next(cuts)}"
        if isinstance(node, dict):
            return {k: cut(v) for k, v in node.items()}
        if isinstance(node, list) or type(node) is tuple:
            return type(node)(map(cut, node))
        return node

    prefix = cut(params)
    expected = jax.tree.leaves(jax.tree.broadcast(prefix, params))
    assert match("x", prefix, params) == expected


@given(params=nested, value=st.sampled_from([0.5, None, True, "text", HOLES[1]]))
def test_one_value_is_the_prefix_of_every_tree(params, value):
    assert match("x", value, params) == [value] * len(jax.tree.leaves(params))


@given(params=nested, data=st.data())
def test_holes_in_the_parameters_take_entries_of_the_whole(params, data):
    """A tree for all parameters fits what ``optax.masked`` leaves of them."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [data.draw(st.booleans()) for _ in leaves]
    hole = data.draw(st.sampled_from(HOLES))
    cut = jax.tree.unflatten(treedef, [0.0 if k else hole for k in kept])
    expected = [i for i, k in enumerate(kept) if k]
    assert match("x", number(params), cut) == expected


def test_prefixes_of_a_small_tree():
    order = {"a": {"kernel": "a.kernel", "bias": "a.bias"}, "b": ["b.0", "b.1.kernel"]}
    assert match("x", order, SMALL) == LEAVES
    assert match("x", {"a": 1, "b": 2}, SMALL) == [1, 1, 2, 2]
    assert match("x", {"a": 1, "b": [2, 3]}, SMALL) == [1, 1, 2, 3]
    assert match("x", (5, 6), (jnp.ones(2), [jnp.ones(3), 1])) == [5, 6, 6]
    assert match("x", 7, jnp.ones(2)) == [7]


def test_a_hole_in_the_tree_is_an_entry():
    for hole in HOLES:
        assert match("x", {"a": hole, "b": 1}, SMALL) == [hole, hole, 1, 1]
        holes = {"a": {"kernel": 1, "bias": hole}, "b": [hole, 2]}
        assert match("x", holes, SMALL) == [hole, 1, hole, 2]


def test_a_hole_where_the_parameters_have_nothing_is_no_surplus():
    params = {"a": 1.0, "b": None}
    assert match("x", {"a": 5, "b": None, "c": None}, params) == [5]
    assert match("x", {"a": 5, "b": optax.MaskedNode()}, params) == [5]


@pytest.mark.parametrize("hole", HOLES, ids=["None", "MaskedNode"])
def test_entries_around_and_below_a_hole_of_the_parameters(hole):
    params = {"a": 1.0, "b": hole, "c": {"d": hole, "e": hole}}
    deep = {"a": 5, "b": {"kernel": 6, "bias": [7]}, "c": {"d": 8, "e": 9}}
    assert match("x", deep, params) == [5]
    assert match("x", {"a": 5, "b": 6, "c": 7}, params) == [5]
    with pytest.raises(ValueError, match=r"\['c'\]\['f'\]"):
        match("x", {"a": 5, "c": {"f": 8}}, params)


def test_a_plain_dict_describes_an_nnx_state():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(2, 1, use_bias=False, rngs=rngs)

    state = nnx.state(Net(), nnx.Param)
    assert isinstance(state, nnx.State)
    linear = {"kernel": "k", "bias": "b"}
    tree = {"layers": {0: linear, 1: "one"}, "head": {"kernel": "h"}}
    assert match("x", tree, state) == ["h", "b", "k", "one", "one"]
    with pytest.raises(ValueError, match=r"\['layers'\]\[1\]\['bias'\]"):
        match("x", {"layers": {0: linear}, "head": 1}, state)


def test_is_leaf_keeps_an_entry_whole():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    pair = lambda node: isinstance(node, tuple)  # noqa: E731
    assert match("x", {"a": (0, 1), "b": None}, params, pair) == [(0, 1), None]
    assert match("x", (0, 1), params, pair) == [(0, 1), (0, 1)]
    with pytest.raises(ValueError, match=r"\['a'\]"):
        match("x", {"a": (0, 1), "b": None}, params)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": 1}, r"\['b'\]\[0\]"),
        ({"a": {"kernel": 1}, "b": 2}, r"\['a'\]\['bias'\]"),
        ({"a": 1, "b": [2]}, r"\['b'\]\[1\]\['kernel'\]"),
        ({"a": 1, "b": {"0": 2, "1": 3}}, r"\['b'\]\[0\]"),
        ({"a": {"kernel": {"deeper": 1}, "bias": 1}, "b": 2}, r"\['a'\]\['kernel'\]"),
        ({}, r"\['a'\]\['bias'\]"),
    ],
)
def test_a_leaf_without_an_entry_is_named(tree, path):
    with pytest.raises(ValueError, match=f"^volume .* no entry for {path}"):
        match("volume", tree, SMALL)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": 1, "b": 2, "c": 3}, r"\['c'\]"),
        ({"a": {"kernel": 1, "bias": 1, "scale": 1}, "b": 2}, r"\['a'\]\['scale'\]"),
        ({"a": 1, "b": [1, 2, False]}, r"\['b'\]\[2\]"),
    ],
)
def test_an_entry_without_a_leaf_is_named(tree, path):
    with pytest.raises(ValueError, match=f"^mask has an entry at {path}"):
        match("mask", tree, SMALL)


def test_errors_say_what_there_is():
    with pytest.raises(ValueError, match=r"It has: \['c'\], \['d'\]\[0\]\."):
        match("x", {"c": 1, "d": [2]}, SMALL)
    with pytest.raises(ValueError, match=r"It has: nothing"):
        match("x", {}, SMALL)
    with pytest.raises(ValueError, match=r"They have: \['a'\]\."):
        match("x", {"a": 1, "b": 2}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"no entry for \(the whole tree\)"):
        match("x", {"a": 1}, 1.0)


@pytest.mark.parametrize("params", [{}, [], None, (), {"a": None}, *HOLES])
@pytest.mark.parametrize("tree", [0.5, None, {"anything": 1}, [2]])
def test_parameters_without_leaves_match_anything(tree, params):
    assert match("x", tree, params) == []


def test_array_entries_come_back_as_they_are():
    entry = np.arange(3.0)
    found = match("x", {"a": entry, "b": 1}, SMALL)
    assert found[0] is found[1] is entry


def test_show_path_writes_paths_as_code():
    tree = {"a": [1, {"kernel": 2}]}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert list(map(show_path, paths)) == ["['a'][0]", "['a'][1]['kernel']"]
    assert show_path(()) == "(the whole tree)"


NET = {"a": jnp.ones((2, 3)), "b": None, "c": [jnp.zeros(4), 2.0]}


def test_leaves_come_with_their_positions_and_go_back_there():
    found = dict(each(NET, [2, 0]))
    assert list(found) == [2, 0] and found[2] == 2.0 and found[0].shape == (2, 3)
    updates = jax.tree.map(lambda x: -jnp.ones_like(x), NET)
    for index, leaf, update in each_with_update(NET, updates, [1]):
        assert index == 1 and leaf.shape == update.shape == (4,)
    new = replaced(updates, {1: "new"}, NET)
    assert new["c"][0] == "new" and new["a"] is updates["a"] and new["b"] is None


def test_updates_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="updates must have the structure of params"):
        list(each_with_update(NET, {"a": 1.0}, [0]))
    wrong = {"a": jnp.ones((3, 2)), "b": None, "c": [jnp.ones(5), 1.0]}
    message = r"updates has shape \(3, 2\) at \['a'\], where params has \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        list(each_with_update(NET, wrong, [0]))
    list(each_with_update(NET, wrong, [2]))  # what is not wanted is not looked at


def test_missing_parameters_are_optaxs_error():
    with pytest.raises(ValueError) as ours:
        check_params(None)
    with pytest.raises(ValueError) as optaxs:
        decay = optax.add_decayed_weights(0.1)
        decay.update(NET, decay.init(NET), None)
    assert str(ours.value) == str(optaxs.value)
    check_params({})


def test_counts_stop_at_the_largest_integer():
    assert CountState.zero().next() == CountState(1)
    most = jnp.iinfo(jnp.int32).max
    assert CountState(jnp.asarray(most, jnp.int32)).next() == CountState(most)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, ValueError, r"alpha must be in \[-1, 1\], but is 2.0"),
        (float("nan"), ValueError, r"alpha must be in \[-1, 1\], but is nan"),
        ([0.5], TypeError, r"alpha must be a scalar, not \[0.5\]"),
        ("a", TypeError, "alpha must be a scalar, not 'a'"),
        (1j, TypeError, "alpha must be a scalar"),
    ],
)
def test_scalars_are_checked(value, error, message):
    with pytest.raises(error, match=message):
        check_scalar("alpha", value, -1, 1)
    check_scalar("alpha", np.float32(-1), -1, 1)
    with pytest.raises(ValueError, match="at least 0 and finite, but is inf"):
        check_scalar("energy", float("inf"), 0, float("inf"))


@pytest.mark.parametrize("value", [1.5, True, "2", None, np.float64(2)])
def test_counts_are_integers(value):
    with pytest.raises(TypeError, match="steps must be an integer"):
        check_count("steps", value, 1)
    assert check_count("steps", np.int8(3), 1) == 3
    with pytest.raises(ValueError, match="steps must be 1 or more, but is 0"):
        check_count("steps", 0, 1)


def test_schedules_are_evaluated_and_what_they_give_is_checked():
    assert at("volume", 0.5, jnp.zeros([], int)) == 0.5
    assert at("volume", lambda count: count + 1, 2) == 3
    assert at("volume", lambda count: jnp.ones(3), 0, (2, 3)).shape == (3,)
    with pytest.raises(TypeError, match="a schedule of numbers, but gives 'x'"):
        at("volume", lambda count: "x", 0)
    with pytest.raises(ValueError, match="must be a scalar, but has shape"):
        at("alpha", lambda count: jnp.ones(3), 0)


def test_a_dtype_without_arithmetic_is_named():
    assert compute_dtype(jnp.bfloat16, np.float16) == jnp.float32
    with pytest.raises(TypeError, match=r"float8_e5m2.*16 bits or more.*mask="):
        compute_dtype(jnp.float8_e5m2)
