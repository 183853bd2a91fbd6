"""Volumization of a linear student: its error in closed form, and trained (Figure 4).

A teacher's weights are uniform in ``[-a, a]``, noise of labels moves the student's
optimum from ``u`` to ``u + eta``, and the error is the mean of ``(w - u)^2`` over
weights. The paper takes ``eta`` uniform in ``[-sigma, sigma]`` with ``sigma <= a``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import weightreg as wr
from benchmarks.environment import environment
from benchmarks.record import FORMAT

NAME = "theory-figure4"  # of the file
Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
NOISES: dict[str, Noise] = {
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
}
RATE, DESCENT = 0.75, 20  # of gradient descent, after which 1e-12 of the way is left


def volumized_error(volume: Any, sigma: Any, a: float = 1.0) -> np.ndarray:
    r"""The error of weights that are trained in the box, ``w = clip(u + eta, -V, V)``.

    .. math::
      E(V) = \tfrac13 (c \sigma^2 + (1 - c)(a - V)^2), \quad c = P(|u + \eta| < V),

    which is a third of the paper's equation (14): as printed it gives :math:`a^2` at
    :math:`V = 0`, where :math:`w = 0` and the error is that of the zero model,
    :math:`a^2 / 3`. It holds for :math:`V \ge \sigma - a`, so for every volume as long
    as :math:`\sigma \le a`. Below that some noise takes every teacher's weight out of
    the box, and

    .. math:: E(V) = \tfrac13 a^2 + V^2 - \tfrac{2}{3 \sigma} (V^3 + a^2 V).

    Args:
      volume: ``V >= 0``.
      sigma: The noise's bound, above 0.
      a: The teacher's.
    """
    v, s = np.minimum(volume, np.add(a, sigma)), np.asarray(sigma)
    inside = np.where(v < a - s, v / a, 1 - (a + s - v) ** 2 / (4 * a * s))
    return np.where(
        v >= s - a,
        (inside * s**2 + (1 - inside) * (a - v) ** 2) / 3,
        a**2 / 3 + v**2 - 2 / (3 * s) * (v**3 + a**2 * v),
    )


def best_volume(sigma: Any, a: float = 1.0) -> np.ndarray:
    """Where `volumized_error` is least: the paper's ``a - sigma / 2``, and beyond.

    The paper derives it for ``sigma <= a``. It holds to ``4 a / 3``, where the best
    volume falls below ``sigma - a``.
    """
    s = np.asarray(sigma)
    beyond = (s - np.sqrt(np.maximum(s**2 - 4 / 3 * a**2, 0))) / 2
    return np.where(s <= 4 / 3 * a, a - s / 2, beyond)


def printed_least_error(sigma: Any, a: float = 1.0) -> np.ndarray:
    """Theorem 3.1's least error, ``(1 - 27 sigma / (64 a)) sigma^2 / 3``."""
    return (1 - 27 / 64 * np.divide(sigma, a)) * np.square(sigma) / 3


def decayed_error(sigma: Any, a: float = 1.0) -> np.ndarray:
    """Theorem 3.3: of the best weight decay, whose strength is ``(sigma / a)^2``."""
    s2 = np.square(sigma)
    return s2 * a**2 / (3 * (s2 + a**2))


def trained(x: jax.Array, y: jax.Array, volume: Any, decay: Any) -> jax.Array:
    """The weights of a linear student after gradient descent, from zero.

    Args:
      x: Inputs, (examples, parameters), whose correlations are the identity.
      y: Noisy labels, (examples,).
      volume: Of the box, infinite for none.
      decay: The strength of L2 in the gradient. The rate is divided by the curvature
        with it, so that each strength converges, and as fast as no decay.
    """
    tx = optax.chain(
        optax.add_decayed_weights(decay),
        optax.scale(-RATE / (1 + decay)),
        wr.volumize(volume, alpha=0.0, mask=True),
    )

    def loss(w):
        return jnp.square(x @ w - y).mean() / 2

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    start = jnp.zeros(x.shape[1], x.dtype)
    (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=DESCENT)
    return jnp.asarray(w)


@jax.jit
def errors(x: jax.Array, u: jax.Array, eta: jax.Array, grid: jax.Array) -> jax.Array:
    """The errors of all runs, trained at once: (seeds, sigmas, settings).

    Args:
      x: Inputs, the same for all.
      u: Teachers, (seeds, parameters).
      eta: What noise adds to them, (seeds, sigmas, parameters). Labels have the noise
        ``x eta``.
      grid: Volume and decay of each setting, (settings, 2).
    """

    def error(u, eta, setting):
        return jnp.square(trained(x, x @ (u + eta), *setting) - u).mean()

    over_settings = jax.vmap(error, (None, None, 0))
    over_sigmas = jax.vmap(over_settings, (None, 0, None))
    return jax.vmap(over_sigmas, (0, 0, None))(u, eta, grid)


