"""The record of a converted model has what its observers counted, in bins of equal width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CaptureError
from pt2e_quant.observer import HistogramObserver, MinMaxObserver, MSEObserver
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export

VALUES = torch.tensor([-2.0, *[0.5] * 10, 62.0])
"""Of 64 bins, each 1 wide: one value in the first, ten in the third, one in the last."""


@pytest.mark.parametrize(("observer", "wide"), [(MSEObserver, 1 / 64), (HistogramObserver, 64 / 2048)])
def test_counted_values_are_those_seen_to_the_width_of_a_bin(observer, wide):
    one = observer(dtype=torch.int8)
    assert one.counted() is None
    one(VALUES)
    values, counts = one.counted()
    assert int(counts.sum()) == 12
    assert (float(values[0]), float(values[-1])) == (-2.0, 62.0)
    assert float(values[counts == 10]) == pytest.approx(0.5, abs=wide)


def test_an_observer_of_the_range_alone_counts_nothing():
    one = MinMaxObserver(dtype=torch.int8)
    one(VALUES)
    assert one.counted() is None


@pytest.fixture(scope="module")
def report() -> Report:
    prepared = prepare_pt2e(
        export(nn.Linear(12, 2), VALUES[None]), XNNPACKQuantizer(get_symmetric_quantization_config())
    )
    prepared(VALUES[None])
    return explain(convert_pt2e(prepared))


def test_the_record_has_64_equal_bins_over_all_values(report):
    found = next(one.histogram for one in report.groups if one.histogram and one.members != ("linear",))
    counts = [0] * 64
    counts[0], counts[2], counts[63] = 1, 10, 1
    assert (found.low, found.high, list(found.counts)) == (-2.0, 62.0, counts)


def test_histograms_come_back_from_json_and_damaged_ones_do_not(report):
    text = report.to_json()
    assert Report.from_json(text).groups == report.groups
    with pytest.raises(CaptureError, match="has the histogram"):
        Report.from_json(text.replace('"counts": [\n     1', '"counts": [\n     -1'))
