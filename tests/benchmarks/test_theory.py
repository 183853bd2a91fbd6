"""Volumization's error in closed form, against integrals and trained students."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize

from benchmarks import record, report, theory, theory_plot

SIGMAS = (0.1, 0.5, 1.0, 1.3, 2.0, 3.0)  # below a, at it, and on both sides of 4 a / 3


def integrated(volume, sigma, a):
    """The error from its definition: an integral over the noise, teacher by teacher.

    Between the noises that lead just to a wall, the integrand is a polynomial.
    """

    def over_noise(u):
        squared = lambda eta: (np.clip(u + eta, -volume, volume) - u) ** 2  # noqa: E731
        walls = np.clip([-volume - u, volume - u], -sigma, sigma)
        cuts = [-sigma, *walls, sigma]
        pieces = itertools.pairwise(cuts)
        return sum(integrate.fixed_quad(squared, *p, n=3)[0] for p in pieces)

    kinks = np.clip(np.r_[sigma - volume, volume - sigma, volume + sigma], 0, a)
    cuts = np.unique([0, *kinks, a])
    halves = (
        integrate.quad(over_noise, *piece)[0] for piece in itertools.pairwise(cuts)
    )
    return 2 * sum(halves) / (2 * a * 2 * sigma)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_closed_form_is_the_integral(sigma):
    for a in (1.0, 0.7):
        volumes = np.linspace(0, 1.2 * (a + sigma), 9)
        expected = [integrated(v, sigma, a) for v in volumes]
        np.testing.assert_allclose(
            theory.volumized_error(volumes, sigma, a), expected, rtol=1e-6
        )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_best_volume_is_where_the_error_is_least(sigma):
    a = 1.0
    error = lambda v: float(theory.volumized_error(v, sigma, a))  # noqa: E731
    found: Any = optimize.minimize_scalar(error, bounds=(0, a), method="bounded")
    best = theory.best_volume(sigma, a)
    assert best == pytest.approx(found.x, abs=1e-4)
    # The paper's for sigma <= a, which go on to 4 a / 3 and no further.
    known = best == pytest.approx(a - sigma / 2)
    printed = theory.printed_least_error(sigma, a) == pytest.approx(error(best))
    assert known == printed == (sigma <= 4 / 3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.99])
def test_theorem_3_2_names_the_range_in_which_volumes_help(sigma):
    inside = np.linspace(1 - sigma, 1 + sigma, 23)[1:-1]
    none = sigma**2 / 3
    assert np.all(theory.volumized_error(inside, sigma) < none)
    ends = theory.volumized_error([1 - sigma, 1 + sigma, 9.0], sigma)
    np.testing.assert_allclose(ends, none, rtol=1e-12)
    assert theory.volumized_error(0.99 * (1 - sigma), sigma) > none


def test_equation_14_as_printed_lacks_a_third():
    """Its first piece, at two volumes below a - sigma."""
    sigma, volume = 0.25, np.array([0.0, 0.5])
    printed = volume * sigma**2 + (1 - volume) ** 3
    exact = theory.volumized_error(volume, sigma)
    np.testing.assert_allclose(printed / 3, exact, rtol=1e-12)
    assert exact[0] == pytest.approx(1 / 3)  # the zero model's


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_best_weight_decay_is_theorem_3_3(sigma):
    """``w = u' / (1 + lam)`` errs by what it shrinks and by what noise is left."""
    a = 0.7
    error = lambda lam: (lam**2 * a**2 + sigma**2) / (3 * (1 + lam) ** 2)  # noqa: E731
    found: Any = optimize.minimize_scalar(error, bounds=(0, 100), method="bounded")
    assert theory.decayed_error(sigma, a) == pytest.approx(error(found.x), rel=1e-6)
    assert found.x == pytest.approx((sigma / a) ** 2, rel=1e-3)


def test_students_are_trained_to_their_optimum():
    """Under noise as large as Cauchy's, too, which shall not round others away."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    shifted = rng.normal(size=16) * 10.0 ** rng.integers(-1, 6, 16)
    x = 4 * q
    several = jax.vmap(theory.trained, (None, None, 0, 0))
    with jax.enable_x64(True):
        volumes, decays = jnp.array([np.inf, 0.5, np.inf]), jnp.array([0.0, 0.0, 9.0])
        inputs, labels = jnp.asarray(x), jnp.asarray(x @ shifted)
        free, boxed, decayed = several(inputs, labels, volumes, decays)
    np.testing.assert_allclose(free, shifted, rtol=1e-8, atol=1e-5)
    np.testing.assert_allclose(boxed, np.clip(shifted, -0.5, 0.5), atol=1e-5)
    np.testing.assert_allclose(decayed, shifted / 10, atol=1e-5)


def test_a_run_is_a_file_of_its_own_kind_and_is_drawn(tmp_path):
    result = theory.run(seeds=6, parameters=64, sigmas=3, volumes=16, decays=16)
    out = tmp_path / f"{theory.NAME}.json"
    record.save(result, out)
    loaded = record.load(out)
    assert record.is_theory(loaded) and not record.is_cost(loaded)
    uniform, cauchy = (loaded["simulated"][noise] for noise in ("uniform", "cauchy"))
    for method in ("none", "weight_decay", "volumization"):
        mean, std = (np.array(uniform[method][k]) for k in ("mean", "std"))
        assert np.all(np.abs(mean - loaded["theory"][method]) < 4 * std / 6**0.5)
    best = loaded["theory"]["best_volume"]
    np.testing.assert_allclose(uniform["volumization"]["chosen"], best, atol=0.15)
    assert min(cauchy["none"]["mean"]) > 1 > max(cauchy["volumization"]["mean"])
    said = report.theory_markdown(loaded)
    assert "**Uniform noise**" in said and "It is exact up to 4 a / 3 = 1.33" in said
    assert "errs less than the best volumization at sigma = 1 to 3," in said
    picture = theory_plot.draw(loaded, out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name == "theory-figure4-errors.png"


def test_a_file_of_theory_that_lacks_a_curve_is_refused(tmp_path):
    out = tmp_path / "theory.json"
    record.save({"simulated": {}, "command": "", "device": ""}, out)
    with pytest.raises(ValueError, match="lacks the field settings"):
        record.load(out)
