"""Which fields of which optimizer's state are first moments, for all of Optax."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from jax.tree_util import DictKey, GetAttrKey
from optax import contrib

import weightreg as wr
from weightreg._volumization._volumized import VolumizedState, map_moments

RNG = np.random.default_rng(0)
PARAMS = {
    "bias": jnp.asarray(RNG.normal(size=3) * 3, jnp.float32),
    "kernel": jnp.asarray(RNG.normal(size=(4, 3)) * 3, jnp.float32),
}
GRADS = [
    jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), PARAMS)
    for _ in range(3)
]
p = functools.partial

# Optimizers and the fields of their states that are first moments.
MOMENTS = {
    "adabelief": (optax.adabelief, {"mu"}),
    "adafactor": (p(optax.adafactor, momentum=0.9), {"ema"}),
    "adafactor factored": (
        p(optax.adafactor, momentum=0.9, min_dim_size_to_factor=2), {"ema"}),
    "adam": (optax.adam, {"mu"}),
    "adamax": (optax.adamax, {"mu"}),
    "adamaxw": (optax.adamaxw, {"mu"}),
    "adamw": (optax.adamw, {"mu"}),
    "adan": (optax.adan, {"m"}),
    "amsgrad": (optax.amsgrad, {"mu"}),
    "lamb": (optax.lamb, {"mu"}),
    "lars": (optax.lars, {"trace"}),
    "lion": (optax.lion, {"mu"}),
    "nadam": (optax.nadam, {"mu"}),
    "nadamw": (optax.nadamw, {"mu"}),
    "novograd": (optax.novograd, {"mu"}),
    "optimistic_adam_v2": (p(optax.optimistic_adam_v2, alpha=1.0, beta=1.0), {"mu"}),
    "radam": (optax.radam, {"mu"}),
    "rmsprop": (p(optax.rmsprop, momentum=0.9), {"trace"}),
    "rmsprop centered": (p(optax.rmsprop, momentum=0.9, centered=True), {"trace"}),
    "rmsprop corrected": (
        p(optax.rmsprop, eps=1.0, momentum=0.9, centered=True, bias_correction=True),
        {"trace"}),
    "sgd": (p(optax.sgd, momentum=0.9, nesterov=True), {"trace"}),
    "signum": (optax.signum, {"ema"}),
    "sm3": (optax.sm3, {"nu"}),
    "yogi": (optax.yogi, {"mu"}),
    "acprop": (contrib.acprop, {"mu"}),
    "ademamix": (contrib.ademamix, {"m1", "m2"}),
    "adopt": (contrib.adopt, {"mu"}),
    "dadapt_adamw": (contrib.dadapt_adamw, {"exp_avg"}),
    "momo": (contrib.momo, {"exp_avg"}),
    "momo_adam": (contrib.momo_adam, {"exp_avg"}),
    "muon": (contrib.muon, {"mu"}),
    "prodigy": (contrib.prodigy, {"exp_avg"}),
    "simplified_ademamix": (contrib.simplified_ademamix, {"m"}),
    "sophia": (contrib.sophia, {"mu"}),
    "weightreg.laprop": (wr.laprop, {"mu"}),
}  # fmt: skip
WITHOUT = {
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "fromage": optax.fromage,
    "lbfgs": p(optax.lbfgs, linesearch=None),
    "noisy_sgd": p(optax.noisy_sgd, key=jax.random.key(0)),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "polyak_sgd": optax.polyak_sgd,
    "rmsprop": optax.rmsprop,
    "rmsprop centered": p(optax.rmsprop, centered=True),
    "rprop": optax.rprop,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "cocob": contrib.cocob,
    "dog": contrib.dog,
    "dowg": contrib.dowg,
    "galore": p(contrib.galore, rank=2),  # its moments are those of projections
    "madgrad": contrib.madgrad,
}
# Optimizers after which other parameters are used than those they step.
ELSEWHERE = {
    "lookahead": lambda rate: optax.lookahead(optax.adam(rate), 5, 0.5),
    "mechanize": lambda rate: contrib.mechanize(optax.adam(rate)),
    "schedule_free": lambda rate: contrib.schedule_free(optax.adam(rate), rate),
    "schedule_free_adamw": contrib.schedule_free_adamw,
    "schedule_free_sgd": contrib.schedule_free_sgd,
}
ABSOLUTE = {"cocob": contrib.cocob, "madgrad": contrib.madgrad}

OTHER = {  # no optimizers, or nothing that is not above
    "differentially_private_aggregate",
    "dpsgd",  # SGD with noise; only to be had with a deprecation warning
    "hutchinson_estimator_diag_hessian",
    "normalize",
    "optimistic_adam",  # deprecated
    "reduce_on_plateau",
    "sam",
    "schedule_free_eval_params",
    "split_real_and_imaginary",
}


def update(tx, grads, state):
    """One step, with what line searches and second-order methods ask for."""
    loss = lambda params: optax.tree.norm(params, squared=True)  # noqa: E731
    extra = {"value": 1.0, "grad": grads, "value_fn": loss, "obj_fn": loss}
    return optax.with_extra_args_support(tx).update(grads, state, PARAMS, **extra)


def field_and_key(path):
    """The field of the innermost named tuple, and the parameter's name if any."""
    fields = [k.name for k in path if isinstance(k, GetAttrKey)]
    names = [k.key for k in path if isinstance(k, DictKey) and k.key in PARAMS]
    return fields[-1] if fields else None, names[-1] if names else None


