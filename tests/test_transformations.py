"""One suite that every transformation of the library passes."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import weightreg as wr

pytestmark = quick.everything

BASES = {
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=1e-4),
    "amsgrad": optax.amsgrad,
    "adabelief": optax.adabelief,
    "nadam": optax.nadam,
    "lion": optax.lion,
    "adan": optax.adan,
    "novograd": optax.novograd,
    "sm3": optax.sm3,
    "rmsprop": functools.partial(optax.rmsprop, momentum=0.9),
    "muon": optax.contrib.muon,
    "ademamix": optax.contrib.ademamix,
    "laprop": wr.laprop,
}


def chained(base, learning_rate, volume, alpha):
    return optax.chain(base(learning_rate), wr.volumize(volume, alpha))


def wrapped(base, learning_rate, volume, alpha):
    return wr.volumized(base(learning_rate), volume, alpha)


def named(factory, learning_rate, volume, alpha):
    return factory(learning_rate, volume=volume, alpha=alpha)


# From (learning_rate, volume, alpha) to a transformation.
FACTORIES = {
    **{f"volumized({k})": functools.partial(wrapped, v) for k, v in BASES.items()},
    "chain(adam, volumize)": functools.partial(chained, optax.adam),
    "chain(sgd, volumize)": functools.partial(chained, optax.sgd),
    "volumized_sgd": functools.partial(named, wr.volumized_sgd),
    "volumized_adam": functools.partial(named, wr.volumized_adam),
    "volumized_laprop": functools.partial(named, wr.volumized_laprop),
    "laprop": lambda learning_rate, volume, alpha: wr.laprop(learning_rate),
    "chain(add_weissi, adam)": lambda learning_rate, volume, alpha: optax.chain(
        wr.add_weissi(1e-4, 1e-4), optax.adam(learning_rate)
    ),
    "chain(add_weissi(spectral), sgd)": lambda learning_rate, volume, alpha: (
        optax.chain(
            wr.add_weissi(1e-4, 1e-4, norm="spectral"), optax.sgd(learning_rate)
        )
    ),
    "chain(add_shifted_l2, adam)": lambda learning_rate, volume, alpha: optax.chain(
        wr.add_shifted_l2(1e-4, 1e-3), optax.adam(learning_rate)
    ),
    "chain(adam, quantize_every)": lambda learning_rate, volume, alpha: optax.chain(
        optax.adam(learning_rate), wr.quantize_every(2, "ternary", volume)
    ),
    "chain(sgd, parseval)": lambda learning_rate, volume, alpha: optax.chain(
        optax.sgd(learning_rate), wr.parseval(1e-6)
    ),
}
# Those without a box, and among them those that need whole weights.
NEIGHBOURS = ("weissi", "shifted", "parseval")
WHOLE = [name for name in FACTORIES if any(word in name for word in NEIGHBOURS)]
UNBOXED = ["laprop", *WHOLE]
# Ours, without the further optimizers to wrap; enough where the base does not matter.
OURS = [name for name in FACTORIES if not name.startswith("volumized(")]
OURS += ["volumized(sgd)", "volumized(adam)"]


def tree(dtype=jnp.float32, shape=(8, 4)):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[-1:])}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def run(tx, params, grads, steps=4, jit=quick.jit):
    state = tx.init(params)  # compiled, it would not keep shardings

    @jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.dtype, x.shape, x.aval.weak_type), tree)


@pytest.mark.parametrize("name", [n for n in FACTORIES if "quantize" not in n])
def test_converges_in_the_box_and_stops_at_its_wall(name):
    """The minimum of a separable parabola in a box is its clipped minimum."""
    target = {"kernel": jnp.array([[0.3, -0.2], [2.0, -3.0]]), "bias": jnp.array([2.0])}
    loss = lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)  # noqa: E731
    rates = {"volumized(muon)": 0.1}
    rate = optax.cosine_decay_schedule(rates.get(name, 0.05), 1500)
    if name == "volumized(sm3)":  # takes no schedule, and slows down by itself
        rate = 0.3
    tx = FACTORIES[name](rate, 1.0, 0.0)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda t: 0.1 * jnp.sign(t), target)
    train = quick.jit(lambda carry: jax.lax.scan(step, carry, length=1500)[0])
    params, _ = train((params, quick.jit(tx.init)(params)))
    kernel = target["kernel"]
    kernel = kernel if name in UNBOXED else jnp.clip(kernel, -1, 1)
    np.testing.assert_allclose(params["kernel"], kernel, atol=0.06)
    np.testing.assert_allclose(params["bias"], 2.0, atol=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FACTORIES)
def test_types_and_structure_never_change(name, dtype):
    params = tree(dtype)
    tx = FACTORIES[name](1e-2, 0.5, 0.9)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    update = quick.jit(tx.update)
    updates, new = update(grads, state, params)
    chex.assert_trees_all_equal_structs(updates, params)
    assert types(updates) == types(params)
    chex.assert_trees_all_equal_structs(state, new)
    assert types(new) == types(update(grads, new, params)[1])
    assert types(state) == types(new)
    if dtype != "float16" or "sgd" in name or "laprop" in name:
        # Squares of gradients underflow in float16, and Optax's Adam divides by them.
        chex.assert_tree_all_finite(updates)


def test_weak_types_do_not_stay_in_the_state():
    params = {"kernel": jnp.full((3, 3), 1.0)}
    assert params["kernel"].aval.weak_type
    for name in OURS:
        tx = FACTORIES[name](1e-2, 0.5, jnp.float32(0.9))

        def step(state, _, tx=tx):
            return tx.update(params, state, params)[1], None

        jax.lax.scan(step, tx.init(params), length=2)  # fails if a type changes
    # Adan keeps the last gradient with the type it came with.
    adan = wr.volumized(optax.adan(1e-2), 0.5, 0.9)
    _, state = adan.update(params, adan.init(params), params)
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", FACTORIES)
def test_compiles_once_with_traced_hyperparameters(name):
    traces = []

    @quick.jit
    def step(params, state, rate, volume, alpha):
        traces.append(1)
        tx = FACTORIES[name](rate, volume, alpha)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = tree()
    state = FACTORIES[name](1e-2, 0.5, 0.9).init(params)
    for volume, alpha in ((0.5, 0.9), (0.3, 0.0), (0.0, -1.0), (jnp.inf, 1.0)):
        params, state = step(params, state, 1e-2, volume, alpha)
    assert len(traces) == 1


@pytest.mark.parametrize("name", FACTORIES)
def test_unexpected_extra_arguments_and_map_params(name):
    params = tree()
    tx = optax.with_extra_args_support(FACTORIES[name](1e-2, 0.5, 0.9))
    state = tx.init(params)
    tx.update(params, state, params, nobody_expects=1)
    if "novograd" not in name and "muon" not in name:  # Optax's cannot be mapped
        doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
        chex.assert_trees_all_equal_structs(doubled, state)


def test_extra_arguments_reach_the_wrapped_optimizer():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = wr.volumized(inner, jnp.inf, 0.5, require_momentum=False)
    updates, _ = tx.update(tree(), tx.init(tree()), tree(), factor=3.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 3 * x, tree()))


@pytest.mark.parametrize("params", [{}, None, (), {"a": None}, {"b": jnp.ones(3)}, 2.0])
@pytest.mark.parametrize("name", OURS)
def test_trees_without_weights(name, params):
    params = jax.tree.map(jnp.asarray, params)
    tx = FACTORIES[name](1e-2, wr.he_volume(0.5), 0.9)
    if params is None:
        tx.init(params)
        return
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal_structs(updates, params)


@quick.bits
@pytest.mark.parametrize("name", OURS)
def test_inject_hyperparams_equals_the_plain_one(name):
    params, grads = tree(), tree()
    compiled = functools.partial(run, params=params, grads=grads, jit=jax.jit)
    plain, _ = compiled(FACTORIES[name](1e-2, 0.5, 0.9))

    def factory(learning_rate, volume, alpha):
        return FACTORIES[name](learning_rate, volume, alpha)

    injected = optax.inject_hyperparams(factory)(1e-2, 0.5, 0.9)
    got, state = compiled(injected)
    chex.assert_trees_all_close(got, plain, rtol=1e-6)
    assert set(state.hyperparams) == {"learning_rate", "volume", "alpha"}

    shrinking = lambda count: 0.5 / (count + 1)  # noqa: E731
    scheduled, _ = compiled(optax.inject_hyperparams(factory)(1e-2, shrinking, 0.9))
    own, _ = compiled(FACTORIES[name](1e-2, shrinking, 0.9))
    chex.assert_trees_all_close(scheduled, own, rtol=1e-6)
    assert name in UNBOXED or not np.allclose(own["kernel"], plain["kernel"])


def test_inject_hyperparams_with_a_rule_needs_static_args():
    params, grads = tree(), tree()
    rule = wr.he_volume(0.5)
    static = optax.inject_hyperparams(wr.volumize, static_args="volume")(
        rule, alpha=0.5
    )
    expected, _ = run(wr.volumize(rule, 0.5), params, grads)
    chex.assert_trees_all_close(run(static, params, grads)[0], expected, rtol=1e-6)
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(wr.volumize)(rule, alpha=0.5).init(params)


@pytest.mark.parametrize("name", OURS)
def test_vmap_over_hyperparameters_equals_a_loop(name):
    params, grads = tree(), tree()

    def go(volume, alpha):
        tx = FACTORIES[name](1e-2, volume, alpha)
        state = tx.init(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    volumes = jnp.array([0.1, 0.5, jnp.inf, 0.0])
    alphas = jnp.array([0.0, 0.9, 0.5, -1.0])
    mapped, alone = quick.jit(jax.vmap(go))(volumes, alphas), quick.jit(go)
    for i, (volume, alpha) in enumerate(zip(volumes, alphas, strict=True)):
        one = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(one, alone(volume, alpha), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", OURS)
def test_multi_steps_around(name):
    params, grads = tree(), tree()
    tx = FACTORIES[name](1e-2, 0.5, 0.5)
    expected, _ = run(tx, params, grads, steps=2)
    every = optax.MultiSteps(tx, 3)
    after_five, _ = run(every, params, grads, steps=5)
    after_three, _ = run(every, params, grads, steps=3)
    after_six, _ = run(every, params, grads, steps=6)
    chex.assert_trees_all_equal(after_five, after_three)
    chex.assert_trees_all_close(after_six, expected, rtol=1e-5, atol=1e-6)


def test_multi_steps_inside_volumizes_only_steps_that_are_taken():
    params, grads = tree(), tree()
    schedule = lambda count: 0.5 - 0.1 * count  # noqa: E731
    inner = optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation()
    tx = wr.volumized(inner, schedule, 0.5)
    plain = wr.volumized(optax.adam(1e-2), schedule, 0.5)
    chex.assert_trees_all_equal(run(tx, params, grads, 2)[0], params)
    got, state = run(tx, params, grads, 8)
    expected, plain_state = run(plain, params, grads, 2)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert state.count == 2
    adam_state = optax.tree.get(state, "ScaleByAdamState")
    chex.assert_trees_all_close(
        adam_state.mu, plain_state.inner_state[0].mu, rtol=1e-5, atol=1e-6
    )


def test_apply_if_finite_inside_and_around():
    params, grads = tree(), tree()
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    inside = wr.volumized(optax.apply_if_finite(optax.adam(1e-2), 3), 0.5, 0.5)
    around = optax.apply_if_finite(wr.volumized(optax.adam(1e-2), 0.5, 0.5), 3)
    expected, _ = run(wr.volumized(optax.adam(1e-2), 0.5, 0.5), params, grads, 2)
    for tx in (inside, around):
        p, state = params, tx.init(params)
        for g in (grads, bad, grads):
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        chex.assert_trees_all_close(p, expected, rtol=1e-6)


@quick.bits
def test_a_step_that_is_accepted_though_not_finite_is_volumized():
    """After too many errors in a row ``apply_if_finite`` gives up."""
    params = {"kernel": jnp.full((2, 2), 2.0)}
    bad = {"kernel": jnp.array([[jnp.nan, 0.0], [0.0, 0.0]])}
    inner = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 1)
    tx = wr.volumized(inner, 0.5, 0.0)
    updates, state = tx.update(bad, tx.init(params), params)
    chex.assert_trees_all_equal(updates, {"kernel": jnp.zeros((2, 2))})
    assert state.count == 0
    updates, state = tx.update(bad, state, params)
    assert state.count == 1
    new = (params["kernel"] + updates["kernel"]).ravel()
    np.testing.assert_array_equal(new, [jnp.nan, 0.5, 0.5, 0.5])


def test_wrappers_that_put_steps_off_may_be_nested():
    params, grads = tree(), tree()
    twice = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    tx = wr.volumized(optax.apply_if_finite(twice, 3), 0.5, 0.5)
    plain = wr.volumized(optax.adam(1e-2), 0.5, 0.5)
    got, state = run(tx, params, grads, 4)
    expected, _ = run(plain, params, grads, 2)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert state.count == 2


def test_partition_and_masked():
    params = {"a": tree(), "b": tree()}
    labels = {"a": "adam", "b": "sgd"}
    parts = {"adam": optax.adam(1e-2), "sgd": optax.sgd(1e-2, momentum=0.9)}
    volume = {"a": 0.5, "b": {"kernel": 0.25, "bias": None}}
    whole = wr.volumized(optax.partition(parts, labels), volume, 0.5)
    each = optax.partition(
        {k: wr.volumized(tx, volume, 0.5) for k, tx in parts.items()}, labels
    )
    got, state = run(whole, params, params)
    expected, other = run(each, params, params)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    for name in ("mu", "trace"):
        chex.assert_trees_all_close(
            optax.tree.get(state, name), optax.tree.get(other, name), rtol=1e-6
        )
    frozen = optax.masked(
        wr.volumized(optax.adam(1e-2), 0.5, 0.5), {"a": True, "b": False}
    )
    updates, _ = frozen.update(params, frozen.init(params), params)
    chex.assert_trees_all_equal(updates["b"], params["b"])
    with pytest.raises(ValueError, match="around volumized"):
        waits = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
        tx = wr.volumized(optax.partition({"x": waits}, {"a": "x", "b": "x"}), 0.5, 0.5)
        tx.update(params, tx.init(params), params)


def test_flatten_inside():
    params, grads = tree(), tree()
    got, state = run(
        wr.volumized(optax.flatten(optax.adam(1e-2)), 0.5, 0.5), params, grads
    )
    expected, plain = run(wr.volumized(optax.adam(1e-2), 0.5, 0.5), params, grads)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    flat = jnp.concatenate(
        [x.ravel() for x in jax.tree.leaves(plain.inner_state[0].mu)]
    )
    chex.assert_trees_all_close(state.inner_state[0].mu, flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_restored_in_mid_run_it_goes_on_bit_for_bit(name, tmp_path):
    params, grads = tree(), tree()
    tx = FACTORIES[name](1e-2, lambda count: 0.5 - 0.05 * count, 0.9)
    state = tx.init(params)

    @quick.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "mid", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, {"params": params, "state": state}
        )
        restored = checkpointer.restore(tmp_path / "mid", abstract)
    on, back = (params, state), (restored["params"], restored["state"])
    for _ in range(3):
        on, back = step(*on), step(*back)
    chex.assert_trees_all_equal(on, back)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", [n for n in FACTORIES if n not in OURS])
def test_keeps_the_sharding_of_eight_devices(name, axis_type, cpu_mesh):
    """Around optimizers of others; test_meshes.py tests ours, and more of them."""
    if "adan" in name or ("muon" in name and axis_type == AxisType.Explicit):
        pytest.skip("Optax's own does not keep shardings")
    mesh = cpu_mesh((4, 2), ("x", "y"), axis_type)
    specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y")}
    shard = {k: NamedSharding(mesh, s) for k, s in specs.items()}
    params = tree()
    tx = FACTORIES[name](1e-2, wr.he_volume(0.2), 0.5)
    expected, _ = run(tx, params, params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard)
        got, state = run(tx, placed, placed)
        updates, _ = quick.jit(tx.update)(placed, tx.init(placed), placed)
    for key, sharding in shard.items():
        assert got[key].sharding.is_equivalent_to(sharding, got[key].ndim)
        assert updates[key].sharding.is_equivalent_to(sharding, got[key].ndim)
    if "sm3" in name:  # vectors of its own, not of parameters
        state = ()
    for leaf in jax.tree.leaves(state):
        if leaf.shape in ((8, 4), (4,)):
            want = shard["kernel" if leaf.ndim == 2 else "bias"]
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", sorted(set(OURS) - set(WHOLE)))
def test_inside_shard_map_on_parts_of_a_weight(name, cpu_mesh):
    mesh = cpu_mesh((8,), ("x",))
    params = {"kernel": tree()["kernel"]}
    tx = FACTORIES[name](1e-2, 0.5, 0.5)

    def go(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    rows = PartitionSpec("x")
    sharded = quick.jit(jax.shard_map(go, mesh=mesh, in_specs=rows, out_specs=rows))
    chex.assert_trees_all_close(sharded(params), quick.jit(go)(params), rtol=1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_inside_shard_map_on_whole_weights(name, cpu_mesh):
    """Each device with examples of its own; JAX sums gradients of what they share."""
    mesh = cpu_mesh((8,), ("x",))
    params, x = {"kernel": tree()["kernel"]}, jnp.ones((8, 4, 8))
    tx = FACTORIES[name](1e-2, 0.5, 0.5)

    def go(params, x, mean=lambda g: g):
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"]) ** 2))(params)
        updates, _ = tx.update(mean(grads), tx.init(params), params)
        return optax.apply_updates(params, updates)

    spread = jax.shard_map(
        functools.partial(go, mean=lambda g: jax.tree.map(lambda x: x / 8, g)),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("x")),
        out_specs=PartitionSpec(),
    )
    chex.assert_trees_all_close(
        quick.jit(spread)(params, x), quick.jit(go)(params, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["volumized_adam", "chain(add_weissi(spectral), sgd)"])
def test_never_waits_for_the_device(name):
    params = tree()
    tx = FACTORIES[name](1e-2, wr.he_volume(0.5), 0.5)
    step = jax.jit(tx.update)
    state = tx.init(params)
    step(params, state, params)
    with jax.transfer_guard("disallow"):
        step(params, state, params)


def test_linen_nnx_and_equinox_agree():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 2)), rng.normal(size=2)
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))
    tx = wr.volumized_adam(0.1, volume=0.5, alpha=0.25)
    loss = lambda out: jnp.mean((out - y) ** 2)  # noqa: E731

    dense = nn.Dense(2)
    params = {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda p: loss(dense.apply(p, x)))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = params["params"]["kernel"]

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray(kernel)
    model.bias[...] = jnp.asarray(bias)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        grads = nnx.grad(lambda m: loss(m(x)))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        train(model, optimizer)
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)

    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    where = lambda m: (m.weight, m.bias)  # noqa: E731
    linear = eqx.tree_at(where, linear, (jnp.asarray(kernel.T), jnp.asarray(bias)))
    state = tx.init(eqx.filter(linear, eqx.is_inexact_array))
    for _ in range(3):
        grads = eqx.filter_grad(lambda m: loss(jax.vmap(m)(x)))(linear)
        arrays = eqx.filter(linear, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, arrays)
        linear = eqx.apply_updates(linear, updates)
    np.testing.assert_allclose(linear.weight.T, expected, rtol=1e-5)
    assert jnp.abs(expected).max() < np.abs(kernel).max()
