"""Devices that need not be there: programs are compiled for them and counted.

To add a device, add an entry to `TARGETS`, and an extra of its name to pyproject.toml.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Target(NamedTuple):
    """A device, and how its compiler is reached.

    Attributes:
      device: What it is called in results.
      packages: What its compiler is installed by.
      topology: Arguments of ``jax.experimental.topologies.get_topology_desc``.
      is_kernel: Whether an instruction of this opcode is a kernel of its own.
      trees: The leaves to compile for, of `benchmarks.trees`, and the kinds of
        programs that take them, of `benchmarks.programs`.
      environment: Variables that the compiler reads when it is loaded.
    """

    device: str
    packages: tuple[str, ...]
    topology: Mapping[str, Any]
    is_kernel: Callable[[str], bool]
    trees: Mapping[str, tuple[str, ...]]
    environment: Mapping[str, str] = {}


# A GpuTargetConfigProto as text, with the numbers that XLA knows this card by.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
# Instructions for which a GPU launches nothing.
IDLE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def _is_launched(opcode: str) -> bool:
    return opcode not in IDLE


TARGETS: dict[str, Target] = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        ("jaxlib", "jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
        {
            "topology_name": "h100",
            "platform": "cuda",
            "topology": "1x1x4",
            "target_config": H100,
        },
        _is_launched,
        {
            "resnet50": ("steps",),
            "32x2048x2048": ("steps",),
            "8x2048x2048": ("maps",),
        },
    ),
    "v5e": Target(
        "TPU v5e",
        ("jaxlib", "libtpu"),
        {"topology_name": "v5e:2x2", "platform": "tpu"},
        # The rest is arithmetic of scalars and copies ahead of time, which take no turn
        # of the vector unit.
        lambda opcode: opcode in ("fusion", "while", "conditional"),
        {"4x4096x4096": ("steps", "maps")},
        {
            "TPU_SKIP_MDS_QUERY": "1",  # or it waits for a server that only clouds have
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_LOG_DIR": "disabled",
            # Nothing is run, so compilers do not have to wait for each other.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        },
    ),
}


class Plan(NamedTuple):
    """What a compiler is going to let a device do, and how long it took to tell.

    Attributes:
      kernels: How many the program launches, one for a loop or a branch.
      bytes: What they read and write.
      temporary_bytes: What is held beside arguments and results.
      trace_seconds: Of processors, from the function to the compiler's input.
      compile_seconds: Likewise, from there to the program.
    """

    kernels: int
    bytes: float
    temporary_bytes: int
    trace_seconds: float
    compile_seconds: float


def missing(name: str) -> list[str]:
    """The packages of a target's compiler that are not installed."""
    return [package for package in TARGETS[name].packages if not _installed(package)]


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def device(name: str) -> Any:
    """A target's first device, to compile for."""
    return devices(name)[0]


@functools.cache
def devices(name: str) -> list[Any]:
    """A target's devices, to compile for. JAX must not have started a backend before.

    Raises:
      ValueError: Its compiler is not installed, or cannot be loaded.
    """
    if absent := missing(name):
        raise ValueError(
            f"target {name} needs {', '.join(absent)}: install the extra by pip "
            f"install -e '.[{name}]', which takes Linux on x86-64."
        )
    target = TARGETS[name]
    os.environ.update(target.environment)
    # CUDA's plugin registers without a driver only where another platform is chosen.
    jax.config.update("jax_platforms", "cpu")
    # A program out of the cache has taken no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return topologies.get_topology_desc(**target.topology).devices
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"target {name} cannot be compiled for ({error}): its packages must be "
            f"those of the extra {name}, and JAX must not have run in this process."
        ) from error


def plan(
    name: str | None, run: Callable, arguments: tuple, donated: tuple[int, ...] = ()
) -> Plan:
    """Compiles a function for a target, of which only shapes and dtypes matter.

    Args:
      name: Of the target; None for this machine's first device.
      run: The function.
      arguments: Trees of arrays, or of what has their shapes and dtypes.
      donated: Which of them it may overwrite.

    Raises:
      ValueError: There is no compiler for the target.
    """
    sharding = jax.sharding.SingleDeviceSharding(
        device(name) if name else jax.devices()[0]
    )
    is_kernel = TARGETS[name].is_kernel if name else _is_launched
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    begun = _processor_seconds()
    lowered = jax.jit(run, donate_argnums=donated).lower(*there)
    traced = _processor_seconds()
    compiled = lowered.compile()
    done = _processor_seconds()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    return Plan(
        kernels=sum(map(is_kernel, opcodes(text))),
        bytes=_bytes_accessed(compiled),
        temporary_bytes=memory.temp_size_in_bytes,
        trace_seconds=traced - begun,
        compile_seconds=done - traced,
    )


def _processor_seconds() -> float:
    """Of all threads and of assemblers that have run; other load moves it little."""
    return sum(os.times()[:4])


def opcodes(program: str) -> list[str]:
    """What each instruction of a program's entry does, from the compiler's text."""
    entry = program[program.index("\nENTRY ") :].partition("\n}")[0]
    # NAME = TYPE OPCODE(OPERANDS), where the type may be a tuple of types.
    return re.findall(
        r"^ +(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", entry, re.M
    )


def _bytes_accessed(compiled: Any) -> float:
    cost = compiled.cost_analysis()
    if cost is None:
        # CUDA's plugin analyses no program without a device, but the CPU's client does
        # so for any program. JAX has no public name for that, nor for the program.
        internals = importlib.import_module("jax._src.lib")._jax
        (module,) = compiled._executable.xla_executable.hlo_modules()
        client = jax.devices("cpu")[0].client
        cost = internals.hlo_module_cost_analysis(client, module)
    return cost["bytes accessed"]
