"""Ziyin, Wang, Yamada and Ueda: volumization of a network that others trained."""

from benchmarks.experiments.experiment import Experiment, beaten, best_and_last

_ROWS = {
    "l2_5e-4_adam": (78.16, 76.76),
    "vol_1_0.99": (78.87, 78.39),
    "b1, weight decay": (79.93, 75.65),
    "b1, volumization (1, 0.99)": (80.19, 79.61),
    "b2, weight decay": (79.89, 78.26),
    "b2, volumization (1, 0.99)": (81.90, 81.27),
    "b3, weight decay": (83.21, 81.34),
    "b3, volumization (1, 0.99)": (83.62, 82.76),
}

TABLE1 = Experiment(
    title="a pre-trained EfficientNet (volumization, Table 1)",
    shared={
        "noise": 0.0,
        "optimizer": "adam",
        "batch": 128,
        "methods": ("vol_1_0.99", "l2_5e-4_adam"),
        "attacked": 0,
        "model": "efficientnet_lite0",
        "pretrained": True,
        "resize": 112,
    },
    parts={
        "cifar10": {"dataset": "cifar10"},
        "tiny-imagenet": {"dataset": "tiny_imagenet"},
    },
    scales={
        "smoke": {
            "model": "cnn",
            "pretrained": False,
            "resize": 16,
            "epochs": 1,
            "examples": 128,
            "seeds": 1,
            "methods": ("l2_5e-4_adam",),
        },
        "cpu": {"epochs": 20, "seeds": 1},
        "full": {"epochs": 20, "seeds": 3, "whole": True},
    },
    # A CPU takes a day for what a GPU does in minutes.
    limited={"smoke": ("cifar10",), "cpu": ()},
    paper={
        "cifar10": {
            f"Tiny ImageNet, {label}": row
            for label, row in best_and_last(
                {
                    "weight decay": _ROWS["l2_5e-4_adam"],
                    "volumization (1, 0.99)": _ROWS["vol_1_0.99"],
                }
            ).items()
        },
        "tiny-imagenet": best_and_last(_ROWS),
    },
    claims={
        part: beaten("vol_1_0.99", ("l2_5e-4_adam",), "best", "last")
        for part in ("cifar10", "tiny-imagenet")
    },
    note=(
        "The paper's EfficientNet-b0 to b3 were trained on ImageNet, as Lite0 here, "
        "which is b0 without squeeze and excitation and with ReLU6. It does not say "
        "how large images are."
    ),
)
