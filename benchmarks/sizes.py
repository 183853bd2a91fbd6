"""How large what is timed is, for each class of device.

Nothing is made smaller to fit without being written down: a result says its sizes. To
add some, add an entry to `SIZES`.
"""

import dataclasses

import jax

from benchmarks.transformer import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured, and for how long.

    Attributes:
      rounds: Turns of each program, at most.
      seconds: After how long no turn begins any more, in each column of a table.
      steps: Of an optimizer in a turn, or in one program.
      called: Trees, see `benchmarks.trees`, whose steps are called one by one.
      looped: Trees whose steps are repeated within one program.
      many: A tree of many leaves, which takes long to compile, looped with `FEW` only.
      batch: Examples of a training step.
      trained: Networks that are trained, see `benchmarks.models`, and in which dtypes
        they compute.
      image: Height, width and channels of what they see.
      transformer: Of that one; it sees sequences of its length.
      sequences: Of a training step.
      small: Networks whose sensitivity is measured, and of which there are populations.
      examples: On which it is measured.
      runs: Of a population.
      layers: Of a network that is run from bits.
      width: Inputs and outputs of each of them.
      floats: In what it is run otherwise, first what one would run there.
      batches: Examples that it is run on.
      torch: Trees whose steps are also taken in PyTorch.
      growth: The most layers that programs are compiled for.
    """

    rounds: int
    seconds: float
    steps: int
    called: tuple[str, ...]
    looped: tuple[str, ...]
    many: str | None
    trained: tuple[tuple[str, str], ...]
    batch: int
    image: tuple[int, int, int]
    transformer: Size
    sequences: int
    small: tuple[str, ...]
    examples: int
    runs: int
    layers: int
    width: int
    floats: tuple[str, ...]
    batches: tuple[int, ...]
    torch: tuple[str, ...]
    growth: int


SIZES: dict[str, Sizes] = {
    "accelerator": Sizes(
        rounds=30,
        seconds=8,
        steps=20,
        called=("resnet50",),
        looped=("resnet50", "transformer of 100M"),
        many="1000x64x64",
        trained=(
            ("mlp1024", "float32"),
            ("resnet18_norm", "float32"),
            ("resnet18_norm", "bfloat16"),
        ),
        batch=128,
        image=(32, 32, 3),
        transformer=Size(layers=12, width=512, vocabulary=10_000, length=512),
        sequences=16,
        small=("mlp1024", "cnn"),
        examples=1000,
        runs=8,
        layers=8,
        width=4096,
        floats=("bfloat16", "float32"),
        batches=(1, 2, 4, 16, 64),
        torch=("resnet50",),
        growth=1000,
    ),
    "cpu": Sizes(
        rounds=20,
        seconds=20,
        steps=3,
        called=("resnet50, narrow", "transformer of 2M"),
        looped=("transformer of 2M",),  # XLA compiles loops over many leaves slowly
        many=None,
        trained=(("mlp1024", "float32"), ("cnn", "float32")),
        batch=128,
        image=(32, 32, 3),
        transformer=Size(layers=4, width=128, vocabulary=1_000, length=64),
        sequences=8,
        small=("mlp1024", "cnn"),
        examples=100,
        runs=4,
        layers=4,
        width=1024,
        floats=("float32", "bfloat16"),
        batches=(1, 2, 4, 16, 64),
        torch=("16x512x512",),
        growth=100,
    ),
    "quick": Sizes(
        rounds=2,
        seconds=1,
        steps=2,
        called=("2x8x8",),
        looped=("2x8x8",),
        many=None,
        trained=(("mlp", "float32"),),
        batch=4,
        image=(4, 4, 1),
        transformer=Size(layers=2, width=16, vocabulary=10, length=8),
        sequences=2,
        small=("mlp",),
        examples=4,
        runs=2,
        layers=2,
        width=16,
        floats=("float32", "bfloat16"),
        batches=(1, 2),
        torch=("2x8x8",),
        growth=10,
    ),
}


def default_sizes() -> str:
    """The name of the sizes for the device that JAX has."""
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"
