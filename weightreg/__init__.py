"""Weight regularization for JAX that goes past weight decay."""

from weightreg._core._packed_weight import PackedWeight
from weightreg._core._weights import left_out, weight_layers, weight_mask
from weightreg._equivalent_norm._equivalent_norm import equivalent_norm
from weightreg._equivalent_norm._shifted_l2 import add_shifted_l2, shifted_l2
from weightreg._quantization._files import load_packed, save_packed
from weightreg._quantization._pack import pack, unpack
from weightreg._quantization._quantize import (
    binarize,
    level_distances,
    quantize_every,
    ternarize,
)
from weightreg._robustness._attacks import fgsm, pgd
from weightreg._robustness._losses import generalized_cross_entropy, max_mahalanobis
from weightreg._sensitivity._bounds import gbr_bounds, input_gradient_bound
from weightreg._sensitivity._jacobian import (
    gbr,
    input_gradient_norms,
    jacobian_norms,
    label_probability,
    probabilities,
)
from weightreg._volumization._optimizers import (
    laprop,
    scale_by_laprop,
    volumized_adam,
    volumized_laprop,
    volumized_sgd,
)
from weightreg._volumization._volumes import he_volume, lipschitz_volume
from weightreg._volumization._volumize import volumize, volumized
from weightreg._weissi._exponents import cnn_exponents
from weightreg._weissi._parseval import convex_sum, parseval
from weightreg._weissi._scale_shift import (
    balance_scales,
    minimum_weight_decay,
    shift_scales,
)
from weightreg._weissi._weissi import (
    add_weissi,
    layer_complexity,
    log_weight_energy,
    weight_energy,
    weissi,
)

__all__ = [
    "PackedWeight",
    "add_shifted_l2",
    "add_weissi",
    "balance_scales",
    "binarize",
    "cnn_exponents",
    "convex_sum",
    "equivalent_norm",
    "fgsm",
    "gbr",
    "gbr_bounds",
    "generalized_cross_entropy",
    "he_volume",
    "input_gradient_bound",
    "input_gradient_norms",
    "jacobian_norms",
    "label_probability",
    "laprop",
    "layer_complexity",
    "left_out",
    "level_distances",
    "lipschitz_volume",
    "load_packed",
    "log_weight_energy",
    "max_mahalanobis",
    "minimum_weight_decay",
    "pack",
    "parseval",
    "pgd",
    "probabilities",
    "quantize_every",
    "save_packed",
    "scale_by_laprop",
    "shift_scales",
    "shifted_l2",
    "ternarize",
    "unpack",
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
