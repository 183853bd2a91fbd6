"""Volumization, Figures 10 and 11 and Table 3: binary and ternary networks."""

from benchmarks.experiments.experiment import Experiment

_TUNED = ("weight_decay", "volumization", "binary", "ternary")
_USUAL = ("binary_ste", "ternary_ste")
_PAPER = ("volumization_paper", "binary_paper", "ternary_paper")
_MNIST = {"methods": (*_TUNED, *_USUAL, *_PAPER)}


def _rows(**rows: tuple[float, float]) -> dict[str, dict[str, float]]:
    """The best epoch's test accuracy, and the last ten epochs'."""
    return {label: {"best": best, "last": last} for label, (best, last) in rows.items()}


EXPERIMENT = Experiment(
    title="binary and ternary networks (volumization, Figures 10 and 11, Table 3)",
    shared={"dataset": "mnist", "noise": 0.0, "tuning_seeds": 1},
    parts={
        "distributions": {
            "methods": tuple(
                f"box_{volume}_{alpha}"
                for alpha in (0.99, 0.9999)
                for volume in (1.2, 0.9, 0.6, 0.3)
            ),
            "seeds": 1,
        },
        "mnist": {**_MNIST, "deploy": ("volumization", "binary", "ternary")},
        "mnist-noise40": {**_MNIST, "noise": 0.4},
        "mnist-noise80": {**_MNIST, "noise": 0.8},
        "cifar10-noise80": {
            "dataset": "cifar10",
            "noise": 0.8,
            "methods": (*_TUNED, *_PAPER),
            "seeds": 3,
        },
    },
    scales={
        "cpu": {
            "examples": 20_000,
            "epochs": 16,
            "trials": 9,
            "attacked": 300,
            "attack_steps": 10,
            "restarts": 2,
        },
        "full": {"epochs": 100, "trials": 12},
    },
    resized={
        ("cpu", "distributions"): {"examples": None, "epochs": 20},
        ("cpu", "cifar10-noise80"): {
            "model": "resnet_norm",
            "examples": 10_000,
            "epochs": 8,
            "batch": 100,
            "trials": 5,
            "attacked": 200,
        },
        ("full", "cifar10-noise80"): {"model": "resnet18"},
    },
    paper={
        "distributions": {},
        "mnist": {},
        "mnist-noise40": {},
        "mnist-noise80": {},
        "cifar10-noise80": _rows(
            **{
                "ResNet18, Lq": (47.50, 22.58),
                "ResNet18, volumization (0.25, 0.5)": (45.56, 38.16),
                "ResNet18, binary": (13.01, 10.00),
                "ResNet18, ternary": (48.72, 45.85),
            }
        ),
    },
    note=(
        "Binary and ternary networks are measured as such after every epoch, with the "
        "statistics of batch normalizations renewed; on the way weights become so in "
        "every second epoch. The paper's curves (Figure 11) and half of its Table 3 "
        "are of an LSTM on IMDB."
    ),
)