@pytest.mark.parametrize("name", MOMENTS)
def test_first_moments_are_damped_where_weights_are_outside_and_nothing_else(name):
    factory, fields = MOMENTS[name]
    bare = factory(0.01)
    ours = wr.volumized(bare, 1.0, 0.5)
    ours.init(PARAMS)  # covers all weights, or raises
    state = bare.init(PARAMS)
    for grads in GRADS[:2]:  # ADOPT's first moment moves in its second step
        _, state = update(bare, grads, state)
    updates, expected = update(bare, GRADS[2], state)
    _, got = update(ours, GRADS[2], VolumizedState(jnp.int32(0), state))
    outside = jnp.abs(optax.apply_updates(PARAMS, updates)["kernel"]) > 1
    assert jnp.any(outside) and not jnp.all(outside)
    damped = set()

    def check(path, ours, theirs):
        field, key = field_and_key(path)
        if field in fields and key == "kernel":
            assert jnp.all(theirs != 0)
            theirs = jnp.where(outside, theirs / 2, theirs)
            damped.add(field)
        message = jax.tree_util.keystr(path)
        if not jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(ours, theirs, err_msg=message)

    jax.tree_util.tree_map_with_path(check, got.inner_state, expected)
    assert damped == fields


@pytest.mark.parametrize("name", WITHOUT)
def test_optimizers_without_a_first_moment_are_refused_unless_meant(name):
    bare = WITHOUT[name](0.01)
    with pytest.raises(ValueError, match=r"no first moment for \['kernel'\].* frozen"):
        wr.volumized(bare, 1.0, 0.0).init(PARAMS)
    ours = wr.volumized(bare, 1.0, 0.0, require_momentum=False)
    _, theirs = update(bare, GRADS[0], bare.init(PARAMS))
    updates, mine = update(ours, GRADS[0], ours.init(PARAMS))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    for a, b in zip(*map(jax.tree.leaves, (mine.inner_state, theirs)), strict=True):
        if not is_key(b):
            np.testing.assert_array_equal(a, b)
    new = optax.apply_updates(PARAMS, updates)
    assert jnp.all(jnp.abs(new["kernel"]) <= 1)


def test_every_optimizer_of_optax_is_in_the_tables():
    known = {name.split()[0] for name in (*MOMENTS, *WITHOUT, *ELSEWHERE)}
    for module, home in ((optax, "optax._src.alias"), (contrib, "optax.contrib._")):
        names = {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "").startswith(home)
            and callable(value)
            and not isinstance(value, type)
            and not name.startswith(("scale_by_", "_"))
        }
        assert len(names) > 15
        assert names - OTHER <= known


