"""Volumization, Table 2: MNIST with wrong labels."""

from benchmarks.experiments.experiment import Experiment


def _rows(**rows: tuple[float, float]) -> dict[str, dict[str, float]]:
    """The best epoch's test accuracy, and the last ten epochs'."""
    return {label: {"best": best, "last": last} for label, (best, last) in rows.items()}


EXPERIMENT = Experiment(
    title="MNIST with wrong labels (volumization, Table 2)",
    shared={
        "dataset": "mnist",
        "methods": ("none", "weight_decay", "l2", "volumization", "weissi"),
    },
    parts={"noise40": {"noise": 0.4}, "noise80": {"noise": 0.8}},
    scales={"cpu": {"epochs": 20}, "full": {"epochs": 100}},
    paper={
        "noise40": _rows(
            **{
                "none": (96.50, 89.65),
                "weight decay 5e-3": (94.82, 94.70),
                "weight decay 5e-4": (96.23, 95.92),
                "weight decay 5e-5": (96.10, 95.42),
                "volumization (1, 0.9999)": (96.18, 95.40),
            }
        ),
        "noise80": _rows(
            **{
                "none": (87.04, 35.88),
                "weight decay 5e-5": (87.29, 53.67),
                "weight decay 5e-4": (86.51, 61.26),
                "weight decay 5e-3": (88.04, 86.87),
                "volumization (1, 0.99)": (87.96, 86.57),
            }
        ),
    },
    note="The paper's network, its epochs (100) and learning rate (1e-4) are others.",
)
