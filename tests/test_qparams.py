"""qparams.py: the arithmetic of affine quantization, against hand-made tables, torch's own ops, and its own laws."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pt2e_quant.errors import CalibrationError, SpecError
from pt2e_quant.qparams import (
    affine_qparams,
    dequantize,
    fake_quantize,
    flat,
    float_qparams,
    min_max,
    quantize,
    storage_dtype,
    symmetric_zero_point,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.ao says that it is deprecated; here it is the oracle
    import torch.ao.quantization.fx._decomposed  # registers the q/dq ops
    from torch.ao.quantization.utils import determine_qparams

OPS = torch.ops.quantized_decomposed
EPS = 2.0**-23

RANGES = [  # bounds with a zero point that a symmetric range can use
    (torch.int8, -128, 127),
    (torch.int8, -127, 127),
    (torch.int8, -8, 7),
    (torch.uint8, 0, 255),
    (torch.uint8, 0, 15),
    (torch.uint8, 3, 240),
    (torch.int16, -32768, 32767),
]

ranges = st.sampled_from(RANGES)
# Up to 2**100: the last step of a range that ends at the largest float32 lies beyond it.
reals = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.floats(
    -8, 8, width=32, allow_subnormal=False
)
intervals = st.tuples(reals, reals).map(sorted)
lists = st.lists(reals, min_size=1, max_size=24)


# --- range -> qparams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "bounds", "dtype", "scale", "zero_point"),
    [
        (0.0, 255.0, (-128, 127), torch.int8, 1.0, -128),
        (-128.0, 127.0, (-128, 127), torch.int8, 1.0, 0),
        (-1.0, 3.0, (0, 255), torch.uint8, 4 / 255, 64),  # 0 - round(-63.75)
        (-3.0, 0.75, (0, 15), torch.uint8, 0.25, 12),
        (2.0, 6.0, (0, 12), torch.uint8, 0.5, 0),  # widened to [0, 6]
        (-6.0, -2.0, (0, 12), torch.uint8, 0.5, 12),  # widened to [-6, 0]
        (-5.0, 20.0, (-50, 200), torch.int16, 0.1, 0),
        (-1.0, 1.0, (10, 20), torch.uint8, 0.2, 15),
    ],
)
def test_an_affine_range_is_mapped_onto_the_integers(low, high, bounds, dtype, scale, zero_point):
    got_scale, got_zero_point = affine_qparams(low, high, *bounds, dtype=dtype)
    assert got_scale.item() == torch.tensor(scale).item()  # the nearest float32
    assert got_zero_point.item() == zero_point
    assert (got_scale.dtype, got_zero_point.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("low", "high", "bounds", "dtype", "scale", "zero_point"),
    [
        (-1.0, 3.175, (-127, 127), torch.int8, 0.025, 0),
        (-5.1, 2.0, (-128, 127), torch.int8, 0.04, 0),
        (-5.1, 2.0, (0, 255), torch.uint8, 0.04, 128),
        (-3.0, 1.0, (0, 15), torch.uint8, 0.4, 7),
        (0.5, 3.0, (-8, 7), torch.int8, 0.4, 0),
    ],
)
def test_a_symmetric_range_has_a_constant_zero_point(low, high, bounds, dtype, scale, zero_point):
    got_scale, got_zero_point = affine_qparams(low, high, *bounds, dtype=dtype, symmetric=True)
    torch.testing.assert_close(got_scale.item(), scale, rtol=2 * EPS, atol=0)  # one division, one literal: 1 ulp each
    assert got_zero_point.item() == zero_point


def test_the_zero_point_of_a_symmetric_range_can_be_given():
    _, zero_point = affine_qparams(-2.0, 1.0, 0, 255, dtype=torch.uint8, symmetric=True, zero_point=127)
    assert zero_point.item() == 127


@pytest.mark.parametrize(
    ("bounds", "dtype", "zero_point"),
    [
        ((-128, 127), torch.qint8, 0),
        ((0, 255), torch.quint8, 128),
        ((0, 127), torch.uint8, 63),
        ((0, 65535), torch.uint16, 32768),
        ((-448, 448), torch.float8_e4m3fn, 0),
    ],
)
def test_zero_lies_in_the_middle_of_a_symmetric_range(bounds, dtype, zero_point):
    assert symmetric_zero_point(*bounds, dtype) == zero_point


def test_eps_is_the_smallest_scale():
    low, high = torch.tensor([0.0, -1e-9, -1.0]), torch.tensor([0.0, 1e-9, 3.0])
    scale, zero_point = affine_qparams(low, high, -128, 127, dtype=torch.int8, eps=2**-12)
    torch.testing.assert_close(scale, torch.tensor([2**-12, 2**-12, 4 / 255]), rtol=0, atol=0)
    assert zero_point.tolist() == [-128, -128, -64]  # -128 - round(-63.75)
    scale, _ = affine_qparams(low, high, -127, 127, dtype=torch.int8, symmetric=True, eps=2**-12)
    torch.testing.assert_close(scale, torch.tensor([2**-12, 2**-12, 3 / 127]), rtol=0, atol=0)


def test_a_range_wider_than_float32_has_a_finite_scale():
    scale, zero_point = affine_qparams(-3e38, 3e38, -128, 127, dtype=torch.int8)
    torch.testing.assert_close(scale.item(), 6e38 / 255, rtol=2 * EPS, atol=0)  # float64 sum, one rounding to float32
    assert zero_point.item() == 0


def test_a_float_zero_point_puts_the_smallest_value_at_0():
    low, high = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([4.0, 1.0, 5.0])
    scale, zero_point = float_qparams(low, high, 0, 15)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 1.0]), rtol=EPS, atol=0)  # one division
    torch.testing.assert_close(zero_point, torch.tensor([-5.0, 10.0, -5.0]), rtol=2 * EPS, atol=0)  # one more


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@given(st.lists(intervals, min_size=1, max_size=5), ranges)
def test_qparams_are_those_of_the_reference_bit_for_bit(scheme, found, integers):
    low, high = torch.tensor(found).unbind(1)
    dtype, *bounds = integers
    qscheme = getattr(torch, f"per_channel_{scheme}")
    customized = tuple(bounds) != (0, 255)
    expected = determine_qparams(low, high, *bounds, dtype, torch.tensor([EPS]), customized, qscheme)
    scale, zero_point = affine_qparams(low, high, *bounds, dtype=dtype, symmetric=scheme == "symmetric")
    assert scale.tolist() == expected[0].tolist()
    assert zero_point.tolist() == expected[1].tolist()


@pytest.mark.parametrize(
    ("low", "high"), [(float("nan"), 1.0), (-1.0, float("inf")), (float("-inf"), 0.0), (2.0, 1.0), ([], [])]
)
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(CalibrationError, match="range"):
        affine_qparams(torch.tensor(low), torch.tensor(high), -128, 127, dtype=torch.int8)


def test_the_message_shows_the_ends_of_a_broken_range():
    with pytest.raises(CalibrationError, match=r"\[\[-1.0, nan\], \[1.0, 2.0\]\] is not a range"):
        affine_qparams(torch.tensor([-1.0, torch.nan]), torch.tensor([1.0, 2.0]), 0, 9, dtype=torch.uint8)


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(SpecError, match="quant_min=7 must be smaller than quant_max=7"):
        affine_qparams(-1.0, 1.0, 7, 7, dtype=torch.int8)


# --- values, against the ops that backends run ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "low", "high", "source"),
    [
        (torch.int8, -127, 127, torch.float32),
        (torch.uint8, 3, 250, torch.bfloat16),
        (torch.int8, -128, 127, torch.float16),
        (torch.int16, -9000, 9000, torch.float32),  # in half precision the op rounds q - zero_point, which is coarser
    ],
)
def test_a_tensor_is_quantized_as_by_the_op(dtype, low, high, source):
    x = (torch.randn(5000) * 3).to(source)
    arguments = (0.0371, 17, low, high, dtype)
    q = quantize(x, *arguments)
    assert torch.equal(q, OPS.quantize_per_tensor(x, *arguments))
    assert torch.equal(q, quantize(x, torch.tensor([0.0371]), torch.tensor([17]), low, high, dtype))
    back = dequantize(q, 0.0371, 17, out_dtype=source)
    assert torch.equal(back, OPS.dequantize_per_tensor(q, *arguments, out_dtype=source))


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_channels_are_quantized_as_by_the_op(axis):
    x = torch.randn(5, 4, 3) * 2
    size = x.shape[axis]
    scale, zero_point = torch.rand(size) / 40 + 0.01, torch.randint(-20, 20, (size,))
    arguments = (scale, zero_point, axis % 3, -100, 100, torch.int8)
    q = quantize(x, scale, zero_point, -100, 100, torch.int8, axis=axis)
    assert torch.equal(q, OPS.quantize_per_channel(x, *arguments))
    assert torch.equal(dequantize(q, scale, zero_point, axis=axis), OPS.dequantize_per_channel(q, *arguments))


def test_groups_of_a_weight_are_quantized_as_by_the_op():
    w = torch.randn(6, 40)
    low, high = min_max(w, group_size=8)
    scale, zero_point = affine_qparams(low, high, -8, 7, dtype=torch.int8, symmetric=True)
    q = quantize(w, scale, zero_point, -8, 7, torch.int8, group_size=8)
    arguments = (scale, zero_point, -8, 7, torch.int8, 8)
    assert torch.equal(q, OPS.quantize_per_channel_group(w, *arguments))
    back = dequantize(q, scale, zero_point, group_size=8)
    assert torch.equal(back, OPS.dequantize_per_channel_group(q, *arguments, torch.float32))


def test_fake_quantize_is_that_of_torch():
    x = torch.randn(4, 999) * 3
    expected = torch.fake_quantize_per_tensor_affine(x, 0.043, 11, 2, 201)
    assert torch.equal(fake_quantize(x, 0.043, 11, 2, 201), expected)


def test_fake_quantize_keeps_the_dtype():
    x = torch.tensor([0.3, -0.9]).bfloat16()
    assert fake_quantize(x, 0.25, 0, -2, 2).tolist() == [0.25, -0.5]
    assert fake_quantize(x, 0.25, 0, -2, 2).dtype is torch.bfloat16


def test_a_scalar_stays_a_scalar():
    x = torch.tensor(0.7)
    assert quantize(x, torch.tensor([0.5]), torch.tensor([3]), 0, 9, torch.uint8).shape == ()


@pytest.mark.parametrize(("x", "q"), [(1e30, 2**31 - 1), (-1e30, -(2**31)), (5.0, 50)])
def test_32_bit_bounds_saturate_instead_of_overflowing(x, q):
    assert quantize(torch.tensor([x]), 0.1, 0, -(2**31), 2**31 - 1, torch.int32).item() == q


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.qint8, torch.int8),
        (torch.quint8, torch.uint8),
        (torch.qint32, torch.int32),
        (torch.int4, torch.int8),
        (torch.uint16, torch.uint16),
    ],
)
def test_integers_are_stored_in_the_smallest_type_that_torch_computes_with(dtype, stored):
    assert storage_dtype(dtype) is stored
    assert quantize(torch.tensor([2.0]), 0.5, 0, -1 if stored.is_signed else 0, 7, dtype).dtype is stored


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.float16, r"torch\.float16 is not an integer type"), (torch.uint64, r"torch\.uint64 is wider than")],
)
def test_a_type_that_cannot_hold_the_integers_is_refused(dtype, message):
    with pytest.raises(SpecError, match=message):
        quantize(torch.ones(2), 0.5, 0, 0, 7, dtype)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3,), {}, "pass axis for one per channel"),
        ((3,), {"axis": 0}, "do not fit axis 0"),
        ((4,), {"axis": 2}, "axis 2 does not exist"),
        ((2, 2), {"group_size": 4}, "groups of 4 do not divide"),
        ((4,), {"axis": 0, "group_size": 3}, "exclude each other"),
    ],
)
def test_qparams_that_do_not_fit_the_tensor_are_refused(shape, arguments, message):
    with pytest.raises(SpecError, match=message):
        quantize(torch.ones(4, 6), torch.full(shape, 0.5), 0, 0, 7, torch.uint8, **arguments)


# --- laws -------------------------------------------------------------------------------------------------------------


def _qparams(values: Tensor, integers: tuple[torch.dtype, int, int], symmetric: bool, **granularity: object):
    dtype, *bounds = integers
    return affine_qparams(*min_max(values, **granularity), *bounds, dtype=dtype, symmetric=symmetric)


def _whole(integers: tuple[torch.dtype, int, int]) -> bool:
    """Ranges around the middle that symmetric schemes need: [3, 240] is not, half a step is lost at its lower end."""
    return integers[1:] != (3, 240)


@given(lists, ranges, st.booleans())
def test_what_lies_in_the_range_comes_back_within_half_a_step(values, integers, symmetric):
    x = torch.tensor(values)
    scale, zero_point = _qparams(x, integers, symmetric)
    error = (fake_quantize(x, scale, zero_point, *integers[1:]).double() - x.double()).abs()
    # float32 rounds 1 / scale, x / scale and the product with scale: each by 2**-24 of at most this many steps.
    steps = integers[2] - integers[1] + 1
    assert error.max().item() <= scale.item() * (0.5 + 4 * steps * 2.0**-24)


@given(intervals, ranges, st.booleans())
def test_zero_is_exact(interval, integers, symmetric):
    dtype, *bounds = integers
    scale, zero_point = affine_qparams(*interval, *bounds, dtype=dtype, symmetric=symmetric)
    q = quantize(torch.zeros(3), scale, zero_point, *bounds, dtype)
    assert q.tolist() == [zero_point.item()] * 3
    assert dequantize(q, scale, zero_point).tolist() == [0.0] * 3


@given(lists, intervals, ranges, st.booleans())
def test_rounding_twice_changes_nothing(values, interval, integers, symmetric):
    dtype, *bounds = integers
    qparams = affine_qparams(*interval, *bounds, dtype=dtype, symmetric=symmetric)
    once = fake_quantize(torch.tensor(values), *qparams, *bounds)
    assert torch.equal(fake_quantize(once, *qparams, *bounds), once)


@given(lists, intervals, ranges)
def test_fake_quantize_is_quantize_and_back(values, interval, integers):
    dtype, *bounds = integers
    x, qparams = torch.tensor(values), affine_qparams(*interval, *bounds, dtype=dtype)
    q = quantize(x, *qparams, *bounds, dtype)
    assert torch.equal(dequantize(q, *qparams), fake_quantize(x, *qparams, *bounds))
    assert bounds[0] <= int(q.min()) <= int(q.max()) <= bounds[1]


@given(st.integers(0, 2), st.tuples(*[st.integers(1, 4)] * 3), ranges, st.booleans())
def test_per_channel_is_per_tensor_slice_by_slice(axis, shape, integers, symmetric):
    x = torch.randn(shape) * 7
    dtype, *bounds = integers
    scale, zero_point = _qparams(x, integers, symmetric, axis=axis)
    q = quantize(x, scale, zero_point, *bounds, dtype, axis=axis)
    for index in range(shape[axis]):
        part = x.select(axis, index)
        one = _qparams(part, integers, symmetric)
        assert (scale[index], zero_point[index]) == one
        assert torch.equal(q.select(axis, index), quantize(part, *one, *bounds, dtype))


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), ranges)
def test_per_group_is_per_channel_of_the_reshaped_tensor(group_size, groups, rows, integers):
    x = torch.randn(2, rows, groups * group_size) * 5
    bounds = integers[1:]
    scale, zero_point = _qparams(x, integers, False, group_size=group_size)
    assert scale.shape == (2, rows, groups)
    flattened = x.reshape(-1, group_size)
    expected = fake_quantize(flattened, scale.flatten(), zero_point.flatten(), *bounds, axis=0).reshape(x.shape)
    assert torch.equal(fake_quantize(x, scale, zero_point, *bounds, group_size=group_size), expected)


def test_per_token_is_per_tensor_row_by_row():
    x = torch.randn(2, 5, 7) * torch.tensor([1.0, 20, 0.1, 3, 9]).unsqueeze(1)
    scale, zero_point = _qparams(x, (torch.int8, -128, 127), False, per_token=True)
    assert scale.shape == (2, 5, 1)
    q = quantize(x, scale, zero_point, -128, 127, torch.int8)
    for token in [(0, 0), (1, 3)]:
        one = _qparams(x[token], (torch.int8, -128, 127), False)
        assert torch.equal(q[token], quantize(x[token], *one, -128, 127, torch.int8))
    assert torch.equal(dequantize(q, scale, zero_point), fake_quantize(x, scale, zero_point, -128, 127))


# --- ranges of tensors ------------------------------------------------------------------------------------------------


def _layouts() -> dict[str, Tensor]:
    x = torch.randn(2, 6, 90, 70)  # 75600 values: beyond the size where two reductions replace one
    return {
        "contiguous": x,
        "small": x[0, 0, 0],
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "every second": x[..., ::2],
        "expanded": x[:1].expand(4, 6, 90, 70),
        "scalar": torch.tensor(-0.37),
        "double": x.double(),
        "half": x.half(),
        "bfloat16, channels_last": x.bfloat16().to(memory_format=torch.channels_last),
        "integer": torch.randint(-90, 90, (5, 7)),
        "with gradient": x.clone().requires_grad_(),
    }


@pytest.mark.parametrize("name", list(_layouts()))
def test_the_range_does_not_depend_on_the_layout(name):
    x = _layouts()[name]
    low, high = min_max(x)
    assert (low, high) == (x.min().float(), x.max().float())
    assert (low.dtype, low.shape, low.requires_grad) == (torch.float32, (), False)
    assert torch.equal(flat(x).sort().values, x.flatten().sort().values)
    for axis in range(x.dim()):
        low, high = min_max(x, axis=axis)
        expected = x.detach().float().movedim(axis, 0).flatten(1) if x.dim() > 1 else x.float().unsqueeze(1)
        assert torch.equal(low, expected.amin(1))
        assert torch.equal(high, expected.amax(1))


@pytest.mark.parametrize("name", ["channels_last", "transposed"])
def test_dense_tensors_are_flattened_without_a_copy(name):
    x = _layouts()[name]
    assert flat(x).data_ptr() == x.data_ptr()


def test_nan_shows_in_the_range():
    x = torch.randn(40000)
    x[31415] = torch.nan
    assert all(end.isnan() for end in min_max(x))


def test_an_empty_tensor_has_no_range():
    with pytest.raises(CalibrationError, match=r"shape \(3, 0\) has no values"):
        min_max(torch.ones(3, 0))


def test_one_granularity_at_a_time():
    with pytest.raises(SpecError, match="exclude each other"):
        min_max(torch.ones(4, 4), axis=0, per_token=True)
