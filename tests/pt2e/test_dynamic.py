"""Run-time qparams and weight-only quantization: neither needs calibration data."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import ConversionError
from pt2e_quant.observer import PerTokenPlaceholderObserver, PlaceholderObserver
from pt2e_quant.quantizer import QuantizationConfig, QuantizationSpec
from tests.nets import MLP, export
from tests.pt2e.kit import (
    DYNAMIC,
    PER_CHANNEL,
    WEIGHT_ONLY,
    Toy,
    affine_by_hand,
    calls,
    dequantizes,
    on_grid,
    quantizes,
    relative_error,
    symmetric_by_hand,
)

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

FLOAT32_SUM = 1e-5  # the same integers and scales on both sides, summed in another order

PER_TOKEN = QuantizationConfig(
    QuantizationSpec(torch.int8, PerTokenPlaceholderObserver, qscheme=torch.per_tensor_affine, is_dynamic=True),
    None,
    PER_CHANNEL,
)


def converted(module: nn.Module, config: QuantizationConfig, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    return convert_pt2e(prepare_pt2e(export(module, *inputs), Toy(config)))


def rounded_weights(model: MLP) -> list[torch.Tensor]:
    return [on_grid(m.weight, symmetric_by_hand(m.weight), 0, -119, 119) for m in (model.up, model.down)]


def test_dynamic_qparams_are_chosen_quantized_and_dequantized_in_four_forms():
    gm = converted(MLP(), DYNAMIC, torch.randn(5, 10))
    dq = calls(gm, aten.linear.default)[0].args[0]
    q, scale, zero_point, *limits = dq.args
    choose = scale.args[0]
    assert [node.target for node in (choose, scale, zero_point, q, dq)] == [
        decomposed.choose_qparams.tensor,
        operator.getitem,
        operator.getitem,
        decomposed.quantize_per_tensor.tensor,
        decomposed.dequantize_per_tensor.tensor,
    ]
    assert (scale.args, zero_point.args) == ((choose, 0), (choose, 1))
    assert q.args[1:] == (scale, zero_point, *limits)
    assert (limits, choose.args[1:]) == ([-128, 127, torch.int8], (-128, 127, 2**-14, torch.int8))


def test_dynamic_output_is_that_of_the_model_rounded_by_hand():
    torch.manual_seed(1)
    model, x = MLP(), torch.randn(5, 10)
    gm = converted(model, DYNAMIC, x)
    up, down = rounded_weights(model)
    hidden = torch.relu(on_grid(x, *affine_by_hand([x], -128, 127), -128, 127) @ up.T + model.up.bias)
    expected = on_grid(hidden, *affine_by_hand([hidden], -128, 127), -128, 127) @ down.T
    assert relative_error(gm(x), expected) < FLOAT32_SUM


def test_dynamic_qparams_follow_the_input():
    """Twice the input, twice the scale, the same integers: the first linear is exactly linear."""
    model = nn.Linear(10, 6, bias=False)
    x = torch.randn(5, 10)
    gm = converted(model, DYNAMIC, x)
    torch.testing.assert_close(gm(x * 2), gm(x) * 2, rtol=0, atol=0)


def test_per_token_qparams_are_those_of_each_row():
    torch.manual_seed(1)
    model, x = nn.Linear(10, 6), torch.randn(2, 3, 10) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    gm = converted(model, PER_TOKEN, x)
    rows = [on_grid(row, *affine_by_hand([row], -128, 127), -128, 127) for row in x.flatten(0, 1)]
    weight = on_grid(model.weight, symmetric_by_hand(model.weight), 0, -119, 119)
    assert relative_error(gm(x), torch.stack(rows).unflatten(0, (2, 3)) @ weight.T + model.bias) < FLOAT32_SUM


def test_per_token_ops_carry_one_scale_for_each_row():
    gm = converted(nn.Linear(10, 6), PER_TOKEN, torch.randn(2, 3, 10))
    (choose,) = calls(gm, decomposed.choose_qparams_per_token_asymmetric.default)
    assert [tuple(value.shape) for value in choose.meta["val"]] == [(2, 3, 1), (2, 3, 1)]


def test_a_symmetric_dynamic_spec_chooses_symmetrically():
    spec = QuantizationSpec(torch.int8, PlaceholderObserver, -127, 127, torch.per_tensor_symmetric, is_dynamic=True)
    gm = converted(nn.Linear(10, 6), QuantizationConfig(spec, None, PER_CHANNEL), torch.randn(5, 10))
    assert len(calls(gm, decomposed.choose_qparams_symmetric.tensor)) == 1


@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.int8, torch.per_tensor_symmetric), (torch.uint8, torch.per_tensor_affine)]
)
def test_per_token_qparams_that_no_op_chooses_are_refused(dtype, scheme):
    spec = QuantizationSpec(dtype, PerTokenPlaceholderObserver, qscheme=scheme, is_dynamic=True)
    with pytest.raises(ConversionError, match=r"(?s)asymmetric schemes over all of torch\.int8 only"):
        converted(nn.Linear(10, 6), QuantizationConfig(spec, None, PER_CHANNEL), torch.randn(5, 10))


def test_weight_only_rounds_the_weights_and_nothing_else():
    torch.manual_seed(1)
    model, x = MLP(), torch.randn(5, 10)
    gm = converted(model, WEIGHT_ONLY, x)
    up, down = rounded_weights(model)
    assert relative_error(gm(x), torch.relu(x @ up.T + model.up.bias) @ down.T) < FLOAT32_SUM


def test_weight_only_leaves_no_quantize_in_the_graph():
    gm = converted(MLP(), WEIGHT_ONLY, torch.randn(5, 10))
    assert quantizes(gm) == []
    assert {node.args[0].op for node in dequantizes(gm)} == {"get_attr"}


@pytest.mark.parametrize("config", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight-only"])
def test_weights_are_integers_although_no_data_ever_ran(config):
    """Users' item 3: weight-only and dynamic configurations convert without a single calibration call."""
    model = MLP()
    gm = converted(model, config, torch.randn(5, 10))
    frozen = {tuple(value.shape): value for name, value in gm.named_buffers() if "frozen" in name}
    for module in (model.up, model.down):
        expected = torch.round(module.weight / symmetric_by_hand(module.weight))
        assert torch.equal(frozen[tuple(module.weight.shape)].float(), expected)


