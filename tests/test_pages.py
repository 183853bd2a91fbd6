"""Pages hold: their code runs, links lead somewhere, numbers are those of results.

Pages are all Markdown files and notebooks of the repository, so that a new one is
tested as soon as it is there.
"""

import ast
import codeop
import copy
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import optax
import pytest

import weightreg as wr
from benchmarks.__main__ import _parser

ROOT = pathlib.Path(__file__).parent.parent
PLANS, TESTS = "<!-- ci: the plans -->", "<!-- ci: the tests -->"
# What holds of a page's names when its code has run; `kernels` lists a tree's matrices.
CHECKS = {
    "README.md": ["(model(x_test).argmax(-1) == y_test).mean() > 0.9"],
    "weightreg/_volumization/README.md": [
        "(logits.argmax(-1) == y_test).mean() > 0.9",
        "len(left) == 2 and set(left.values()) == {\"called 'bias'\"}",
        "[layer.fan_in for layer in layers] == [64, 128]",
        "box['weight'] == wr.he_volume(0.5)({'w': jnp.ones((64, 10))})['w']",
        "jnp.max(abs(kernels(params)[1])) > 0.3",
        "not jnp.any(kernels(frozen.update(params, frozen.init(params), params))[0])",
        "jnp.max(abs(kernels(free.update(params, free.init(params), params)[1].z)[1]))"
        " <= 0.3",
        "slow.init(optax.LookaheadParams.init_synced(params)).steps_since_sync == 0",
    ],
    "weightreg/_quantization/README.md": [
        "(logits.argmax(-1) == y_test).mean() > 0.85",
        "jnp.all(logits.argmax(-1) == run(packed, x_test).argmax(-1))",
        "jnp.all(kernels(wr.unpack(packed))[0] == kernels(params)[0])",
        "max(far.values()) < 1e-6",
        "len(jnp.unique(kernels(wr.unpack(small))[0])) == 2",
        "len(jnp.unique(kernels(binary)[0])) == 2",
        "len(jnp.unique(kernels(ternary)[0])) == 3",
    ],
    "weightreg/_weissi/README.md": [
        "(model(x_test).argmax(-1) == y_test).mean() > 0.9",
        "jnp.isclose(least, sum(jnp.sum(k**2) for k in kernels(balanced)), rtol=1e-4)",
        "jnp.isclose(wr.weight_energy(shifted), energy, rtol=1e-4)",
        "jnp.isclose(wr.layer_complexity(balanced), complexity, rtol=1e-4)",
        "jnp.isfinite(penalty) and h.shape == x.shape",
    ],
    "weightreg/_equivalent_norm/README.md": [
        "(plain(x_test).argmax(-1) == y_test).mean() > 0.9",
        "all(jnp.isclose(jnp.sum(k**2), 1) for k in kernels(nnx.state(plain)))",
        "jnp.isclose(jnp.sum(params['kernel'] ** 2), 1)",
        "jnp.isfinite(penalty) and jnp.any(grads['kernel'] != 0)",
    ],
    "weightreg/_sensitivity/README.md": [
        "norms.shape == (len(x_test), 10)",
        "jnp.allclose(jnp.sum(norms**2, 1), squared, rtol=1e-3)",
        "jnp.all(jnp.isfinite(estimate.mean)) and estimate.mean.shape == (50,)",
        "jnp.all(squared < jnp.exp(bound)) and jnp.all(norms < most)",
        "0 < gbr < 10",
    ],
    "weightreg/_tracing/README.md": [
        "str(decoder) in prose and str(conv_net) in prose",
        "str(conv_net.between) in prose",
        "'share an input' in net.open[0]",
    ],
    "weightreg/_robustness/README.md": [
        "(model(x_test).argmax(-1) == y_test).mean() > 0.9",
        "moved.shape == x_test.shape and noisy.shape == value.shape == y_test.shape",
        "jnp.max(jnp.linalg.norm(moved - x_test, axis=1)) < 0.5001",
        "jnp.all((moved >= 0) & (moved <= 1)) and predicted.shape == y_test.shape",
    ],
}


