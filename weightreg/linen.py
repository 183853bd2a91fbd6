"""Modules for Flax's linen: ``import weightreg.linen``."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.serialization import register_serialization_state
from flax.typing import Dtype
from jax.typing import ArrayLike

from weightreg._core._arguments import is_real
from weightreg._core._packed_weight import PackedWeight, register_state
from weightreg._core._weights import is_packed
from weightreg._equivalent_norm._equivalent_norm import (
    NormMap,
    check_wrapped,
    equivalent_norm,
    warn_of_zeros,
)
from weightreg._quantization._pack import check_bits, unpack
from weightreg._quantization._product import dot_general_of
from weightreg._weissi._parseval import convex_sum, initial_logits

register_state(register_serialization_state)


def _remove_axis(packed: PackedWeight, index: int, params: Any) -> PackedWeight:
    """Refuses bits that are to be sliced along an axis which they do not have."""
    del params
    gone = len(packed.stack_axes) - packed.scale.ndim
    kept = packed.stack_axes[max(gone, 0) :]
    stack = (*range(-gone), *(axis - gone for axis in kept))
    if index >= 0 and stack[: index + 1] == tuple(range(index + 1)):
        return packed
    given = f"{packed.levels} weights packed as layers of shape {packed.shape}"
    if not stack:
        raise ValueError(
            f"{given} are to be scanned or mapped along axis {index}, but have no bits "
            "of their own for each step: pack with dims=wr.trace_network(fn, params, "
            "x), and stack= for layers that share an input, or unpack them before."
        )
    raise ValueError(
        f"{given}, stacked along {stack}, are to be scanned or mapped along axis "
        f"{index}, but bits can be sliced along axis 0 of the parameters only: use "
        'variable_axes={"params": 0}, or unpack them before.'
    )


def _replace_boxed(packed: PackedWeight, val: Any) -> Any:
    """An array that takes the place of a packed weight is not packed."""
    del packed
    return val


def _add_axis(packed: PackedWeight, index: int, params: Any) -> PackedWeight:
    """Axes of bits have no names that could be added to."""
    del index, params
    return packed


# To Flax a packed weight is a box around the weight: one that is asked before lifted
# transformations slice it, and that modules know how to open.
for _name, _method in {
    "unbox": unpack,
    "replace_boxed": _replace_boxed,
    "add_axis": _add_axis,
    "remove_axis": _remove_axis,
}.items():
    setattr(PackedWeight, _name, _method)
nn.meta.AxisMetadata.register(PackedWeight)


class ConvexSum(nn.Module):
    r"""Adds a residual branch convexly, with a balance that is learnt.

    .. math::
      a h + (1 - a) r, \qquad a = \mathrm{softmax}(l)_1

    The parameter ``convex_logits`` holds :math:`l`, two numbers, and is never taken for
    a weight by `weightreg.weight_mask`. See `weightreg.convex_sum` for the function.

    Attributes:
      initial: The value of ``a`` at the start, between 0 and 1.
      dtype: Dtype of the result. By default ``h``, ``residual`` and the parameter are
        promoted to one, which is what Flax's layers do.
      param_dtype: Dtype of the parameter.

    Raises:
      TypeError: On the first call, ``initial`` is no number.
      ValueError: ``initial`` is not between 0 and 1; or ``h`` and ``residual`` differ
        in shape.

    References:
      Liu et al., WEISSI, 2020, eq. 19.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg.linen
      >>> layer = weightreg.linen.ConvexSum()
      >>> h, residual = jnp.array([4.0, 0.0]), jnp.array([0.0, 2.0])
      >>> params = layer.init(jax.random.key(0), h, residual)
      >>> params
      {'params': {'convex_logits': Array([0., 0.], dtype=float32)}}
      >>> layer.apply(params, h, residual)
      Array([2., 1.], dtype=float32)
    """

    initial: float = 0.5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: ArrayLike, residual: ArrayLike) -> jax.Array:
        """The sum of two branches of one shape; the weight of ``h`` is ``a``."""
        logits = self.param(
            "convex_logits", lambda _: initial_logits(self.initial, self.param_dtype)
        )
        dtype = canonicalize_dtype(h, residual, logits, dtype=self.dtype)
        # The logits are not cast, for in 16 bits they would round to a few balances.
        return convex_sum(jnp.asarray(h, dtype), jnp.asarray(residual, dtype), logits)


class EquivalentNorm(nn.Module):
    r"""Runs a module on weights that `weightreg.equivalent_norm` maps to one norm.

    The map is part of the forward pass, so that gradients flow through it to the
    weights that are stored. Those are the module's, under ``module`` (or where it was
    made, if that was inside of another module), and are initialized without the map. A
    learnt alpha adds the parameter ``log_alpha``. Only ``__call__`` is wrapped: for
    another method, apply ``module`` to what ``fold`` returns.

    Layers whose weights are all 0 (where the map centres, all equal) never learn, since
    the map's derivative there is 0. ``init`` warns of them, for which it reads the
    weights back to the host. Under ``jax.jit``, ``jax.eval_shape`` and the like their
    values are not known, and there is no warning.

    Attributes:
      module: A layer or a whole network.
      norm: What `weightreg.equivalent_norm` returns. Its ``mask`` and ``dims`` are
        those of the module's parameters.

    Raises:
      TypeError: ``module`` or ``norm`` is something else.
      ValueError: On a call, ``mask`` or ``dims`` of the map does not match the
        parameters, or a weight cannot be centred.

    Warns:
      UserWarning: On ``init``, a layer is mapped to 0 and will not learn.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eqs. 19 to 23.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg.linen
      >>> layer = weightreg.linen.EquivalentNorm(nn.Dense(3))
      >>> x = jnp.ones((1, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'module': {'bias': (3,), 'kernel': (4, 3)}}}
      >>> folded = layer.fold(variables)
      >>> jax.tree.map(jnp.shape, folded)
      {'params': {'bias': (3,), 'kernel': (4, 3)}}
      >>> bool(jnp.all(nn.Dense(3).apply(folded, x) == layer.apply(variables, x)))
      True
    """

    module: nn.Module
    norm: NormMap = equivalent_norm()

    def __post_init__(self):
        """Refuses what cannot be wrapped."""
        check_wrapped(self.module, nn.Module, self.norm)
        super().__post_init__()

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module on the mapped weights."""
        log_alpha = None
        if self.norm.learn:
            log_alpha = self.param("log_alpha", lambda _: self.norm.initial_log_alpha())
        if self.is_initializing():
            out = self.module(*args, **kwargs)
            warn_of_zeros(self.norm, self.module.variables.get("params", {}))
            return out

        def to_effective(variables):
            return {"params": self.norm.apply(variables.get("params", {}), log_alpha)}

        call = nn.map_variables(
            lambda module: module(*args, **kwargs), "params", trans_in_fn=to_effective
        )
        return call(self.module)

    def fold(self, variables: Any) -> Any:
        """The variables with which ``module`` by itself does what this one does.

        Args:
          variables: All of this module's variables, with this as the outermost module.

        Raises:
          ValueError: They are not this module's.
        """
        if "module" not in variables.get("params", {}):
            raise ValueError(
                "variables must be all that init returned, with the parameters under "
                f"['params']['module'], but have {list(variables)}."
            )
        log_alpha = variables["params"]["log_alpha"] if self.norm.learn else None
        trees = variables.items()
        plain = {kind: tree["module"] for kind, tree in trees if "module" in tree}
        return plain | {"params": self.norm.apply(plain["params"], log_alpha)}


