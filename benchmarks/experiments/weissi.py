"""Liu, Cui and Chan: WEISSI, and how it withstands attacks."""

from benchmarks.experiments.experiment import Experiment, Rows, beaten

# Test accuracy, and that under FGSM and PGD with 10 steps.
_METRICS = ("last", "fgsm", "pgd")
# In the order of the tables of CIFAR-10, which lack PGD at 0.05.
_RADII = ("last", "fgsm 0.05", "fgsm", "fgsm 0.01", "pgd", "pgd 0.01")
_ALL = (*_RADII, "worst")


def _at_one_radius(rows: dict[str, tuple[float, ...]]) -> Rows:
    """Rows of Table 1, at 0.03."""
    return {name: dict(zip(_METRICS, row, strict=True)) for name, row in rows.items()}


def _at_radii(rows: dict[str, tuple[float, ...]]) -> Rows:
    """Rows of Tables 2 to 4, at 0.05, 0.03 and 0.01."""
    return {name: dict(zip(_RADII, row, strict=True)) for name, row in rows.items()}


TABLE1 = Experiment(
    title="MNIST (WEISSI, Table 1)",
    shared={
        "dataset": "mnist",
        "noise": 0.0,
        "methods": ("l2_paper", "weissi_paper", "l2", "weissi"),
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
        "smoke": {
            "model": "mlp",
            "epochs": 1,
            "examples": 100,
            "seeds": 1,
            "trials": 1,
            "attacked": 4,
            "attack_steps": 2,
            "restarts": 2,
            "methods": ("weissi_paper",),
        },
        "cpu": {"epochs": 10, "trials": 40, "source_epochs": 3},
        "full": {
            "epochs": 60,
            "trials": 40,
            "attacked": 10_000,
            "source_epochs": 10,
            "whole": True,
        },
    },
    limited={"smoke": ("mlp-adversarial",)},
    resized={
        ("cpu", "mlp"): {"examples": 20_000},
        ("cpu", "mlp-adversarial"): {"examples": 10_000, "epochs": 8},
        ("cpu", "cnn"): {"model": "cnn8", "examples": 10_000, "epochs": 8},
        ("cpu", "cnn-adversarial"): {"model": "cnn8", "examples": 5_000, "epochs": 8},
        ("full", "cnn"): {"trials": 12},
        ("full", "cnn-adversarial"): {"trials": 12},
    },
    paper={
        "mlp": _at_one_radius(
            {"l2_paper": (96.98, 88.05, 87.68), "weissi_paper": (97.66, 90.22, 90.09)}
        ),
        "mlp-adversarial": _at_one_radius(
            {"l2_paper": (97.44, 94.09, 93.92), "weissi_paper": (98.09, 95.32, 95.19)}
        ),
        "cnn": _at_one_radius(
            {"l2_paper": (98.73, 92.28, 92.22), "weissi_paper": (98.83, 94.32, 93.85)}
        ),
        "cnn-adversarial": _at_one_radius(
            {"l2_paper": (98.98, 97.69, 97.67), "weissi_paper": (98.97, 97.75, 97.74)}
        ),
    },
    claims={
        part: (
            *beaten("weissi_paper", ("l2_paper",), *_METRICS, "worst"),
            *beaten("weissi", ("l2",), *_METRICS, "worst"),
        )
        for part in ("mlp", "mlp-adversarial", "cnn", "cnn-adversarial")
    },
    note=(
        "The paper trains for 60 epochs on all 60,000 examples and lowers the "
        "learning rate, it does not say how, and its convolutions have 128 "
        "filters."
    ),
)

# All tables of CIFAR-10.
_CIFAR = {
    "dataset": "cifar10",
    "noise": 0.0,
    "optimizer": "momentum",
    "augment": ("flip_crop",),
    "batch": 100,
    "seeds": 3,
    "tuning_seeds": 1,
    "tune_for": "fgsm",
    "epsilon": 0.03,
    "epsilons": (0.05, 0.01),
    "attack_steps": 10,
}
# The learning rate falls to a tenth every 100 epochs.
_VGG = {"model": "vgg16", "schedule": "thirds"}
_WRN = {"model": "wrn28_10", "schedule": "half"}
_CONVEX = {"model": "wrn28_10_convex", "schedule": "half"}
_ADVERSARIAL = {"adversarial": 0.01}