def _files(suffix: str) -> list[str]:
    """Files of the repository, without what is hidden or installed."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        here = pathlib.Path(folder)
        hidden = [name for name in folders if name.startswith(".")]
        installed = [name for name in folders if (here / name / "pyvenv.cfg").is_file()]
        folders[:] = sorted({*folders} - {*hidden, *installed})
        found += [here / name for name in sorted(files) if name.endswith(suffix)]
    return [path.relative_to(ROOT).as_posix() for path in found]


MARKDOWN, NOTEBOOKS = _files(".md"), _files(".ipynb")


@functools.cache
def prose(page: str) -> str:
    """What a page says: all of a Markdown file, a notebook without its code."""
    written = (ROOT / page).read_text("utf8")
    if page.endswith(".md"):
        return written
    cells = json.loads(written)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] != "code")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, below as many empty lines as it has lines before."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", prose(page), re.M | re.S)
    return ["\n" * prose(page)[: m.start(1)].count("\n") + m[1] for m in found]


WITH_CODE = [page for page in MARKDOWN if blocks(page, "python")]


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """The names of a module for a page's code, which runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where Flax looks for its modules
    return module.__dict__


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs(page, namespace):
    for source in blocks(page, "python"):
        exec(compile(source, page, "exec"), namespace)
    names = {"wr": wr, "jnp": jnp, "kernels": kernels, "prose": prose(page)}
    names |= namespace
    for check in CHECKS.get(page, []):
        assert eval(check, names), check


def kernels(tree) -> list[jax.Array]:
    """The matrices of a tree."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf) == 2]


def test_every_page_with_checks_is_there():
    assert CHECKS.keys() <= set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_can_be_pasted(page):
    """Python's prompt ends a function or a loop at its first empty line."""
    for source in blocks(page, "python"):
        pending: list[str] = []
        for line in source.lstrip("\n").splitlines():
            pending.append(line)
            if codeop.compile_command("\n".join(pending), symbol="single"):
                pending = []
        assert not any(pending), f"{page}: an empty line must follow {pending}"


def transformations() -> Iterator:
    """Each statement that makes a transformation, after all that it needs."""
    for page in WITH_CODE:
        before: list[ast.stmt] = []
        for statement in itertools.chain(
            *(ast.parse(source).body for source in blocks(page, "python"))
        ):
            if "tx" in _assigned(statement):
                needed, code = _names(statement), [statement]
                for earlier in reversed(before):
                    imports = isinstance(earlier, ast.Import | ast.ImportFrom)
                    if imports or _assigned(earlier) & needed:
                        needed |= _names(earlier)
                        code.insert(0, earlier)
                yield pytest.param(page, code, id=f"{page}:{statement.lineno}")
            before.append(statement)


