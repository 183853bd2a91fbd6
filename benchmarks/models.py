"""The models that are compared, and how they are applied.

To add a model, add an entry to `MODELS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks import efficientnet
from benchmarks.networks import (
    CNN,
    MLP,
    VGG,
    DenseNet,
    EfficientNetLite0,
    LSTMAttention,
    NormMLP,
    NormResNet,
    Resized,
    ResNet,
    UnstridedCNN,
)

# Parameters, and the statistics of batches in networks that have them.
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network, and what methods must know of it.

    Attributes:
      make: From the number of classes to the network.
      output: Path of the output layer's kernel in the parameters. Neither the order of
        names nor that of layers tells which one it is.
      normalized: Whether a normalization follows every layer, as equivalent norms need.
      together: Whether an accelerator trains many networks at once much faster than
        one after the other, as it does where all layers are dense: these are a batch.
      pretrained: From a fresh network's variables to trained ones that are published;
        None where there are none. An output layer of other classes stays as it is.
    """

    make: Callable[[int], nn.Module]
    output: str
    normalized: bool = False
    together: bool = False
    pretrained: Callable[[Variables], Variables] | None = None


STEM: Any = {"window": 7, "pool": True}  # for ImageNet
IMAGENET: Any = {**STEM, "last_norm": False}

# The authors of WEISSI train mlp1024 and cnn128 on MNIST; cnn8 and cnn16 have fewer
# filters.
MODELS: Mapping[str, Model] = {
    # The papers' two-layer network; that on volumization does not say how wide.
    "mlp": Model(
        make=lambda classes: MLP((256,), classes),
        output="Dense_1/kernel",
        together=True,
    ),
    "mlp1024": Model(
        make=lambda classes: MLP((1024, 1024), classes),
        output="Dense_2/kernel",
        together=True,
    ),
    "cnn": Model(
        make=lambda classes: CNN(classes),
        output="Dense_0/kernel",
    ),
    "cnn8": Model(
        make=lambda classes: UnstridedCNN((8, 8), classes),
        output="Dense_0/kernel",
    ),
    "cnn16": Model(
        make=lambda classes: UnstridedCNN((16, 16), classes),
        output="Dense_0/kernel",
    ),
    "cnn128": Model(
        make=lambda classes: UnstridedCNN((128, 128), classes),
        output="Dense_0/kernel",
    ),
    "resnet": Model(
        make=lambda classes: ResNet(classes),
        output="Dense_0/kernel",
    ),
    "resnet_convex": Model(
        make=lambda classes: ResNet(classes, convex=True),
        output="Dense_0/kernel",
    ),
    "resnet_small": Model(
        make=lambda classes: ResNet(classes, blocks=1),
        output="Dense_0/kernel",
    ),
    "resnet_small_convex": Model(
        make=lambda classes: ResNet(classes, blocks=1, convex=True),
        output="Dense_0/kernel",
    ),
    "mlp_norm": Model(
        make=lambda classes: NormMLP((256,), classes),
        output="Dense_1/kernel",
        normalized=True,
        together=True,
    ),
    "resnet_norm": Model(
        make=lambda classes: NormResNet(classes),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "wrn28_10": Model(
        make=lambda classes: ResNet(classes, blocks=4, width=10),
        output="Dense_0/kernel",
    ),
    "wrn28_10_convex": Model(
        make=lambda classes: ResNet(classes, blocks=4, width=10, convex=True),
        output="Dense_0/kernel",
    ),
    "vgg16": Model(
        make=lambda classes: VGG(classes),
        output="Dense_1/kernel",
    ),
    "vgg_small": Model(
        make=lambda classes: VGG(classes, (1, 1, 1, 1, 1), 8),
        output="Dense_1/kernel",
    ),
    # Without a normalization after the last layer, as usual, and with one.
    "resnet18": Model(
        make=lambda classes: NormResNet(classes, (2, 2, 2, 2), 64, 1, last_norm=False),
        output="Dense_0/kernel",
    ),
    "resnet18_norm": Model(
        make=lambda classes: NormResNet(classes, (2, 2, 2, 2), 64, 1),
        output="Dense_0/kernel",
        normalized=True,
    ),
    # For images of 32 by 32, with a normalization after the last layer, and as they
    # are for ImageNet.
    "resnet50": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 6, 3), 64, 1, True),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnet101": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 23, 3), 64, 1, True),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnext50": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 6, 3), 64, 1, True, groups=32, inner=2
        ),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnext101": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 1, True, groups=32, inner=2
        ),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "se_resnet50": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 6, 3), 64, 1, True, squeeze=16),
        output="Dense_0/kernel",
    ),
    "se_resnet101": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 1, True, squeeze=16
        ),
        output="Dense_0/kernel",
    ),
    "densenet201": Model(
        make=lambda classes: DenseNet(classes),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnet50_imagenet": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 6, 3), 64, 2, True, **IMAGENET),
        output="Dense_0/kernel",
    ),
    "resnet101_imagenet": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 2, True, **IMAGENET
        ),
        output="Dense_0/kernel",
    ),
    "resnext50_imagenet": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 6, 3), 64, 2, True, groups=32, inner=2, **IMAGENET
        ),
        output="Dense_0/kernel",
    ),
    "resnext101_imagenet": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 2, True, groups=32, inner=2, **IMAGENET
        ),
        output="Dense_0/kernel",
    ),
    "se_resnet50_imagenet": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 6, 3), 64, 2, True, squeeze=16, **IMAGENET
        ),
        output="Dense_0/kernel",
    ),
    "se_resnet101_imagenet": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 2, True, squeeze=16, **IMAGENET
        ),
        output="Dense_0/kernel",
    ),
    "densenet201_imagenet": Model(
        make=lambda classes: DenseNet(classes, strides=2, **IMAGENET),
        output="Dense_0/kernel",
    ),
    # With a normalization after the last layer too.
    "resnet50_imagenet_norm": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 6, 3), 64, 2, True, **STEM),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnet101_imagenet_norm": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 23, 3), 64, 2, True, **STEM),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnext50_imagenet_norm": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 6, 3), 64, 2, True, groups=32, inner=2, **STEM
        ),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnext101_imagenet_norm": Model(
        make=lambda classes: NormResNet(
            classes, (3, 4, 23, 3), 64, 2, True, groups=32, inner=2, **STEM
        ),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "densenet201_imagenet_norm": Model(
        make=lambda classes: DenseNet(classes, strides=2, **STEM),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "efficientnet_lite0": Model(
        make=lambda classes: EfficientNetLite0(classes),
        output="Dense_0/kernel",
        pretrained=efficientnet.pretrained,
    ),
    "lstm_attention": Model(
        make=lambda classes: LSTMAttention(classes),
        output="logits/kernel",
        together=True,
    ),
}