# Steps that take every optimizer to the wall, where 0.1 or 30 of them do not.
RATES = {"adadelta": 30.0, "adafactor": 0.3, "fromage": 0.3, "galore": 1.0}
RATES |= {"lamb": 0.3, "lars": 100.0}
STARTS = {
    "dadapt_adamw": lambda rate: contrib.dadapt_adamw(rate, estim_lr0=1.0),
    "dog": lambda rate: contrib.dog(10 * rate, ("learning_rate", 0.1)),
    "dowg": lambda rate: contrib.dowg(10 * rate, 1.0),
    "prodigy": lambda rate: contrib.prodigy(rate, estim_lr0=1.0),
}
# Wrappers that keep something of the parameters, of the updates, or of the steps.
AROUND = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: True
    ),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(tx, optax.scale(scale))
    )(1.0),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "reduce_on_plateau": lambda tx: optax.chain(tx, contrib.reduce_on_plateau()),
    "snapshot": lambda tx: optax.chain(tx, optax.snapshot("u", lambda u: u)),
    "split_real_and_imaginary": contrib.split_real_and_imaginary,
    "line search": lambda tx: optax.chain(
        tx, optax.scale_by_backtracking_linesearch(5)
    ),
    "zoom": lambda tx: optax.chain(tx, optax.scale_by_zoom_linesearch(5)),
}
EVERY = {name: factory for name, (factory, _) in MOMENTS.items()} | WITHOUT | STARTS
EVERY |= {name: lambda rate, f=f: f(optax.sgd(rate, 0.9)) for name, f in AROUND.items()}
START = {"bias": jnp.zeros(3), "kernel": 0.1 * jnp.sign(PARAMS["kernel"])}
GOAL = {"bias": jnp.ones(3), "kernel": 3 * jnp.sign(PARAMS["kernel"][::-1])}


def distance(params):
    """A loss whose minimum lies far outside of the box."""
    difference = jax.tree.map(jnp.subtract, params, GOAL)
    return optax.tree.norm(difference, squared=True) / 2


@quick.everything
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_stays_in_the_box_and_gets_to_the_wall(name):
    bare = EVERY[name](RATES.get(name.split()[0], 0.1))
    tx = wr.volumized(bare, 0.25, 0.0, require_momentum=False)
    extra = {"value_fn": distance}
    if "search" not in name and name != "zoom":  # which take no other arguments
        extra["obj_fn"] = distance

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(distance)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, **extra
        )
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"]

    _, seen = quick.jit(lambda carry: jax.lax.scan(step, carry, length=40))(
        (START, tx.init(START))
    )
    assert jnp.max(jnp.abs(seen)) == 0.25
    inside = jnp.abs(seen[-1] - jnp.sign(GOAL["kernel"]) * 0.25) > 1e-6
    assert not jnp.any(inside) or name == "galore"  # whose steps are of low rank


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.masked(tx, True)])
def test_optimizers_after_which_other_parameters_are_used_are_refused(name, wrap):
    bare = wrap(optax.chain(optax.clip(1.0), ELSEWHERE[name](0.1)))
    params = optax.LookaheadParams.init_synced(PARAMS)
    params = params if name == "lookahead" else PARAMS
    tx = wr.volumized(bare, 0.25, 0.0, require_momentum=False)
    with pytest.raises(
        ValueError, match=r"cannot wrap (look|sched|mech).*(around|behind)"
    ):
        tx.init(params)
    with pytest.raises(
        ValueError, match=r"cannot wrap (look|sched|mech).*(around|behind)"
    ):
        tx.update(params, VolumizedState(jnp.int32(0), bare.init(params)), params)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_optimizers_that_undo_each_pull_have_no_soft_wall(name):
    bare = ABSOLUTE[name](0.1)
    state = VolumizedState(jnp.int32(0), bare.init(PARAMS))
    soft = {"number": 0.5, "schedule": optax.constant_schedule(0.0)}
    for alpha in soft.values():
        tx = wr.volumized(bare, 0.25, alpha, require_momentum=False)
        with pytest.raises(ValueError, match=f"alpha must be .* around {name}.* soft"):
            tx.init(PARAMS)
        with pytest.raises(ValueError, match=f"alpha must be .* around {name}.* soft"):
            tx.update(GRADS[0], state, PARAMS)
    wr.volumized(bare, 0.25, 1.0, require_momentum=False).init(PARAMS)


