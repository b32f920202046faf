"""merge: the parts of any partition of the data, in any order, give what one pass gives."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observer_data import KINDS, values
from torch import nn

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError
from pt2e_quant.observer.derived import DerivedObserver
from pt2e_quant.specs import DerivedQuantizationSpec

EXACT = {
    "MinMaxObserver": ours.MinMaxObserver.with_args(dtype=torch.int8),
    "PerChannelMinMaxObserver": ours.PerChannelMinMaxObserver.with_args(ch_axis=1, dtype=torch.int8),
    "MSEObserver": ours.MSEObserver.with_args(dtype=torch.int8),
    "LpNormObserver": ours.LpNormObserver.with_args(p=3.0),
    "PercentileObserver": ours.PercentileObserver.with_args(percentile=99.0),
    "EntropyObserver": ours.EntropyObserver.with_args(qscheme=torch.per_tensor_symmetric, dtype=torch.int8),
    "AffineQuantizedMinMaxObserver": ours.AffineQuantizedMinMaxObserver.with_args(
        mapping_type=ours.MappingType.ASYMMETRIC, target_dtype=torch.int8, granularity=ours.PerAxis(1)
    ),
}
AVERAGES = {
    "MovingAverageMinMaxObserver": ours.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3),
    "MovingAveragePerChannelMinMaxObserver": ours.MovingAveragePerChannelMinMaxObserver.with_args(ch_axis=1),
    "AffineQuantizedMovingAverageMinMaxObserver": ours.AffineQuantizedMovingAverageMinMaxObserver.with_args(
        mapping_type=ours.MappingType.ASYMMETRIC, target_dtype=torch.int8, granularity=ours.PerAxis(1)
    ),
}
WITHOUT_STATE = {
    "PlaceholderObserver": ours.PlaceholderObserver,
    "NoopObserver": ours.NoopObserver,
    "ReuseInputObserver": ours.ReuseInputObserver,
    "FixedQParamsObserver": ours.FixedQParamsObserver.with_args(scale=0.5, zero_point=3),
    "AffineQuantizedPlaceholderObserver": ours.AffineQuantizedPlaceholderObserver.with_args(
        mapping_type=ours.MappingType.ASYMMETRIC, target_dtype=torch.int8, granularity=ours.PerTensor()
    ),
}
OTHERS = {"HistogramObserver": ours.HistogramObserver, "RecordingObserver": ours.RecordingObserver}


def state(observer: nn.Module) -> dict[str, object]:
    return {key: value.tolist() for key, value in observer.state_dict().items()}


@pytest.mark.parametrize("name", EXACT)
@given(seed=st.integers(0, 2**20), batches=st.integers(1, 6), parts=st.integers(1, 4))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_partition_in_any_order_gives_the_state_and_qparams_of_one_pass(name, seed, batches, parts):
    torch.manual_seed(seed)
    dice = random.Random(seed)
    data = [values(dice.choice(list(KINDS)), 5 * dice.choice([1, 7, 300])).reshape(-1, 5) for _ in range(batches)]
    whole = EXACT[name]()
    for x in data:
        whole(x)
    workers = [EXACT[name]() for _ in range(parts)]
    dice.shuffle(data)
    for x in data:
        dice.choice(workers)(x)
    dice.shuffle(workers)
    untouched = [state(worker) for worker in workers[1:]]
    for worker in workers[1:]:
        workers[0].merge(worker)
    assert [state(worker) for worker in workers[1:]] == untouched
    assert state(workers[0]) == state(whole)
    assert [end.tolist() for end in workers[0].calculate_qparams()] == [e.tolist() for e in whole.calculate_qparams()]


@pytest.mark.parametrize("name", AVERAGES)
def test_merged_averages_are_the_range_that_holds_them_all_in_any_order(name):
    torch.manual_seed(0)
    workers = [AVERAGES[name]() for _ in range(3)]
    for worker in workers:
        for _ in range(3):
            worker(torch.randn(4, 5))
    low = torch.stack([worker.min_val for worker in workers]).amin(0)
    high = torch.stack([worker.max_val for worker in workers]).amax(0)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        merged = copy.deepcopy(workers[order[0]])
        for number in order[1:]:
            merged.merge(workers[number])
        assert torch.equal(merged.min_val, low)
        assert torch.equal(merged.max_val, high)


def test_merged_compatible_histograms_have_all_counts_and_the_whole_range():
    data = [torch.randn(1000) * scale for scale in (1.0, 0.2, 5.0)]
    whole, workers = ours.HistogramObserver(), [ours.HistogramObserver() for _ in data]
    for x, worker in zip(data, workers, strict=True):
        whole(x)
        worker(x)
    merged = ours.HistogramObserver()
    merged.merge(ours.HistogramObserver())
    assert not merged.has_data
    for worker in workers:
        merged.merge(worker)
    assert (merged.min_val, merged.max_val) == (whole.min_val, whole.max_val)
    assert merged.histogram.sum().item() == pytest.approx(3000, rel=1e-6)
    scales = [observer.calculate_qparams()[0].item() for observer in (merged, whole)]
    assert scales[0] == pytest.approx(scales[1], rel=0.1)  # a few bins of 2048 apart


@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_observers_without_state_merge_with_their_like(name):
    observer, other = WITHOUT_STATE[name](), WITHOUT_STATE[name]()
    other(torch.ones(2, 2))
    before = state(observer)
    observer.merge(other)
    assert state(observer) == before


def test_a_recording_is_continued_by_what_it_is_merged_with():
    one, other = ours.RecordingObserver(), ours.RecordingObserver()
    one(torch.ones(2))
    other(torch.zeros(3))
    one.merge(other)
    assert [value.tolist() for value in one.tensor_val] == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_derived_observers_leave_merging_to_their_sources():
    sources = [ours.MinMaxObserver(dtype=torch.int8), ours.MinMaxObserver(dtype=torch.int8)]
    for source, end in zip(sources, (2.0, 5.0), strict=True):
        source(torch.tensor([-1.0, end]))
    node = torch.fx.Graph().placeholder("x")
    spec = DerivedQuantizationSpec([node], lambda inner: inner[0].calculate_qparams(), torch.int32)
    one, other = (DerivedObserver([source], spec) for source in sources)
    one.merge(other)
    assert one.calculate_qparams() == sources[0].calculate_qparams()
    assert (sources[0].max_val.item(), one.sources) == (2.0, [sources[0]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ours.MinMaxObserver(), ours.HistogramObserver()),
        (ours.MinMaxObserver(dtype=torch.int8), ours.MinMaxObserver(dtype=torch.uint8)),
        (ours.MSEObserver(dtype=torch.int8), ours.MSEObserver(dtype=torch.int8, quant_min=-127)),
        (ours.LpNormObserver(p=2.0), ours.LpNormObserver(p=3.0)),
        (ours.HistogramObserver(bins=16), ours.HistogramObserver(bins=32)),
        (ours.FixedQParamsObserver(0.5, 3), ours.FixedQParamsObserver(0.5, 4)),
    ],
    ids=["class", "dtype", "bounds", "exponent", "bins", "fixed"],
)
def test_observers_that_differ_are_not_merged(one, other):
    one.site = "input x"
    with pytest.raises(CalibrationError, match=r"(?s)input x: .*[Mm]erge"):
        one.merge(other)


def test_another_number_of_channels_is_not_merged():
    one, other = ours.PerChannelMinMaxObserver(), ours.PerChannelMinMaxObserver()
    one(torch.ones(3, 4))
    other(torch.ones(5, 4))
    with pytest.raises(CalibrationError, match="saw 3 channels, and the observer to merge 5"):
        one.merge(other)


def test_every_observer_can_merge():
    tested = {*EXACT, *AVERAGES, *WITHOUT_STATE, *OTHERS}
    kinds = {name for name in ours.__all__ if name.endswith("Observer") and isinstance(getattr(ours, name), type)}
    assert kinds - tested == {
        "DistributionObserver",
        "PerGroupMSEObserver",
        "PerGroupMinMaxObserver",
        "PerTokenPlaceholderObserver",
    }  # a base, two PerChannelMinMaxObservers of constant shape, and a PlaceholderObserver
