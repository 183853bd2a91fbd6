"""Residual networks' blocks: groups, and channels that are weighed."""

import jax
import numpy as np
from drawn import normal, randomized
from flax import linen as nn
from quick import jit as quick
from shapes import flat, shapes_of

from benchmarks import networks
from benchmarks.networks.resnets import Excitation


def test_excitation_multiplies_channels_by_what_their_means_say():
    x, layer = normal(3, 4, 5, 6), Excitation(2)
    params = randomized(shapes_of(layer, *x.shape))
    few, all = params["Dense_0"], params["Dense_1"]
    assert few["kernel"].shape == (6, 3)
    hidden = np.maximum(x.mean((1, 2)) @ few["kernel"] + few["bias"], 0)
    scale = nn.sigmoid(hidden @ all["kernel"] + all["bias"])
    got = quick(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(got, x * scale[:, None, None], rtol=1e-4, atol=1e-5)


def test_a_resnext_is_wider_inside_and_in_groups():
    model = networks.NormResNet(10, (1,), 64, 1, True, groups=32, inner=2)
    block = flat(shapes_of(model, 1, 8, 8, 3)["NormBlock_0"])
    kernels = [leaf.shape for path, leaf in block.items() if path.endswith("kernel")]
    assert kernels == [
        (1, 1, 64, 128),
        (3, 3, 4, 128),
        (1, 1, 128, 256),
        (1, 1, 64, 256),
    ]


def test_imagenets_stem_quarters_the_resolution():
    model = networks.NormResNet(10, (1, 1), 4, 2, window=7, pool=True)
    run = lambda x: model.init_with_output(  # noqa: E731
        jax.random.key(0), x, capture_intermediates=True, mutable=True
    )
    _, state = jax.eval_shape(run, np.zeros((1, 64, 64, 3), np.float32))
    blocks = [state["intermediates"][f"NormBlock_{i}"]["__call__"][0] for i in (0, 1)]
    assert [block.shape for block in blocks] == [(1, 16, 16, 4), (1, 8, 8, 8)]
    assert state["params"]["Convolution_0"]["kernel"].shape == (7, 7, 3, 4)
