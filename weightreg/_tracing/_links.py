"""What functions do to scale and to distances: degrees of homogeneity, and slopes.

A function of degree ``d`` maps ``c x`` to ``c^d f(x)`` for every positive ``c``. Its
slope is the most by which it multiplies distances, in the Euclidean norm.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from weightreg._tracing._graph import Link

# The largest slopes of functions of one number. Those of all others are taken to be
# unbounded.
_SLOPES = {
    "abs": 1.0,
    "asinh": 1.0,
    "atan": 1.0,
    "cos": 1.0,
    "erf": 2 / math.sqrt(math.pi),
    "logistic": 0.25,
    "neg": 1.0,
    "sin": 1.0,
    "tanh": 1.0,
}
# What the degree of a function's argument is multiplied by.
_DEGREES = {
    "abs": 1,
    "cbrt": Fraction(1, 3),
    "is_finite": 0,
    "neg": 1,
    "rsqrt": Fraction(-1, 2),
    "sign": 0,
    "sqrt": Fraction(1, 2),
    "square": 2,
}


def through(eqn: Any, values: Sequence[Any], node: int) -> Link:
    """The link of what an equation computes from one node, constants and parameters.

    Args:
      eqn: The equation.
      values: Its operands, of which those with a node all have this one.
      node: The node.
    """
    name = eqn.primitive.name
    data = [v for v in values if v.node == node]
    rest = [v for v in values if v.node is None]
    before = dict.fromkeys(n for v in data for n in v.link.primitives)
    degrees = [v.link.degree for v in data]
    slopes = [v.link.slope for v in data]
    rule = _RULES.get(name, _other)
    degree, slope = rule(eqn, values, data, rest, degrees, slopes)
    # Whatever is computed from directions alone is one of directions.
    if degree is None and degrees and all(d == 0 for d in degrees):
        degree = Fraction(0)
    return Link((*before, name), degree, slope)


def _other(eqn, values, data, rest, degrees, slopes):
    """A function of one number at a time, if it is in the tables above."""
    name = eqn.primitive.name
    if len(values) != 1:
        return None, math.inf
    factor = _DEGREES.get(name)
    degree = None if factor is None or degrees[0] is None else degrees[0] * factor
    return degree, slopes[0] * _SLOPES.get(name, math.inf)


def _sum(eqn, values, data, rest, degrees, slopes):
    if not all(v.known == 0 for v in rest):
        return None, sum(slopes)
    same = len(set(degrees)) == 1
    return degrees[0] if same else None, sum(slopes)


def _product(eqn, values, data, rest, degrees, slopes):
    degree = None if None in degrees else sum(degrees, Fraction(0))
    if len(data) > 1:
        return degree, math.inf
    return degree, slopes[0] * _size(rest[0]) if rest else math.inf


def _quotient(eqn, values, data, rest, degrees, slopes):
    above, below = values
    if len(data) > 1:
        known = None not in degrees
        return degrees[0] - degrees[1] if known else None, math.inf
    if above.node is None:
        return -degrees[0] if degrees[0] is not None else None, math.inf
    size = _size(below)
    return degrees[0], slopes[0] / size if 0 < size < math.inf else math.inf


def _extreme(eqn, values, data, rest, degrees, slopes):
    """The larger or the smaller of two values."""
    still = all(v.known in (0, math.inf, -math.inf) for v in rest)
    same = len(set(degrees)) == 1
    one = len({v.base()[0] for v in data}) == 1 and not rest
    slope = max(slopes) if one else math.hypot(*slopes)
    return degrees[0] if same and still else None, slope


def _comparison(eqn, values, data, rest, degrees, slopes):
    same = len(set(degrees)) == 1 and None not in degrees
    still = all(v.known == 0 for v in rest)
    return Fraction(0) if same and still else None, math.inf


def _power(eqn, values, data, rest, degrees, slopes):
    power = eqn.params.get("y", values[1].known if len(values) > 1 else None)
    if power is None or degrees[0] is None or len(data) > 1:
        return None, math.inf
    return degrees[0] * Fraction(power), math.inf


def _choice(eqn, values, data, rest, degrees, slopes):
    """``select_n``: continuous if a sign decides between multiples of one value."""
    which, *cases = values
    if which.node is not None and which.link.degree != 0:
        degree = None
    else:
        of = {v.link.degree for v in cases if v.node is not None}
        still = all(v.known == 0 for v in cases if v.node is None)
        degree = of.pop() if len(of) == 1 and still else None
    own = [v.link.slope for v in cases if v.node is not None]
    if which.node is None:
        return degree, math.hypot(*own)
    bases = {v.base()[0] for v in cases if v.known != 0}
    return degree, max(own) if own and bases == {which.sign} else math.inf


def _clamp(eqn, values, data, rest, degrees, slopes):
    low, x, high = values
    if x.node is None or low.node is not None or high.node is not None:
        return None, math.inf
    return None, slopes[0]


def _reduction(eqn, values, data, rest, degrees, slopes):
    axes = eqn.params["axes"]
    count = math.prod(values[0].shape[a] for a in axes)
    times = math.sqrt(count) if eqn.primitive.name == "reduce_sum" else 1.0
    return degrees[0], slopes[0] * times


def _window(eqn, values, data, rest, degrees, slopes):
    p = eqn.params
    size, strides = p["window_dimensions"], p["window_strides"]
    dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    # One number is in so many windows at most.
    overlap = math.prod(-(-n // s) for n, s in zip(size, strides, strict=True))
    times = overlap * (math.prod(size) if "sum" in eqn.primitive.name else 1)
    return degrees[0], math.inf if dilated else slopes[0] * math.sqrt(times)


def _linear(eqn, values, data, rest, degrees, slopes):
    """Products with constants, of which the size is not known."""
    if len(data) > 1:
        return None if None in degrees else sum(degrees), math.inf
    return degrees[0], math.inf


def _joined(eqn, values, data, rest, degrees, slopes):
    """Parts of one value, or the value among constants, next to each other."""
    same = len(set(degrees)) == 1 and all(v.known == 0 for v in rest)
    return degrees[0] if same else None, math.hypot(*slopes)


def _picked(eqn, values, data, rest, degrees, slopes):
    """Numbers of a value that constants pick, perhaps some of them twice."""
    picks = values[0].node is not None and len(data) == 1
    once = eqn.primitive.name == "dynamic_slice"
    return degrees[0] if picks else None, slopes[0] if picks and once else math.inf


def _order(eqn, values, data, rest, degrees, slopes):
    if len(data) > 1 or len(eqn.outvars) > 1:  # The order itself is no number.
        return None, math.inf
    return degrees[0], slopes[0]


def _size(value: Any) -> float:
    """The size of the number that a constant repeats."""
    return math.inf if value.known is None else abs(value.known)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _comparison),
    **dict.fromkeys(("pow", "integer_pow"), _power),
    "select_n": _choice,
    "clamp": _clamp,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduction),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window
    ),
    **dict.fromkeys(("dot_general", "conv_general_dilated", "cumsum"), _linear),
    **dict.fromkeys(("sort", "cummax", "cummin"), _order),
    **dict.fromkeys(("concatenate", "stack", "pad"), _joined),
    **dict.fromkeys(("gather", "dynamic_slice"), _picked),
}
