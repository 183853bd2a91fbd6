"""Tables and figures of the papers: the runs they need, and the papers' numbers.

One file each; to add one, add it to `EXPERIMENTS`.
"""

from benchmarks.experiments import (
    enc_tables,
    quantization,
    volumization_table2,
    weissi_table1,
)
from benchmarks.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "weissi-table1": weissi_table1.EXPERIMENT,
    "volumization-table2": volumization_table2.EXPERIMENT,
    "enc-tables": enc_tables.EXPERIMENT,
    "quantization": quantization.EXPERIMENT,
}
