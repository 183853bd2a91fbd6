"""WEISSI: a penalty that shifting scale between layers cannot lower."""

import math
import operator
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from weightreg._core._arguments import (
    Number,
    at,
    check_count,
    check_params,
    check_scalar,
    compute_dtype,
    each,
    each_with_update,
    is_function,
    is_hole,
    leaf_path,
    match,
    refuse_step_count,
    replaced,
    spread,
)
from weightreg._core._norms import Axes, Norm, need_of, start_vector
from weightreg._core._weights import (
    Dims,
    Mask,
    WeightLayer,
    check_whole,
    layers_for,
    layers_of,
)
from weightreg._weissi._penalty import (
    Form,
    Hyper,
    iterate,
    measure_all,
    penalty_gradients,
    penalty_value,
)

_WARM_UP = 30  # This is the number of power iterations in init, which runs once.


class AddWeissiState(NamedTuple):
    """State of `add_weissi`.

    Attributes:
      count: The number of steps taken, an int32 scalar that schedules are given.
      vectors: Estimates of the right singular vectors, as a tree like the parameters
        with an array ``(*stack, *outputs)`` for every weight and ``optax.MaskedNode``
        for every other leaf, in no boxes with metadata, which would name axes that the
        vectors lack. Where no power iterations are made it is ``()``.
    """

    count: jax.typing.ArrayLike
    vectors: Any


