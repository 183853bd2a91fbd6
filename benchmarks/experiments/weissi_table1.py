"""WEISSI, Table 1: MNIST, ordinary and adversarial training."""

from benchmarks.experiments.experiment import Experiment


def _rows(
    decay: tuple[float, float, float], weissi: tuple[float, float, float]
) -> dict[str, dict[str, float]]:
    """Test accuracy, and that under FGSM and PGD with 10 steps at 0.03."""
    return {
        label: {"last": clean, "fgsm": fgsm, "pgd": pgd}
        for label, (clean, fgsm, pgd) in {
            "weight decay": decay,
            "WEISSI": weissi,
        }.items()
    }


EXPERIMENT = Experiment(
    title="MNIST (WEISSI, Table 1)",
    shared={
        "dataset": "mnist",
        "noise": 0.0,
        "methods": ("l2_paper", "l2", "weissi_paper", "weissi"),
        "optimizer": "momentum",
        "batch": 100,
        "seeds": 5,
        "tuning_seeds": 1,
        "tune_for": "fgsm",
        "epsilon": 0.03,
        "attack_steps": 10,
    },
    parts={
        "mlp": {"model": "mlp1024"},
        "mlp-adversarial": {"model": "mlp1024", "adversarial": 0.01},
        "cnn": {"model": "cnn128"},
        "cnn-adversarial": {"model": "cnn128", "adversarial": 0.01},
    },
    scales={
        "cpu": {"epochs": 10, "trials": 8},
        "full": {"epochs": 60, "trials": 12, "attacked": 10_000},
    },
    resized={
        ("cpu", "mlp-adversarial"): {"examples": 20_000},
        ("cpu", "cnn"): {"model": "cnn8", "examples": 20_000},
        ("cpu", "cnn-adversarial"): {"model": "cnn8", "examples": 10_000},
    },
    paper={
        "mlp": _rows((96.98, 88.05, 87.68), (97.66, 90.22, 90.09)),
        "mlp-adversarial": _rows((97.44, 94.09, 93.92), (98.09, 95.32, 95.19)),
        "cnn": _rows((98.73, 92.28, 92.22), (98.83, 94.32, 93.85)),
        "cnn-adversarial": _rows((98.98, 97.69, 97.67), (98.97, 97.75, 97.74)),
    },
    note=(
        "The paper trains for 60 epochs on all 60,000 examples and lowers the learning "
        "rate, it does not say how, and its convolutions have 128 filters."
    ),
)
