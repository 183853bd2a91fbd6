"""Weight regularization for JAX that goes past weight decay."""

from weightreg._attacks import fgsm, pgd
from weightreg._exponents import cnn_exponents
from weightreg._jacobian import input_gradient_bound, input_gradient_norms
from weightreg._losses import generalized_cross_entropy, max_mahalanobis
from weightreg._optimizers import (
    laprop,
    scale_by_laprop,
    volumized_adam,
    volumized_laprop,
    volumized_sgd,
)
from weightreg._parseval import convex_sum, parseval
from weightreg._scale_shift import balance_scales, minimum_weight_decay, shift_scales
from weightreg._volumes import he_volume, lipschitz_volume
from weightreg._volumize import volumize, volumized
from weightreg._weights import weight_layers, weight_mask
from weightreg._weissi import (
    add_weissi,
    layer_complexity,
    log_weight_energy,
    weight_energy,
    weissi,
)

__all__ = [
    "add_weissi",
    "balance_scales",
    "cnn_exponents",
    "convex_sum",
    "fgsm",
    "generalized_cross_entropy",
    "he_volume",
    "input_gradient_bound",
    "input_gradient_norms",
    "laprop",
    "layer_complexity",
    "lipschitz_volume",
    "log_weight_energy",
    "max_mahalanobis",
    "minimum_weight_decay",
    "parseval",
    "pgd",
    "scale_by_laprop",
    "shift_scales",
    "volumize",
    "volumized",
    "volumized_adam",
    "volumized_laprop",
    "volumized_sgd",
    "weight_energy",
    "weight_layers",
    "weight_mask",
    "weissi",
]