def make(
    name: str, classes: int, dtype: Dtype = jnp.float32, resize: int | None = None
) -> nn.Module:
    """The network of that name in `MODELS`, whose layers compute in a dtype.

    Args:
      name: In `MODELS`.
      classes: Number of classes.
      dtype: Of the computation; parameters have float32.
      resize: Height and width that images are scaled to before; None for as they are.

    Raises:
      ValueError: There is none.
    """
    if name not in MODELS:
        raise ValueError(f"model must be among {', '.join(MODELS)}, not {name!r}.")
    model = in_dtype(MODELS[name].make(classes), dtype)
    return model if resize is None else Resized(model, resize)


def in_dtype(model: nn.Module, dtype: Dtype) -> nn.Module:
    """The same network, whose layers compute in a dtype."""
    if isinstance(model, Resized):
        return model.clone(network=in_dtype(model.network, dtype))
    return model.clone(dtype=dtype)


def logits(model: nn.Module, variables: Variables, x: jax.Array) -> jax.Array:
    """The network's outputs in inference mode, of shape (batch, classes).

    Losses are computed from them, and have float32 at least.
    """
    out = model.apply(variables, x)
    assert isinstance(out, jax.Array)  # apply may also give a pair
    return _widened(out)


def training_logits(
    model: nn.Module, variables: Variables, x: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, Variables]:
    """The outputs in training, and the statistics of batches after it.

    They are those of inference for networks without ``trains``. Others normalize by the
    batch's own statistics, and drop at random by a key.

    Raises:
      ValueError: There is no key for a network that drops.
    """
    if not getattr(model, "trains", False):
        return logits(model, variables, x), {}
    if key is None and getattr(model, "dropout", 0):
        raise ValueError(
            f"key must be given for {type(model).__name__}, which drops at random in "
            "training: write training_logits(model, variables, x, key)."
        )
    rngs = None if key is None else {"dropout": key}
    out, after = model.apply(
        variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
    )
    return _widened(out), after


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def describe(model: nn.Module) -> dict[str, Any]:
    """A network's class and settings, for the record."""
    if isinstance(model, Resized):
        return {**describe(model.network), "resize": model.size}
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    kept = {k: v for k, v in fields.items() if k not in ("parent", "name", "dtype")}
    return {"class": type(model).__name__, **kept, "dtype": fields["dtype"].__name__}
