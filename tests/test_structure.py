"""The house: how many files a call runs through, and which way the calls go."""

import ast
import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import quick

import weightreg as wr

HOME = pathlib.Path(wr.__file__).parent
INSIDE = f"{HOME}/"  # spelled out once, since every call of any function asks


def network(size):
    """Parameters of a shape that is traced nowhere else, or it would not be here."""
    return {
        "Dense_0": {"kernel": jnp.ones((4, size)), "bias": jnp.ones(size)},
        "Dense_1": {"kernel": jnp.ones((size, 2)), "bias": jnp.ones(2)},
    }


def link(make, params):
    """Makes, initializes and updates a transformation once."""
    tx = make()
    tx.update(params, tx.init(params), params)


def ones(params):
    """Two examples of a shape of their own."""
    return jnp.ones((2, len(params["Dense_0"]["bias"])))


HALF = wr.he_volume(optax.linear_schedule(0.5, 0.25, 10))
BOX = {"volume": HALF, "alpha": optax.linear_schedule(1.0, 0.5, 10)}
LINKS = {
    "volumize": lambda: wr.volumize(HALF, 0.9),
    "volumized": lambda: wr.volumized(optax.adam(0.1), HALF, 0.9),
    "volumized_sgd": lambda: wr.volumized_sgd(0.1, **BOX),
    "volumized_adam": lambda: wr.volumized_adam(0.1, **BOX),
    "volumized_laprop": lambda: wr.volumized_laprop(0.1, **BOX),
    "laprop": lambda: wr.laprop(0.1),
    "quantize_every": lambda: wr.quantize_every(2, "binary", HALF),
    "parseval": lambda: wr.parseval(optax.constant_schedule(1e-3)),
    "add_weissi": lambda: wr.add_weissi(1e-3, 1e-5),
    "add_shifted_l2": lambda: wr.add_shifted_l2(1e-4, 1e-3),
}
CALLS = {name: functools.partial(link, make) for name, make in LINKS.items()} | {
    "weissi": jax.grad(wr.weissi(1e-3, 1e-5)),
    "equivalent_norm": wr.equivalent_norm(),
    "shifted_l2": jax.grad(wr.shifted_l2(1e-4, 1e-3)),
    "balance_scales": wr.balance_scales,
    "input_gradient_bound": wr.input_gradient_bound,
    "gbr": lambda params: wr.gbr(jnp.sin, ones(params), batch_size=1),
    "pgd": lambda params: wr.pgd(
        lambda x, y: x.sum(-1), ones(params), None, 0.1, steps=1
    ),
    "pack": lambda params: wr.unpack(wr.pack(params, wr.he_volume(0.5), "binary")),
}
SIZES = {name: 211 + i for i, name in enumerate(CALLS)}
MOST = {"pack": 7}  # which is no transformation, and 6 for all others


def is_ours(code):
    """Whether code is a function of the library; modules' own bodies are none."""
    return code.co_filename.startswith(INSIDE) and code.co_name != "<module>"


def files_of(frame):
    """The files of the library on the way to a frame, neighbours that agree as one."""
    files = []
    while frame:
        name = frame.f_code.co_filename
        if is_ours(frame.f_code) and files[-1:] != [name]:
            files.append(name)
        frame = frame.f_back
    return files[::-1]


@quick.everything
@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_through_few_files_and_only_downwards(name):
    ran, upwards = set(), set()

    def tracer(frame, event, arg):
        if is_ours(frame.f_code):
            *above, own = files_of(frame)
            ran.add(own)
            if own in above:
                upwards.add((*above, own))

    params = network(SIZES[name])
    sys.settrace(tracer)
    try:
        CALLS[name](params)
    finally:
        sys.settrace(None)
    assert not upwards
    assert 1 <= len(ran) <= MOST.get(name, 6), ran


def room(module):
    """The folder that a module of the library is in, or the module itself."""
    return module.split(".")[1] if "." in module else module


def test_rooms_stand_on_each_other_without_circles():
    """No folder imports one that imports it, and the core imports none."""
    imports = {}
    for file in HOME.rglob("*.py"):
        own = file.relative_to(HOME).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.startswith("weightreg.") and room(module) != own:
                    imports.setdefault(own, set()).add(room(module))
    assert "_core" not in imports
    while imports:  # takes away what stands on nothing that is left
        free = {own for own, used in imports.items() if not used & set(imports)}
        assert free, imports
        imports = {own: used for own, used in imports.items() if own not in free}


@pytest.mark.parametrize("file", sorted(HOME.rglob("*.py")), ids=lambda file: file.stem)
def test_flax_is_imported_by_its_own_modules_only(file):
    imports_flax = re.search(r"^(from|import) flax\b", file.read_text(), re.MULTILINE)
    assert bool(imports_flax) == (file.stem in ("linen", "nnx"))
