"""Weight regularization for JAX that goes past weight decay."""

from weightreg._core._network import Network as Network
from weightreg._core._network import WeightLayer as WeightLayer
from weightreg._core._packed_weight import PackedWeight as PackedWeight
from weightreg._core._weights import left_out as left_out
from weightreg._core._weights import taken as taken
from weightreg._core._weights import weight_layers as weight_layers
from weightreg._core._weights import weight_mask as weight_mask
from weightreg._equivalent_norm._equivalent_norm import (
    equivalent_norm as equivalent_norm,
)
from weightreg._equivalent_norm._shifted_l2 import add_shifted_l2 as add_shifted_l2
from weightreg._equivalent_norm._shifted_l2 import shifted_l2 as shifted_l2
from weightreg._quantization._files import load_packed as load_packed
from weightreg._quantization._files import save_packed as save_packed
from weightreg._quantization._pack import pack as pack
from weightreg._quantization._pack import unpack as unpack
from weightreg._quantization._product import packed_matmul as packed_matmul
from weightreg._quantization._quantize import binarize as binarize
from weightreg._quantization._quantize import level_distances as level_distances
from weightreg._quantization._quantize import quantize_every as quantize_every
from weightreg._quantization._quantize import ternarize as ternarize
from weightreg._robustness._attacks import fgsm as fgsm
from weightreg._robustness._attacks import pgd as pgd
from weightreg._robustness._losses import (
    generalized_cross_entropy as generalized_cross_entropy,
)
from weightreg._robustness._losses import max_mahalanobis as max_mahalanobis
from weightreg._sensitivity._bounds import gbr_bounds as gbr_bounds
from weightreg._sensitivity._bounds import input_gradient_bound as input_gradient_bound
from weightreg._sensitivity._jacobian import gbr as gbr
from weightreg._sensitivity._jacobian import (
    input_gradient_norms as input_gradient_norms,
)
from weightreg._sensitivity._jacobian import jacobian_norms as jacobian_norms
from weightreg._sensitivity._jacobian import label_probability as label_probability
from weightreg._sensitivity._jacobian import probabilities as probabilities
from weightreg._tracing._trace import trace_network as trace_network
from weightreg._volumization._optimizers import laprop as laprop
from weightreg._volumization._optimizers import scale_by_laprop as scale_by_laprop
from weightreg._volumization._optimizers import volumized_adam as volumized_adam
from weightreg._volumization._optimizers import volumized_laprop as volumized_laprop
from weightreg._volumization._optimizers import volumized_sgd as volumized_sgd
from weightreg._volumization._volumes import he_volume as he_volume
from weightreg._volumization._volumes import lipschitz_volume as lipschitz_volume
from weightreg._volumization._volumize import volumize as volumize
from weightreg._volumization._volumized import volumized as volumized
from weightreg._weissi._parseval import convex_sum as convex_sum
from weightreg._weissi._parseval import parseval as parseval
from weightreg._weissi._scale_shift import balance_scales as balance_scales
from weightreg._weissi._scale_shift import minimum_weight_decay as minimum_weight_decay
from weightreg._weissi._scale_shift import shift_scales as shift_scales
from weightreg._weissi._weissi import add_weissi as add_weissi
from weightreg._weissi._weissi import cnn_exponents as cnn_exponents
from weightreg._weissi._weissi import layer_complexity as layer_complexity
from weightreg._weissi._weissi import log_weight_energy as log_weight_energy
from weightreg._weissi._weissi import weight_energy as weight_energy
from weightreg._weissi._weissi import weissi as weissi
