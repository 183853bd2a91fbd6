"""Wrong labels of humans beside as many that are drawn: not in the papers.

Wei, Zhu, Cheng, Liu, Niu and Liu, `Learning with Noisy Labels Revisited
<https://arxiv.org/abs/2110.12088>`_, 2022, had CIFAR-10 labelled once more.
"""

from benchmarks.experiments.experiment import Experiment, beaten

_PARTS = {
    "worse": {"noise": 0.0, "labels": "worse_label"},
    "random1": {"noise": 0.0, "labels": "random_label1"},
    "aggre": {"noise": 0.0, "labels": "aggre_label"},
    "synthetic40": {"noise": 0.4},
    "synthetic17": {"noise": 0.17},
    "synthetic9": {"noise": 0.09},
}

# Whether these win against weight decay on people's labels as they do on drawn ones.
_ASKED = ("weight_decay", "weissi", "binary", "ternary", "none")

HUMAN = Experiment(
    title="CIFAR-10 as humans label it (CIFAR-10N)",
    shared={
        "dataset": "cifar10",
        "optimizer": "adam",
        "batch": 128,
        "tuning_seeds": 1,
        "attacked": 0,
        "methods": (*_ASKED[:4], "volumization", "lq", "l2", "none"),
    },
    parts=_PARTS,
    scales={
        "smoke": {
            "model": "mlp",
            "epochs": 1,
            "examples": 128,
            "seeds": 1,
            "trials": 1,
            "methods": ("weight_decay",),
        },
        "cpu": {
            "model": "mlp_norm",
            "examples": 5_000,
            "tested": 5_000,
            "epochs": 16,
            "seeds": 5,
            "trials": 24,
        },
        "full": {
            "model": "resnet18",
            "epochs": 100,
            "seeds": 3,
            "trials": 6,
            "whole": True,
        },
    },
    limited={
        "smoke": ("worse",),
        "cpu": ("worse", "synthetic40", "random1", "synthetic17"),
    },
    resized={
        ("cpu", part): {"methods": _ASKED}
        for part in ("synthetic40", "random1", "synthetic17")
    },
    paper={part: {} for part in _PARTS},
    claims={
        part: beaten("weissi", ("weight_decay",), "last")
        + beaten("binary", ("weight_decay",), "last")
        + beaten("ternary", ("weight_decay",), "last")
        + beaten("volumization", ("weight_decay",), "last")
        for part in _PARTS
    },
    note=(
        "Three people labelled every training image. Of the worst of an image's three "
        "labels 40 % are wrong, of the first 17 %, and of the majority's 9 %; the "
        "synthetic parts have as many wrong ones, drawn from all other classes alike. "
        "On a CPU dense layers learn from 5,000 images."
    ),
)
