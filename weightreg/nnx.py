"""Modules for Flax's nnx: ``import weightreg.nnx``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from flax.serialization import register_serialization_state
from flax.typing import Dtype
from jax.typing import ArrayLike

from weightreg._core._arguments import is_real, leaf_path
from weightreg._core._network import Network
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
from weightreg._tracing import _trace
from weightreg._weissi._parseval import convex_sum, initial_logits

register_state(register_serialization_state)


def trace_network(
    model: nnx.Module, *inputs: Any, stack: _trace.Stack = None, **static: Any
) -> Network:
    """Reads what a module of nnx does with its parameters, in the mode that it is in.

    It is `weightreg.trace_network` for ``nnx.state(model, nnx.Param)``, which is what
    optimizers train. All other state is an input, such as batch statistics and keys for
    dropout. The module itself stays as it is.

    Args:
      model: A layer or a whole network. ``model.train()`` and ``model.eval()`` say how
        it is called.
      *inputs: What it is called on: trees of arrays or ``jax.ShapeDtypeStruct``.
      stack: Axes that stack layers by your word: see `weightreg.trace_network`.
      **static: Keyword arguments of the call, passed as they are.

    Returns:
      A `weightreg.Network` whose paths are those of ``nnx.state(model, nnx.Param)``.

    Raises:
      TypeError: ``model`` is no module, or ``stack`` of another type.
      ValueError: There is no array among ``inputs``, or ``stack`` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layers = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
      >>> model = nnx.Sequential(*layers)
      >>> net = weightreg.nnx.trace_network(model, jnp.ones((2, 4)))
      >>> for path, role in net.roles.items():
      ...     print(path, role)
      ['layers'][0]['bias'] bias
      ['layers'][0]['kernel'] weight
      ['layers'][1]['bias'] bias
      ['layers'][1]['scale'] scale
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a module of nnx, not {model!r}.")
    # Counts of random numbers are no data: noise depends on nothing but keys.
    graph, params, counts, rest = nnx.split(model, nnx.Param, nnx.RngCount, ...)

    def call(params: Any, rest: Any, *inputs: Any, **static: Any) -> Any:
        return nnx.merge(graph, params, counts, rest, copy=True)(*inputs, **static)

    if not any(map(_trace.is_array, jax.tree.leaves(inputs))):
        raise ValueError(
            "inputs must hold an array or a jax.ShapeDtypeStruct at least: what the "
            "module is called on."
        )
    return _trace.trace_network(call, params, rest, *inputs, stack=stack, **static)


