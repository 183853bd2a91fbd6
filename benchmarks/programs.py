"""Steps of optimizers and maps whose costs are measured or planned.

To add an optimizer, add an entry to `STEPS`; to add a map, add one to `MAPS`.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax

import weightreg as wr

ENERGY, COMPLEXITY = 1e-9, 1e-5  # of WEISSI; costs do not depend on them
BOX = {"volume": wr.he_volume(0.5), "alpha": 0.99}
STEPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3, mask=wr.weight_mask),
    "chain(adam, volumize)": lambda: optax.chain(optax.adam(1e-3), wr.volumize(**BOX)),
    "volumized(adam)": lambda: wr.volumized(optax.adam(1e-3), **BOX),
    "sgd, momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "volumized(sgd, momentum)": lambda: wr.volumized_sgd(1e-3, momentum=0.9, **BOX),
    "laprop": lambda: wr.laprop(1e-3),
    "volumized_laprop": lambda: wr.volumized_laprop(1e-3, **BOX),
    "chain(adam, quantize_every)": lambda: optax.chain(
        optax.adam(1e-3), wr.quantize_every(800, "ternary", BOX["volume"])
    ),
    "chain(add_weissi, adam)": lambda: optax.chain(
        wr.add_weissi(ENERGY, COMPLEXITY), optax.adam(1e-3)
    ),
    "chain(add_weissi(log), adam)": lambda: optax.chain(
        wr.add_weissi(ENERGY, COMPLEXITY, log=True), optax.adam(1e-3)
    ),
    "chain(add_shifted_l2, adam)": lambda: optax.chain(
        wr.add_shifted_l2(1e-4, 1e-3), optax.adam(1e-3)
    ),
}
# By the number of the paper's equation.
MAPS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "equivalent_norm(22)": lambda: wr.equivalent_norm(),
    "equivalent_norm(20)": lambda: wr.equivalent_norm(scope="layer", center=False),
}
PULLBACKS = {f"vjp({name})": name for name in MAPS}
KINDS = {"steps": tuple(STEPS), "maps": (*MAPS, *PULLBACKS)}


class Program(NamedTuple):
    """A function to compile.

    Attributes:
      run: The function.
      arguments: Of which shapes and dtypes matter.
      donated: Which of them it may overwrite.
    """

    run: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()


def names(kinds: Iterable[str]) -> list[str]:
    """The programs of these kinds, after Adam's step, which all are compared with."""
    return list(dict.fromkeys(["adam", *(n for kind in kinds for n in KINDS[kind])]))


def program(name: str, params: Any) -> Program:
    """A program by its name, for parameters that may be without values."""
    if name in STEPS:
        return step(STEPS[name](), params, params)
    if name in MAPS:
        return Program(MAPS[name](), (params,))
    mapping = MAPS[PULLBACKS[name]]()

    def pulled(params, cotangents):
        mapped, pullback = jax.vjp(mapping, params)
        return mapped, pullback(cotangents)

    return Program(pulled, (params, params))


def step(tx: optax.GradientTransformation, params: Any, grads: Any) -> Program:
    """The optimizer's part of a step, with parameters and state donated.

    Both come first, and in this order they go out: XLA pairs donated inputs with
    outputs in turn, and copies every array where the orders differ.
    """

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (params, jax.eval_shape(tx.init, params), grads), (0, 1))


def compiled(programs: Mapping[str, Program]) -> dict[str, Callable]:
    """Programs that can be run: compilers work side by side, and hold no lock."""
    lowered = [
        jax.jit(p.run, donate_argnums=p.donated).lower(*p.arguments)
        for p in programs.values()
    ]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda one: one.compile(), lowered)
        return dict(zip(programs, done, strict=True))
