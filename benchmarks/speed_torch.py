"""The same steps in PyTorch, as one would write volumization there.

PyTorch is imported when it is used, for it need not be installed.
"""

import contextlib
import importlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import programs, trees
from benchmarks.programs import BOX
from benchmarks.sizes import Sizes
from benchmarks.speed_parts import Column, ready, values
from benchmarks.timing import relative_times

OURS = ("adam", "chain(adam, volumize)", "volumized(adam)")
LEARNING_RATE = 1e-3
PATIENCE = 180  # seconds for a compiler; what takes longer is left out


def optimizers(sizes: Sizes) -> dict[str, Column]:
    """Steps that are called one after another, without waiting for results."""
    columns = {}
    for tree in sizes.torch:
        params = trees.TREES[tree]()
        steps, carries = ready(
            {name: programs.program(name, params) for name in OURS}, 2
        )
        theirs = torch_steps(params)
        columns[f"{tree}, one by one"] = relative_times(
            theirs | steps,
            dict.fromkeys(theirs) | carries,
            sizes.rounds,
            sizes.seconds,
            sizes.steps,
        )
    return columns


def torch_steps(params: Any) -> dict[str, Callable[[Any], Any]]:
    """Steps by their names, each with tensors of its own; eager ones come first."""
    boxed = {"walls": True, "momentum": True}
    eager = {
        "torch, Adam": {},
        "torch, Adam(fused=True)": {"fused": True},
        "torch, Adam and walls": {"walls": True},
        "torch, Adam, walls and momentum": boxed,
    }
    compiled = {"torch, Adam": {}, "torch, Adam, walls and momentum": boxed}
    steps = {
        name: step(params, tensors(params), **options)
        for name, options in eager.items()
    }
    torch = importlib.import_module("torch")
    # What other processes compile would go on while others are timed.
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.compile_threads = 1
    for name, options in compiled.items():
        run = torch.compile(step(params, tensors(params), **options))
        with contextlib.suppress(TooLong), limited(PATIENCE):
            run(None)
            steps[f"{name}, compiled"] = run
    return steps


def tensors(params: Any) -> list[Any]:
    """A tree's leaves on the device that PyTorch has, with gradients."""
    torch = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = []
    for leaf in jax.tree.leaves(values(params)):
        leaves.append(torch.tensor(np.array(leaf), device=device, requires_grad=True))
        leaves[-1].grad = leaves[-1].detach().clone()
    return leaves


def step(
    params: Any,
    leaves: list[Any],
    walls: bool = False,
    momentum: bool = False,
    **options: Any,
) -> Callable[[Any], None]:
    """Adam, then volumization in as few calls as PyTorch has for lists of tensors.

    Args:
      params: The tree, which may be without values.
      leaves: Its tensors.
      walls: Whether weights are pulled back to the box.
      momentum: Whether the momentum of those that were outside is damped, too.
      **options: Of Adam.
    """
    torch = importlib.import_module("torch")
    adam = torch.optim.Adam(leaves, lr=LEARNING_RATE, **options)
    volumes = jax.tree.leaves(
        BOX["volume"](params), is_leaf=lambda volume: volume is None
    )
    inside = [(w, v) for w, v in zip(leaves, volumes, strict=True) if v is not None]
    weights, high = [w for w, _ in inside], [float(v) for _, v in inside]
    low = [-v for v in high]

    def run(_: Any) -> None:
        adam.step()
        if walls:
            with torch.no_grad():
                boxed = torch._foreach_clamp_max(weights, high)
                torch._foreach_clamp_min_(boxed, low)
                torch._foreach_sub_(boxed, weights)
                if momentum:
                    for w, pull in zip(weights, boxed, strict=True):
                        damped = torch.where(pull != 0, BOX["alpha"], 1.0)
                        adam.state[w]["exp_avg"].mul_(damped)
                torch._foreach_add_(weights, boxed, alpha=1 - BOX["alpha"])

    return run


class TooLong(BaseException):
    """Time is up. No handler of errors on the way, such as a compiler's, takes it."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Ends what takes longer by `TooLong`, in the main thread."""

    def end(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
