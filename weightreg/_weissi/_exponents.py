"""The weights that a penalty is made of, and the exponent of each."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weightreg._core._arguments import (
    check_scalar,
    compute_dtype,
    is_function,
    is_hole,
    match,
    spread,
)
from weightreg._core._norms import Axes
from weightreg._core._weights import (
    Dims,
    Mask,
    WeightLayer,
    refuse_step_count,
    weight_layers,
)


def cnn_exponents(params: Any, *, mask: Mask = None, dims: Dims = None) -> Any:
    """The exponents of the CNN form: 2 for convolutions and 1 for all other weights.

    A convolution's kernel acts at every position, hence more than that of a dense
    layer. With these exponents a shift of scale between a convolution and a dense layer
    changes the penalty. Functions with an argument ``exponents`` take this one itself:
    ``exponents=wr.cnn_exponents``.

    Args:
      params: Any tree of parameters.
      mask: Which leaves count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean, and hence which are convolutions: see
        `weight_layers`.

    Returns:
      A tree of numbers, with ``None`` for leaves that are no weights.

    Raises:
      ValueError: ``mask`` or ``dims`` does not match the parameters.
      TypeError: ``params`` is a step count, which ``optax.inject_hyperparams`` passes
        to functions that it takes for schedules.

    References:
      Liu, Cui, Chan, 2020, section 5, "CNNs".

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> wr.cnn_exponents({"conv": jnp.ones((3, 3, 1, 8)), "out": jnp.ones((8, 2))})
      {'conv': 2, 'out': 1}
    """
    refuse_step_count("exponents", params)
    layers = weight_layers(params, mask=mask, dims=dims)
    powers = {layer.index: 2 if layer.convolves else 1 for layer in layers}
    return spread(params, powers, None)


class Weights(NamedTuple):
    """The weights of a tree, in the order of `weight_layers`, and their exponents."""

    layers: tuple[WeightLayer, ...]
    leaves: list[Any]
    powers: list[jax.Array]

    @classmethod
    def of(cls, params: Any, exponents: Any, mask: Mask, dims: Dims) -> "Weights":
        layers = weight_layers(params, mask=mask, dims=dims)
        leaves = jax.tree.leaves(params)
        powers = _powers(exponents, params, layers, mask, dims)
        return cls(layers, [leaves[layer.index] for layer in layers], powers)

    def arrays(self) -> list[jax.Array]:
        """The weights as arrays. In ``init`` the leaves may be mere shapes."""
        return [jnp.asarray(leaf) for leaf in self.leaves]

    def indices(self) -> list[int]:
        """The positions of the weights in ``jax.tree.leaves(params)``."""
        return [layer.index for layer in self.layers]

    def tree(self, params: Any, values: list[Any]) -> Any:
        """A tree like ``params``, with a value for every weight and holes elsewhere."""
        placed = dict(zip(self.indices(), values, strict=True))
        return spread(params, placed, optax.MaskedNode())

    def pick(self, params: Any, tree: Any) -> list[Any]:
        """The values that a tree made by `tree` has for the weights."""
        leaves = jax.tree.structure(params).flatten_up_to(tree)
        return [leaves[index] for index in self.indices()]

    def axes(self) -> tuple[Axes, ...]:
        """The roles of the axes of every weight."""
        return tuple(Axes.of(layer) for layer in self.layers)


def _powers(
    exponents: Any, params: Any, layers: Iterable[WeightLayer], mask: Mask, dims: Dims
) -> list[Any]:
    """Checks the exponents, and gives that of every weight."""
    if exponents is cnn_exponents:
        tree = cnn_exponents(params, mask=mask, dims=dims)
    else:
        tree = exponents(params) if is_function(exponents) else exponents
    found = match("exponents", tree, params)
    leaves = jax.tree.leaves(params)
    for layer in layers:
        power, where = found[layer.index], f"exponents at {layer.path}"
        if is_hole(power):
            raise TypeError(
                f"{where} must be a number: the leaf is to be penalized. Leave it out "
                "with mask=, or give it a number."
            )
        check_scalar(where, power, 0, math.inf)
    return [
        jnp.asarray(found[x.index], compute_dtype(jnp.result_type(leaves[x.index])))
        for x in layers
    ]
