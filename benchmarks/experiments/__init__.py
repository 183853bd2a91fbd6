"""Tables and figures of the papers: the runs they need, and the papers' numbers.

One file a paper has its tables. To add an experiment, add an entry to `EXPERIMENTS`,
whose order is the one in which tables are wanted.
"""

from collections.abc import Mapping

from benchmarks.experiments import enc, finetune, noise, volumization, weissi
from benchmarks.experiments.experiment import Claim as Claim
from benchmarks.experiments.experiment import Experiment as Experiment

EXPERIMENTS: Mapping[str, Experiment] = {
    "volumization-table2": volumization.TABLES,
    "volumization-grids": volumization.GRIDS,
    "quantization": volumization.QUANTIZATION,
    "volumization-attacks": volumization.ATTACKS,
    "weissi-table1": weissi.TABLE1,
    "weissi-table2": weissi.TABLE2,
    "weissi-table3": weissi.TABLE3,
    "weissi-table4": weissi.TABLE4,
    "human-noise": noise.HUMAN,
    "enc-tables": enc.TABLES,
    "enc-imagenet": enc.IMAGENET,
    "volumization-table1": finetune.TABLE1,
}
