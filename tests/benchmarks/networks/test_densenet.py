"""DenseNet: how its channels grow."""

from shapes import flat, shapes_of

from benchmarks import networks


def test_layers_see_all_before_and_half_goes_on():
    model = networks.DenseNet(10, (2, 1), growth=4)
    params = flat(shapes_of(model, 1, 8, 8, 3))
    kernels = [params[f"Convolution_{i}/kernel"].shape for i in range(8)]
    assert kernels == [
        (3, 3, 3, 8),
        *[(1, 1, 8, 16), (3, 3, 16, 4)],
        *[(1, 1, 12, 16), (3, 3, 16, 4)],
        (1, 1, 16, 8),
        *[(1, 1, 8, 16), (3, 3, 16, 4)],
    ]
    assert params["Dense_0/kernel"].shape == (12, 10)
