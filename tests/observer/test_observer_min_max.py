"""MinMaxObserver and its kin give the reference's qparams, bit for bit, on pleasant and unpleasant data."""

from __future__ import annotations

import pytest
import torch
from observer_data import KINDS, REFERENCES, batches, torch_ao, values

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError, SpecError

PER_TENSOR = [
    {"dtype": torch.int8},
    {"dtype": torch.quint8, "eps": 2**-12},
    {"dtype": torch.int8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_tensor_symmetric},
    {"dtype": torch.uint8, "quant_min": 0, "quant_max": 200, "qscheme": torch.per_tensor_symmetric},
    {"dtype": torch.int16},
]
PER_CHANNEL = [
    {"dtype": torch.int8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric},
    {"dtype": torch.uint8, "qscheme": torch.per_channel_affine},
    {"dtype": torch.quint8, "qscheme": torch.per_channel_affine_float_qparams},
]


def check(mine, theirs, data) -> None:
    for x in data:
        mine(x)
        theirs(x)
    assert torch.equal(mine.min_val, theirs.min_val)
    assert torch.equal(mine.max_val, theirs.max_val)
    for got, expected in zip(mine.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert (got.tolist(), got.shape) == (expected.tolist(), expected.shape)


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("name", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
@pytest.mark.parametrize("kind", [*KINDS, "changing"])
def test_per_tensor_observers_equal_the_reference(kind, name, reference):
    for seed, arguments in enumerate(PER_TENSOR):
        if "Average" in name:
            arguments = {**arguments, "averaging_constant": (0.01, 0.3, 0.7, 1.0, 0.05)[seed]}
        check(getattr(ours, name)(**arguments), getattr(reference, name)(**arguments), batches(kind, seed))


@pytest.mark.parametrize("name", ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
@pytest.mark.parametrize("kind", [*KINDS, "changing"])
def test_per_channel_observers_equal_the_reference(kind, name):
    for axis, arguments in enumerate(PER_CHANNEL):
        kinds = [*KINDS] if kind == "changing" else [kind] * 3
        data = [values(each, 5 * 66).reshape(5, 6, 11).movedim(0, axis) for each in kinds]
        arguments = {**arguments, "ch_axis": axis if axis < 2 else -1}
        check(getattr(ours, name)(**arguments), getattr(torch_ao, name)(**arguments), data)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 3), (5, 8, 20, 20), (9, 1, 3, 3)])
def test_weights_of_every_shape_have_the_ranges_of_the_reference(shape, axis):
    arguments = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "ch_axis": axis}
    weight = torch.nn.Parameter(torch.randn(shape) * 0.2)
    check(ours.PerChannelMinMaxObserver(**arguments), torch_ao.PerChannelMinMaxObserver(**arguments), [weight])


def test_the_range_grows_and_never_shrinks():
    observer = ours.MinMaxObserver(dtype=torch.int8)
    for low, high in [(-1.0, 0.5), (-0.25, 2.0), (0.0, 0.0)]:
        observer(torch.tensor([low, high]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1.0, 2.0)
    scale, zero_point = observer.calculate_qparams()
    assert scale.tolist() == [torch.tensor(3 / 255).item()]
    assert zero_point.tolist() == [-43]  # -128 - round(-85.0)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)


def test_the_average_moves_by_its_constant():
    observer = ours.MovingAverageMinMaxObserver(averaging_constant=0.25)
    for low, high in [(-4.0, 8.0), (-8.0, 4.0)]:
        observer(torch.tensor([low, 0.5, high]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-5.0, 7.0)  # -4 - 0.25 * 4, 8 - 0.25 * 4


def test_a_constant_of_one_keeps_the_last_batch_and_may_be_dynamic():
    observer = ours.MovingAverageMinMaxObserver(averaging_constant=1, is_dynamic=True)
    for high in (8.0, 2.0):
        observer(torch.tensor([-1.0, high]))
    assert observer.max_val.item() == 2.0


def test_channels_have_ranges_of_their_own():
    observer = ours.PerChannelMinMaxObserver(ch_axis=1, dtype=torch.int8, qscheme=torch.per_channel_symmetric)
    observer(torch.tensor([[-1.27, 0.0], [0.5, 2.54]]))
    observer(torch.tensor([[0.0, -5.08]]))
    assert observer.min_val.tolist() == torch.tensor([-1.27, -5.08]).tolist()
    assert observer.max_val.tolist() == torch.tensor([0.5, 2.54]).tolist()


def test_a_vector_is_a_channel_per_value():
    observer = ours.PerChannelMinMaxObserver(dtype=torch.int8)
    observer(torch.tensor([3.0, -2.0]))
    assert observer.min_val.tolist() == observer.max_val.tolist() == [3.0, -2.0]


def test_another_number_of_channels_is_an_error():
    observer = ours.PerChannelMinMaxObserver()
    observer.site = "node conv2d = aten.conv2d.default(x, w)"
    observer(torch.ones(3, 4))
    with pytest.raises(CalibrationError, match=r"node conv2d .* saw 3 channels along dimension 0 before, and now 5"):
        observer(torch.ones(5, 4))


def test_an_axis_that_the_tensor_lacks_is_an_error():
    with pytest.raises(SpecError, match=r"ch_axis=2 does not exist in a tensor of shape \(3, 4\)"):
        ours.PerChannelMinMaxObserver(ch_axis=2)(torch.ones(3, 4))


def test_a_moving_range_that_rounding_turned_inside_out_is_the_one_seen_last():
    """-3e38 + (-1 + 3e38) is 0 in float32, which is above the largest value of a negative batch."""
    observer = ours.MovingAverageMinMaxObserver(averaging_constant=1.0, dtype=torch.int8)
    for batch in (torch.tensor([-3e38, 0.0]), torch.tensor([-2.0, -1.0])):
        observer(batch)
    assert (observer.min_val.item(), observer.max_val.item()) == (-2.0, -1.0)
