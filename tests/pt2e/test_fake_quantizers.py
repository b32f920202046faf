"""Fake quantizers and schemes in graphs: they train, and convert lands on the grid that the last forward rounded to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError, ConversionError, SharingError
from pt2e_quant.fake_quantize import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    toggle_fake_quantizers,
)
from pt2e_quant.observer import (
    AffineQuantizedMinMaxObserver,
    MappingType,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerAxis,
    PerBlock,
    PerChannelMinMaxObserver,
    PerGroup,
    PerRow,
    PerTensor,
)
from pt2e_quant.quantizer import QuantizationConfig, QuantizationSpec
from pt2e_quant.schemes import Scheme, quantization_spec
from tests.nets import export
from tests.pt2e.kit import ACT, ByHand, Toy, annotate, calls, quantizes, the_call

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

SAME_GRID = 1e-6  # the same integers and scales on both sides, summed in the same order


class Net(nn.Module):
    """Layers with and without relu after them, an add that shares nothing; sizes that groups of 16 and 24 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 36, 48, bias=False)
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1))))


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(48, 24, bias=False)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))


def spec(kind: Any, dtype: torch.dtype, low: int, high: int, qscheme: torch.qscheme, **fields: Any) -> QuantizationSpec:
    return QuantizationSpec(dtype, kind, low, high, qscheme, **fields)


AFFINE, SYMMETRIC, CHANNELS = torch.per_tensor_affine, torch.per_tensor_symmetric, torch.per_channel_symmetric
ACTIVATIONS = {
    "plain": FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=2**-14, averaging_constant=0.3),
    "fused": FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.3),
    "learnable": LearnableFakeQuantize.with_args(observer=MinMaxObserver, use_grad_scaling=True),
}
WEIGHTS = {
    "plain": (FakeQuantize.with_args(observer=PerChannelMinMaxObserver), CHANNELS),
    "fused": (FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver), CHANNELS),
    "learnable": (LearnableFakeQuantize.with_args(observer=PerChannelMinMaxObserver, use_grad_scaling=True), CHANNELS),
}


def config(kind: str) -> QuantizationConfig:
    activation = spec(ACTIVATIONS[kind], torch.uint8, 0, 255, AFFINE)
    recipe, qscheme = WEIGHTS[kind]
    return QuantizationConfig(activation, activation, spec(recipe, torch.int8, -127, 127, qscheme, ch_axis=0))