def _assigned(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {name for target in targets for name in _names(target)}


def _names(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


@pytest.mark.parametrize(("page", "code"), list(transformations()))
def test_every_transformation_steps(page, code, namespace):
    exec(compile(ast.Module(code, []), page, "exec"), namespace)
    dense = lambda n: {"kernel": jnp.ones((n, 2)), "bias": jnp.ones(2)}  # noqa: E731
    params, tx = {"Dense_0": dense(3), "Dense_1": dense(2)}, namespace["tx"]
    updates, _ = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for layer in new.values():
        kernel = layer["kernel"]
        assert jnp.all(jnp.isfinite(kernel)) and jnp.any(kernel != 1)


@pytest.mark.parametrize("page", MARKDOWN + NOTEBOOKS)
def test_commands_parse(page):
    """All of ``python -m benchmarks ...``, in code blocks and in sentences."""
    for line in re.findall(r"python3? -m benchmarks +([^\n`]+)", prose(page)):
        try:
            _parser().parse_args(shlex.split(line, comments=True))
        except SystemExit:
            pytest.fail(f"{page}: no such command: python -m benchmarks {line}")


@pytest.mark.parametrize("page", MARKDOWN + NOTEBOOKS)
def test_extras_are_there(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    wanted = re.findall(r"pip install (?:-e )?'(?:\.|weightreg)\[(.+?)\]'", prose(page))
    names = {name for extra in wanted for name in extra.split(",")}
    assert names <= extras["optional-dependencies"].keys()


@functools.cache
def _in_git() -> set[str] | None:
    """Files that are in git or could be added; None where this is no checkout."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        ran = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if ran.returncode else set(ran.stdout.splitlines())


@pytest.mark.parametrize("page", MARKDOWN + NOTEBOOKS)
def test_links_lead_somewhere(page):
    fenced = r"^```.*?^```$|`[^`\n]*`"
    sentences = re.sub(fenced, "", prose(page), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", sentences)
    local = [link for link in links if not re.match(r"https?://", link)]
    assert [link for link in local if not _leads_somewhere(page, link)] == []


def _leads_somewhere(page: str, link: str) -> bool:
    """Whether a file or a folder, and a heading, is there and in git."""
    path, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
    if not target.exists():
        return False
    inside, files = target.relative_to(ROOT).as_posix(), _in_git()
    if files and not any(f == inside or f.startswith(f"{inside}/") for f in files):
        return False
    headings = re.findall(r"^#+ (.+)$", prose(inside), re.M) if anchor else []
    plain = [re.sub(r"[^\w -]", "", heading).lower() for heading in headings]
    return not anchor or anchor in {heading.replace(" ", "-") for heading in plain}


@pytest.fixture(params=NOTEBOOKS)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / request.param, as_version=4)


def test_notebook_runs(notebook, tmp_path, monkeypatch):
    """It does anew what it has done: numbers may differ as accuracies do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    again = copy.deepcopy(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(again, timeout=600, resources=where).execute()
    for cell, run in zip(notebook.cells, again.cells, strict=True):
        *committed, numbers = _said(cell)
        *found, new_numbers = _said(run)
        assert found == committed
        for old, new in zip(numbers, new_numbers, strict=True):  # fractions or percents
            assert abs(old - new) <= (0.05 if old <= 1 else 5), cell.id


def _said(cell: nbformat.NotebookNode) -> tuple[list, str, list[float]]:
    """Kinds of a cell's outputs, its text without numbers, and the numbers."""
    outputs = cell.get("outputs", [])
    kinds = [
        (out.output_type, out.get("name"), *sorted(out.get("data", ())))
        for out in outputs
    ]
    text = "".join(out.get("text", "") for out in outputs)
    number = r"\d+(?:\.\d+)?"
    return (
        kinds,
        re.sub(number, "#", text),
        [float(n) for n in re.findall(number, text)],
    )


def test_notebook_is_as_it_was_run(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert any("image/png" in out.get("data", {}) for c in code for out in c.outputs)
    assert not any(out.get("name") == "stderr" for c in code for out in c.outputs)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) for cell in notebook.cells)


def test_notebook_is_small_and_knows_no_machine(notebook):
    assert len(nbformat.writes(notebook)) < 500_000
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    written = nbformat.writes(notebook)
    assert not re.search(r"(?<![\w.:/])/(?!/)\w+/\w+|[A-Z]:\\\\", written)


# Names of columns, as the pages have them.
METRICS = {
    "best": "best",
    "last epochs": "last",
    "FGSM": "fgsm",
    "PGD": "pgd",
    "all attacks": "worst",
    "GBR (logits)": "gbr of logits",
    "GBR (probabilities)": "gbr of probabilities",
    "GBR (label)": "gbr of label probability",
}
SETTINGS = {
    "learning rate": "learning_rate",
    "v": "v",
    "1 - alpha": "one_minus_alpha",
    "energy": "energy",
    "complexity": "complexity",
}
RESULTS = ROOT / "benchmarks/results"
COST = json.loads((RESULTS / "cost-cpu.json").read_text("utf8"))
GENERATED = tuple(f"benchmarks/{page}.md" for page in ("COSTS", "RESULTS", "SPEED"))
PLANNED = [json.loads(f.read_text("utf8")) for f in RESULTS.glob("cost-*.json")]
PLANNED = [planned["plans"] for planned in PLANNED if "plans" in planned]


def rows(page: str, which: str | None) -> list:
    """Rows of the tables of a page: the text before, the table's head, the cells.

    Tables are of four kinds: ``names``, of leaves; ``results``, of which the sentence
    before says from which file they come; ``settings``, of which every row does;
    ``costs``, of which rows are named as in the file of costs, or as in those of plans.
    """
    found = []
    table = r"((?:[^|\n].*\n)*)\n?((?:^\|.*\|\n)+)"
    for before, lines in re.findall(table, prose(page), re.M):
        head, _, *body = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in lines.splitlines()
        ]
        kind = None
        if re.search(r"From\s\[[^]]*\]\(\S*/results/\S+\.json\)", before):
            kind = "results" if head[0] == "method" else "costs"
        elif all(re.search(r"\]\(\S+\.json\)", row[0]) for row in body):
            kind = "settings"
        elif head[0] in ("optimizer", "training step", "inference", "program"):
            kind = "costs"
        elif head[0].startswith("Leaf"):
            kind = "names"
        if kind == which:
            found += [(before, head, row) for row in body]
    return found


def _result(page: str, text: str) -> dict:
    (link,) = re.findall(r"\]\((\S+\.json)\)", text)
    return json.loads(((ROOT / page).parent / link).read_text("utf8"))["results"]


def _of_kind(kind: str):
    # Pages that are written from all results are compared with what is written.
    pages = [page for page in MARKDOWN if rows(page, kind) and page not in GENERATED]
    return pytest.mark.parametrize("page", pages)


@pytest.mark.parametrize("page", [p for p in MARKDOWN if p.startswith("weightreg/")])
def test_every_table_of_a_card_is_compared(page):
    assert rows(page, None) == []


@_of_kind("names")
def test_names_that_are_listed_are_no_weights(page):
    (listed,) = (row[0] for *_, row in rows(page, "names") if "whatever" in row[1])
    names = re.findall(r"`([^`]+)`", listed)
    assert len(names) > 10
    for name in (name.replace("...", "some") for name in names):
        tree = {"w": jnp.ones((2, 3)), name: jnp.ones((2, 3))}
        assert wr.weight_mask(tree) == {"w": True, name: False}


@_of_kind("results")
def test_results_are_those_of_the_files(page):
    for before, head, row in rows(page, "results"):
        (entry,) = [e for e in _result(page, before).values() if e["label"] == row[0]]
        for column, cell in zip(head[1:], row[1:], strict=True):
            m = entry["metrics"][METRICS[column]]
            expected = f"{100 * m['mean']:.1f} ± {100 * m['std']:.1f}"
            if column.startswith("GBR"):
                expected = f"{m['mean']:.3g} ± {m['std']:.3g}"
            assert cell == expected, (page, row, column)


@_of_kind("settings")
def test_settings_are_those_of_the_files(page):
    for _, head, row in rows(page, "settings"):
        tuned = [e["tuning"]["chosen"] for e in _result(page, row[0]).values()]
        names = [SETTINGS[column] for column in head[1:]]
        chosen = [[f"{t[n]:.2g}" for n in names] for t in tuned if t.keys() >= {*names}]
        assert row[1:] in chosen, (page, row)


@_of_kind("costs")
def test_costs_are_those_of_the_file(page):
    for _, head, row in rows(page, "costs"):
        name = row[0].replace("`", "")
        network = head[0].removesuffix(" as")
        for column, cell in zip(head[1:], row[1:], strict=True):
            if ("H100" not in column or head[0] == "program") and cell:
                digits = len(cell.partition(".")[2])
                values = _plans(name) if network == "program" else _costs(name, network)
                known = {f"{value:,.{digits}f}" for value in values}
                assert cell in known, (page, row, column)


def _costs(name: str, network: str) -> list[float]:
    """All that the file says of a row."""
    parts = [COST["optimizers"], COST["forms"].get(network, {})]
    found = [v for part in parts for v in part.get(name, {}).values()]
    for part in ("training", "inference"):
        found += [of[name] for of in COST[part].values() if name in of]
    return [value for value in found if not isinstance(value, str)]


def _plans(name: str) -> list[float]:
    """All that compilers have planned for a program."""
    trees = [tree for planned in PLANNED for tree in planned.values()]
    return [value for tree in trees for value in tree.get(name, {}).values()]


def test_readme_is_two_screens():
    assert (ROOT / "README.md").stat().st_size <= 8192


def ci(folder: pathlib.Path, readme: str, options=("--print",)):
    """Lets ``.ci/run`` say, from elsewhere, what it takes from a README, or do it."""
    script = folder / ".ci/run"
    script.parent.mkdir()
    script.write_bytes((ROOT / ".ci/run").read_bytes())
    (folder / "README.md").write_text(readme, "utf8")
    command = ["bash", str(script), *options]
    return subprocess.run(command, cwd="/", capture_output=True, text=True)


def test_ci_runs_the_tests(tmp_path):
    ran = ci(tmp_path, prose("README.md"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == ".venv/bin/python -m pytest -n auto"
    bash = [block.lstrip("\n") for block in blocks("README.md", "bash")]
    tests, plans = (block for block in bash if "-m pytest" in block)
    assert ran.stdout == plans + tests


BLOCK = "```bash\npython -m pytest\n```\n"
SHORT = f"{PLANS}\n{BLOCK.replace('pytest', 'pytest -m plans')}"


def test_ci_takes_the_blocks_that_are_marked(tmp_path):
    readme = f"# A\n\n```bash\nfalse\n```\n\n{TESTS}\n{BLOCK}\n{BLOCK}\n{SHORT}"
    ran = ci(tmp_path, readme)
    commands = "python -m pytest -m plans\npython -m pytest\n"
    assert (ran.returncode, ran.stdout) == (0, commands)


@pytest.mark.parametrize(
    ("readme", "error"),
    [
        (BLOCK, "is there 0 times"),
        (f"{TESTS}\n{BLOCK}{TESTS}\n{BLOCK}", "is there 2 times"),
        (f"{TESTS} {TESTS}\n{BLOCK}", "is there 2 times"),
        (f"{TESTS}\n\n{BLOCK}", "must begin a bash block"),
        (f"{TESTS}\n```python\npytest.main()\n```\n", "must begin a bash block"),
        (f"{TESTS}\n```bash\npython -m pytest\n", "must begin a bash block"),
        (f"{BLOCK}{TESTS}\n", "must begin a bash block"),
        (f"{TESTS}\n```bash\npip install pytest\n```\n", "does not run pytest"),
        (f"{TESTS}\n```bash\n# python -m pytest\n```\n", "does not run pytest"),
    ],
)
def test_ci_says_what_is_wrong(tmp_path, readme, error):
    ran = ci(tmp_path, SHORT + readme)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("README.md: the ") and error in ran.stderr
    assert TESTS in ran.stderr


def test_ci_misses_the_plans(tmp_path):
    ran = ci(tmp_path, f"{TESTS}\n{BLOCK}")
    assert ran.returncode == 1 and f"'{PLANS}' must be there once" in ran.stderr


@pytest.mark.parametrize(
    ("first", "then", "printed"),
    [("true", "false", "plans\ntests\n"), ("false", "true", "plans\n")],
)
def test_ci_fails_where_either_fails(first, then, printed, tmp_path):
    fake = "```bash\necho {}\n{}\n: -m pytest\n```\n"
    readme = (
        f"{PLANS}\n{fake.format('plans', first)}{TESTS}\n{fake.format('tests', then)}"
    )
    ran = ci(tmp_path, readme, [])
    assert (ran.returncode, ran.stdout) == (1, printed)
