"""What a trained network is to those who run it: bytes on disk and in memory, time."""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

import weightreg as wr
import weightreg.linen
from benchmarks import models
from benchmarks.timing import relative_times

BATCHES = (1, 100)


class Form(NamedTuple):
    """A way to store and run a network.

    Attributes:
      label: Name in tables.
      store: From variables to what is stored.
      save: Writes that to a file.
      run: From a model, what is stored and inputs, to float32 logits.
      of_bits: Whether weights are packed.
      from_bits: Whether products may be made from bits, which sum in another order.
    """

    label: str
    store: Callable[[Any], Any]
    save: Callable[[Any, pathlib.Path], None]
    run: Callable[[nn.Module, Any, jax.Array], jax.Array]
    of_bits: bool = False
    from_bits: bool = False


def _save_arrays(variables: Any, path: pathlib.Path) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    save_file({jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}, path)


def _run_narrow(model: nn.Module, variables: Any, x: jax.Array) -> jax.Array:
    return models.logits(models.in_dtype(model, jnp.bfloat16), variables, x)


def _run_unpacked(model: nn.Module, packed: Any, x: jax.Array) -> jax.Array:
    return models.logits(model, wr.unpack(packed), x)


def _run_by_layers(model: nn.Module, packed: Any, x: jax.Array) -> jax.Array:
    with nn.intercept_methods(weightreg.linen.unpack_layers):
        return models.logits(model, packed, x)


FLOATS = (
    Form("float32", lambda variables: variables, _save_arrays, models.logits),
    Form(
        "bfloat16",
        functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16)),
        _save_arrays,
        _run_narrow,
    ),
)


def packed_forms(levels: str, volume: Any) -> tuple[Form, Form]:
    """All layers are unpacked at once, or one after another."""

    def store(variables: Any) -> Any:
        packed = wr.pack(variables["params"], volume, levels)
        return {**variables, "params": packed}

    by_layers = f"{levels} bits, by layers"
    return (
        Form(f"{levels} bits", store, wr.save_packed, _run_unpacked, True),
        Form(by_layers, store, wr.save_packed, _run_by_layers, True, True),
    )


def measure(
    model: nn.Module,
    networks: Mapping[str, tuple[Form, Any]],
    x: jax.Array,
    rounds: int = 200,
    seconds: float = 60,
) -> dict[str, dict[str, Any]]:
    """Bytes and times of networks in their forms; times relative to the first.

    Args:
      model: Of all of them.
      networks: A form, and variables, under a name each.
      x: Inputs, as many as the largest of `BATCHES`.
      rounds: How often each is timed, at most.
      seconds: How long the timing of each batch may take.
    """
    stored = {name: form.store(v) for name, (form, v) in networks.items()}
    found = {
        name: {"form": networks[name][0].label, **_sizes(networks[name], tree)}
        for name, tree in stored.items()
    }
    for batch in BATCHES:
        steps, carries = {}, {}
        for name, (form, _) in networks.items():
            compiled = _program(model, form).lower(stored[name], x[:batch]).compile()
            memory = compiled.memory_analysis()
            assert memory is not None
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            found[name][f"peak_bytes_{batch}"] = peak + memory.output_size_in_bytes

            def several(_, compiled=compiled, tree=stored[name], x=x[:batch]):
                for _ in range(5):  # one is too short to time
                    out = jax.block_until_ready(compiled(tree, x))
                return out

            steps[name], carries[name] = several, None
        for name, time in relative_times(steps, carries, rounds, seconds).items():
            found[name][f"relative_time_{batch}"] = time.ratio
    return found


@functools.lru_cache  # compiled once for all seeds
def _program(model: nn.Module, form: Form) -> Any:
    return jax.jit(functools.partial(form.run, model))


def logits(
    model: nn.Module, form: Form, variables: Any, x: jax.Array, batch: int = 1000
) -> np.ndarray:
    """What a network says in one of its forms."""
    stored, run = form.store(variables), _program(model, form)
    starts = range(0, len(x), batch)
    return np.concatenate([run(stored, x[i : i + batch]) for i in starts])


def same_logits(model: nn.Module, form: Form, variables: Any, x: jax.Array) -> bool:
    """Whether a form gives what float32 does: all inputs, and batches that are timed.

    Bit for bit, or to rounding where products may be made from bits. (Programs for
    batches of other sizes may sum in another order.)
    """
    for batch, count in ((1000, len(x)), *((b, 20 * b) for b in BATCHES)):
        one, other = (
            logits(model, f, variables, x[:count], batch) for f in (form, FLOATS[0])
        )
        near = np.abs(one - other) <= 1e-5 * np.abs(other).max()
        if one.tobytes() != other.tobytes() and not (form.from_bits and near.all()):
            return False
    return True


def _sizes(network: tuple[Form, Any], stored: Any) -> dict[str, int]:
    """Bytes of all that is stored, and of the weights among it, by the file."""
    form, variables = network
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.safetensors"
        form.save(stored, path)
        size = path.stat().st_size
        weights = {
            jax.tree_util.keystr((jax.tree_util.DictKey("params"),)) + layer.path
            for layer in wr.weight_layers(variables["params"])
        }
        with safe_open(path, framework="flax") as file:
            kernels = sum(file.get_tensor(name).nbytes for name in weights)
    on_device = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(stored))
    return {"file_bytes": size, "kernel_bytes": kernels, "device_bytes": on_device}
