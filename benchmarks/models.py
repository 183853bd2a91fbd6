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

from benchmarks.attention import LSTMAttention
from benchmarks.networks import CNN, MLP, NormMLP, NormResNet, ResNet, UnstridedCNN

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
      dense: Whether all layers are dense, so that many networks at once are a batch.
    """

    make: Callable[[int], nn.Module]
    output: str
    normalized: bool = False
    dense: bool = False


# The authors of WEISSI train mlp1024 and cnn128 on MNIST; cnn8 and cnn16 have fewer
# filters.
MODELS: Mapping[str, Model] = {
    # The papers' two-layer network; that on volumization does not say how wide.
    "mlp": Model(
        make=lambda classes: MLP((256,), classes),
        output="Dense_1/kernel",
        dense=True,
    ),
    "mlp1024": Model(
        make=lambda classes: MLP((1024, 1024), classes),
        output="Dense_2/kernel",
        dense=True,
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
    "mlp_norm": Model(
        make=lambda classes: NormMLP((256,), classes),
        output="Dense_1/kernel",
        normalized=True,
        dense=True,
    ),
    "resnet_norm": Model(
        make=lambda classes: NormResNet(classes),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnet18": Model(
        make=lambda classes: NormResNet(classes, (2, 2, 2, 2), 64, 1),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "resnet50": Model(
        make=lambda classes: NormResNet(classes, (3, 4, 6, 3), 64, 1, True),
        output="Dense_0/kernel",
        normalized=True,
    ),
    "lstm_attention": Model(
        make=lambda classes: LSTMAttention(classes),
        output="logits/kernel",
        dense=True,
    ),
}


def make(name: str, classes: int, dtype: Dtype = jnp.float32) -> nn.Module:
    """The network of that name in `MODELS`, whose layers compute in a dtype.

    Raises:
      ValueError: There is none.
    """
    if name not in MODELS:
        raise ValueError(f"model must be among {', '.join(MODELS)}, not {name!r}.")
    return MODELS[name].make(classes).clone(dtype=dtype)


def logits(model: nn.Module, variables: Variables, x: jax.Array) -> jax.Array:
    """The network's outputs in inference mode, of shape (batch, classes).

    Losses are computed from them, and have float32 at least.
    """
    out = model.apply(variables, x)
    assert isinstance(out, jax.Array)  # apply may also give a pair
    return _widened(out)


def training_logits(
    model: nn.Module, variables: Variables, x: jax.Array
) -> tuple[jax.Array, Variables]:
    """The outputs by the batch's own statistics, and the statistics after it."""
    if "batch_stats" not in variables:
        return logits(model, variables, x), {}
    out, after = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return _widened(out), after


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def describe(model: nn.Module) -> dict[str, Any]:
    """A network's class and settings, for the record."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    kept = {k: v for k, v in fields.items() if k not in ("parent", "name", "dtype")}
    return {"class": type(model).__name__, **kept, "dtype": fields["dtype"].__name__}
