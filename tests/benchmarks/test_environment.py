"""Where results were measured."""

import shutil
import subprocess

import pytest

from benchmarks import environment

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    ran = subprocess.run(
        ["git", "-C", folder, *name, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return ran.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A file of code and a result, committed."""
    git(tmp_path, "init")
    for file in ("benchmarks/train.py", "benchmarks/results/a.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    return tmp_path


def test_the_commit_is_that_of_the_code(repository):
    folder = repository / "benchmarks"
    head = git(repository, "rev-parse", "HEAD")
    assert environment.commit(folder) == {"commit": head, "dirty": False}
    (repository / "new.py").write_text("untracked\n")
    (folder / "results/a.json").write_text("measured again\n")
    assert environment.commit(folder) == {"commit": head, "dirty": False}
    (folder / "train.py").write_text("2\n")
    assert environment.commit(folder) == {"commit": head, "dirty": True}


def test_without_a_commit_the_reason_is_told(repository, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("outside")
    found = environment.commit(outside)
    assert found["commit"] is None and "not a git repository" in found["no_commit"]
    untracked = repository / "site-packages" / "benchmarks"
    untracked.mkdir(parents=True)
    (untracked / "train.py").write_text("1\n")
    found = environment.commit(untracked)
    assert found["commit"] is None and "did not match any" in found["no_commit"]
    git(outside, "init")
    (outside / "train.py").write_text("1\n")
    git(outside, "add", ".")
    found = environment.commit(outside)
    assert found["commit"] is None and "Needed a single revision" in found["no_commit"]
    monkeypatch.setenv("PATH", str(outside))
    found = environment.commit(repository / "benchmarks")
    assert found["commit"] is None and found["no_commit"].startswith(
        "git cannot be run"
    )


def test_the_environment_tells_versions_and_commit():
    found = environment.environment()
    assert set(found["versions"]) == {*environment.PACKAGES, "python"}
    assert "commit" in found and "cpu" in found["device"]