class ConvexSum(nnx.Module):
    r"""Adds a residual branch convexly, with a balance that is learnt.

    .. math::
      a h + (1 - a) r, \qquad a = \mathrm{softmax}(l)_1

    The parameter ``convex_logits`` holds :math:`l`, two numbers, and is never taken for
    a weight by `weightreg.weight_mask`. See `weightreg.convex_sum` for the function.

    Args:
      initial: The value of ``a`` at the start, between 0 and 1.
      dtype: Dtype of the result. By default ``h``, ``residual`` and the parameter are
        promoted to one, which is what Flax's layers do.
      param_dtype: Dtype of the parameter.

    Raises:
      TypeError: ``initial`` is no number.
      ValueError: ``initial`` is not between 0 and 1; or on a call, ``h`` and
        ``residual`` differ in shape.

    References:
      Liu et al., WEISSI, 2020, eq. 19.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg.nnx
      >>> layer = weightreg.nnx.ConvexSum()  # nothing is random: it takes no rngs
      >>> layer.convex_logits[...]
      Array([0., 0.], dtype=float32)
      >>> layer(jnp.array([4.0, 0.0]), jnp.array([0.0, 2.0]))
      Array([2., 1.], dtype=float32)
    """

    def __init__(
        self,
        initial: float = 0.5,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.convex_logits = nnx.Param(initial_logits(initial, param_dtype))
        self.dtype = dtype
        self.param_dtype = param_dtype

    def __call__(self, h: ArrayLike, residual: ArrayLike) -> jax.Array:
        """The sum of two branches of one shape; the weight of ``h`` is ``a``."""
        logits = self.convex_logits[...]
        dtype = canonicalize_dtype(h, residual, logits, dtype=self.dtype)
        # The logits are not cast, for in 16 bits they would round to a few balances.
        return convex_sum(jnp.asarray(h, dtype), jnp.asarray(residual, dtype), logits)


class EquivalentNorm(nnx.Module):
    r"""Runs a module on weights that `weightreg.equivalent_norm` maps to one norm.

    Each call runs a copy of the module that has the mapped weights, and brings back
    what the call changed other than parameters: batch statistics, counts of random
    numbers. The stored parameters are never written, so that
    ``nnx.state(model, nnx.Param)`` is what the optimizer trains. A learnt alpha adds
    ``log_alpha`` to it. Only ``__call__`` is wrapped: for another method, call it on
    ``fold()``.

    Layers whose weights are all 0 (where the map centres, all equal) never learn, since
    the map's derivative there is 0. The constructor warns of them, for which it reads
    the weights back to the host. Under ``jax.jit``, ``nnx.eval_shape`` and the like
    their values are not known, and there is no warning.

    Args:
      module: A layer or a whole network.
      norm: What `weightreg.equivalent_norm` returns. Its ``mask`` and ``dims`` are
        those of ``nnx.state(module, nnx.Param)``.

    Raises:
      TypeError: ``module`` or ``norm`` is something else.
      ValueError: ``mask`` or ``dims`` of the map does not match the parameters, or a
        weight cannot be centred: on a call, if not before.

    Warns:
      UserWarning: A layer is mapped to 0 and will not learn.

    References:
      Li, Chen, Yang, Generalization Bound Regularizer, eqs. 19 to 23. Flax's own
      ``nnx.WeightNorm`` writes the normalized weights over the stored ones
      (google/flax issue 5576).

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg.nnx
      >>> from flax import nnx
      >>> layer = weightreg.nnx.EquivalentNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> x = jnp.ones((1, 4))
      >>> bool(jnp.all(layer.fold()(x) == layer(x)))
      True
    """

    def __init__(self, module: nnx.Module, norm: NormMap = equivalent_norm()):  # noqa: B008
        check_wrapped(module, nnx.Module, norm)
        self.module = module
        self.norm = norm
        if norm.learn:
            self.log_alpha = nnx.Param(norm.initial_log_alpha())
        warn_of_zeros(norm, nnx.state(module, nnx.Param))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module on the mapped weights."""
        folded = self.fold()
        before = _not_trained(folded)
        out = folded(*args, **kwargs)
        after = _not_trained(folded)
        # What is as it was need not be written, nor can it where a transformation of
        # JAX has caught the module from outside.
        if any(before.get(path) is not leaf for path, leaf in after.items()):
            nnx.update(self.module, nnx.state(folded, nnx.Not(nnx.Param)))
        return out

    def fold(self) -> Any:
        """A copy of the module that does by itself what this one does."""
        graph, params, rest = nnx.split(self.module, nnx.Param, ...)
        log_alpha = self.log_alpha[...] if self.norm.learn else None
        return nnx.merge(graph, self.norm.apply(params, log_alpha), rest, copy=True)


def _not_trained(module: nnx.Module) -> dict[Any, Any]:
    """What a module holds other than parameters, by path."""
    state = nnx.state(module, nnx.Not(nnx.Param))
    return dict(jax.tree_util.tree_leaves_with_path(state))


def unpack_layers(model: nnx.Module, packed: Any) -> Any:
    """A copy of a module that runs on what `weightreg.pack` made of its parameters.

    Bits take the place of its weights, in the same ``nnx.Param``. Each layer unpacks
    its own when it is called and its inputs are known, so that inside of ``nnx.jit`` a
    call holds those of one layer at a time. ``nnx.Linear`` and ``nnx.LinearGeneral``
    multiply as `weightreg.packed_matmul` does, unless they were given a precision or a
    product of their own.

    It is for inference. Only ``__call__`` of layers unpacks: leave out of the packing
    what is read otherwise, as by ``nnx.Embed.attend``, with the ``mask`` of
    `weightreg.pack`. Layers of ``nnx.scan`` and ``nnx.vmap`` have to be packed with
    ``dims``, so that each has bits of its own, and to be stacked along axis 0. What a
    call changes, such as statistics, is that of the copy.

    Args:
      model: A layer or a whole network. It stays as it is.
      packed: What `weightreg.pack` made of ``nnx.state(model, nnx.Param)``, or
        `weightreg.load_packed` read with this for ``like``.

    Returns:
      A module of the same kind, whose layers with packed weights are of subclasses.

    Raises:
      TypeError: ``model`` is no module.
      ValueError: ``packed`` is of another network; or on a call, layers are scanned or
        mapped that were packed without ``dims``.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> import weightreg.nnx
      >>> from flax import nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1))
      ... )
      >>> packed = wr.pack(nnx.state(model, nnx.Param), 0.5, "binary")
      >>> small = weightreg.nnx.unpack_layers(model, packed)
      >>> nnx.jit(lambda model, x: model(x))(small, jnp.ones((1, 4))).shape
      (1, 2)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a module of nnx, not {type(model).__name__}.")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    want, have = _shapes(params), _shapes(packed)
    for path in {**want, **have}:
        if want.get(path) != have.get(path):
            raise ValueError(
                f"packed is of another network than model: at {path} it has "
                f"{have.get(path, 'nothing')}, where the model has "
                f"{want.get(path, 'nothing')}. Pack nnx.state(model, nnx.Param)."
            )
    copy = nnx.merge(graph, packed, rest, copy=True)
    for _, module in nnx.iter_modules(copy):
        if _bits_of(module):
            object.__setattr__(module, "__class__", _in_bits(type(module)))
    return copy


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, as it is when it is unpacked."""
    whole = jax.eval_shape(unpack, params)
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    return {leaf_path(path): leaf.shape for path, leaf in leaves}


def _bits_of(module: nnx.Module) -> dict[str, PackedWeight]:
    """The packed weights that a module itself holds, by their names."""
    variables = {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
    values = {name: variable.get_raw_value() for name, variable in variables.items()}
    return {name: value for name, value in values.items() if is_packed(value)}


def _is_plain(cls: type, own: dict[str, Any]) -> bool:
    """Whether a layer is a dense one that was given no product of its own."""
    if cls is nnx.LinearGeneral:
        return own["dot_general"] is None and own["dot_general_cls"] is None
    return cls is nnx.Linear and own["dot_general"] is jax.lax.dot_general


@functools.cache  # One class for each, as graphs are compared by them.
def _in_bits(cls: type) -> type:
    """A subclass whose calls run on its weights, unpacked."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        bits = _bits_of(self)
        inputs = [x for x in jax.tree.leaves((args, kwargs)) if is_real(x)]
        own = dict(vars(self))
        for name, packed in bits.items():
            check_bits(packed, f"{name!r} of {cls.__name__}")
            own[name] = nnx.Param(unpack(packed, after=inputs))
        if _is_plain(cls, own) and "kernel" in bits:
            own["dot_general"] = dot_general_of(bits["kernel"])
        layer = object.__new__(cls)
        vars(layer).update(own)
        out = layer(*args, **kwargs)
        # What the call has added, as sow does, belongs to the module.
        for name, value in vars(layer).items():
            if own.get(name) is not value:
                setattr(self, name, value)
        return out

    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__")}
    return type(cls)(cls.__name__, (cls,), {**named, "__call__": call})