def from_z(tx):
    """What steps from the iterate of schedule_free, which is not the parameters."""

    def update(updates, state, params=None):
        inner, z = state
        updates, inner = tx.update(updates, inner, z)
        return updates, (inner, optax.apply_updates(z, updates))

    return optax.GradientTransformation(lambda p: (tx.init(p), p), update)


def largest(tx, start, shown, evaluated, steps=150):
    """The largest of all weights that are evaluated on the way to a goal that turns."""

    def step(carry, t):
        params, state = carry
        goal = jnp.where(t < 60, -1, 1) * GOAL["kernel"]
        grads = {**START, "kernel": shown(params)["kernel"] - goal}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.max(jnp.abs(evaluated(params, state)["kernel"]))

    run = quick.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    return float(jnp.max(run((start, tx.init(start)))[1]))


def test_schedule_free_goes_around_what_steps_from_z():
    x = lambda params, state: contrib.schedule_free_eval_params(state, params)  # noqa: E731
    z = lambda params, state: state.z  # noqa: E731
    box = wr.volumized(optax.adam(0.1, b1=0.0), 0.25, 0.0)
    bad, good = (contrib.schedule_free(tx, 0.1) for tx in (box, from_z(box)))
    assert largest(bad, START, lambda p: p, x) > 0.26
    assert 0.249 < largest(good, START, lambda p: p, x) < 0.25 * (1 + 1e-6)
    assert largest(good, START, lambda p: p, z) == 0.25


def test_lookahead_goes_around():
    start = optax.LookaheadParams.init_synced(START)
    tx = optax.lookahead(wr.volumized(optax.adam(0.1), 0.25, 0.0), 5, 0.5)
    for which in ("fast", "slow"):
        read = lambda params, state=None, which=which: getattr(params, which)  # noqa: E731
        most = largest(tx, start, lambda params: params.fast, read)
        assert 0.249 < most < 0.25 * (1 + 1e-6)


def test_volumize_goes_behind_mechanize():
    """It rescales what is inside of it, and starts anew from what is done behind it."""
    fast = optax.adam(1.0)
    bad = contrib.mechanize(wr.volumized(fast, 0.25, 0.0))
    good = optax.chain(contrib.mechanize(fast), wr.volumize(0.25, 0.0))
    read = lambda params, state=None: params  # noqa: E731
    assert largest(bad, START, read, read) > 0.3
    assert largest(good, START, read, read) == 0.25


LABELS = {"bias": "x", "kernel": "y"}
ADAM = optax.adam(0.01)
WRAPPED = {
    "chain": optax.chain(optax.clip(1.0), optax.chain(ADAM, optax.scale(0.5))),
    "named_chain": optax.named_chain(("clip", optax.clip(1.0)), ("adam", ADAM)),
    "masked": optax.masked(ADAM, {"bias": False, "kernel": True}),
    "partition": optax.partition({"x": optax.sgd(0.1), "y": ADAM}, LABELS),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(0.01),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "MultiSteps": optax.MultiSteps(ADAM, 1).gradient_transformation(),
    "flatten": optax.flatten(ADAM),
    "nested": optax.chain(
        optax.apply_if_finite(optax.inject_hyperparams(optax.adamw)(0.01), 3),
        optax.identity(),
    ),
    "flatten masked": optax.flatten(optax.chain(ADAM, optax.trace(0.9))),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_moments_are_found_in_wrapped_optimizers(name):
    bare, zero = WRAPPED[name], jnp.int32(0)
    ours = wr.volumized(bare, 0.0, 0.0)
    _, state = bare.update(GRADS[0], bare.init(PARAMS), PARAMS)
    _, expected = bare.update(GRADS[1], state, PARAMS)
    ours.init(PARAMS)
    _, got = ours.update(GRADS[1], VolumizedState(zero, state), PARAMS)
    changed = []

    def check(path, ours, theirs):
        field, key = field_and_key(path)
        if field in ("mu", "trace") and key != "bias":
            changed.append(field)
            kept = np.array(theirs)
            assert np.all(kept != 0)
            # Flat vectors hold the bias first.
            kept[kept.size - 12 if kept.ndim == 1 else 0 :] = 0
            theirs = kept
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got.inner_state, expected)
    assert changed == (["mu", "trace"] if name == "flatten masked" else ["mu"])


