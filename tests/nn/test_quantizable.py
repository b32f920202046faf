"""nn.quantizable: LSTM and attention with quantized products inside: as torch.ao's, and right where those are not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import pt2e_quant
from pt2e_quant import QuantizationError, eager
from pt2e_quant.nn import qat, quantizable, quantized
from pt2e_quant.qconfig import get_default_qat_qconfig, get_default_qconfig

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.ao is deprecated
    pytest.mark.filterwarnings("error::pt2e_quant.errors.ConversionWarning"),
]
torch_ao = torch.ao.quantization


class Net(nn.Module):
    """A layer between stubs of either package."""

    def __init__(self, of: Any, layer: nn.Module) -> None:
        super().__init__()
        self.quant, self.layer, self.dequant = of.QuantStub(), layer, of.DeQuantStub()

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        x = self.quant(x)
        made = self.layer(x, x, x, **options) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.dequant(made[0]), made[1]


def lstm(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(8, 6, **options)


def attention(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 4, **options)


X = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
OF = {nn.LSTM: X[..., :8], nn.MultiheadAttention: X}


@functools.cache
def ours(make: Any, *options: tuple[str, Any]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The float model, the prepared and the converted one."""
    model = Net(eager, make(**dict(options))).eval()
    model.qconfig = get_default_qconfig("x86")
    prepared = eager.prepare(model)
    prepared(OF[type(model.layer)])
    return model, prepared, eager.convert(prepared)


@functools.cache
def theirs(make: Any, *options: tuple[str, Any]) -> tuple[nn.Module, nn.Module]:
    torch.backends.quantized.engine = "x86"
    model = Net(torch_ao, make(**dict(options))).eval()
    model.qconfig = torch_ao.get_default_qconfig("x86")
    custom = torch_ao.get_default_custom_config_dict()
    prepared = torch_ao.prepare(model, prepare_custom_config_dict=custom)
    prepared(OF[type(model.layer)])
    return prepared, torch_ao.convert(prepared, convert_custom_config_dict=custom)


SAME = [
    (lstm,),
    (lstm, ("num_layers", 2)),
    (lstm, ("bias", False), ("batch_first", True)),
    (attention,),
    (attention, ("bias", False)),
]


@pytest.mark.parametrize("case", SAME)
def test_results_are_torchs_to_one_step(case):
    converted, other = ours(*case)[2], theirs(*case)[1]
    x = OF[nn.LSTM if case[0] is lstm else nn.MultiheadAttention]
    last = converted.layer.out_proj if case[0] is attention else converted.layer.layers[-1].layer_fw.cell.ogate_cy
    for one, their in zip(flat(converted(x)), flat(other(x)), strict=True):
        step = max(one.q_scale(), their.q_scale()) if their.is_quantized else last.scale
        assert (one.dequantize() - their.dequantize()).abs().max() <= step * 1.001


