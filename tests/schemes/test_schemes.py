"""Every cell of the scheme table: legal ones round alike in calibration, training and the ops; illegal ones say why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pt2e_quant.errors import CalibrationError, SpecError
from pt2e_quant.schemes import (
    FORMATS,
    GRANULARITIES,
    TIMINGS,
    Cell,
    Scheme,
    SchemeFakeQuantize,
    SchemeObserver,
    choose_qparams,
    dequantize,
    quantization_spec,
    quantize,
    ranges,
    refusal,
    scheme_table,
)

CELLS = [Cell(dtype, at, when) for dtype in FORMATS for at in GRANULARITIES for when in TIMINGS]
LEGAL = [cell for cell in CELLS if refusal(cell) is None]
ILLEGAL = [cell for cell in CELLS if refusal(cell) is not None]
decomposed = torch.ops.quantized_decomposed


def data(shape: tuple[int, ...] = (8, 96)) -> Tensor:
    """Rows of different sizes, so that a scale in the wrong place cannot go unnoticed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(11))
    return x * torch.logspace(-2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) + 0.01


def made(scheme: Scheme, qat: bool) -> torch.nn.Module:
    """As the engine makes it: with the fields of the spec as keywords."""
    spec = quantization_spec(scheme, qat=qat)
    fields = {name: getattr(spec, name) for name in ("dtype", "quant_min", "quant_max", "qscheme", "is_dynamic")}
    if spec.ch_axis is not None:
        fields["ch_axis"] = spec.ch_axis
    return spec.observer_or_fake_quant_ctr(**{name: value for name, value in fields.items() if value is not None})


def run_ops(x: Tensor, scheme: Scheme, calibrated: torch.nn.Module) -> Tensor:
    """dequantize(quantize(x)) by the ops that convert writes, or where there are none by the project's arithmetic."""
    of = scheme.format
    limits = (of.low, of.high, of.storage)
    if scheme.op is None:
        scale, zero_point = choose_qparams(*ranges(x, scheme), scheme)
        return dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)
    if scheme.op == "quantize_per_token":
        scale, zero_point = decomposed.choose_qparams_per_token_asymmetric(x, of.storage)
        q = decomposed.quantize_per_token(x, scale, zero_point, *limits)
        return decomposed.dequantize_per_token(q, scale, zero_point, *limits, torch.float32)
    if scheme.is_dynamic:
        choose = decomposed.choose_qparams_symmetric if scheme.symmetric else decomposed.choose_qparams
        scale, zero_point = choose.tensor(x, of.low, of.high, scheme.eps, of.storage)
        q = decomposed.quantize_per_tensor.tensor(x, scale, zero_point, *limits)
        return decomposed.dequantize_per_tensor.tensor(q, scale, zero_point, *limits)
    scale, zero_point = calibrated.calculate_qparams()
    if scheme.op == "quantize_per_tensor":
        q = decomposed.quantize_per_tensor(x, scale.item(), zero_point.item(), *limits)
        return decomposed.dequantize_per_tensor(q, scale.item(), zero_point.item(), *limits)
    if scheme.op == "quantize_per_channel_group":
        q = decomposed.quantize_per_channel_group(x, scale, zero_point, *limits, scheme.group_size)
        return decomposed.dequantize_per_channel_group(q, scale, zero_point, *limits, scheme.group_size, torch.float32)
    axis = scheme.axis if scheme.granularity == "axis" else 0
    q = decomposed.quantize_per_channel(x, scale.flatten(), zero_point.flatten(), axis, *limits)
    return decomposed.dequantize_per_channel(q, scale.flatten(), zero_point.flatten(), axis, *limits)


def variants(cell: Cell) -> list[Scheme]:
    """A cell with non-default parameters, symmetric and asymmetric where both exist."""
    made = []
    for symmetric in (False, True):
        block = (2, 48) if cell.dtype[:2] != "mx" else ()
        try:
            made.append(Scheme(**cell._asdict(), symmetric=symmetric, axis=1, group_size=24, block_size=block))
        except SpecError:
            narrow = cell.dtype[0] == "u" and cell.dtype != "uint8" and cell.timing == "dynamic"
            assert (not symmetric and "float" in cell.dtype) or cell.dtype[:2] == "mx" or narrow
    assert made
    return made


