"""Products of the library's own are taken in full precision on every device.

JAX's default on a GPU rounds their factors to TF32, and on a TPU to bfloat16. Here
programs are read before a compiler sees them, where each product says what it asks for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import weightreg as wr

RNG = np.random.default_rng(0)
CHAIN = {
    f"Dense_{i}": {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)}
    for i, shape in enumerate([(4, 6), (6, 3)])
}
LABELS, MAHALANOBIS = jnp.arange(4) % 3, wr.max_mahalanobis(3, 6)


def link(tx):
    """An update by a transformation, whose state is made on the way."""
    return lambda params: tx.update(params, tx.init(params), params)[0]


def gradient(penalty):
    return jax.grad(lambda params: jnp.sum(penalty(params)))


# From a name to a function of parameters, and whether it takes products at all, which
# singular value decompositions do not: LAPACK's on a CPU, and cuSOLVER's on a GPU, are
# in full precision.
PROGRAMS = {
    "weissi": (gradient(wr.weissi(1e-6, 1e-5)), False),
    "weissi, spectral": (gradient(wr.weissi(1e-6, 1e-5, norm="spectral")), False),
    "add_weissi": (link(wr.add_weissi(1e-6, 1e-5)), False),
    "add_weissi, spectral": (link(wr.add_weissi(1e-6, 1e-5, norm="spectral")), True),
    "parseval": (link(wr.parseval(0.1)), True),
    "equivalent_norm": (lambda p: jax.vjp(wr.equivalent_norm(), p)[1](p), False),
    "add_shifted_l2": (link(wr.add_shifted_l2(1e-4, 1e-3)), False),
    "lipschitz_volume": (
        link(wr.volumized(optax.adam(0.1), wr.lipschitz_volume(), 0.5)),
        False,
    ),
    "gbr_bounds": (gradient(lambda p: jnp.stack(wr.gbr_bounds(p))), False),
    "input_gradient_bound": (
        gradient(lambda p: wr.input_gradient_bound(p, norm="spectral")),
        False,
    ),
    "balance_scales": (wr.balance_scales, False),
    "max_mahalanobis": (
        gradient(lambda p: MAHALANOBIS(p["Dense_0"]["kernel"], LABELS)),
        True,
    ),
    "max_mahalanobis, logits": (
        gradient(lambda p: MAHALANOBIS.logits(p["Dense_0"]["kernel"])),
        True,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_in_full_precision(name):
    run, has_products = PROGRAMS[name]
    text = jax.jit(run).lower(CHAIN).as_text()
    products = [s for s in text.splitlines() if "dot_general" in s or "convol" in s]
    assert bool(products) == has_products
    for product in products:
        assert "precision = [HIGHEST, HIGHEST]" in product