def data(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def prepared_net(quantizer: Any) -> GraphModule:
    return prepare_pt2e(export(Net(), data(1)[0]), quantizer)


def difference(prepared: GraphModule, x: Tensor, **kwargs: Any) -> float:
    """Largest difference of the converted model from the fake-quantized forward, in units of the largest output."""
    toggle_fake_quantizers(prepared, observer=False)
    with torch.no_grad():
        expected, got = prepared(x), convert_pt2e(prepared, **kwargs)(x)
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_calibrating_with_fake_quantizers_converts_to_their_grid(kind, fold):
    prepared = prepared_net(Toy().set_global(config(kind)))
    for x in data():
        prepared(x)
    assert difference(prepared, data()[1], fold_quantize=fold) <= SAME_GRID


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_prepared_graph_trains_and_converts_to_the_grid_that_it_trained_on(kind):
    prepared = prepared_net(Toy().set_global(config(kind)))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=2e-3)
    x, target = data(1)[0], torch.randn(4, 5)
    prepared(x)
    if kind == "learnable":
        learnable = [module for module in prepared.modules() if isinstance(module, LearnableFakeQuantize)]
        for module in learnable:
            module.enable_param_learning()
        start = [module.scale.detach().clone() for module in learnable]
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (prepared(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = [p for name, p in prepared.named_parameters() if p.requires_grad and not name.endswith("zero_point")]
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in trained)  # a zero point moves where values clip
    if kind == "learnable":
        assert all(not torch.equal(module.scale, old) for module, old in zip(learnable, start, strict=True))
    prepared(x)  # the grid of today's weights
    assert difference(prepared, data()[2]) <= SAME_GRID


def test_one_call_switches_the_fake_quantizers_of_a_graph():
    """pytorch#120983: disabling fake quantization had no effect on an exported model."""
    prepared = prepared_net(Toy().set_global(config("plain")))
    x = data(1)[0]
    prepared(x)
    assert toggle_fake_quantizers(prepared, fake_quant=False, observer=False) == len(set(fake_quantizers(prepared)))
    plain = Net()
    plain.load_state_dict({key: prepared.state_dict()[key] for key in plain.state_dict()})
    assert torch.equal(prepared(x), plain(x))


def fake_quantizers(gm: GraphModule) -> list[str]:
    return [name for name, module in gm.named_modules() if hasattr(module, "fake_quant_enabled")]


def test_dynamic_fake_quantizers_round_as_the_run_time_ops():
    activation = quantization_spec(Scheme(dtype="int8", timing="dynamic", eps=2**-9), qat=True)
    weight = quantization_spec(Scheme(dtype="int8", granularity="axis", timing="weight_only"), qat=True)
    prepared = prepared_net(Toy().set_global(QuantizationConfig(activation, None, weight)))
    prepared(data(1)[0])
    with torch.no_grad():
        expected, converted = prepared(data()[1]), convert_pt2e(prepared)
        assert float((converted(data()[1]) - expected).abs().max()) <= SAME_GRID * float(expected.abs().max())
    choices = calls(converted, decomposed.choose_qparams.tensor)
    assert choices
    assert all(node.args[3] == 2**-9 for node in choices)  # eps of the observer inside


# --- schemes ----------------------------------------------------------------------------------------------------------

CONVERTED = {
    "int4 per group": (Scheme(dtype="int4", granularity="group", timing="weight_only", group_size=12), (-8, 7)),
    "int3 per row": (Scheme(dtype="int3", granularity="row", timing="weight_only"), (-4, 3)),
    "uint5 per axis": (Scheme(dtype="uint5", granularity="axis", timing="weight_only"), (0, 31)),
    "int16 per tensor": (Scheme(dtype="int16", timing="weight_only"), (-32768, 32767)),
}


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("kind", CONVERTED)
def test_the_weight_of_a_scheme_becomes_integers_in_its_range(kind, qat):
    scheme, bounds = CONVERTED[kind]
    x = torch.randn(7, 48)
    model = Matrices()
    config = QuantizationConfig(None, None, quantization_spec(scheme, qat=qat))
    prepared = prepare_pt2e(export(model, x), Toy().set_global(config))
    if qat:
        prepared(x)
    converted = convert_pt2e(prepared)
    frozen = [tensor for name, tensor in converted.state_dict().items() if name.startswith("_frozen_param")]
    assert [tuple(tensor.shape) for tensor in frozen] == [(24, 48), (5, 24)]
    for tensor, weight in zip(frozen, (model.hidden.weight, model.out.weight), strict=True):
        assert tensor.dtype is scheme.format.storage
        assert bounds[0] <= tensor.min() < tensor.max() <= bounds[1]
        assert tensor.unique().numel() > 0.4 * min(bounds[1] - bounds[0], weight.numel())
    if qat:
        expected = prepared(x).detach()
        assert float((converted(x).detach() - expected).abs().max()) <= SAME_GRID * float(expected.abs().max())
    else:  # half a step of each weight
        assert torch.allclose(converted(x), model(x), atol=0.5 if bounds[1] - bounds[0] < 40 else 1e-3)


def test_groups_use_the_op_that_backends_know():
    scheme = Scheme(dtype="int4", granularity="group", timing="weight_only", group_size=12)
    config = QuantizationConfig(None, None, quantization_spec(scheme))
    x = torch.randn(7, 48)
    gm = convert_pt2e(prepare_pt2e(export(Matrices(), x), Toy().set_global(config)), fold_quantize=False)
    quantize = calls(gm, decomposed.quantize_per_channel_group.default)[0]
    dequantize = calls(gm, decomposed.dequantize_per_channel_group.default)[0]
    assert quantize.args[3:] == (-8, 7, torch.int8, 12)
    assert dequantize.args[3:] == (-8, 7, torch.int8, 12, torch.float32)
    assert [tuple(getattr(gm, qparam.target).shape) for qparam in quantize.args[1:3]] == [(24, 4)] * 2
    assert "int4 symmetric per group of 12, weight_only" in str(explain(gm))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(dtype="int8", granularity="block", timing="weight_only", block_size=(1, 12)),
        Scheme(dtype="uint4", granularity="group", timing="weight_only", group_size=12),
        Scheme(dtype="float8_e4m3fn", granularity="axis", timing="weight_only"),
        Scheme(dtype="float8_e5m2", timing="weight_only"),
    ],
    ids=str,
)
@pytest.mark.parametrize("qat", [False, True])
def test_a_scheme_without_an_op_prepares_and_runs_and_says_at_convert_what_is_missing(scheme, qat):
    x = torch.randn(7, 48)
    config = QuantizationConfig(None, None, quantization_spec(scheme, qat=qat))
    prepared = prepare_pt2e(export(Matrices(), x), Toy().set_global(config))
    assert bool(prepared(x).isfinite().all())
    with pytest.raises(ConversionError) as raised:
        convert_pt2e(prepared)
    for part in ("node linear", "has no op for", str(scheme), "convert(model, node)"):
        assert part in str(raised.value)