def flat(value: Any) -> list[torch.Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


@pytest.mark.parametrize("case", SAME)
def test_state_dicts_have_torchs_keys(case):
    """But for weights that torch.ao's observed attention keeps and does not use; they are read over."""
    _, prepared, converted = ours(*case)
    other_prepared, other = theirs(*case)
    assert set(converted.state_dict()) == set(other.state_dict())
    unused = {"layer.in_proj_weight", "layer.in_proj_bias"}
    assert set(other_prepared.state_dict()) - set(prepared.state_dict()) <= unused
    prepared.load_state_dict(other_prepared.state_dict())


def test_two_directions_are_joined_on_a_grid_that_holds_both():
    """torch.ao takes the grid of the first, and clips the second."""
    model, _, converted = ours(lstm, ("bidirectional", True), ("num_layers", 2))
    out, (h, _) = converted(OF[nn.LSTM])
    wanted, (wanted_h, _) = model(OF[nn.LSTM])
    assert (h.dequantize() - wanted_h).abs().max() < 0.04
    assert (out - wanted).abs().max() < 0.04  # about 3 steps of 1/128: 7 bits for outputs in [-0.5, 0.5], two layers


def test_attention_is_right_with_the_batch_first():
    """Where torch.ao's mixes up heads and batch (pytorch#91435)."""
    model, prepared, converted = ours(attention, ("batch_first", True))
    step = converted.layer.out_proj.scale
    assert torch.equal(prepared(X)[0], model(X)[0])
    assert (converted(X)[0] - model(X)[0]).abs().max() < 4 * step
    assert (theirs(attention, ("batch_first", True))[1](X)[0] - model(X)[0]).abs().max() > 50 * step


@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"batch_first": True}, {"kdim": 16, "vdim": 16}]
)
@pytest.mark.parametrize("mask", [torch.bool, torch.float32])
def test_observed_attention_computes_as_the_float_one(options, mask):
    layer = attention(**options).eval()
    layer.qconfig = get_default_qconfig("x86")
    observed = quantizable.MultiheadAttention.from_float(layer)
    batch, steps = (5, 3) if "batch_first" in options else (3, 5)
    padding = torch.zeros(batch, steps, dtype=torch.bool)
    padding[0, -1] = True
    causal = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    if mask is torch.float32:
        causal, padding = (torch.zeros(one.shape).masked_fill(one, float("-inf")) for one in (causal, padding))
    for average in (True, False):
        given = {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": average}
        for one, other in zip(observed(X, X, X, **given), layer(X, X, X, **given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32, in another order


def test_split_gates_have_a_grid_each():
    layer = lstm().eval()
    layer.qconfig = get_default_qconfig("x86")
    observed = quantizable.LSTM.from_float(layer, split_gates=True)
    x = OF[nn.LSTM]
    torch.testing.assert_close(observed(x)[0], layer(x)[0], rtol=1e-5, atol=1e-6)
    made = quantized.LSTM.from_observed(observed)
    assert len({one.scale for one in made.layers[0].layer_fw.cell.gates.values()}) == 4


def test_layers_in_training_round_their_weights():
    layer = lstm().train()
    layer.qconfig = get_default_qat_qconfig("x86")
    observed = quantizable.LSTM.from_float(layer)
    observed(OF[nn.LSTM])[0].sum().backward()
    gates = observed.layers[0].layer_fw.cell.igates
    assert isinstance(gates, qat.Linear)
    assert gates.weight.grad is not None


def test_a_cell_is_quantized_by_itself():
    torch.manual_seed(0)
    cell = nn.LSTMCell(8, 6).eval()
    cell.qconfig = get_default_qconfig("x86")
    observed = quantizable.LSTMCell.from_float(cell)
    x = X[0, :, :8]
    torch.testing.assert_close(observed(x), cell(x), rtol=1e-5, atol=1e-6)
    made = quantized.LSTMCell.from_observed(observed)
    states = made(pt2e_quant.quantize_per_tensor(x, 1 / 32, 112, torch.quint8))
    assert (states[0].dequantize() - cell(x)[0]).abs().max() < 0.03  # 7 bits of products in [-2, 2]


def test_a_converted_attention_becomes_float_again():
    model, _, converted = ours(attention)
    back = converted.layer.dequantize()
    assert type(back) is nn.MultiheadAttention
    error = (back(X, X, X)[0] - model.layer(X, X, X)[0]).abs().max()
    assert 0 < error < 0.02  # the weights have 8 bits


def test_a_transformer_layer_in_evaluation_calls_its_observed_attention():
    """Where torch's fused kernel would read the weights past it."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.qconfig = get_default_qconfig("x86")
    prepared = eager.prepare(layer)
    with torch.no_grad():
        wanted = layer(X)
        torch.testing.assert_close(prepared(X), wanted, rtol=1e-5, atol=1e-6)
    assert prepared.self_attn.linear_Q.activation_post_process.has_data


def test_a_transformer_layer_in_evaluation_calls_its_observed_linears():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.qconfig = get_default_qconfig("x86")
    layer.self_attn.qconfig = None
    prepared = eager.prepare(layer)
    with torch.no_grad():
        prepared(X)
    assert prepared.linear1.activation_post_process.has_data


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: quantizable.LSTM.from_float(nn.Linear(2, 2)), r"takes a torch\.nn\.LSTM, got Linear"),
        (lambda: quantizable.LSTM.from_float(nn.LSTM(2, 2)), "has no qconfig"),
        (lambda: quantizable.LSTM.from_float(nn.LSTM(2, 3, proj_size=1), get_default_qconfig()), "proj_size"),
        (lambda: quantized.LSTM.from_float(nn.LSTM(2, 2)), "made by from_observed"),
        (lambda: quantizable.LSTM(2, 2)(torch.ones(1, 1, 2), (torch.ones(2, 1, 2),) * 2), "1 states are needed"),
        (lambda: quantizable.LSTM(2, 2, dropout=2.0), "dropout is a probability"),
        (lambda: quantizable.MultiheadAttention(4, 2)(*[torch.ones(1, 1, 4)] * 3, is_causal=True), "attn_mask"),
    ],
)
def test_what_cannot_be_is_an_error(call, said):
    with pytest.raises(QuantizationError, match=said):
        call()


def test_a_functional_that_took_numbers_alone_needs_no_grid():
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.f, self.dequant = eager.QuantStub(), quantized.FloatFunctional(), eager.DeQuantStub()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dequant(self.f.mul_scalar(self.quant(x), 0.5))

    model = Halved().eval()
    model.qconfig = get_default_qconfig("x86")
    prepared = eager.prepare(model)
    prepared(X)
    made = eager.convert(prepared)
    assert (made(X) - X / 2).abs().max() <= made.quant.scale.item() / 4 * 1.001
