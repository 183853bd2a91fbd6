"""Volumization as a link of a chain: weights are pulled to the wall of their box."""

from typing import Any

import optax

from weightreg._core._arguments import CountState, Number, at, check_params
from weightreg._core._weights import Dims, Mask
from weightreg._volumization._box import confine
from weightreg._volumization._volumes import check_alpha, check_argument, volumes_of


def volumize(
    volume: Any, alpha: Number, *, mask: Mask = None, dims: Dims = None
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls weights that leave the box ``[-V, V]`` to its wall.

    With :math:`\hat w = w + u` the weight that the updates propose,

    .. math::
      w \leftarrow \begin{cases}
        \hat w + (1 - \alpha) (V \, \mathrm{sgn}(\hat w) - \hat w)
          & |\hat w| > V \\
        \hat w & \text{otherwise.}
      \end{cases}

    This transformation changes weights only. `volumized` damps the optimizer's
    momentum too, which is the method of the paper.

    ``alpha = 1`` leaves the updates as they are, bit for bit, and so does ``V = inf``.
    (So do traced ones, but XLA may round an optimizer's own arithmetic otherwise where
    it fuses that with what depends on a traced value.) ``0 < alpha < 1`` is a soft
    wall; with ``V = 0`` it is weight decay by ``1 - alpha``, applied after the step and
    not scaled by the learning rate. ``alpha = 0`` is a projection onto the box: after
    ``optax.apply_updates`` every weight satisfies ``abs(w) <= V`` in its own dtype (V
    rounded to that dtype), sitting on the wall wherever some update reaches it and else
    at the nearest value inside that one reaches. ``alpha < 0`` reflects: the result
    lies in the box if :math:`|\hat w| \le V (1 + 2 / |\alpha|)`, and is not clamped
    otherwise. ``alpha = -1`` is the elastic wall; with ``V = 0`` it flips every sign
    each step.

    .. warning::
      This must be the last link of a chain, but for `quantize_every`. Updates that a
      later link changes do not land on the wall. It sees weights and no labels: leaves
      that an earlier link freezes it moves, unless ``mask`` leaves them out or it is
      itself inside of ``optax.partition``. After ``schedule_free`` it does not confine
      what is evaluated.

    Args:
      volume: The wall ``V >= 0``: a number, schedule or array that broadcasts to the
        weight, traced ones too; a tree of these, or a prefix of one; or a function of
        the parameters that makes one, such as `he_volume`.
      alpha: The share of an excess that stays, in [-1, 1]; may be a schedule or traced.
      mask: Which leaves to volumize, as booleans or a function: see `weight_mask`.
      dims: Which leaves are weights without ``mask``, and their axes: `weight_layers`.

    Returns:
      A transformation that needs ``params``. Updates keep their dtype, except that
      one narrower than the parameter's is widened to it: steps as coarse as that
      cannot reach the box.

    Raises:
      ValueError: A number is out of its range, a tree or the updates do not match the
        parameters, a rule meets a leaf without fans, or ``params`` are not passed.
      TypeError: A number is none, or a weight is no float of 16, 32 or 64 bits.

    References:
      Ziyin, Wang, Yamada, Ueda, Volumization as a Natural Generalization of Weight
      Decay, 2020, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import weightreg as wr
      >>> tx = optax.chain(optax.sgd(1.0), wr.volumize(0.5, alpha=0.0))
      >>> params = {"kernel": jnp.array([[0.1, 0.4]]), "bias": jnp.array([0.4, 0.4])}
      >>> grads = {"kernel": jnp.array([[0.2, -0.3]]), "bias": jnp.array([-1.0, 0.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[-0.1,  0.5]], dtype=float32)
    """
    check_argument(volume)
    check_alpha(alpha)

    def init_fn(params):
        volumes_of("volumize", params, volume, mask, dims)
        return CountState.zero()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        walls = volumes_of("volumize", params, volume, mask, dims, state.count)
        share = at("alpha", alpha, state.count)
        updates, _ = confine(updates, params, walls, share)
        return updates, state.next()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
