"""What compiles in a hurry are the tests that say so, and no others."""

import jax
import pytest
import quick


@pytest.mark.parametrize(
    "hurries",
    [
        pytest.param(True, marks=quick.everything),
        pytest.param(False, marks=quick.bits),
        False,
    ],
)
def test_marks_say_how_all_programs_of_a_test_are_compiled(hurries, monkeypatch):
    """Shown by an option that XLA does not know, and refuses where it is told."""
    monkeypatch.setattr(quick, "OPTIONS", {"xla_hurry": True})
    double = jax.jit(lambda x: 2 * x)
    if hurries:
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_hurry"):
            double(3)
    else:
        assert double(3) == 6


def test_what_was_compiled_in_a_hurry_is_nobody_elses():
    double = jax.jit(lambda x: 2 * x)
    for hurries, programs in ((True, 1), (False, 2), (True, 2)):
        with quick.context(hurries):
            double(3)
        assert double._cache_size() == programs
