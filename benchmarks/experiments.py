"""Tables and figures of the papers: the runs they need, and the papers' numbers.

To add an experiment, add an entry to `EXPERIMENTS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table of a paper, as comparisons to run and numbers to set beside them.

    Attributes:
      title: What it repeats.
      shared: Settings of all its comparisons.
      parts: Further settings of each comparison, by name.
      scales: Further settings of all comparisons at each scale.
      paper: The paper's rows of each part: label, and metrics in percent.
      note: In what the paper's runs differ.
      resized: Further settings of single comparisons, by ``(scale, part)``.
    """

    title: str
    shared: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, Rows]
    note: str
    resized: Mapping[tuple[str, str], Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )

    def settings(self, part: str, scale: str) -> dict[str, Any]:
        """All settings of one comparison."""
        resized = self.resized.get((scale, part), {})
        return {**self.shared, **self.parts[part], **self.scales[scale], **resized}


def _attacked(rows: Mapping[str, tuple[float, float, float]]) -> Rows:
    """Test accuracy, and that under FGSM and PGD with 10 steps at 0.03."""
    columns = ("last", "fgsm", "pgd")
    return {label: dict(zip(columns, row, strict=True)) for label, row in rows.items()}


def _best_and_last(rows: Mapping[str, tuple[float, float]]) -> Rows:
    """The best epoch's test accuracy, and the last ten epochs'."""
    return {label: {"best": best, "last": last} for label, (best, last) in rows.items()}


def _imagenet(rows: Mapping[str, float]) -> Rows:
    """Top-1 accuracy of ResNet-50 on ImageNet."""
    return {f"ImageNet, {label}": {"last": top1} for label, top1 in rows.items()}


_TUNED = ("weight_decay", "volumization", "binary", "ternary")
_PUBLISHED = ("volumization_paper", "binary_paper", "ternary_paper")
_MNIST = (*_TUNED, "binary_ste", "ternary_ste", *_PUBLISHED)