def test_rows_and_groups_of_a_convolution_have_no_op():
    scheme = Scheme(dtype="int8", granularity="row", timing="weight_only")
    prepared = prepared_net(Toy().set_global(QuantizationConfig(None, None, quantization_spec(scheme))))
    with pytest.raises(ConversionError, match="of a tensor that is not a matrix"):
        convert_pt2e(prepared)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)])
def test_a_float8_spec_converts_with_its_scale(dtype, largest):
    """There is no zero point: the scale is the largest magnitude over the largest number of the format."""

    def by_hand(gm: GraphModule) -> None:
        node = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
        annotate(node, {node.args[0]: QuantizationSpec(dtype, MinMaxObserver)})

    model, x = nn.Linear(48, 24, bias=False), torch.randn(7, 48)
    prepared = prepare_pt2e(export(model, x), ByHand(by_hand))
    with pytest.raises(CalibrationError, match="never saw data"):
        convert_pt2e(prepared)
    prepared(x)
    gm = convert_pt2e(prepared)
    node = the_call(gm, decomposed.quantize_per_tensor.default)
    scale = node.args[1]
    assert node.args[1:] == (pytest.approx(x.abs().max().item() / largest), 0, -largest, largest, dtype)
    assert explain(gm).groups[0].scale == scale
    rounded = (x * (1 / scale)).round().to(dtype).float() * scale  # the op rounds to integers before it casts
    torch.testing.assert_close(gm(x), rounded @ model.weight.T, rtol=SAME_GRID, atol=SAME_GRID)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int16_in_a_half_precision_model_is_dequantized_in_float32(dtype):
    """In float16 the op would compute 65535 * scale from infinity; a step of the grid is far below half precision."""
    spec = QuantizationSpec(torch.int16, MinMaxObserver, qscheme=torch.per_tensor_affine)

    def by_hand(gm: GraphModule) -> None:
        node = the_call(gm, aten.relu.default)
        annotate(node, {node.args[0]: spec}, spec)

    x = (torch.rand(5, 6) * 7).to(dtype)
    prepared = prepare_pt2e(export(nn.ReLU(), x), ByHand(by_hand))
    prepared(x)
    gm = convert_pt2e(prepared)
    assert gm(x).dtype is dtype
    assert gm.graph.output_node().args[0][0].meta["val"].dtype is dtype
    torch.testing.assert_close(gm(x), x, rtol=float(torch.finfo(dtype).eps), atol=7 / 65535)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((float("nan"), 0), "scale nan"),
        ((float("inf"), 0), "scale inf"),
        ((-1.0, 0), "scale -1"),
        ((0.0, 0), "scale 0"),
        ((0.01, 1000), "zero point 1000"),
        (None, "does not give a scale and a zero point"),
    ],
)
def test_an_answer_that_is_no_grid_is_an_error_with_its_place(answer, message):
    class Odd(MinMaxObserver):
        def calculate_qparams(self):
            return answer and tuple(torch.tensor([part]) for part in answer)

    def by_hand(gm: GraphModule) -> None:
        node = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
        annotate(node, {node.args[0]: QuantizationSpec(torch.int8, Odd, qscheme=torch.per_tensor_affine)})

    prepared = prepare_pt2e(export(Matrices(), torch.randn(7, 48)), ByHand(by_hand))
    prepared(torch.randn(7, 48))
    with pytest.raises(ConversionError, match=rf"(?s){message}.*\n  input x"):
        convert_pt2e(prepared)