def unpack_layers(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Lets a network run on what `weightreg.pack` made of it, layer by layer.

    This is an interceptor for ``flax.linen.intercept_methods``. It unpacks the weights
    of a layer when the inputs are known, so that inside of ``jax.jit`` the call holds
    those of one layer at a time. The result is that of
    ``model.apply({"params": weightreg.unpack(packed)}, x)``.

    Without it ``model.apply({"params": packed}, x)`` gives that result as well, but may
    hold all layers at a time: once this module is imported, packed weights are boxes to
    Flax, which it opens by unpacking them, as ``nn.unbox`` does.

    It is for inference, where parameters are read only. Layers of ``nn.scan`` and
    ``nn.vmap`` have to be packed with ``dims``, so that each has bits of its own, and
    to be stacked along axis 0 of the parameters. Layers that make their parameters in
    ``setup``, such as ``nn.Embed``, read them before there is an input, and
    ``nn.WeightNorm`` reads those of another layer: leave them out with the ``mask`` of
    `weightreg.pack`, or unpack them before.
    ``capture_intermediates`` finds every packed layer twice.

    Raises:
      ValueError: A layer makes packed parameters in ``setup``; or layers are scanned
        or mapped that were packed without ``dims``, or along another axis than 0.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> import weightreg.linen
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((1, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> @jax.jit
      ... def run(packed, x):
      ...     with nn.intercept_methods(weightreg.linen.unpack_layers):
      ...         return model.apply({"params": packed}, x)
      >>> run(wr.pack(params, 0.5, "binary"), x).shape
      (1, 2)
    """
    own = context.module.variables.get("params", {})
    found = {name: _packed_in(value) for name, value in own.items()}
    packed = {name: content for name, content in found.items() if content}
    # The functions that lifted transformations call are not named among the methods.
    if not packed or not hasattr(context.module, context.method_name):
        return next_fun(*args, **kwargs)
    for name, content in packed.items():
        check_bits(content, f"{name!r} of {_describe(context.module)}")
    if context.method_name == "setup":
        raise ValueError(
            f"{_describe(context.module)} makes packed parameters "
            f"({', '.join(packed)}) in setup, before its input is known. Leave them "
            "out with the mask of weightreg.pack, or unpack them before."
        )
    inputs = [x for x in jax.tree.leaves((args, kwargs)) if is_real(x)]

    def unpacked(variables):
        tree = variables.get("params", {})
        known = {name: unpack(tree[name], after=inputs) for name in packed}
        return {"params": {**tree, **known}}

    def run(module):
        layer = _multiplied(module, packed)
        return getattr(layer, context.method_name)(*args, **kwargs)

    call = nn.map_variables(run, "params", trans_in_fn=unpacked)
    return call(context.module)


def _multiplied(module: nn.Module, packed: dict[str, PackedWeight]) -> nn.Module:
    """Lets a dense layer multiply with bits, unless it has a product of its own."""
    dense = type(module) in (nn.Dense, nn.DenseGeneral) and set(packed) == {"kernel"}
    if not dense or module.dot_general or module.dot_general_cls:
        return module
    product = dot_general_of(packed["kernel"])
    return module.clone(parent=module.scope, dot_general=product)


def _packed_in(value: Any) -> PackedWeight | None:
    """The packed weight that a parameter is, with or without a box around it."""
    if isinstance(value, PackedWeight):
        return value
    if isinstance(value, nn.meta.AxisMetadata):
        inside = jax.tree.leaves(value, is_leaf=is_packed)
        return next((x for x in inside if isinstance(x, PackedWeight)), None)
    return None


def _describe(module: nn.Module) -> str:
    """A module by its class and path."""
    return f"{type(module).__name__} at {'/'.join(module.path)!r}"