_SMOKE = {
    "epochs": 1,
    "examples": 100,
    "seeds": 1,
    "trials": 1,
    "attacked": 0,
    "epsilons": (),
}
# In small batches, without which so few examples make too few steps to learn from, and
# at half the resolution.
_CPU = {
    "examples": 5_000,
    "epochs": 16,
    "batch": 50,
    "resize": 16,
    "seeds": 3,
    "trials": 8,
    "tested": 2_000,
    "attacked": 200,
    "restarts": 2,
    "source_epochs": 8,
}
_CPU_WRN = {**_CPU, "epochs": 8}
_CPU_ADVERSARIAL = {**_CPU, "epochs": 8}
_CPU_WRN_ADVERSARIAL = {**_CPU, "epochs": 5, "source_epochs": 5}
_FULL = {
    "trials": 4,
    "attacked": 1000,
    "restarts": 2,
    "source_epochs": 10,
    "whole": True,
}

TABLE2 = Experiment(
    title="VGG16 on CIFAR-10 (WEISSI, Table 2)",
    shared=_CIFAR | _VGG,
    parts={
        "standard": {
            "methods": (
                "weissi_vgg",
                "l2_vgg",
                "parseval_vgg",
                "l2",
                "weissi_cnn",
                "parseval",
            )
        },
        "adversarial": {
            **_ADVERSARIAL,
            "methods": (
                "weissi_vgg_adversarial",
                "l2_vgg",
                "parseval_vgg",
                "l2",
                "weissi_cnn",
                "parseval",
            ),
        },
    },
    scales={
        "smoke": {**_SMOKE, "model": "vgg_small", "methods": ("weissi_vgg",)},
        "cpu": {**_CPU, "model": "vgg_small"},
        "full": {**_FULL, "epochs": 300},
    },
    limited={"smoke": ("standard",)},
    resized={
        ("cpu", "standard"): {
            "methods": ("weissi_vgg", "l2_vgg", "parseval_vgg", "l2", "weissi_cnn")
        },
        ("cpu", "adversarial"): {
            **_CPU_ADVERSARIAL,
            "model": "vgg_small",
            "methods": ("weissi_vgg_adversarial", "l2_vgg", "parseval_vgg"),
        },
    },
    paper={
        "standard": _at_radii(
            {
                "l2_vgg": (90.72, 24.43, 26.11, 47.36, 13.13, 27.67),
                "parseval_vgg": (88.72, 6.11, 13.33, 48.55, 1.46, 34.63),
                "weissi_vgg": (91.06, 25.97, 27.29, 47.52, 16.23, 28.57),
            }
        ),
        "adversarial": _at_radii(
            {
                "l2_vgg": (87.64, 23.69, 39.68, 69.18, 27.67, 65.11),
                "parseval_vgg": (84.61, 20.24, 36.66, 66.93, 26.72, 64.06),
                "weissi_vgg_adversarial": (88.06, 24.78, 40.71, 70.27, 28.89, 66.17),
            }
        ),
    },
    claims={
        "standard": (
            *beaten("weissi_vgg", ("l2_vgg",), *_ALL),
            *beaten("weissi_vgg", ("parseval_vgg",), "last", "fgsm", "pgd"),
            *beaten("weissi_cnn", ("l2", "parseval"), "last", "fgsm", "pgd"),
        ),
        "adversarial": (
            *beaten("weissi_vgg_adversarial", ("l2_vgg", "parseval_vgg"), *_ALL),
            *beaten("weissi_cnn", ("l2", "parseval"), "last", "fgsm", "pgd"),
        ),
    },
    note=(
        "The paper takes the median of three runs, by test accuracy. Its strengths "
        "are for the energy of VGG16: in a smaller network, whose energy is smaller by "
        "orders of magnitude, they leave the complexity alone. Parseval here is the "
        "paper's Parseval OC: nothing is added up in this network. PGD tries two "
        "starts. On a CPU images are scaled to 16 by 16, and VGG has 5 convolutions."
    ),
)

