"""Training steps do what the names of their regularizers say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import weightreg as wr
from benchmarks import training
from benchmarks.programs import BOX, COMPLEXITY, ENERGY
from benchmarks.training import REGULARIZERS, Task

PARAMS = {"kernel": jnp.arange(1.0, 7.0).reshape(3, 2) / 2}
X = jnp.arange(12.0).reshape(4, 3) ** 2 / 50
Y = X @ PARAMS["kernel"]  # where the loss has no gradient, penalties move the weights
SGD = optax.sgd(100.0, momentum=0.9)


def loss(params, kept, x, y):
    return jnp.mean((x @ params["kernel"] - y) ** 2), {"seen": kept["seen"] + 1}


TASK = Task(loss, {"params": PARAMS, "seen": jnp.zeros(())}, X, Y)


def stepped(name):
    program = training.step(TASK, REGULARIZERS[name], SGD)
    params, kept, _ = jax.jit(program.run)(*program.arguments)
    assert kept["seen"] == 1 and program.donated == (0, 1, 2)
    return params["kernel"]


def by_hand(tx, norm=lambda params: params, penalty=lambda params: 0.0):
    objective = lambda p: loss(norm(p), {"seen": 0}, X, Y)[0] + penalty(p)  # noqa: E731
    grads = jax.grad(objective)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)["kernel"]


EXPECTED = {
    "none": lambda: by_hand(SGD),
    "add_decayed_weights": lambda: by_hand(
        optax.chain(optax.add_decayed_weights(1e-4), SGD)
    ),
    "volumized": lambda: by_hand(wr.volumized(SGD, **BOX)),
    "volumize": lambda: by_hand(optax.chain(SGD, wr.volumize(**BOX))),
    "weissi in the loss": lambda: by_hand(SGD, penalty=wr.weissi(ENERGY, COMPLEXITY)),
    "add_weissi": lambda: by_hand(SGD, penalty=wr.weissi(ENERGY, COMPLEXITY)),
    "equivalent_norm": lambda: by_hand(SGD, wr.equivalent_norm()),
    "add_shifted_l2": lambda: by_hand(SGD, penalty=wr.shifted_l2(1e-4, 1e-3)),
    "equivalent_norm and add_shifted_l2": lambda: by_hand(
        SGD, wr.equivalent_norm(), wr.shifted_l2(1e-4, 1e-3)
    ),
    "parseval": lambda: by_hand(optax.chain(SGD, wr.parseval(1e-3))),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_step_is_that_of_its_name(name):
    expected = EXPECTED[name]()
    np.testing.assert_allclose(stepped(name), expected, rtol=1e-5)
    if name != "none":
        assert np.abs(expected - EXPECTED["none"]()).max() > 1e-4


def test_without_values_a_step_starts_from_shapes():
    shapes = jax.eval_shape(lambda: TASK.variables)
    program = training.step(TASK._replace(variables=shapes), REGULARIZERS["none"], SGD)
    states = zip(*map(jax.tree.leaves, (program.arguments[2], PARAMS)), strict=True)
    for state, leaf in states:
        assert isinstance(state, jax.ShapeDtypeStruct) and state.shape == leaf.shape
