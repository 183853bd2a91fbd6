"""Weight regularization for JAX that goes past weight decay."""

from weightreg._attacks import fgsm, pgd
from weightreg._optimizers import (
    laprop,
    scale_by_laprop,
    volumized_adam,
    volumized_laprop,
    volumized_sgd,
)
from weightreg._volumes import he_volume, lipschitz_volume
from weightreg._volumize import volumize, volumized
from weightreg._weights import weight_layers, weight_mask

__all__ = [
    "fgsm",
    "he_volume",
    "laprop",
    "lipschitz_volume",
    "pgd",
    "scale_by_laprop",
    "volumize",
    "volumized",
    "volumized_adam",
    "volumized_laprop",
    "volumized_sgd",
    "weight_layers",
    "weight_mask",
]