def test_what_a_flattened_part_holds_cannot_be_told():
    part = optax.masked(optax.flatten(ADAM), {"bias": False, "kernel": True})
    with pytest.raises(ValueError, match=r"no first moment for \['kernel'\]"):
        wr.volumized(part, 1.0, 0.0).init(PARAMS)


@pytest.mark.parametrize(
    "silent",
    [
        optax.conditionally_mask(ADAM, lambda step: step % 2 == 0),
        optax.chain(contrib.sam(ADAM, optax.sgd(0.1))),
        optax.chain(ADAM, optax.apply_every(3)),
    ],
)
def test_wrappers_that_skip_steps_silently_are_refused(silent):
    tx = wr.volumized(silent, 1.0, 0.0)
    with pytest.raises(ValueError, match="Put them around volumized"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
        lambda tx: contrib.sam(tx, optax.sgd(0.1), sync_period=2),
    ],
)
def test_wrappers_that_skip_steps_go_around(outer):
    tx, params = outer(wr.volumized(optax.adam(0.1), 1.0, 0.0)), PARAMS
    state = tx.init(params)
    for grads in GRADS[:2]:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.all(jnp.abs(params["kernel"]) <= 1 + 1e-6)


def test_measurements_are_no_moments():
    measure = optax.transforms.measure_with_ema(lambda updates: updates, 0.5)
    bare = optax.chain(ADAM, optax.transforms.monitor({"all": measure}))
    _, expected = bare.update(GRADS[0], bare.init(PARAMS), PARAMS)
    tx = wr.volumized(bare, 0.0, 0.0)
    _, got = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got.inner_state[1], expected[1])
    np.testing.assert_array_equal(optax.tree.get(got, "mu")["kernel"], 0)


class Own(NamedTuple):
    """A state as other packages have them."""

    step: Any
    mu: Any
    velocity: Any
    inner: Any


def own(shape_of=lambda p: p.shape, inner=None):
    """An optimizer whose state has a field ``mu``, and which does nothing."""

    def init(params):
        ones = jax.tree.map(lambda p: jnp.ones(shape_of(p)), params)
        return Own(jnp.int32(0), ones, ones, inner and inner.init(params))

    return optax.GradientTransformation(init, lambda u, state, params=None: (u, state))


def ones_left(state):
    return {k: float(jnp.sum(v)) for k, v in state.items()}


def test_a_users_own_state_with_mu():
    tx = wr.volumized(own(inner=optax.trace(0.9)), 0.0, 0.0)
    state = tx.init(PARAMS)
    ones = optax.tree.ones_like(PARAMS)
    filled = state.inner_state._replace(inner=optax.TraceState(ones))
    _, new = tx.update(PARAMS, state._replace(inner_state=filled), PARAMS)
    assert ones_left(new.inner_state.mu) == {"bias": 3.0, "kernel": 0.0}
    assert ones_left(new.inner_state.inner.trace) == {"bias": 3.0, "kernel": 0.0}
    assert ones_left(new.inner_state.velocity) == {"bias": 3.0, "kernel": 12.0}


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (12,), (3, 4), (2, 4, 3)])
def test_mu_that_is_not_shaped_like_the_parameters_is_left_alone(shape):
    bare = own(lambda p: shape if p.ndim == 2 else p.shape)
    with pytest.raises(ValueError, match=r"no first moment for \['kernel'\]"):
        wr.volumized(bare, 0.0, 0.0).init(PARAMS)
    tx = wr.volumized(bare, 0.0, 0.0, require_momentum=False)
    state = tx.init(PARAMS)
    _, new = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(new.inner_state.mu["kernel"], jnp.ones(shape))


