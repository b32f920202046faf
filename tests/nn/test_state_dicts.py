"""State dicts of torch.ao load into our modules and ours into torch.ao's, bit for bit; old ones load, too."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from pt2e_quant import QuantizationError
from pt2e_quant.eager import DeQuantStub, QuantStub
from pt2e_quant.nn import load_quantized, quantized
from pt2e_quant.qtensor import QTensor, from_torch, to_torch
from tests.nn.cases import DYNAMIC, MODULES, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's types and modules are deprecated

CASES = {**MODULES, **DYNAMIC}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def blank(module: Any) -> Any:
    """The same module with other numbers."""
    other = copy.deepcopy(module)
    if hasattr(other, "set_weight_bias"):
        weight = other.weight()
        other.set_weight_bias(weight.with_codes(torch.zeros_like(weight.codes)), other.bias())
        other.scale, other.zero_point = 1.0, 0
    return other


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_go_both_ways(name: str) -> None:
    torch.backends.quantized.engine = "x86"
    their, _ = CASES[name](theirs())
    our, arguments = CASES[name](ours())
    before = our(*arguments)
    loaded = blank(our)
    loaded.load_state_dict(through_a_file(their.state_dict()))
    after = loaded(*arguments)
    assert (
        torch.equal(after.int_repr(), before.int_repr()) if isinstance(after, QTensor) else torch.equal(after, before)
    )
    back = to_torch(through_a_file(loaded.state_dict()))
    wanted = from_torch(their.state_dict())  # now: a table of torch's does not outlive the next one
    assert set(back) == set(wanted)
    their.load_state_dict(back)
    for key, value in from_torch(their.state_dict()).items():
        assert same(value, wanted[key]), key


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", ["Linear", "LinearReLU", "dynamic Linear"])
def test_lost_versions_do_not_matter(name: str) -> None:
    their, _ = CASES[name](theirs())
    our, arguments = CASES[name](ours())
    plain = dict(their.state_dict())
    assert not hasattr(plain, "_metadata")
    loaded = blank(our)
    loaded.load_state_dict(plain)
    assert same(loaded(*arguments).dequantize(), our(*arguments).dequantize())


@pytest.mark.parametrize("prefix", ["", "_packed_params."], ids=["version 1", "version 2"])
def test_old_layouts_of_linears_load(prefix: str) -> None:
    our, arguments = CASES["Linear"](ours())
    old = {
        f"{prefix}weight": our.weight(),
        f"{prefix}bias": our.bias(),
        "scale": our.scale,
        "zero_point": our.zero_point,
    }
    loaded = blank(our)
    loaded.load_state_dict(old)
    assert torch.equal(loaded(*arguments).int_repr(), our(*arguments).int_repr())


def test_a_float16_linear_goes_both_ways() -> None:
    their, our = theirs().qd.Linear(4, 3, dtype=torch.float16), quantized.dynamic.Linear(4, 3, dtype=torch.float16)
    their.set_weight_bias(torch.randn(3, 4), torch.randn(3))
    our.load_state_dict(through_a_file(their.state_dict()))
    x = torch.randn(2, 4)
    torch.testing.assert_close(our(x), their(x))
    their.load_state_dict(our.state_dict())


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*_packed_params\._packed_params"):
        quantized.Linear(4, 3).load_state_dict({"scale": torch.tensor(1.0), "zero_point": torch.tensor(0)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        quantized.Conv2d(4, 3, 1).load_state_dict({"scale": torch.tensor(1.0), "zero_point": torch.tensor(0)})


class Float(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(12, 5), nn.LayerNorm(5)


def test_a_quantized_state_dict_loads_into_a_float_model() -> None:
    model, (conv, _), (linear, _) = Float(), CASES["Conv2d"](ours()), CASES["Linear"](ours())
    state = {f"conv.{k}": v for k, v in conv.state_dict().items()} | {
        f"linear.{k}": v for k, v in linear.state_dict().items()
    }
    state |= {f"norm.{k}": v for k, v in model.norm.state_dict().items()}
    load_quantized(model, to_torch(state))
    assert type(model.conv) is quantized.Conv2d
    assert type(model.linear) is quantized.Linear
    assert model.conv.weight().equal(conv.weight())
    assert model.linear.scale == linear.scale


class Between(nn.Module):
    """What an eager model has around its layers."""

    def __init__(self, quant: nn.Module, dequant: nn.Module, total: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant, self.total = quant, dequant, total
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.group = nn.Hardswish(), nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.quant(x)
        total: Any = self.total
        return self.dequant(total.add(self.group(self.act(self.norm(self.conv(x)))), x))


def test_a_converted_eager_model_of_the_peer_loads_into_a_float_one() -> None:
    """With its stubs, functionals, activations and norms."""
    import torch.ao.quantization as peer

    torch.manual_seed(0)
    theirs = Between(peer.QuantStub(), peer.DeQuantStub(), torch.ao.nn.quantized.FloatFunctional()).eval()
    theirs.qconfig = peer.default_qconfig  # type: ignore[assignment]
    peer.prepare(theirs, inplace=True)
    theirs(x := torch.randn(2, 4, 5, 5))
    peer.convert(theirs, inplace=True)
    made: Any = load_quantized(
        Between(QuantStub(), DeQuantStub(), quantized.FloatFunctional()).eval(), theirs.state_dict()
    )
    assert type(made.total) is quantized.QFunctional
    assert (made(x) - theirs(x)).abs().max() <= 1.01 * made.total.scale


def test_dynamic_linears_are_known_by_their_version() -> None:
    linear, _ = CASES["dynamic Linear"](ours())
    made = load_quantized(nn.Sequential(nn.Linear(12, 5)), nn.Sequential(linear).state_dict())
    assert type(made[0]) is quantized.dynamic.Linear


def test_a_state_dict_without_quantized_modules_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no module of the model is quantized"):
        load_quantized(Float(), Float().state_dict())


def test_a_model_that_is_not_fused_is_told_the_list_to_fuse() -> None:
    conv, _ = CASES["Conv2d"](ours())
    state = {f"conv.{k}": v for k, v in conv.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"fuse_modules\(model, \[\['conv', 'norm'\]\]\)"):
        load_quantized(nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, padding=1), "norm": nn.BatchNorm2d(6)}), state)


def test_a_state_dict_of_fx_mode_is_told_where_it_fits() -> None:
    conv, _ = CASES["Conv2d"](ours())
    state = {f"conv.{k}": v for k, v in conv.state_dict().items()} | {"conv_input_scale_0": torch.tensor(0.1)}
    with pytest.raises(QuantizationError, match="convert_fx the float model"):
        load_quantized(nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, padding=1)}), state)


def test_codes_and_scales_cross_the_border_bit_for_bit() -> None:
    for value in (ours().weight(5, 12), ours().weight(5, 12, axis=None), ours().table(torch.quint4x2)):
        there = to_torch({"a": [value]})["a"][0]
        assert there.is_quantized
        assert not isinstance(there, QTensor)
        assert from_torch(there).equal(value)
