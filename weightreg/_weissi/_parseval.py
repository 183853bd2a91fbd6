"""Parseval networks: weights kept near orthonormal, and branches added convexly."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from weightreg._core._arguments import (
    CountState,
    Number,
    at,
    check_params,
    check_scheduled,
    compute_dtype,
    each_with_update,
    floats,
    is_real,
    replaced,
)
from weightreg._core._mesh import gathered, placed
from weightreg._core._norms import need_of
from weightreg._core._weights import SUPPORTED, Dims, Mask, WeightLayer, layers_for


def parseval(
    beta: Number, *, mask: Mask = None, dims: Dims = None
) -> optax.GradientTransformationExtraArgs:
    r"""Moves every weight a little towards orthonormal rows after each step.

    With :math:`\hat W = W + U` the weight that the updates propose, one row a unit, the
    step is

    .. math::
      W \leftarrow (1 + \beta) \hat W - \beta \hat W \hat W^\top \hat W .

    This is a step of gradient descent on :math:`\frac \beta 4 \|W W^\top - I\|_F^2`. It
    keeps the singular vectors of :math:`\hat W` and maps each singular value ``s`` to
    :math:`s + \beta s (1 - s^2)`, of which 0 and 1 are the fixed points. Alone, for
    :math:`0 < \beta \le 1`, it takes every :math:`0 < s < \sqrt{1 + 2 / \beta}` to 1,
    in the end by the factor :math:`|1 - 2 \beta|` a step. (Single values that hit 0 on
    the way, such as :math:`\sqrt{1 + 1 / \beta}`, are exceptions.) Rows become
    orthonormal, or columns do where there are more units than inputs. A singular value
    of 0 stays 0 but for rounding, the bound itself only changes its sign, and beyond it
    weights grow until they are infinite. Up to :math:`\beta = 1/2` no ``s < 1``
    overshoots.

    A kernel is taken for the matrix of all its input axes, window included, by all its
    output axes. For a convolution it is this matrix that becomes orthonormal. The norm
    of the convolution itself may be larger, by the root of the number of window
    positions that one input reaches. Of a grouped convolution in a traced network
    (`trace_network`) each group has a matrix of its own, and a depthwise one is made
    orthonormal filter by filter.

    .. warning::
      It must be the last link of a chain, since updates that a later link changes do
      not make this step. Leaves that an earlier link freezes it moves, unless ``mask``
      leaves them out. Inside of ``jax.shard_map`` each weight must be whole.

    Args:
      beta: 0 or more: a number, a traced scalar or a schedule of the step count. Cisse
        et al. take 1e-4. A change that small is lost in the rounding of weights of 16
        bits.
      mask: Which leaves to change, as booleans or a function: see `weight_mask`. The
        output layer is usually left out. Cisse et al. give it weight decay instead.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which are changed one by one.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, and arithmetic
      is in float32 at least.

    Raises:
      ValueError: ``beta`` is negative, infinite or NaN, ``mask`` or ``dims`` does not
        match the parameters, a masked leaf has fewer than two axes, or a grouped
        convolution has units along several axes. In ``update``, ``params`` is not
        passed, or ``updates`` does not fit it.
      TypeError: ``beta`` is neither a scalar nor a schedule, or a masked leaf is no
        floating-point array of 16, 32 or 64 bits.

    References:
      Cisse, Bojanowski, Grave, Dauphin, Usunier, `Parseval Networks
      <https://arxiv.org/abs/1704.08847>`_, 2017, Algorithm 1, which takes a random
      subset of the rows; Liu et al., WEISSI, 2020, section 6.1, takes all, as here.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(optax.sgd(0.1), wr.parseval(0.5))
      >>> params = {"kernel": jnp.array([[0.5, 0.0], [0.0, 2.0]]), "bias": jnp.ones(2)}
      >>> grads = {"kernel": jnp.zeros((2, 2)), "bias": jnp.ones(2)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]  # s + 0.5 s (1 - s^2)
      Array([[ 0.6875,  0.    ],
             [ 0.    , -1.    ]], dtype=float32)
    """
    check_scheduled("beta", beta, 0, math.inf)

    def init_fn(params):
        for layer in _layers(params, mask, dims).values():
            _groups(layer)
        return CountState.zero()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        layers = _layers(params, mask, dims)
        now = at("beta", beta, state.count)
        stepped = {
            i: _step(w, u, now, *_gram_axes(layers[i]), *_groups(layers[i]))
            for i, w, u in each_with_update(params, updates, layers)
        }
        return replaced(updates, stepped, params), state.next()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def convex_sum(h: ArrayLike, residual: ArrayLike, logits: ArrayLike) -> jax.Array:
    r"""Adds a residual branch convexly.

    .. math::
      a h + (1 - a) r, \qquad a = \mathrm{softmax}(l)_1

    Where both branches are ``c``-Lipschitz the result is so too, whatever the logits,
    which a plain sum need not be. ``weightreg.linen.ConvexSum`` and
    ``weightreg.nnx.ConvexSum`` learn the logits.

    Args:
      h: One branch :math:`h`, usually the identity, of any shape and a floating dtype.
      residual: The other branch :math:`r`, of the same shape and a floating dtype.
      logits: Two numbers :math:`l` of a floating dtype. Only their difference matters.

    Returns:
      The sum, of the shape of ``h`` and the dtype to which ``h`` and ``residual``
      promote, whatever that of ``logits`` is. Arithmetic is in float32 at least.

    Raises:
      TypeError: An argument is no floating-point array.
      ValueError: ``residual`` does not have the shape of ``h``, or ``logits`` does not
        have shape ``(2,)``.

    References:
      Liu et al., WEISSI, 2020, eq. 19; Cisse et al., `Parseval Networks
      <https://arxiv.org/abs/1704.08847>`_, 2017.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> h, residual = jnp.array([4.0, 0.0]), jnp.array([0.0, 2.0])
      >>> wr.convex_sum(h, residual, jnp.zeros(2))
      Array([2., 1.], dtype=float32)
    """
    h, residual = floats("h", h), floats("residual", residual)
    logits = floats("logits", logits)
    if residual.shape != h.shape:
        raise ValueError(
            f"residual must have the shape of h, {h.shape}, but has {residual.shape}."
        )
    if logits.shape != (2,):
        raise ValueError(
            f"logits must have shape (2,), one number a branch, but has {logits.shape}."
        )
    out = jnp.promote_types(h.dtype, residual.dtype)
    dtype = compute_dtype(out)
    a, b = jax.nn.softmax(logits.astype(compute_dtype(dtype, logits.dtype)))
    a, b = a.astype(dtype), b.astype(dtype)
    return (a * h.astype(dtype) + b * residual.astype(dtype)).astype(out)


def initial_logits(initial: Any, dtype: DTypeLike) -> jax.Array:
    """The logits of mean 0 at which `convex_sum` gives ``h`` the weight ``initial``."""
    if not is_real(initial) or np.shape(initial) != ():
        raise TypeError(f"initial must be a number, not {initial!r}.")
    if jnp.dtype(dtype) not in map(jnp.dtype, SUPPORTED):
        raise TypeError(
            f"param_dtype must be a float of 16 bits or more, not {jnp.dtype(dtype)}."
        )
    if isinstance(initial, Tracer):
        wide = jnp.asarray(initial, compute_dtype(dtype))
        half = 0.5 * (jnp.log(wide) - jnp.log1p(-wide))
    elif 0 < initial < 1:
        wide = np.float64(initial)  # In float32, 1 - 1e-9 would be 1.
        half = 0.5 * (np.log(wide) - np.log1p(-wide))
    else:
        raise ValueError(f"initial must be between 0 and 1, but is {initial}.")
    return jnp.asarray(jnp.stack([half, 0 - half]), dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))  # Equal shapes share a trace.
def _step(
    p, u, beta, kept: tuple[int, ...], stacked: tuple[int, ...], axis: int, groups: int
):
    """The update with which one weight makes the step."""
    dtype = compute_dtype(p.dtype, u.dtype)
    wide = u.astype(dtype)
    w = p.astype(dtype) + wide
    if groups == 1:
        cube = _cubed(w, kept, stacked)
    else:
        cube = _cubed_by_group(w, stacked, axis, groups)
    excess = w - cube
    beta = jnp.asarray(beta, dtype)
    # A beta of 0 leaves updates as they are, even where 0 times infinity would be NaN.
    excess = jnp.where((beta == 0) & ~jnp.isfinite(excess), 0, excess)
    return (wide + beta * excess).astype(u.dtype)


def _cubed(w: jax.Array, kept: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    """``W W^T W`` of the matrix of ``kept`` axes by the others that are not stacked.

    The transposed matrix has the transposed cube, so that either side may be the rows.
    Matrices are not formed by a reshape, since no sharding survives one.
    """
    axes = list(range(w.ndim))
    copy = [a + w.ndim if a in kept else a for a in axes]
    pairs = [*stacked, *kept, *(a + w.ndim for a in kept)]
    whole, split = placed(w, pairs, stacked), placed(w, axes, None)
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    gram = einsum(w, axes, w, copy, pairs, out_sharding=whole)
    return einsum(gram, pairs, w, copy, axes, out_sharding=split)


def _cubed_by_group(
    w: jax.Array, stacked: tuple[int, ...], axis: int, groups: int
) -> jax.Array:
    """``W W^T W`` of each group of units of a convolution, which ``axis`` numbers."""
    others = tuple(a for a in range(w.ndim) if a not in (axis, *stacked))
    whole = gathered(w, [a for a in range(w.ndim) if a != axis])
    split = whole.reshape(*w.shape[:axis], groups, -1, *w.shape[axis + 1 :])
    after = lambda axes: tuple(a + (a > axis) for a in axes)  # noqa: E731
    size = math.prod(w.shape[a] for a in others)
    kept = (axis + 1,) if split.shape[axis + 1] <= size else after(others)
    cube = _cubed(split, kept, (*after(stacked), axis)).reshape(w.shape)
    spec = placed(w, range(w.ndim), None)
    if spec is None:
        return cube
    return jax.sharding.reshard(cube, NamedSharding(jax.typeof(w).sharding.mesh, spec))


def _groups(layer: WeightLayer) -> tuple[int, int]:
    """The axis of a grouped convolution's units, and how many groups there are."""
    if layer.groups == 1:
        return 0, 1
    if len(layer.output_axes) != 1:
        raise ValueError(
            f"parseval cannot tell the {layer.groups} groups of {layer.path} apart, "
            f"whose units are along several axes, {layer.output_axes}: leave it out "
            "with mask=, or say with trace_network(..., stack=) which stack layers."
        )
    return layer.output_axes[0], layer.groups


def _gram_axes(layer: WeightLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the smaller side, of which the Gram matrix is, and the stacked."""
    sides = (layer.output_axes, layer.input_axes)
    kept = min(sides, key=lambda axes: math.prod(layer.shape[a] for a in axes))
    return kept, layer.stack_axes


def _layers(params: Any, mask: Mask, dims: Dims) -> dict[int, WeightLayer]:
    """The layers by the positions of their weights."""
    layers = layers_for("parseval", params, mask, dims, need_of("spectral"))
    return {layer.index: layer for layer in layers}
