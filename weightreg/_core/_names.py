"""What names and numbers of axes tell: the table for trees that were not traced.

All of it is made when the module is imported, and `weightreg._core._weights` reads it.
"""

import re
from typing import Literal, NamedTuple, TypeAlias

# A leaf's own name is taken in lower case and without a number at its end.
BIASES = frozenset({"b", "bias"})

# These shift or scale units in Flax, Haiku, Equinox and Keras, or are added to all
# examples alike. Their rank does not tell, since biases of attention are
# (heads, head_dim) and those of scanned layers have an axis of layers.
SHIFTS = BIASES | {
    "alpha",  # PReLU's, in Keras
    "beta",
    "cls",
    "convex_logits",  # ConvexSum's, here
    "gamma",
    "layer_scale",
    "negative_slope",
    "offset",
    "scale",
}
SHIFT_LIKE = re.compile(
    r".*_(bias|scale|offset|gamma|beta)|bias_.*|weight_g|pos(ition(al)?)?_emb.*"
    r"|(cls|class|mask|dist|distillation|register)_tokens?"
)

# These are weights, however many of their axes have size 1.
WEIGHTS = frozenset({"embedding", "embeddings", "kernel", "lora_a", "lora_b", "w"})
WEIGHT_LIKE = re.compile(r"w_.*|(.*_)?(kernel|weight)(_.*)?")

# Equinox and PyTorch store (units, inputs), and call it so.
UNITS_FIRST = re.compile(r"(.*_)?weight(_.*)?")

# Kernels of depthwise layers have groups, of which the tree does not tell, and those of
# an einsum have any axes at all.
UNKNOWN = re.compile(r"depthwise.*")
UNKNOWN_MODULES = re.compile(r".*einsum.*|.*depthwise.*|conv_?local")

# Some libraries store these kernels (window, units, inputs), and some do not.
TRANSPOSED_MODULES = re.compile(r"conv.*transpose.*|deconv.*")

Order: TypeAlias = Literal["units last", "units first", "transposed"]
REVERSED: dict[Order, Order] = {
    "units last": "transposed",
    "units first": "units last",
    "transposed": "units last",
}

Kind: TypeAlias = Literal["any", "convolution", "general", "attention", "merging"]
MODULES: dict[Kind, re.Pattern[str]] = {
    "convolution": re.compile(r"conv_?\d?_?d?(_?transpose)?"),
    "general": re.compile(r"dense_?general"),
    "attention": re.compile(r"query|key|value"),
    "merging": re.compile(r"out|attention_output"),  # heads, beside those three
}


class Reading(NamedTuple):
    """What the axes of a leaf may mean. Axes that it does not name stack layers.

    Attributes:
      inputs: Axes over which a unit sums, those of a window first.
      outputs: Axes that number the units.
      convolves: Whether it is a convolution.
      reach: How many units see one input at most, as far as ``convolves`` leaves open.
      bias: The axes that the bias has as well, in its order.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    convolves: bool = False
    reach: int = 1
    bias: tuple[int, ...] = ()

    def stacked(self, axis: int) -> "Reading":
        """The reading of a stack of such layers along a further axis."""
        past = lambda axes: tuple(a + (a >= axis) for a in axes)  # noqa: E731
        bias = past(self.bias)
        return self._replace(
            inputs=past(self.inputs),
            outputs=past(self.outputs),
            bias=(*bias[:axis], axis, *bias[axis:]),
        )


def _single(ndim: int, order: Order, kind: Kind) -> list[Reading]:
    """The readings of a leaf that is one layer."""
    axes = tuple(range(ndim))
    if ndim == 2:
        last = order == "units last"
        return [Reading((0,), (1,))] if last else [Reading((1,), (0,))]
    convolutions = {
        "units last": Reading(axes[:-1], axes[-1:], convolves=True),
        "transposed": Reading((*axes[:-2], axes[-1]), axes[-2:-1], convolves=True),
        "units first": Reading((*axes[2:], 1), (0,), convolves=True),
    }
    found = [convolutions[order]] if kind in ("any", "convolution") else []
    if order == "units last" and ndim == 3:
        in_heads, merges_heads = Reading((0,), (1, 2)), Reading((0, 1), (2,))
        found += [in_heads] if kind in ("any", "general", "attention") else []
        found += [merges_heads] if kind in ("any", "general", "merging") else []
    if order == "units last" and ndim == 4:
        found += [Reading((0, 1), (2, 3))] if kind in ("any", "general") else []
    return found


def _all(ndim: int, order: Order, kind: Kind) -> tuple[Reading, ...]:
    """The readings of a leaf, which may be a stack of layers."""
    single = _single(ndim, order, kind)
    found = [reading._replace(bias=reading.outputs) for reading in single]
    if ndim > (3 if kind == "convolution" else 2):
        fewer = _all(ndim - 1, order, kind)
        places = (
            (0, 1) if order == "units last" else (0,)
        )  # 1 is for Flax's scans alone
        found += [reading.stacked(axis) for axis in places for reading in fewer]
    return tuple(dict.fromkeys(found))


READINGS: dict[tuple[int, Order, Kind], tuple[Reading, ...]] = {
    (ndim, order, kind): _all(ndim, order, kind)
    for ndim in range(2, 9)
    for order in REVERSED
    for kind in ("any", *MODULES)
}
"""What a leaf of so many axes may be, by the order of its axes and its module."""
