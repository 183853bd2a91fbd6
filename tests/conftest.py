"""Eight virtual CPU devices, and programs that are compiled once for all workers."""

import os

import jax
import meshes
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Each of the workers would take most of a GPU's memory, and the second one find none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_report_header(config):
    """Which devices the tests run on."""
    from benchmarks import devices

    if config.option.markexpr == "plans":
        return []  # JAX would look for the devices whose compilers alone are there
    backend, asked = jax.default_backend(), os.environ.get("JAX_PLATFORMS")
    return [
        f"on {devices.described()} (JAX {jax.__version__})",
        *devices.unseen(backend, asked),
    ]


def pytest_addoption(parser):
    parser.addoption(
        "--tf32", action="store_true", help="round products on the CPU as a GPU does"
    )


def pytest_configure(config):
    if config.getoption("tf32"):
        import tf32

        tf32.emulate()


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory):
    """Compiling is most of what the tests take time for."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


@pytest.fixture(autouse=True)
def hurry(request):
    """Compiles in a hurry what `quick.everything` marks."""
    mark = request.node.get_closest_marker("hurry")
    if mark is None:
        yield
        return
    import quick  # compiles, which takes the devices' number for settled

    with quick.context(*mark.args):
        yield


@pytest.fixture
def full_precision():
    """What formulas of networks are compared at, which a GPU's default is not."""
    with jax.default_matmul_precision("highest"):
        yield


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
