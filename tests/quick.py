"""Compiling in a hurry, which is most of what small programs take time for.

The code is worse, the formulas are the same: for tests of formulas with a tolerance.
Tests of bits compile as users do.

`jit` compiles one program so. A test, or a module of tests, that `everything` marks
compiles all of its programs so: also those that each operation outside of a `jit` is,
and those that the library makes. In such a module `bits` marks tests of bits.
"""

import functools
from typing import Any

import jax
import pytest
from jax._src import compiler


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

everything = pytest.mark.hurry(True)
bits = pytest.mark.hurry(False)

# JAX keeps programs apart that were compiled inside and outside of a context, so that
# no test of bits gets one that another test has compiled in a hurry.
context = jax.make_user_context(False)


def _hurried(options_of):
    """JAX has no options for all programs that would be read after its start."""

    @functools.wraps(options_of)
    def options(*args, env_options_overrides=None, **kwargs):
        given = env_options_overrides or {}
        if context.value:
            given = OPTIONS | given
        return options_of(*args, env_options_overrides=given, **kwargs)

    return options


compiler.get_compile_options = _hurried(compiler.get_compile_options)
