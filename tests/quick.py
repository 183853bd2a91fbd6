"""Compiling in a hurry, which is most of what small programs take time for.

The code is worse, the formulas are the same: for tests of formulas with a tolerance.
Tests of bits compile as users do.
"""

import functools
from typing import Any

import jax


def _known(name: str, value: Any) -> bool:
    """Whether this XLA has an option."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


OPTIONS = {
    name: value
    for name, value in {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }.items()
    if _known(name, value)
}

jit = functools.partial(jax.jit, compiler_options=OPTIONS)