TABLE3 = Experiment(
    title="WRN-28-10 on CIFAR-10 (WEISSI, Table 3 and Figures 2 to 4)",
    shared=_CIFAR,
    parts={
        "convex": {
            **_CONVEX,
            "methods": (
                "weissi_wrn_convex",
                "parseval_wrn",
                "weissi_wrn_energy",
                "weissi_wrn_complexity",
                "weissi_cnn",
                "parseval",
            ),
        },
        "standard": {
            **_WRN,
            "methods": (
                "weissi_wrn",
                "l2_wrn",
                "parseval_wrn",
                "l2",
                "weissi_cnn",
                "parseval",
            ),
        },
        "convex-adversarial": {
            **_CONVEX,
            **_ADVERSARIAL,
            "methods": (
                "weissi_wrn_convex_adversarial",
                "parseval_wrn",
                "weissi_cnn",
                "parseval",
            ),
        },
        "adversarial": {
            **_WRN,
            **_ADVERSARIAL,
            "methods": (
                "weissi_wrn",
                "l2_wrn",
                "parseval_wrn",
                "l2",
                "weissi_cnn",
                "parseval",
            ),
        },
    },
    scales={
        "smoke": {
            **_SMOKE,
            "model": "resnet_small_convex",
            "methods": ("weissi_wrn_energy",),
        },
        "cpu": _CPU_WRN,
        "full": {**_FULL, "epochs": 200, "trials": 2},
    },
    limited={"smoke": ("convex",)},
    resized={
        ("cpu", "convex"): {
            "model": "resnet_small_convex",
            "methods": (
                "weissi_wrn_convex",
                "parseval_wrn",
                "weissi_wrn_energy",
                "weissi_wrn_complexity",
            ),
        },
        ("cpu", "standard"): {
            "model": "resnet_small",
            "methods": ("weissi_wrn", "l2_wrn", "parseval_wrn"),
        },
        ("cpu", "convex-adversarial"): {
            **_CPU_WRN_ADVERSARIAL,
            "model": "resnet_small_convex",
            "methods": ("weissi_wrn_convex_adversarial", "parseval_wrn"),
        },
        ("cpu", "adversarial"): {
            **_CPU_WRN_ADVERSARIAL,
            "model": "resnet_small",
            "methods": ("weissi_wrn", "l2_wrn", "parseval_wrn"),
        },
    },
    paper={
        "convex": _at_radii(
            {
                "parseval_wrn": (91.33, 7.27, 14.19, 42.73, 1.01, 27.90),
                "weissi_wrn_convex": (89.06, 24.28, 28.89, 53.17, 12.40, 30.87),
            }
        ),
        "standard": _at_radii(
            {
                "l2_wrn": (92.22, 14.50, 20.04, 47.18, 2.03, 21.25),
                "parseval_wrn": (92.86, 16.73, 21.60, 45.25, 0.55, 12.78),
                "weissi_wrn": (92.45, 23.64, 28.50, 50.34, 3.03, 16.71),
            }
        ),
        "convex-adversarial": _at_radii(
            {
                "parseval_wrn": (83.82, 24.70, 34.96, 65.67, 29.43, 64.44),
                "weissi_wrn_convex_adversarial": (
                    87.69,
                    42.23,
                    55.22,
                    72.33,
                    45.39,
                    70.19,
                ),
            }
        ),
        "adversarial": _at_radii(
            {
                "l2_wrn": (89.44, 37.57, 51.10, 74.23, 41.01, 72.56),
                "parseval_wrn": (89.39, 32.43, 44.07, 74.22, 36.84, 73.13),
                "weissi_wrn": (89.90, 41.71, 55.14, 75.18, 44.15, 73.51),
            }
        ),
    },
    claims={
        "convex": (
            *beaten("weissi_wrn_convex", ("parseval_wrn",), *_ALL[1:]),
            *beaten("weissi_wrn_energy", ("weissi_wrn_complexity",), "fgsm"),
            *beaten("weissi_wrn_complexity", ("weissi_wrn_energy",), "pgd"),
            *beaten("weissi_cnn", ("parseval",), *_METRICS),
        ),
        "standard": (
            *beaten("weissi_wrn", ("l2_wrn",), *_RADII[:5]),
            *beaten("parseval_wrn", ("weissi_wrn",), "last"),
            *beaten("weissi_cnn", ("l2", "parseval"), *_METRICS),
        ),
        "convex-adversarial": (
            *beaten("weissi_wrn_convex_adversarial", ("parseval_wrn",), *_ALL),
            *beaten("weissi_cnn", ("parseval",), *_METRICS),
        ),
        "adversarial": (
            *beaten("weissi_wrn", ("l2_wrn", "parseval_wrn"), *_ALL),
            *beaten("weissi_cnn", ("l2", "parseval"), *_METRICS),
        ),
    },
    note=(
        "The paper takes the median of three runs, by test accuracy. In the parts "
        "called convex shortcuts and branches are balanced: there Parseval is the "
        "paper's Parseval and WEISSI its WEISSI CA, in the others Parseval is its "
        "Parseval OC. Energy and complexity alone are its ablation, of which it draws "
        "a figure and prints no numbers, as of energy, complexity and gradients. Its "
        "strengths are for the energy of WRN-28-10: in a smaller network they leave "
        "the complexity alone. PGD tries two starts. On a CPU images are scaled to 16 "
        "by 16, and the network has 9 convolutions."
    ),
)