def test_weights_are_read_when_converting_not_when_preparing():
    """Whoever fine-tunes or loads a checkpoint into a prepared model gets the weights that are there at convert."""
    model = nn.Linear(10, 6)
    prepared = prepare_pt2e(export(model, torch.randn(5, 10)), Toy(WEIGHT_ONLY))
    with torch.no_grad():
        prepared.get_parameter("weight").mul_(torch.linspace(0.5, 2, 10))
    expected = torch.round(model.weight / symmetric_by_hand(model.weight))
    assert torch.equal(convert_pt2e(prepared)._frozen_param0.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [DYNAMIC, PER_TOKEN, WEIGHT_ONLY], ids=["dynamic", "per-token", "weight-only"])
def test_half_precision_models_run(config, dtype):
    model, x = nn.Linear(10, 6).to(dtype), torch.randn(5, 10, dtype=dtype)
    gm = converted(model, config, x)
    assert gm(x).dtype is dtype
    # two roundings to 8 bits (1 / 255 of a range each) and one to bfloat16 (2**-8) stay below 5 percent
    assert relative_error(gm(x).float(), model(x).float()) < 0.05


def test_dynamic_shapes_stay_dynamic():
    model, x = MLP(), torch.randn(5, 10)
    exported = export(model, x, dynamic_shapes=({0: torch.export.Dim("batch")},))
    gm = convert_pt2e(prepare_pt2e(exported, Toy(DYNAMIC)))
    assert gm(torch.randn(17, 10)).shape == (17, 6)