@pytest.mark.parametrize("cell", LEGAL, ids=str)
def test_training_and_the_ops_land_on_one_grid(cell):
    for scheme in variants(cell):
        x = data()
        observer, fake = made(scheme, qat=False), made(scheme, qat=True)
        assert observer(x) is x
        expected = run_ops(x, scheme, observer)
        assert torch.equal(fake(x), expected)
        assert not torch.equal(expected, x)


@pytest.mark.parametrize("cell", LEGAL, ids=str)
def test_qparams_have_the_documented_shape_and_dtype(cell):
    for scheme in variants(cell):
        x = data()
        fake = made(scheme, qat=True)
        fake(x)
        scale, zero_point = fake.calculate_qparams()
        expected = scheme.qparams_shape((8, 96))
        assert expected == {
            "tensor": (1,), "axis": (96,), "row": (8, 1), "token": (8, 1), "group": (8, 4),
            "block": (8, 3) if cell.dtype[:2] == "mx" else (4, 2),
        }[cell.granularity]  # fmt: skip
        assert scale.shape == zero_point.shape == expected
        per_token = scheme.op == "quantize_per_token"
        assert scale.dtype is (torch.float64 if per_token else scheme.scale_dtype)
        assert zero_point.dtype is torch.int64
        assert bool((scale.to(torch.float64) > 0).all())


@pytest.mark.parametrize("cell", LEGAL, ids=str)
def test_gradients_pass_inside_the_range(cell):
    for scheme in variants(cell):
        fake = made(scheme, qat=True)
        x = data().requires_grad_()
        fake(x).sum().backward()
        assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
        assert x.grad.mean() > 0.5


@pytest.mark.parametrize("cell", ILLEGAL, ids=str)
def test_an_illegal_cell_names_its_reason_and_a_legal_neighbour(cell):
    reason, nearest = refusal(cell)
    with pytest.raises(SpecError) as raised:
        Scheme(**cell._asdict())
    assert str(cell) in str(raised.value)
    assert reason in str(raised.value)
    assert str(nearest) in str(raised.value)
    assert refusal(nearest) is None
    assert nearest.dtype == cell.dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int9"}, "int9 is not a format to quantize to; choose one of int2, "),
        ({"dtype": torch.float32}, "torch.float32 is not a format"),
        ({"dtype": "int8", "granularity": "channel"}, "granularity must be one of 'tensor', 'axis', .*, got 'channel'"),
        ({"dtype": "int8", "timing": "qat"}, "timing must be one of .*, got 'qat'"),
        ({"dtype": "float8_e5m2", "symmetric": False}, "have no zero point"),
        ({"dtype": "uint4", "timing": "dynamic", "symmetric": True}, "use symmetric=False"),
        ({"dtype": "int4", "granularity": "group", "timing": "weight_only", "group_size": 1}, "at least 2"),
        ({"dtype": "int4", "granularity": "block", "timing": "weight_only", "block_size": (1, 1)}, "at least 2 values"),
        ({"dtype": "mxfp4", "granularity": "block", "timing": "dynamic", "block_size": (16,)}, "MX blocks are 32"),
        ({"dtype": "int8", "eps": math.nan}, "eps is the smallest scale"),
    ],
)
def test_parameters_that_contradict_a_scheme_are_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        Scheme(**arguments)


def test_dtypes_of_torch_count_by_their_name():
    assert Scheme(dtype=torch.int4) == Scheme(dtype="int4")
    assert Scheme(dtype=torch.quint8) == Scheme(dtype="uint8")
    assert Scheme(dtype=torch.float8_e5m2).dtype == "float8_e5m2"


@pytest.mark.parametrize(
    ("granularity", "shape"), [("group", (4, 33)), ("block", (5, 96)), ("axis", (96,)), ("group", ())]
)
def test_a_tensor_without_such_blocks_is_refused_with_the_place(granularity, shape):
    scheme = Scheme(
        dtype="int8", granularity=granularity, timing="static" if granularity == "axis" else "weight_only", axis=1,
        block_size=(2, 48),
    )  # fmt: skip
    observer = SchemeObserver(scheme)
    observer.site = "node linear_4"
    with pytest.raises(SpecError, match="node linear_4: "):
        observer(torch.ones(shape))


def test_spec_fields_that_contradict_the_scheme_are_refused():
    scheme = Scheme(dtype="int4", granularity="group", timing="weight_only")
    with pytest.raises(SpecError, match="quant_max=8 contradicts the scheme"):
        SchemeObserver(scheme, quant_max=8)


