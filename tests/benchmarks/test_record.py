"""Results as files."""

import numpy as np
import pytest

from benchmarks import compare, record


def test_what_has_diverged_is_recorded(tmp_path):
    counts, edges = compare._histogram([1.0, np.nan, 2.0, np.inf])
    assert sum(counts) == 2 and edges[0] == 1 and edges[-1] == 2
    counts, _ = compare._histogram([np.nan])
    assert sum(counts) == 0
    curves = compare._rounded(np.array([[1.0, np.nan], [-np.inf, 2.0]]))
    assert curves == [[1.0, None], [None, 2.0]]
    record.save({"curves": curves}, tmp_path / "out.json")
    with pytest.raises(ValueError):
        record.save({"curves": [np.nan]}, tmp_path / "out.json")