@pytest.mark.parametrize("mu", [None, 0.9, {"other": jnp.ones((4, 3))}, [1.0, 2.0]])
def test_mu_that_is_no_tree_of_the_parameters_is_left_alone(mu):
    """The moment is found beside it, and below it."""
    state = Own(0, mu, ADAM.init(PARAMS), {"mu": Own(1, mu, 2, optax.EmptyState())})
    new, covered = map_moments(lambda _, m: m + 1, state, PARAMS)
    assert covered == {0, 1}
    np.testing.assert_array_equal(new.velocity[0].mu["kernel"], 1.0)
    np.testing.assert_array_equal(new.velocity[0].nu["kernel"], 0.0)
    same = lambda x, y: np.testing.assert_array_equal(x, y)  # noqa: E731
    jax.tree.map(same, new._replace(velocity=0), state._replace(velocity=0))


def test_map_moments_numbers_leaves_as_jax_does():
    params = {"b": [jnp.zeros((2, 2)), None, jnp.zeros(3)], "a": jnp.zeros((1, 5))}
    for tx in (ADAM, optax.flatten(ADAM), optax.masked(ADAM, {"a": True, "b": False})):
        seen = {}
        state = tx.init(params)
        new, covered = map_moments(
            lambda i, m, seen=seen: seen.setdefault(i, m) + i + 1, state, params
        )
        shapes = {0: (1, 5), 1: (2, 2), 2: (3,)}
        assert {i: m.shape for i, m in seen.items()} == {i: shapes[i] for i in covered}
        assert jax.tree.structure(new) == jax.tree.structure(state)
        moments = jax.tree.leaves(optax.tree.get(new, "mu"))
        flat = np.concatenate([np.ravel(m) for m in moments])
        want = np.concatenate([np.full(np.prod(shapes[i]), i + 1.0) for i in covered])
        np.testing.assert_array_equal(flat, want)


def test_nnx_and_equinox_parameters():
    nnx_state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    module = eqx.filter(eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.is_array)
    for params in (nnx_state, module, jnp.ones((4, 3)), [jnp.ones((4, 3))] * 2):
        tx = wr.volumized(optax.sgd(0.1, momentum=0.9), 0.0, 0.0)
        ones = optax.tree.ones_like(params)
        _, state = tx.update(ones, tx.init(params), params)
        trace = optax.tree.get(state, "trace")
        for leaf in jax.tree.leaves(trace):
            np.testing.assert_array_equal(leaf, 0.0 if leaf.ndim == 2 else 1.0)
        assert jax.tree.structure(trace) == jax.tree.structure(params)


@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.flatten])
@pytest.mark.parametrize(
    "factory",
    [
        p(optax.adam, mu_dtype=jnp.bfloat16),
        p(optax.lion, mu_dtype="bfloat16"),
        p(optax.sgd, momentum=0.9, accumulator_dtype=jnp.bfloat16),
        p(contrib.muon, mu_dtype=jnp.bfloat16),
    ],
)
def test_moments_keep_their_dtype_and_take_alpha_in_it(factory, wrap):
    bare = wrap(factory(0.01))
    tx = wr.volumized(bare, 0.0, 0.3)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    _, expected = bare.update(GRADS[0], bare.init(PARAMS), PARAMS)
    for new, old in zip(
        *map(jax.tree.leaves, (state.inner_state, expected)), strict=True
    ):
        assert new.dtype == old.dtype
        if new.dtype == jnp.bfloat16:
            exact = old.astype(jnp.float32) * np.float32(0.3)
            weights = new.size - 12 if new.ndim == 1 else 0
            want = jnp.concatenate(
                [old.ravel()[:weights], exact.ravel()[weights:].astype(jnp.bfloat16)]
            )
            if new.size >= 12:
                np.testing.assert_array_equal(new.ravel(), want)


def test_galores_moments_are_in_other_axes_even_where_shapes_agree():
    """A square weight's projection at full rank has its shape, but is rotated."""
    params = {"kernel": jnp.eye(3)}
    with pytest.raises(ValueError, match="no first moment"):
        wr.volumized(contrib.galore(0.01), 0.0, 0.0).init(params)


class Gaussian(NamedTuple):
    """Parameters of two heads, one of which is called like a moment."""

    mu: Any
    sigma: Any