TABLE4 = Experiment(
    title="the MMC loss on CIFAR-10 (WEISSI, Table 4)",
    shared=_CIFAR | {"loss": "mmc"},
    parts={
        "vgg": {**_VGG, "methods": ("weissi_vgg", "l2_vgg", "l2", "weissi_cnn")},
        "wrn": {**_WRN, "methods": ("weissi_wrn", "l2_wrn", "l2", "weissi_cnn")},
    },
    scales={
        "smoke": {**_SMOKE, "model": "vgg_small", "methods": ("l2_vgg",)},
        "cpu": {**_CPU, "model": "vgg_small"},
        "full": _FULL | {"epochs": 300},
    },
    limited={"smoke": ("vgg",)},
    resized={
        ("cpu", "vgg"): {"methods": ("weissi_vgg", "l2_vgg")},
        ("cpu", "wrn"): {
            **_CPU_WRN,
            "model": "resnet_small",
            "methods": ("weissi_wrn", "l2_wrn"),
        },
        ("full", "wrn"): {"epochs": 200, "trials": 2},
    },
    paper={
        "vgg": _at_radii(
            {
                "l2_vgg": (90.10, 23.28, 29.85, 52.00, 12.59, 30.04),
                "weissi_vgg": (90.64, 33.79, 35.98, 50.72, 22.31, 33.84),
            }
        ),
        "wrn": _at_radii(
            {
                "l2_wrn": (92.90, 55.67, 68.26, 76.39, 60.51, 63.02),
                "weissi_wrn": (93.12, 55.98, 67.35, 75.64, 60.67, 63.67),
            }
        ),
    },
    claims={
        "vgg": (
            *beaten("weissi_vgg", ("l2_vgg",), "fgsm 0.05", "fgsm", "pgd", "pgd 0.01"),
            *beaten("weissi_cnn", ("l2",), *_METRICS),
        ),
        "wrn": (
            *beaten("weissi_wrn", ("l2_wrn",), "last", "pgd"),
            *beaten("weissi_cnn", ("l2",), *_METRICS),
        ),
    },
    note=(
        "The paper takes the median of three runs, by test accuracy, and does not say "
        "how long its centres of classes are. On a CPU images and networks are those "
        "of Tables 2 and 3."
    ),
)