def weissi(
    energy: jax.typing.ArrayLike,
    complexity: jax.typing.ArrayLike,
    *,
    log: bool = False,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> Callable[[Any], jax.Array]:
    r"""The weight-scale-shift-invariant penalty, to be added to a loss.

    .. math::
      R(W) = \lambda_e \prod_l \eta(W_l)^{n_l}
        + \lambda_c \sum_l \frac{g(W_l)}{\eta(W_l)}

    With ``log=True``, :math:`\lambda_e \sum_l n_l \ln \eta(W_l)` takes the place of the
    product. With equal exponents neither term changes when layers are scaled by
    factors whose product is 1. Such a shift keeps the function of a ReLU network (see
    `shift_scales`) and can lower its weight decay for nothing.

    Value and gradient are right wherever they are in the range of the dtype, however
    far out of it the product, its factors, or squares of weights are. Elsewhere they
    are infinite or 0. A layer of zeros, as Fixup makes them, has complexity 0. It makes
    the product and its gradient 0. The sum of logarithms leaves it out, since it would
    be minus infinity.

    .. warning::
      The sum of logarithms is not bounded from below: it has no minimum other than a
      layer of zeros, and its gradient grows as norms fall.

    Args:
      energy: ``lambda_e >= 0``, which may be traced. The paper takes 1e-6 for two or
        three layers and 1e-24 to 1e-31 for sixteen to twenty-eight, since the product
        grows with depth.
      complexity: ``lambda_c >= 0``, which may be traced. The paper takes 1e-5 or 3e-5.
      log: Whether to penalize the logarithm of the product, so that ``lambda_e`` does
        not have to fit its size.
      norm: ``eta``, one of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair
        ``(p, q)`` with p within a unit and q across units, from 1 to infinity. The
        spectral norm is that of the kernel matrix, computed exactly by a singular value
        decomposition of every layer. `add_weissi` has a cheaper way.
      complexity_norm: ``g``, which may be any of the norms that ``norm`` may be.
      exponents: ``n_l >= 0``: a number, a tree that matches the parameters or a prefix
        of them, or a function of the parameters that makes one (see `cnn_exponents`).
      mask: Which leaves to penalize, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one. It matters to the spectral norm,
        to pairs of a different p and q, and to `cnn_exponents`.

    Returns:
      A function from parameters to a scalar, in float32 at least, whose derivative is
      in closed form. Without any weight the product is 1 and the sums are 0. Inside of
      ``jax.shard_map`` the weights must be whole, since the norm of a shard is not the
      norm of its layer.

    Raises:
      ValueError: A strength or an exponent is negative, infinite or NaN, a norm is none
        of those above, ``mask``, ``dims`` or ``exponents`` does not match the
        parameters, or the product is wanted of parameters with a hole where a weight
        may be.
      TypeError: A strength or an exponent is not a scalar. `add_weissi` takes
        schedules.

    References:
      Liu, Cui, Chan, Improve Generalization and Robustness of Neural Networks via
      Weight Scale Shifting Invariant Regularizations, 2020, eq. 13, and section 5 for
      the CNN form and the logarithm.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> penalty = wr.weissi(energy=0.01, complexity=0.1)
      >>> params = {"a": jnp.full((2, 2), 2.0), "b": jnp.array([[3.0], [4.0]])}
      >>> print(f"{penalty(params):.5f}")  # 0.01 * 16 * 25 + 0.1 * (8 / 4 + 7 / 5)
      4.34000
      >>> shifted = {"a": params["a"] * 1e9, "b": params["b"] / 1e9}
      >>> print(f"{penalty(shifted):.5f}")
      4.34000
    """
    for name, value in (("energy", energy), ("complexity", complexity)):
        if callable(value):
            raise TypeError(
                f"{name} must be a scalar: a penalty has no step count for a schedule. "
                "add_weissi has one."
            )
    form = Form.parse(energy, complexity, log, norm, complexity_norm)

    def penalty(params: Any) -> jax.Array:
        return _penalty(form, energy, complexity, params, exponents, mask, dims)

    return penalty


def add_weissi(
    energy: Number,
    complexity: Number,
    *,
    log: bool = False,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    exponents: Any = 2,
    iterations: int | None = 1,
    mask: Mask = None,
    dims: Dims = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `weissi` to the updates, in closed form.

    .. math::
      u_l \leftarrow u_l + n_l \, \lambda_e \prod_k \eta(W_k)^{n_k}
        \frac{\nabla \eta(W_l)}{\eta(W_l)}
      + \frac{\lambda_c}{\eta(W_l)} \Big( \nabla g(W_l)
        - \frac{g(W_l)}{\eta(W_l)} \nabla \eta(W_l) \Big)

    With ``log=True`` the first term is :math:`n_l \lambda_e \nabla \eta(W_l) /
    \eta(W_l)`. For the default norms :math:`\nabla \eta` is :math:`W / \|W\|_2` and
    :math:`\nabla g` is :math:`\mathrm{sgn}(W)`.

    Where it stands in a chain decides what it is:

    - *Before the optimizer* it is a penalty in the loss, as L2 is. The optimizer takes
      the sum for the gradient, and Adam divides both by the same root:
      ``optax.chain(wr.add_weissi(1e-6, 1e-5), optax.adam(1e-3))``.
    - *Between the optimizer's direction and its learning rate* it is decoupled, as
      weight decay is in AdamW: ``optax.chain(optax.scale_by_adam(),
      wr.add_weissi(1e-6, 1e-5), optax.scale_by_learning_rate(1e-3))``.

    .. warning::
      After the learning rate, as in ``optax.chain(optax.adam(1e-3),
      wr.add_weissi(...))``, the sign is wrong, since updates are by then what is added
      to the weights.

    Args:
      energy: ``lambda_e >= 0``: a number, a traced scalar or a schedule of the step
        count. The paper takes 1e-6 for two or three layers and less for more.
      complexity: ``lambda_c >= 0``: a number, a traced scalar or a schedule of the step
        count. The paper takes 1e-5 or 3e-5.
      log: Whether to penalize the logarithm of the product.
      norm: ``eta``, one of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair
        ``(p, q)`` with p within a unit and q across units, from 1 to infinity.
      complexity_norm: ``g``, which may be any of the norms that ``norm`` may be.
      exponents: ``n_l >= 0``: a number, a tree that matches the parameters or a prefix
        of them, or a function of the parameters that makes one (see `cnn_exponents`).
      iterations: The number of power iterations a step for a spectral norm, from
        vectors that the state carries from step to step. Their estimate is at most the
        norm, but for rounding, and follows it while weights change slowly. ``None``
        computes the norm exactly.
      mask: Which leaves to penalize, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`. Axes that it does
        not name stack layers, which count one by one.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, and the gradient
      is computed in float32 at least. Inside of ``jax.shard_map`` the weights must be
      whole.

    Raises:
      ValueError: A strength or an exponent is negative, infinite or NaN, a norm is none
        of those above, ``iterations`` is below 1, ``mask``, ``dims`` or ``exponents``
        does not match the parameters, or the product is wanted of parameters with a
        hole where a weight may be, as inside of ``optax.partition``. In ``update``,
        ``params`` is not passed, or ``updates`` does not fit it.
      TypeError: A strength is neither a scalar nor a schedule, an exponent is not a
        scalar, or ``iterations`` is neither an integer nor ``None``.

    References:
      Liu, Cui, Chan, 2020, section 5 (the gradient of the energy, for Frobenius norms).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(wr.add_weissi(energy=0.5, complexity=0.0), optax.sgd(0.1))
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.ones(1)}
      >>> grads = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"]  # -0.1 times the gradient of the squared norm, halved
      Array([[-0.3],
             [-0.4]], dtype=float32)
    """
    form = Form.parse(energy, complexity, log, norm, complexity_norm)
    if isinstance(iterations, Tracer):
        if form.is_spectral():
            raise TypeError(
                "iterations must be known before tracing. Under "
                "optax.inject_hyperparams pass static_args='iterations'."
            )
    elif iterations is not None:
        iterations = check_count("iterations", iterations, 1)

    carries_vectors = iterations is not None and form.is_spectral()

    def iterate_all(params, axes, vectors, steps) -> tuple[list, dict[int, jax.Array]]:
        found = {
            i: iterate(w, vectors[i], form.norms(), axes[i], steps)
            for i, w in each(params, axes)
        }
        sizes = [size for size, _ in found.values()]
        return sizes, {i: vector for i, (_, vector) in found.items()}

    def init_fn(params):
        axes, _ = _weights(form, params, exponents, mask, dims)
        vectors: Any = ()
        if carries_vectors:
            key = jax.random.key(0)
            start = {
                i: start_vector(w, axes[i], jax.random.fold_in(key, position))
                for position, (i, w) in enumerate(each(params, axes))
            }
            start = iterate_all(params, axes, start, _WARM_UP)[1]
            vectors = spread(params, start, optax.MaskedNode())
        return AddWeissiState(count=jnp.zeros([], jnp.int32), vectors=vectors)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        axes, powers = _weights(form, params, exponents, mask, dims)
        vectors = state.vectors
        if carries_vectors:
            before = _vectors_of(state, params, axes)
            sizes, after = iterate_all(params, axes, before, iterations)
            # States of earlier versions have boxes around vectors, and keep them, so
            # that loops may carry them.
            structure = jax.tree.structure(vectors)
            vectors = structure.unflatten([after[i] for i in sorted(axes)])
        else:
            arrays = [w for _, w in each(params, axes)]
            sizes = measure_all(form, tuple(axes.values()), arrays)
        lambda_e = at("energy", energy, state.count)
        lambda_c = at("complexity", complexity, state.count)
        gradients = penalty_gradients(form, Hyper.of(lambda_e, lambda_c, powers), sizes)
        found = each_with_update(params, updates, axes)
        pairs = zip(found, gradients, strict=True)
        added = {i: (u + gradient).astype(u.dtype) for (i, _, u), gradient in pairs}
        count = optax.safe_increment(state.count)
        return replaced(updates, added, params), AddWeissiState(count, vectors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    need = operator.attrgetter("convolves")
    layers = layers_of("cnn_exponents", params, mask, dims, need)
    powers = {layer.index: 2 if layer.convolves else 1 for layer in layers}
    return spread(params, powers, None)


def weight_energy(
    params: Any,
    *,
    norm: Norm = "frobenius",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The product of all layers' norms, :math:`\prod_l \eta(W_l)^{n_l}`.

    It is infinite or 0 where it is out of the dtype's range. Its logarithm,
    `log_weight_energy`, hardly ever is.

    Args:
      params: Any tree of parameters.
      norm: ``eta``, one of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair
        ``(p, q)`` with p within a unit and q across units, from 1 to infinity.
      exponents: ``n_l >= 0``: a number, a tree that matches the parameters or a prefix
        of them, or a function of the parameters that makes one.
      mask: Which leaves to count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`.

    Returns:
      A scalar, in float32 at least.

    Raises:
      ValueError: A norm or an exponent is out of range, a tree does not match, or there
        is a hole in the parameters where a weight may be.
      TypeError: An exponent is no scalar.

    References:
      Liu, Cui, Chan, 2020, eq. 13, its first term.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> print(wr.weight_energy({"a": jnp.full((2, 2), 2.0), "b": jnp.ones((3, 3))}))
      144.0
    """
    form = Form.parse(1.0, 0.0, False, norm, "l1")
    return _penalty(form, 1.0, 0.0, params, exponents, mask, dims)


def log_weight_energy(
    params: Any,
    *,
    norm: Norm = "frobenius",
    exponents: Any = 2,
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The natural logarithm of `weight_energy`, :math:`\sum_l n_l \ln \eta(W_l)`.

    It is minus infinity where a layer with a positive exponent is zero. Its gradient is
    then 0 for the layer of zeros, and for other layers what it is without that one. Of
    parts of a network the logarithms add up, so that holes in ``params`` are no error.

    Args:
      params: Any tree of parameters.
      norm: ``eta``, one of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair
        ``(p, q)`` with p within a unit and q across units, from 1 to infinity.
      exponents: ``n_l >= 0``: a number, a tree that matches the parameters or a prefix
        of them, or a function of the parameters that makes one.
      mask: Which leaves to count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`.

    Returns:
      A scalar, in float32 at least.

    Raises:
      ValueError: A norm or an exponent is out of range, or a tree does not match.
      TypeError: An exponent is no scalar.

    References:
      Liu, Cui, Chan, 2020, section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> deep = [jnp.full((10, 10), 1e3)] * 50
      >>> print(f"{wr.log_weight_energy(deep) / jnp.log(10):.3f}")  # of 1e4^100
      400.000
    """
    form = Form.parse(1.0, 0.0, True, norm, "l1")._replace(log_of_zero=True)
    return _penalty(form, 1.0, 0.0, params, exponents, mask, dims)


def layer_complexity(
    params: Any,
    *,
    norm: Norm = "frobenius",
    complexity_norm: Norm = "l1",
    mask: Mask = None,
    dims: Dims = None,
) -> jax.Array:
    r"""The sum of the layers' complexities, :math:`\sum_l g(W_l / \eta(W_l))`.

    With the default norms a layer of ``k`` weights has a complexity from 1, where one
    weight is not 0, to the root of ``k``, where all weights are of one size. A layer of
    zeros has 0.

    Args:
      params: Any tree of parameters.
      norm: ``eta``, one of ``"frobenius"``, ``"l1"`` and ``"spectral"``, or a pair
        ``(p, q)`` with p within a unit and q across units, from 1 to infinity.
      complexity_norm: ``g``, which may be any of the norms that ``norm`` may be.
      mask: Which leaves to count, as booleans or a function: see `weight_mask`.
      dims: What the axes of the weights mean: see `weight_layers`.

    Returns:
      A scalar, in float32 at least.

    Raises:
      ValueError: A norm is none, or ``mask`` or ``dims`` does not match the parameters.

    References:
      Liu, Cui, Chan, 2020, eq. 13, its second term.

    Example:
      >>> import jax.numpy as jnp
      >>> import weightreg as wr
      >>> params = {"dense": jnp.ones((2, 2)), "sparse": jnp.eye(1, 9)}
      >>> print(wr.layer_complexity(params))  # 2 + 1
      3.0
    """
    form = Form.parse(0.0, 1.0, False, norm, complexity_norm)
    return _penalty(form, 0.0, 1.0, params, 2, mask, dims)


def _penalty(form, energy, complexity, params, exponents, mask, dims) -> jax.Array:
    """The value of the penalty for a tree of parameters."""
    axes, powers = _weights(form, params, exponents, mask, dims)
    arrays = [w for _, w in each(params, axes)]
    hyper = Hyper.of(energy, complexity, powers)
    return penalty_value(form, tuple(axes.values()), hyper, arrays)


def _vectors_of(state: AddWeissiState, params: Any, axes: Container[int]) -> list[Any]:
    """The vector of each leaf, which weights have and others have not."""
    vectors = match("state.vectors", state.vectors, params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    for index, (vector, (path, _)) in enumerate(zip(vectors, paths, strict=True)):
        if is_hole(vector) == (index in axes):
            have, want = ("no vector", "a") if index in axes else ("a vector", "no")
            raise ValueError(
                f"state has {have} for {leaf_path(path)}, which is {want} weight: call "
                "init again where mask= or dims= have changed."
            )
    return vectors


def _weights(
    form: Form, params: Any, exponents: Any, mask: Mask, dims: Dims
) -> tuple[dict[int, Axes], list[jax.Array]]:
    """The axes of all weights by their positions, and the exponents ``n_l``."""
    layers = layers_for("weissi", params, mask, dims, need_of(*form.norms()))
    if layers and form.energy and not form.log:
        # Sums over layers, such as the complexity, are right by parts.
        around = (
            "Put the link around the partition, as optax.chain(wr.add_weissi(...), "
            "optax.partition(...)), or give the function all parameters."
        )
        check_whole("WEISSI's product of norms", params, mask, dims, around)
    powers = _powers(exponents, params, layers, mask, dims)
    return {layer.index: Axes.of(layer) for layer in layers}, powers


def _powers(
    exponents: Any, params: Any, layers: tuple[WeightLayer, ...], mask: Mask, dims: Dims
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
