"""Values that no range can hold, and data of every size: observers go on, with one warning, or say what is wrong."""

from __future__ import annotations

import tracemalloc
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError, CalibrationWarning

MAX = torch.finfo(torch.float32).max

PER_TENSOR = [
    "MinMaxObserver", "MovingAverageMinMaxObserver", "HistogramObserver", "MSEObserver", "LpNormObserver",
    "PercentileObserver", "EntropyObserver",
]  # fmt: skip
PER_CHANNEL = ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"]
AFFINE = ["AffineQuantizedMinMaxObserver", "AffineQuantizedMovingAverageMinMaxObserver"]


def make(name: str):
    if name in AFFINE:
        return getattr(ours, name)(ours.MappingType.ASYMMETRIC, torch.int8, ours.PerTensor())
    return getattr(ours, name)(dtype=torch.int8)


values = st.sampled_from(
    [0.0, -0.0, 1.0, -3.5, 1e-45, -1e-40, 1e-38, 1e30, -1e38, MAX, -MAX, torch.inf, -torch.inf, 65504.0, -1e9, 7.25e-6]
)
shapes = st.one_of(st.just(()), st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 3), st.integers(1, 300)))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(shapes)
    few = draw(st.lists(values, min_size=1, max_size=6))
    size = int(torch.Size(shape).numel())
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return torch.tensor((few * (size // len(few) + 1))[:size], dtype=torch.float64).reshape(shape).to(dtype)


@pytest.mark.parametrize("name", PER_TENSOR + AFFINE)
@given(batches=st.lists(tensors(), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_data_without_nan_is_taken_with_at_most_one_warning(name, batches):
    observer = make(name)
    observer.site = "node softmax"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in batches:
            assert observer(x) is x
    usable = [x for x in batches if (x.double().abs() < min(torch.finfo(x.dtype).max, MAX)).any()]
    masked = [x for x in batches if (x.double().abs() >= min(torch.finfo(x.dtype).max, MAX)).any()]
    assert len(caught) == bool(masked)
    assert all(one.category is CalibrationWarning and str(one.message).startswith("node softmax: ") for one in caught)
    assert observer.has_data == bool(usable)
    if usable:
        check_qparams(observer)
    else:
        with pytest.raises(CalibrationError, match=r"node softmax: .* saw no data"):
            observer.calculate_qparams()


@pytest.mark.parametrize("name", PER_CHANNEL)
@given(batches=st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_channels_without_nan_are_taken_with_at_most_one_warning(name, batches):
    observer = make(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            observer(torch.tensor(batch).reshape(3, 2))
    usable = [batch for batch in batches if any(abs(value) < MAX for value in batch)]
    assert len(caught) == any(abs(value) >= MAX for batch in batches for value in batch)
    assert observer.has_data == bool(usable)
    if usable:
        check_qparams(observer)


def check_qparams(observer) -> None:
    scale, zero_point = observer.calculate_qparams()
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert bool(((zero_point >= -128) & (zero_point <= 127)).all())


@pytest.mark.parametrize("mask", [-torch.inf, torch.inf, -MAX, MAX])
@pytest.mark.parametrize("name", PER_TENSOR + PER_CHANNEL + AFFINE)
def test_masks_leave_the_qparams_of_the_rest(name, mask):
    x = torch.linspace(-2.0, 3.0, 64).reshape(1, 64)
    plain, masked = make(name), make(name)
    plain(x)
    plain(x * 2)
    with pytest.warns(CalibrationWarning, match=r"as in an attention mask; the others lie in \[-2, 3\]"):
        masked(torch.cat([x, torch.full((1, 7), mask)], dim=1))
    masked(torch.cat([x * 2, torch.full((1, 3), mask)], dim=1))  # no second warning: it would be an error here
    assert [end.tolist() for end in masked.calculate_qparams()] == [end.tolist() for end in plain.calculate_qparams()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_number_of_a_half_type_is_a_mask_too(dtype):
    observer = ours.MinMaxObserver(dtype=torch.int8)
    with pytest.warns(CalibrationWarning, match=f"1 of 3 values .* the largest number of {dtype}"):
        observer(torch.tensor([1.0, -0.5, torch.finfo(dtype).min], dtype=dtype))
    assert (observer.min_val.item(), observer.max_val.item()) == (-0.5, 1.0)


def test_a_number_below_the_largest_is_data():
    observer = ours.MinMaxObserver(dtype=torch.int8)
    observer(torch.tensor([-3.4e38, 3.3e38]))
    assert observer.min_val.item() == torch.tensor(-3.4e38).item()
    check_qparams(observer)


def test_a_channel_of_nothing_but_masks_has_the_range_zero():
    observer = ours.PerChannelMinMaxObserver(dtype=torch.int8)
    with pytest.warns(CalibrationWarning):
        observer(torch.tensor([[2.0, 3.0], [-torch.inf, -torch.inf]]))
    assert observer.min_val.tolist() == [2.0, 0.0]
    observer(torch.tensor([[1.0, 1.0], [5.0, 5.5]]))
    assert observer.max_val.tolist() == [3.0, 5.5]


@pytest.mark.parametrize("name", PER_TENSOR + AFFINE)
def test_nan_is_an_error_that_names_the_place(name):
    observer = make(name)
    observer.site = "node log = aten.log.default(x)"
    with pytest.raises(CalibrationError, match=r"node log .*: 1 NaN among 3 values"):
        observer(torch.tensor([1.0, torch.nan, torch.inf]))
    assert not observer.has_data


@pytest.mark.parametrize("name", PER_TENSOR + PER_CHANNEL + AFFINE)
def test_memory_does_not_grow_with_the_number_of_batches(name):
    def size_after(batches: int) -> tuple[int, int]:
        observer = make(name)
        torch.manual_seed(0)
        data = [torch.randn(4, 50) * (1 + number % 7) for number in range(10)]
        tracemalloc.start()
        for number in range(batches):
            observer(data[number % 10])
        python, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return sum(buffer.nbytes for buffer in observer.buffers()), python

    size_after(2)  # imports and caches
    few, many = size_after(10), size_after(1000)
    assert many[0] == few[0]
    assert many[1] <= few[1] + 16_000  # bytes of Python objects; one float kept per batch would take 24,000