EXPERIMENTS: Mapping[str, Experiment] = {
    "weissi-table1": Experiment(
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
            "mlp": _attacked(
                {"weight decay": (96.98, 88.05, 87.68), "WEISSI": (97.66, 90.22, 90.09)}
            ),
            "mlp-adversarial": _attacked(
                {"weight decay": (97.44, 94.09, 93.92), "WEISSI": (98.09, 95.32, 95.19)}
            ),
            "cnn": _attacked(
                {"weight decay": (98.73, 92.28, 92.22), "WEISSI": (98.83, 94.32, 93.85)}
            ),
            "cnn-adversarial": _attacked(
                {"weight decay": (98.98, 97.69, 97.67), "WEISSI": (98.97, 97.75, 97.74)}
            ),
        },
        note=(
            "The paper trains for 60 epochs on all 60,000 examples and lowers the "
            "learning rate, it does not say how, and its convolutions have 128 "
            "filters."
        ),
    ),
    "volumization-table2": Experiment(
        title="MNIST with wrong labels (volumization, Table 2)",
        shared={
            "dataset": "mnist",
            "methods": ("none", "weight_decay", "l2", "volumization", "weissi"),
        },
        parts={"noise40": {"noise": 0.4}, "noise80": {"noise": 0.8}},
        scales={"cpu": {"epochs": 20}, "full": {"epochs": 100}},
        paper={
            "noise40": _best_and_last(
                {
                    "none": (96.50, 89.65),
                    "weight decay 5e-3": (94.82, 94.70),
                    "weight decay 5e-4": (96.23, 95.92),
                    "weight decay 5e-5": (96.10, 95.42),
                    "volumization (1, 0.9999)": (96.18, 95.40),
                }
            ),
            "noise80": _best_and_last(
                {
                    "none": (87.04, 35.88),
                    "weight decay 5e-5": (87.29, 53.67),
                    "weight decay 5e-4": (86.51, 61.26),
                    "weight decay 5e-3": (88.04, 86.87),
                    "volumization (1, 0.99)": (87.96, 86.57),
                }
            ),
        },
        note=(
            "The paper's network, its epochs (100) and learning rate (1e-4) are others."
        ),
    ),
    "enc-tables": Experiment(
        title="CIFAR-10 (equivalent norms, Tables 1 and 5, Figures 1 to 3)",
        shared={
            "dataset": "cifar10",
            "noise": 0.0,
            "optimizer": "momentum",
            "schedule": "steps",
            "augment": ("flip_crop",),
            "batch": 100,
            "tuning_seeds": 1,
            "epsilon": 2 / 255,
            "attack_steps": 10,
        },
        parts={
            "tables": {
                "methods": (
                    "l2_0.0001",
                    "wn",
                    "ws",
                    "enc_eq20",
                    "enc_eq21",
                    "enc_eq22",
                    "enc_eq23",
                    "enc_alpha0.5",
                    "enc_alpha2",
                    "enc_learnt",
                )
            },
            "decay": {
                "methods": (
                    "l2_0",
                    "l2_0.0001",
                    "l2_0.001",
                    "l2_0.01",
                    "l2_0.1",
                    "enc_eq22",
                )
            },
            "tuned": {"methods": ("l2", "enc")},
        },
        scales={
            "cpu": {
                "model": "resnet_norm",
                "examples": 10_000,
                "epochs": 8,
                "seeds": 3,
                "trials": 9,
                "attacked": 200,
                "restarts": 2,
                "sensitivity": 200,
            },
            "full": {
                "model": "resnet50",
                "epochs": 100,
                "seeds": 3,
                "trials": 12,
                "attacked": 1000,
                "restarts": 3,
                "sensitivity": 1000,
            },
        },
        paper={
            "tables": _imagenet(
                {
                    "weight decay": 76.54,
                    "weight normalization": 76.44,
                    "weight standardization": 76.74,
                    "eq. 20": 77.09,
                    "eq. 21": 77.25,
                    "eq. 22": 77.44,
                    "eq. 23": 77.21,
                    "alpha 0.5": 77.31,
                    "alpha 2": 77.40,
                    "alpha learnt": 77.08,
                }
            ),
            "decay": {},
            "tuned": {},
        },
        note=(
            "The paper trains ResNet-50 on ImageNet: its numbers are for reference "
            "only. Here it is CIFAR-10, with ResNet-50's layout at full scale, else a "
            "residual network of 9 convolutions and a dense layer, trained for 800 "
            "steps, in which a decay of 1e-4 does nothing: hence strengths up to 0.1."
        ),
    ),
    "quantization": Experiment(
        title="binary and ternary networks (volumization, Figures 10 and 11, Table 3)",
        shared={"dataset": "mnist", "noise": 0.0, "tuning_seeds": 1},
        parts={
            "distributions": {
                "methods": (
                    "box_1.2_0.99",
                    "box_0.9_0.99",
                    "box_0.6_0.99",
                    "box_0.3_0.99",
                    "box_1.2_0.9999",
                    "box_0.9_0.9999",
                    "box_0.6_0.9999",
                    "box_0.3_0.9999",
                ),
                "seeds": 1,
            },
            "mnist": {
                "methods": _MNIST,
                "deploy": ("volumization", "binary", "ternary"),
            },
            "mnist-noise40": {"methods": _MNIST, "noise": 0.4},
            "mnist-noise80": {"methods": _MNIST, "noise": 0.8},
            "cifar10-noise80": {
                "dataset": "cifar10",
                "noise": 0.8,
                "methods": (*_TUNED, *_PUBLISHED),
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
            "cifar10-noise80": _best_and_last(
                {
                    "ResNet18, Lq": (47.50, 22.58),
                    "ResNet18, volumization (0.25, 0.5)": (45.56, 38.16),
                    "ResNet18, binary": (13.01, 10.00),
                    "ResNet18, ternary": (48.72, 45.85),
                }
            ),
        },
        note=(
            "Binary and ternary networks are measured as such after every epoch, with "
            "the statistics of batch normalizations renewed; on the way weights become"
            " so in every second epoch. The paper's curves (Figure 11) and half of its"
            " Table 3 are of an LSTM on IMDB."
        ),
    ),
}