def test_a_parameter_called_mu_is_no_moment():
    dense = {"kernel": PARAMS["kernel"]}
    params = {**dense, "heads": Gaussian(mu=dense, sigma=dense)}
    tx = wr.volumized(ADAM, 0.0, 0.0)
    _, state = tx.update(params, tx.init(params), params)
    for leaf in jax.tree.leaves(state.inner_state[0].mu):
        np.testing.assert_array_equal(leaf, 0.0)
    for leaf in jax.tree.leaves(state.inner_state[0].nu):
        assert jnp.all(leaf > 0)


def test_weak_moments_become_strong_without_a_program_for_each_shape(caplog):
    params = {str(n): jnp.full((7, n), 0.5) for n in range(51, 61)}
    assert all(leaf.weak_type for leaf in params.values())
    tx = wr.volumized(ADAM, 0.5, 0.5)
    ADAM.init(params)
    with jax.log_compiles():
        state = tx.init(params)
    compiled = [r.message for r in caplog.records if r.message.startswith("Compiling")]
    assert not [text for text in compiled if "convert_element_type" in text]
    for leaf in jax.tree.leaves(state):
        assert not leaf.weak_type
    _, new = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_a_moment_is_damped_by_few_operations():
    """Some for each leaf, of which one is a program: that of the box."""
    params = [jnp.ones((3, n)) for n in range(3, 8)]
    tx, bare = wr.volumized(ADAM, 0.5, 0.5), ADAM
    count = lambda tx, *state: len(  # noqa: E731
        jax.make_jaxpr(lambda p, s: tx.update(p, s, p))(params, *state).jaxpr.eqns
    )
    state = tx.init(params)
    more = count(tx, state) - count(bare, state.inner_state)
    assert more <= 13 * len(params) + 10


def test_gradients_narrower_than_weights_under_apply_if_finite():
    """Optax wants updates of the gradients' dtype, which is what the card says."""
    params = {"kernel": jnp.full((3, 2), 0.25)}
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, -5, jnp.bfloat16), params)
    finite = lambda tx: optax.apply_if_finite(tx, 3)  # noqa: E731
    sgd, box = optax.sgd(0.1), wr.volumize(0.5, 0.0)

    def stepped(tx, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)["kernel"]

    with pytest.raises(TypeError, match="cond branches"):
        stepped(finite(optax.chain(sgd, box)), grads)
    with pytest.raises(TypeError, match="cond branches"):
        stepped(finite(optax.adam(0.1)), grads)  # by itself
    around = wr.volumized(finite(sgd), 0.5, 0.0, require_momentum=False)
    wide = jax.tree.map(jnp.float32, grads)
    ways = [
        (optax.chain(finite(sgd), box), grads),
        (around, grads),
        (wr.volumized(finite(optax.adam(1.0)), 0.5, 0.0), wide),
        (finite(optax.chain(sgd, box)), wide),
    ]
    for tx, given in ways:
        np.testing.assert_array_equal(stepped(tx, given), 0.5)
        nans = jax.tree.map(lambda leaf: leaf * jnp.nan, given)
        np.testing.assert_array_equal(stepped(tx, nans), params["kernel"])


def test_counts_of_states_are_found():
    params = jnp.full((3, 2), 0.25)
    links = {
        "CountState": [
            wr.volumize(0.5, 0.5),
            wr.parseval(1e-3),
            wr.add_shifted_l2(1e-4, 1e-3),
            wr.quantize_every(2, "binary", 0.5),
        ],
        "AddWeissiState": [wr.add_weissi(1e-3, 1e-4)],
        "VolumizedState": [wr.volumized(ADAM, 0.5, 0.5)],
    }
    for name, own in links.items():
        for link in own:
            tx = optax.chain(optax.trace(0.9), optax.scale_by_adam(), link)
            _, state = tx.update(params, tx.init(params), params)
            for wanted in (name, "ScaleByAdamState"):
                if name == "VolumizedState" and wanted != name:
                    continue  # of which there are two here
                count = optax.tree.get(
                    state,
                    "count",
                    filtering=lambda path, _: path[-1].tuple_name == wanted,  # noqa: B023
                )
                assert count == 1
    tx = wr.volumized(ADAM, 0.5, 0.5)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(KeyError, match="Found multiple values"):
        optax.tree.get(state, "count")
    assert state.count == optax.tree.get(state.inner_state, "count") == 1
