"""Eight virtual CPU devices, and programs that are compiled once for all workers."""

import os

import jax
import meshes
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory):
    """Compiling is most of what the tests take time for."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


@pytest.fixture(scope="session")
def digits():
    """The data set of the comparison that needs no network and no files."""
    from benchmarks import data

    return data.load("digits")


@pytest.fixture
def cpu_mesh():
    """Makes meshes of CPU devices, where all else of the test is computed as well."""
    with jax.default_device(next(iter(meshes.cpu_devices()), None)):
        yield meshes.cpu_mesh