def test_static_ranges_grow_in_calibration_and_average_in_training():
    scheme = Scheme(dtype="float8_e4m3fn")
    observer, fake = SchemeObserver(scheme), SchemeFakeQuantize(scheme, averaging_constant=0.25)
    for x in (torch.tensor([-448.0, 10.0]), torch.tensor([-896.0, 3.0])):
        observer(x)
        fake(x)
    assert observer.calculate_qparams()[0].tolist() == [2.0]
    assert fake.calculate_qparams()[0].tolist() == [1.25]  # 448 + 0.25 * 448, over 448
    with pytest.raises(SpecError, match=r"in \(0, 1\], got 1.5"):
        quantization_spec(scheme, averaging_constant=1.5)


@pytest.mark.parametrize("cell", [Cell("int4", "group", "weight_only"), Cell("mxfp8", "block", "dynamic")], ids=str)
def test_the_state_of_a_scheme_travels_through_a_checkpoint(cell):
    fake = made(Scheme(**cell._asdict()), qat=True)
    x = data()
    expected = fake(x)
    again = made(Scheme(**cell._asdict()), qat=True)
    again.load_state_dict(fake.state_dict(), strict=True)
    again.disable_observer()
    assert torch.equal(again(x), expected)


def test_a_scheme_without_data_is_an_error():
    fake = made(Scheme(dtype="float8_e5m2"), qat=True)
    with pytest.raises(CalibrationError, match="saw no data"):
        fake.calculate_qparams()
    fake.disable_observer()
    with pytest.raises(CalibrationError, match="Run a batch with the observer enabled"):
        fake(torch.ones(3))


# --- formats ----------------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_mxfp4_rounds_to_e2m1_half_to_even():
    """OCP MX v1.0, section 5.3.3, by hand: the elements of E2M1, ties to the one with an even last bit."""
    x = torch.linspace(-6, 6, 4801)
    distances = (x.abs().unsqueeze(1) - torch.tensor(E2M1)).abs()
    nearest = torch.tensor(E2M1)[distances.argmin(1)] * x.sign()
    ties = (distances == distances.amin(1, keepdim=True)).sum(1) > 1
    got = FORMATS["mxfp4"].elements(x).to(torch.float32)
    assert torch.equal(got[~ties], nearest[~ties])
    tied = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert FORMATS["mxfp4"].elements(tied).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (6.0, 1.0),
        (7.9, 1.0),
        (8.0, 2.0),
        (4.0, 1.0),
        (3.99, 0.5),
        (0.0, 2.0**-127),
        (1e-45, 2.0**-127),
        (3e38, 2.0**125),
    ],
)
def test_a_shared_exponent_is_that_of_the_largest_value_less_that_of_the_format(largest, scale):
    scheme = Scheme(dtype="mxfp4", granularity="block", timing="weight_only")
    got, zero_point = choose_qparams(*ranges(torch.full((1, 32), -largest), scheme), scheme)
    assert (got.to(torch.float64).item(), zero_point.item()) == (scale, 0)


@pytest.mark.parametrize("element", ["mxfp8", "mxfp4"])
def test_mx_is_that_of_torchao(element):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    kind = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}[element]
    x = data() * 7.3
    peer = MXTensor.to_mx(x, kind, block_size=32).dequantize(torch.float32)
    assert torch.equal(made(Scheme(dtype=element, granularity="block", timing="dynamic"), qat=True)(x), peer)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_float8_is_that_of_torchao(granularity):
    from torchao.quantization.quant_primitives import (
        _choose_scale_float8,
        _dequantize_affine_float8,
        _quantize_affine_float8,
    )

    x, kind = data(), torch.float8_e4m3fn
    scale = _choose_scale_float8(x, list(x.shape) if granularity == "tensor" else [1, 96], kind)
    peer = _dequantize_affine_float8(_quantize_affine_float8(x, scale, kind), scale, torch.float32)
    scheme = Scheme(dtype="float8_e4m3fn", granularity=granularity, timing="dynamic")
    assert torch.equal(made(scheme, qat=True)(x), peer)


# --- documents --------------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_code_says():
    """If this fails: python docs/make_schemes.py"""
    assert (Path(__file__).parents[2] / "docs/schemes.md").read_text() == scheme_table()
