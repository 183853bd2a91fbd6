"""How many floating-point operations training takes, and how long at least.

Operations are those of products of matrices and of convolutions, a multiplication and
an addition each: all else is bound by memory. They are counted in a program's trace,
for which nothing is computed and no data is loaded.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from benchmarks import models
from benchmarks.data import DATASETS
from benchmarks.methods import METHODS
from benchmarks.settings import Settings
from benchmarks.train import ADVERSARY_STEPS

# Of a step forward, whose gradient for the weights and that for the layer below are a
# product as large as the layer's own each.
TRAINING, ATTACK = 3, 2
# What an H100 achieves in such networks. In float32, where it multiplies in TF32, a
# step of ResNet-18 on images of 32 by 32 in batches of 128 takes it 5.02 ms. In
# bfloat16 nothing was measured: its units are twice as fast there.
_TF32 = TRAINING * 2 * 0.556e9 * 128 / 5.02e-3
RATES: Mapping[tuple[str, str], float] = {
    ("H100", "float32"): _TF32,
    ("H100", "bfloat16"): 2 * _TF32,
    # The same units with a faster memory.
    ("H200", "float32"): _TF32,
    ("H200", "bfloat16"): 2 * _TF32,
}
# Small networks wait for the host: MNIST with 12 trials, twice, and 5 seeds of 5
# methods took an H100 80 s, compilation and attacks included, for 82,500 steps.
SECONDS_A_STEP = 80 / 82_500


def count(fn: Callable, *args: Any) -> float:
    """Floating-point operations of a function, on an accelerator.

    Of a branch for each platform it is the one that is for all others that counts, and
    of other branches the longest.

    Args:
      fn: The function.
      *args: What it is called with, or the shapes and dtypes of it.

    Raises:
      ValueError: There are products in a loop of which no one knows how often it runs.
    """
    return _of_program(jax.make_jaxpr(fn)(*args).jaxpr)


def epoch_flops(settings: Settings, method: str) -> float:
    """Operations of an epoch of one run: training, and the test after it.

    Neither augmentations nor what is measured of sensitivity is counted.
    """
    forward = forward_flops(settings)
    attacks = ADVERSARY_STEPS if settings.adversarial else 0
    step = settings.batch * forward * (TRAINING + ATTACK * attacks)
    step += _update_flops(_network(settings), METHODS[method].like or method)
    return steps(settings) * step + DATASETS[settings.dataset].sizes[1] * forward


def epoch_seconds(settings: Settings, method: str, device_kind: str) -> float | None:
    """How long such an epoch takes at least, or None for a device of unknown rate.

    Loops within a network, as over words, wait for each round and take longer.

    Args:
      settings: Of the comparison.
      method: Name in `benchmarks.methods.METHODS`.
      device_kind: As JAX calls it, such as ``"NVIDIA H100 80GB HBM3"``.
    """
    for (device, dtype), rate in RATES.items():
        if device in device_kind and dtype == settings.dtype:
            busy = epoch_flops(settings, method) / rate
            return max(busy, steps(settings) * SECONDS_A_STEP)
    return None


def forward_flops(settings: Settings) -> float:
    """Operations of an example's way through the network."""
    return _traced(_network(settings))[0]


def parameters(settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what is trained, by path."""
    params = _traced(_network(settings))[1]["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def steps(settings: Settings) -> int:
    """Training steps of an epoch."""
    known = DATASETS[settings.dataset].sizes[0]
    examples = known if settings.whole else known * 4 // 5
    return min(examples, settings.examples or examples) // settings.batch


class _Network(NamedTuple):
    """What tells networks apart, and the shape and dtype of an input."""

    model: str
    classes: int
    shape: tuple[int, ...]
    dtype: str


def _network(settings: Settings) -> _Network:
    info = DATASETS[settings.dataset]
    size = settings.resize
    shape = (size, size, *info.shape[2:]) if size else info.shape
    dtype = "int32" if info.kind == "text" else "float32"
    return _Network(settings.model, info.classes, shape, dtype)


@functools.cache
def _traced(network: _Network) -> tuple[float, Any]:
    """Operations of an example's way through a network, and shapes of variables.

    Initializing a network sends the example through it, and multiplies nothing more.
    """
    model = models.make(network.model, network.classes)
    x = jax.ShapeDtypeStruct((1, *network.shape), network.dtype)
    program, (_, variables) = jax.make_jaxpr(model.init_with_output, return_shape=True)(
        jax.random.key(0), x
    )
    return _of_program(program.jaxpr), variables


@functools.cache
def _update_flops(network: _Network, name: str) -> float:
    """Operations of a method's own, such as Parseval's products."""
    method, output = METHODS[name], models.MODELS[network.model].output
    params = _traced(network)[1]["params"]
    hyper = {name: 1e-3 for name in ("learning_rate", *method.space)}
    hyper |= method.fixed or {}
    if method.norm:
        params = jax.eval_shape(method.norm(hyper).init, params)
    optimizer = method.build(hyper, "momentum", output)
    update = lambda p: optimizer.update(p, optimizer.init(p), p)  # noqa: E731
    return count(update, params)


def _of_program(program: Jaxpr) -> float:
    return sum(map(_of_equation, program.eqns))


def _of_equation(equation: JaxprEqn) -> float:
    counted = _OF.get(equation.primitive.name, _of_others)
    return counted(equation)


def _of_product(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _array(equation.invars[0]).shape
    summed = math.prod(shape[axis] for axis in contracted)
    return 2.0 * _array(equation.outvars[0]).size * summed


def _of_convolution(equation: JaxprEqn) -> float:
    params, kernel = equation.params, _array(equation.invars[1])
    units = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # The gradient of a strided convolution has zeros between its inputs.
    window = kernel.size / units / math.prod(params["lhs_dilation"])
    return 2.0 * _array(equation.outvars[0]).size * window


def _array(variable: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what goes into an equation, or comes out of it."""
    return variable.aval


def _of_scan(equation: JaxprEqn) -> float:
    return equation.params["length"] * _of_others(equation)


def _of_branches(equation: JaxprEqn) -> float:
    branches = [_of_program(b.jaxpr) for b in equation.params["branches"]]
    platforms = equation.params.get("branches_platforms")
    return branches[platforms.index(None)] if platforms else max(branches)


def _of_while(equation: JaxprEqn) -> float:
    if _of_others(equation):
        raise ValueError(
            "fn has products in a loop of which the trace does not tell how often it "
            "runs: count its body, or write it as jax.lax.scan."
        )
    return 0.0


def _of_others(equation: JaxprEqn) -> float:
    """Operations of the programs that an equation calls."""
    return sum(map(_of_program, _called(equation)))


def _called(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


_OF: Mapping[str, Callable[[JaxprEqn], float]] = {
    "dot_general": _of_product,
    "conv_general_dilated": _of_convolution,
    "scan": _of_scan,
    "cond": _of_branches,
    "while": _of_while,
}
