"""Products as a GPU takes them by JAX's default, on a CPU: ``pytest --tf32``.

Under the default precision a GPU rounds the factors of float32 products to TF32, whose
10 bits of mantissa leave three digits. What states its precision is left as it is.
"""

import jax
from jax import lax
from jax._src.interpreters import mlir as rules
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import hlo
from jax.interpreters import mlir

EXPONENT_BITS, MANTISSA_BITS = 8, 10
DEFAULTS = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


def emulate() -> None:
    """Has all float32 products that are compiled for the CPU round their factors."""
    for primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
        known = rules._platform_specific_lowerings["cpu"]
        exact = known.get(primitive) or rules._lowerings[primitive]
        mlir.register_lowering(primitive, _rounded(exact.rule), platform="cpu")
    jax.clear_caches()


def _rounded(exact):
    def rule(context, left, right, *rest, precision, **params):
        if precision in DEFAULTS:
            left, right = _narrow(left), _narrow(right)
        return exact(context, left, right, *rest, precision=precision, **params)

    return rule


def _narrow(x: ir.Value) -> ir.Value:
    if ir.RankedTensorType(x.type).element_type != ir.F32Type.get():
        return x
    width = ir.IntegerType.get_signless(32)
    bits = (ir.IntegerAttr.get(width, n) for n in (EXPONENT_BITS, MANTISSA_BITS))
    return hlo.reduce_precision(x, *bits)
