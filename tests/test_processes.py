"""Two processes that train one network together end up with that of one process.

Run as a program, this file is one of them.
"""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import weightreg as wr

STEPS, PROCESSES, DEVICES = 3, 2, 2
SHAPE, NAMES = (2, 2), ("data", "model")
SPECS = {"Dense_0": PartitionSpec("data", "model"), "Dense_1": PartitionSpec("model")}
SHAPES = {"Dense_0": (8, 16), "Dense_1": (16, 4)}


def train(mesh: Mesh) -> dict[str, np.ndarray]:
    """A few steps with weights and examples that the mesh splits."""
    rng = np.random.default_rng(0)

    def put(x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        x, where = np.float32(x), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

    kernels = {k: put(rng.normal(size=s), SPECS[k]) for k, s in SHAPES.items()}
    x = put(rng.normal(size=(16, 8)), PartitionSpec("data"))
    tx = wr.volumized(
        optax.chain(wr.add_weissi(1e-3, 1e-3), optax.adam(0.05)), wr.he_volume(0.5), 0.5
    )

    def loss(kernels, x):
        hidden = jax.nn.relu(x @ kernels["Dense_0"])
        return jnp.mean((hidden @ kernels["Dense_1"] - x[:, :4]) ** 2)

    @jax.jit
    def run(kernels, x):
        state = tx.init(kernels)
        for _ in range(STEPS):
            updates, state = tx.update(jax.grad(loss)(kernels, x), state, kernels)
            kernels = optax.apply_updates(kernels, updates)
        return kernels

    return multihost_utils.process_allgather(run(kernels, x), tiled=True)


def test_two_processes_train_as_one(cpu_mesh, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[1]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(i), str(tmp_path / "trained.npz")],
            env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    try:
        alone = train(cpu_mesh(SHAPE, NAMES))
        for process in running:
            printed, _ = process.communicate(timeout=180)
            assert process.returncode == 0, printed
    finally:
        for process in running:
            process.kill()
            with process:  # which closes its pipe and waits
                pass
    with np.load(tmp_path / "trained.npz") as together:
        assert together.keys() == alone.keys()
        for name, kernel in alone.items():
            np.testing.assert_allclose(together[name], kernel, rtol=1e-5, atol=1e-6)


def main(address: str, process: str, file: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, PROCESSES, int(process), initialization_timeout=120
    )
    assert jax.device_count() == PROCESSES * DEVICES == 2 * jax.local_device_count()
    trained = train(jax.make_mesh(SHAPE, NAMES, axis_types=(AxisType.Auto,) * 2))
    if process == "0":
        np.savez(file, **trained)


if __name__ == "__main__":
    main(*sys.argv[1:])