def run(
    seeds: int = 20,
    parameters: int = 256,
    sigmas: int = 12,
    volumes: int = 61,
    decays: int = 50,
    a: float = 1.0,
) -> dict:
    """Closed forms, and students trained by gradient descent.

    The volume and the decay of each sigma are the best of a grid by the mean error of
    as many further seeds, so that none is chosen by what it is measured on.

    Args:
      seeds: That errors are measured on.
      parameters: Of a student, and its examples.
      sigmas: Noises up to 3 a.
      volumes: Up to 1.5 a.
      decays: 0, and strengths from 0.01 to a million.
      a: The bound of the teacher's weights.

    Returns:
      What goes into the file.
    """
    sigma = 3 * a * np.arange(1, sigmas + 1) / sigmas
    volume = np.linspace(0, 1.5 * a, volumes)
    decay = np.r_[0, np.geomspace(1e-2, 1e6, decays - 1)]
    grid = np.r_[[(v, 0) for v in volume], [(np.inf, d) for d in decay]]
    simulate = functools.partial(_simulated, sigma, volume, decay, grid)
    found = {
        noise: simulate(*_drawn(draw, sigma, seeds, parameters, a))
        for noise, draw in NOISES.items()
    }
    return {
        "format": FORMAT,
        "command": "python -m benchmarks theory",
        **environment(),
        "settings": {
            "a": a,
            "parameters": parameters,
            "rate": RATE,
            "steps": DESCENT,
            "seeds": list(range(seeds)),
            "tuning_seeds": list(range(seeds, 2 * seeds)),
            "sigmas": _rounded(sigma),
            "volumes": _rounded(volume),
            "decays": _rounded(decay),
        },
        "theory": {
            "none": _rounded(sigma**2 / 3),
            "constant": _rounded(np.full(sigmas, a**2 / 3)),
            "weight_decay": _rounded(decayed_error(sigma, a)),
            "volumization": _rounded(volumized_error(best_volume(sigma, a), sigma, a)),
            "printed": _rounded(printed_least_error(sigma, a)),
            "best_volume": _rounded(best_volume(sigma, a)),
        },
        "simulated": found,
    }


def _drawn(draw: Noise, sigma: np.ndarray, seeds: int, parameters: int, a: float):
    """Inputs, teachers and what noise adds, of the measured seeds and then the others.

    A seed has the same teacher and the same noise, but for its scale, at every sigma.
    """
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(parameters, parameters)))
    streams = [np.random.default_rng([1, seed]) for seed in range(2 * seeds)]
    u = np.stack([rng.uniform(-a, a, parameters) for rng in streams])
    noise = np.stack([draw(rng, (1, parameters)) for rng in streams])
    return np.sqrt(parameters) * q, u, sigma[:, None] * noise


def _simulated(sigma, volume, decay, grid, x, u, eta) -> dict[str, Any]:
    """What is measured under one kind of noise."""
    with jax.enable_x64(True):  # Cauchy's largest values would round all others away
        error = np.asarray(errors(*map(jnp.asarray, (x, u, eta, grid))))
    measured, tuning = np.split(error, 2)
    first = len(volume)  # of the grid's entries that have no box
    none = measured[..., first]
    box, decayed = (
        _best(measured[..., part], tuning[..., part])
        for part in (slice(first), slice(first, None))
    )
    return {
        "none": _over_seeds(none),
        "volumization": {"chosen": _rounded(volume[box[0]]), **_over_seeds(box[1])},
        "weight_decay": {
            "chosen": _rounded(decay[decayed[0]]),
            **_over_seeds(decayed[1]),
        },
        # Over volumes, for each sigma.
        "boxes": _over_seeds(measured[..., :first]),
    }


def _best(measured: np.ndarray, tuning: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sigma the best setting by some seeds, and the errors of the others."""
    best = tuning.mean(0).argmin(-1)
    return best, np.take_along_axis(measured, best[None, :, None], -1)[..., 0]


def _over_seeds(values: np.ndarray) -> dict[str, list]:
    return {"mean": _rounded(values.mean(0)), "std": _rounded(values.std(0, ddof=1))}


def _rounded(values: np.ndarray) -> list:
    """Six digits of each number."""
    return np.vectorize(lambda v: float(f"{v:.6g}"))(values).tolist()
