"""Each registry is one literal: all of it is where it is written, and stays so."""

import ast
import pathlib

import pytest

import benchmarks

FOLDER = pathlib.Path(benchmarks.__file__).parent
REGISTRIES = {
    "DATASETS": "data.py",
    "LAYOUTS": "folders.py",
    "MODELS": "models.py",
    "METHODS": "methods.py",
    "EXPERIMENTS": "__init__.py",
    "ACCELERATORS": "devices.py",
    "TARGETS": "targets.py",
    "TREES": "trees.py",
    "STEPS": "programs.py",
    "MAPS": "programs.py",
    "REGULARIZERS": "training.py",
    "SIZES": "sizes.py",
    "PARTS": "speed.py",
    "PLANNED": "speed.py",
    "GROWTH": "growth.py",
    "LIMITS": "step_plans.py",
}
CHANGES = {"update", "setdefault", "pop", "popitem", "clear", "__setitem__"}


def named(node, registry):
    """Whether an expression is the registry, by itself or of a module."""
    by_itself = isinstance(node, ast.Name) and node.id == registry
    return by_itself or (isinstance(node, ast.Attribute) and node.attr == registry)


def targets(node):
    """What a statement assigns to or deletes, tuples and their parts included."""
    if isinstance(node, ast.Assign | ast.Delete):
        assigned = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For):
        assigned = [node.target]
    else:
        assigned = []
    return [part for target in assigned for part in ast.walk(target)]


def changed(node, registry):
    """Whether a node assigns to a registry or to an entry, or calls what would."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in CHANGES and named(node.func.value, registry)
    return any(named(target, registry) for target in targets(node))


def changes_of(registry, source):
    return [node for node in ast.walk(ast.parse(source)) if changed(node, registry)]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_registry_is_assigned_once_by_a_literal_with_all_keys(registry):
    found = {
        file.name: changes
        for file in FOLDER.rglob("*.py")
        if (changes := changes_of(registry, file.read_text()))
    }
    assert list(found) == [REGISTRIES[registry]]
    (assignment,) = found[REGISTRIES[registry]]
    assert isinstance(assignment, ast.AnnAssign) and isinstance(
        assignment.value, ast.Dict
    )
    keys = [ast.literal_eval(key) for key in assignment.value.keys]
    assert len(set(keys)) == len(keys) > 1


@pytest.mark.parametrize(
    "source",
    [
        "X = {}",
        "X |= {}",
        "X['a'] = 1",
        "m.X['a'] = 1",
        "X['a'], b = 1, 2",
        "del X['a']",
        "for X['a'] in (): pass",
        "X.update(a=1)",
        "m.X.setdefault('a', 1)",
    ],
)
def test_every_way_to_change_a_registry_is_seen(source):
    assert changes_of("X", source)
    assert not changes_of("Y", source)
