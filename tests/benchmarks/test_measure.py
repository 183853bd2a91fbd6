"""What is measured of trained networks is theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import quick

from benchmarks import measure, models, robustness
from benchmarks.cells import Run
from benchmarks.settings import Settings


def test_walls_in_plots_are_those_of_the_convolutional_network():
    config = Settings.of("cifar10")
    model = models.make(config.model, 10)
    init = quick.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    run = Run("final", "volumization", {"v": 0.7}, 0)
    layers = measure.weights(run, params).values()
    fans = np.array([9 * 32, 9 * 64, 9 * 64, 10])  # He's fan-out, window included
    walls = [layer["wall"] for layer in layers]
    np.testing.assert_allclose(walls, 0.7 * np.sqrt(6 / fans), rtol=1e-5)


def test_what_has_diverged_is_in_no_bin():
    kernel = np.array([[1.0, np.nan], [2.0, np.inf]], np.float32)
    run = Run("final", "none", {"learning_rate": 1e-3}, 0)
    (layer,) = measure.weights(run, {"Dense_0": {"kernel": kernel}}).values()
    assert sum(layer["counts"]) == 2 and layer["wall"] is None
    assert (layer["edges"][0], layer["edges"][-1]) == (1, 2)


def test_gradients_are_counted_by_their_norms():
    """Of logits (w x, 0) it is |w| times the other class's probability."""

    def logits(w, x):
        return jnp.concatenate([x * w, jnp.zeros_like(x)], axis=-1)

    x, y = np.array([[0.0], [0.0], [1.0]], np.float32), np.array([0, 1, 0])
    for w in (1e-3, 30.0, 0.0, np.nan):
        counts = measure.gradients(robustness.Network(logits, np.float32(w)), x, y)
        assert sum(counts) == (0 if np.isnan(w) else 3)
        norms = np.abs(w) * np.array([0.5, 0.5, 1 / (1 + np.exp(w))])
        inside = norms[norms > 1e-7]
        places = np.searchsorted(measure.LOG10_EDGES, np.log10(inside)) - 1
        assert all(counts[place] for place in places)
        if w == 0:  # below the first edge
            assert counts[0] == 3