def test_sub_byte_dtypes_of_torch_are_stored_in_a_byte():
    weight = QuantizationSpec(torch.int4, PerChannelMinMaxObserver, qscheme=CHANNELS, ch_axis=0)
    gm = convert_pt2e(
        prepare_pt2e(export(Matrices(), torch.randn(7, 48)), Toy().set_global(QuantizationConfig(None, None, weight))),
        fold_quantize=False,
    )
    assert [node.args[-3:] for node in quantizes(gm)] == [(-8, 7, torch.int8)] * 2


@pytest.mark.parametrize(
    ("granularity", "op", "shape"),
    [
        (PerTensor(), "quantize_per_tensor", None),
        (PerAxis(0), "quantize_per_channel", (24,)),
        (PerRow(), "quantize_per_channel", (24,)),
        (PerGroup(16), "quantize_per_channel_group", (24, 3)),
        (PerBlock((2, 8)), None, None),
    ],
    ids=str,
)
def test_observers_of_blocks_convert_where_there_is_an_op(granularity, op, shape):
    recipe = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=granularity
    )

    def by_hand(gm: GraphModule) -> None:
        node = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
        annotate(node, {node.args[1]: QuantizationSpec(torch.int8, recipe)})

    prepared = prepare_pt2e(export(Matrices(), torch.randn(7, 48)), ByHand(by_hand))
    if op is None:
        with pytest.raises(ConversionError, match="PerBlock"):
            convert_pt2e(prepared)
        return
    gm = convert_pt2e(prepared, fold_quantize=False)
    node = the_call(gm, getattr(decomposed, op).default)
    if shape is not None:
        assert tuple(getattr(gm, node.args[1].target).shape) == shape


def test_channels_of_another_dimension_have_their_own_scales_along_it():
    recipe = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerAxis(1), quant_min=-100
    )

    def by_hand(gm: GraphModule) -> None:
        node = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
        annotate(node, {node.args[1]: QuantizationSpec(torch.int8, recipe)})

    model = Matrices()
    gm = convert_pt2e(prepare_pt2e(export(model, torch.randn(7, 48)), ByHand(by_hand)), fold_quantize=False)
    node = the_call(gm, decomposed.quantize_per_channel.default)
    assert node.args[3] == 1
    largest = model.hidden.weight.detach().abs().amax(0)  # 227 steps over [-b, b]
    torch.testing.assert_close(getattr(gm, node.args[1].target), largest * 2 / 227, rtol=1e-6, atol=0)


def test_two_sizes_of_groups_on_one_weight_are_not_taken_for_one():
    """int8 both, but not the same integers."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 48))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + nn.functional.linear(x * 2, self.weight)

    def by_hand(gm: GraphModule) -> None:
        linears = [node for node in gm.graph.nodes if node.target is aten.linear.default]
        for node, size in zip(linears, (8, 24), strict=True):
            scheme = Scheme(dtype="int8", granularity="group", timing="weight_only", group_size=size)
            annotate(node, {node.args[1]: quantization_spec(scheme)})

    with pytest.raises(SharingError, match=r"(?s)per group of 8, weight_only.*per group of 24, weight_only"):
        prepare_pt2e(export(Shared(), torch.randn(3, 48)), ByHand(by_hand))


def test_an_uncalibrated_fake_quantizer_is_named():
    prepared = prepared_net(Toy().set_global(QuantizationConfig(ACT, ACT, config("plain").weight)))
    with pytest.raises(CalibrationError, match="never saw data"):
        convert_pt2e(prepared)
