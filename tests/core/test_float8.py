"""Floats of 8 bits, for which JAX has no arithmetic, are refused where they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx

import weightreg as wr
import weightreg.linen
import weightreg.nnx

pytestmark = quick.everything

NARROW = (jnp.float8_e4m3fn, jnp.float8_e5m2)
X = jnp.ones((2, 4))


def tree(dtype):
    return {"kernel": jnp.eye(4, 3).astype(dtype), "bias": jnp.ones(3)}


def chain(params):
    """Two layers, of which the first is that of ``params``."""
    last = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    return {"Dense_0": params, "Dense_1": last}


class Narrow(nn.Module):
    """A layer of linen that casts its weights, since Flax's own do not."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda _: tree(self.dtype)["kernel"])
        return x @ kernel.astype(x.dtype)


def linen(params):
    model = weightreg.linen.EquivalentNorm(Narrow(params["kernel"].dtype))
    return model.init(jax.random.key(0), X)


def of_nnx(params):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(params["kernel"])
    return model


BOX = {"volume": 0.5, "alpha": 0.5}
TRANSFORMATIONS = {
    "add_shifted_l2": lambda: wr.add_shifted_l2(1e-4, 1e-3),
    "add_weissi": lambda: wr.add_weissi(1e-3, 1e-4),
    "laprop": lambda: wr.laprop(0.1),
    "parseval": lambda: wr.parseval(1e-3),
    "quantize_every": lambda: wr.quantize_every(2, "binary", 0.5),
    "scale_by_laprop": wr.scale_by_laprop,
    "volumize": lambda: wr.volumize(**BOX),
    "volumized": lambda: wr.volumized(optax.adam(0.1), **BOX),
    "volumized_adam": lambda: wr.volumized_adam(0.1, **BOX),
    "volumized_laprop": lambda: wr.volumized_laprop(0.1, **BOX),
    "volumized_sgd": lambda: wr.volumized_sgd(0.1, **BOX),
}
REFUSE = {name: lambda p, f=f: f().init(p) for name, f in TRANSFORMATIONS.items()} | {
    "balance_scales": lambda p: wr.balance_scales(chain(p)),
    "binarize": lambda p: wr.binarize(p, 0.5),
    "equivalent_norm": wr.equivalent_norm(),
    "equivalent_norm, learn": wr.equivalent_norm(learn=True).init,
    "gbr_bounds": lambda p: wr.gbr_bounds(chain(p)),
    "input_gradient_bound": lambda p: wr.input_gradient_bound(chain(p)),
    "layer_complexity": wr.layer_complexity,
    "level_distances": lambda p: wr.level_distances(p, 0.5, "binary"),
    "linen.EquivalentNorm": linen,
    "log_weight_energy": wr.log_weight_energy,
    "minimum_weight_decay": lambda p: wr.minimum_weight_decay(chain(p)),
    "nnx.EquivalentNorm": lambda p: weightreg.nnx.EquivalentNorm(of_nnx(p)),
    "pack": lambda p: wr.pack(p, 0.5, "binary"),
    "shift_scales": lambda p: wr.shift_scales(chain(p), [2.0, 0.5]),
    "shifted_l2": lambda p: wr.shifted_l2(1e-4, 1e-3)(p),
    "ternarize": lambda p: wr.ternarize(p, 0.5),
    "weight_energy": wr.weight_energy,
    "weissi": lambda p: wr.weissi(1e-3, 1e-4)(p),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", REFUSE)
def test_weights_of_8_bits_are_refused_by_path(name, dtype):
    REFUSE[name](tree(jnp.float32))  # which is fine
    with pytest.raises(TypeError, match=r"\['kernel'\].* of dtype float8") as error:
        REFUSE[name](tree(dtype))
    assert jnp.dtype(dtype).name in str(error.value)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_needs_no_arithmetic_works(dtype, tmp_path):
    params = tree(dtype)
    wide = tree(jnp.float32)
    for count in (wr.he_volume(0.5), wr.lipschitz_volume(), wr.cnn_exponents):
        assert count(params) == count(wide)
    assert wr.weight_layers(params) == wr.weight_layers(wide)
    assert wr.weight_mask(params) == wr.weight_mask(wide)
    assert wr.left_out(params) == wr.left_out(wide)
    apply = lambda p, x: x @ p["kernel"].astype(x.dtype) + p["bias"]  # noqa: E731
    network = wr.trace_network(apply, params, X)
    assert network.roles == {"['bias']": "bias", "['kernel']": "weight"}
    traced = weightreg.nnx.trace_network(of_nnx(wide), X)
    assert traced.roles == network.roles
    # As a leaf that is left out, also in a file.
    rest = {"scale": params["kernel"]}
    mask = {"kernel": True, "bias": False, "scale": False}
    packed = wr.pack(wide | rest, 0.5, "binary", mask=mask)
    wr.save_packed(packed, tmp_path / "packed.safetensors")
    loaded = wr.load_packed(tmp_path / "packed.safetensors")
    assert loaded["scale"].dtype == dtype
    np.testing.assert_array_equal(loaded["scale"], params["kernel"])
    for make in TRANSFORMATIONS.values():
        kept = optax.masked(make(), mask)
        kept.init(wide | rest)


@pytest.mark.parametrize("dtype", NARROW)
def test_arguments_of_8_bits_are_refused_by_name(dtype):
    loss = lambda x, y: x.sum(-1)  # noqa: E731
    with pytest.raises(TypeError, match="x must be in floats of 16 bits or more"):
        wr.fgsm(loss, X.astype(dtype), None, 0.1)
    with pytest.raises(TypeError, match="x must be in floats of 16 bits or more"):
        wr.pgd(loss, X.astype(dtype), None, 0.1, steps=1)
    with pytest.raises(TypeError, match="param_dtype must be a float of 16 bits"):
        weightreg.nnx.ConvexSum(param_dtype=dtype)
    with pytest.raises(TypeError, match="param_dtype must be a float of 16 bits"):
        weightreg.linen.ConvexSum(param_dtype=dtype).init(jax.random.key(0), X, X)
