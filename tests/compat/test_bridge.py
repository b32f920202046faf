"""eager_to_pt2e: an eager model as an exported graph, and a quantizer that gives it the grids of eager mode."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import QuantizationError, convert_pt2e, eager, explain, prepare_pt2e
from pt2e_quant.compat import eager_to_pt2e
from pt2e_quant.nn.quantized import FloatFunctional, QFunctional
from pt2e_quant.qconfig import (
    default_symmetric_qnnpack_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
    per_channel_dynamic_qconfig,
)


class Residual(nn.Module):
    """Fused and single layers, a sum, operators that keep a grid, and one whose grid is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.sum = eager.QuantStub(), eager.DeQuantStub(), FloatFunctional()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.fc, self.sigmoid = nn.Linear(8, 5), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn(self.conv(self.quant(x))))
        y = self.pool(self.sum.add(self.conv2(y), y)).mean((2, 3))
        return self.dequant(self.sigmoid(self.fc(y)))


class Twice(nn.Module):
    """One layer at two places, and an input that is read in float, too."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.fc = eager.QuantStub(), eager.DeQuantStub(), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dequant(self.fc(self.fc(self.quant(x)))) + x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.lstm = eager.QuantStub(), eager.DeQuantStub(), nn.LSTM(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dequant(self.lstm(self.quant(x))[0])


def residual() -> nn.Module:
    torch.manual_seed(0)
    return eager.fuse_modules(Residual().eval(), [["conv", "bn", "relu"]])


INPUTS = {
    "residual": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "twice": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    "recurrent": torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1)),
}
MODELS = {"residual": residual, "twice": lambda: Twice().eval(), "recurrent": lambda: Recurrent().eval()}


@functools.cache
def built(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The float model with qconfigs, the calibrated and the converted one."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.qconfig = get_default_qconfig("x86")
    prepared = eager.prepare(model)
    prepared(INPUTS[name])
    return model, prepared, eager.convert(prepared)


@functools.cache
def bridged(name: str, calibrated: bool) -> GraphModule:
    model, prepared, _ = built(name)
    x = INPUTS[name]
    bridge = eager_to_pt2e(prepared if calibrated else model, (x,))
    made = prepare_pt2e(bridge.exported, bridge.quantizer)
    if not calibrated:
        made(x)
    return convert_pt2e(made)


def grids_of_eager(model: nn.Module) -> set[tuple[float, int]]:
    """Of activations: scale, rounded as a float32 holds it, and zero point."""
    found = [(float(one.scale), int(one.zero_point)) for one in model.modules() if hasattr(one, "scale")]
    idle = [one for one in model.modules() if isinstance(one, QFunctional) and one.scale == 1.0]
    return {(torch.tensor(scale).item(), zero) for scale, zero in found if not idle or scale != 1.0}


def grids_of_graph(gm: GraphModule) -> set[tuple[float, int]]:
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    nodes = gm.graph.find_nodes(op="call_function", target=quantize)
    return {(torch.tensor(node.args[1]).item(), node.args[2]) for node in nodes}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", ["residual", "twice"])
def test_grids_of_activations_are_those_of_eager_mode(name, calibrated):
    fixed = {(1 / 256, 0)} if name == "residual" else set()  # of the sigmoid
    assert grids_of_graph(bridged(name, calibrated)) == grids_of_eager(built(name)[2]) | fixed


@pytest.mark.parametrize("calibrated", [True, False])
def test_weights_are_those_of_eager_mode(calibrated):
    gm, model = bridged("residual", calibrated), built("residual")[2]
    codes = {tuple(value.flatten().tolist()) for value in gm.buffers() if value.dtype is torch.int8}
    codes |= {tuple(value.flatten().tolist()) for value in gm.parameters() if value.dtype is torch.int8}
    layers = (model.conv, model.conv2, model.fc)
    assert codes == {tuple(layer.weight().int_repr().flatten().tolist()) for layer in layers}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("name", "steps"), [("residual", 1), ("twice", 1), ("recurrent", 2)])
def test_outputs_are_those_of_eager_mode(name, steps, calibrated):
    """To one step of the output; in a recurrent layer a step comes around again."""
    gm, (_, _, converted), x = bridged(name, calibrated), built(name), INPUTS[name]
    step = {"residual": lambda m: 1 / 256, "twice": lambda m: m.fc.scale, "recurrent": last_step}[name](converted)
    assert (gm(x) - converted(x)).abs().max() <= steps * step * 1.001


def last_step(model: Any) -> float:
    return float(model.lstm.layers[0].layer_fw.cell.ogate_cy.scale)


def test_no_tap_is_left():
    assert "tap" not in str(bridged("residual", True).graph)
    assert "eager" in explain(bridged("residual", True)).text()


def test_what_has_no_qconfig_stays_float():
    model = residual()
    model.conv2.qconfig = None
    model.conv.qconfig = model.quant.qconfig = get_default_qconfig("x86")
    bridge = eager_to_pt2e(model, (INPUTS["residual"],))
    made = prepare_pt2e(bridge.exported, bridge.quantizer)
    made(INPUTS["residual"])
    gm = convert_pt2e(made)
    assert len(grids_of_graph(gm)) == 2
    assert len([value for value in (*gm.buffers(), *gm.parameters()) if value.dtype is torch.int8]) == 1


def test_dynamic_layers_are_quantized_as_they_run():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    bridge = eager_to_pt2e(with_qconfig(model, per_channel_dynamic_qconfig), (x,))
    gm = convert_pt2e(prepare_pt2e(bridge.exported, bridge.quantizer))
    assert "choose_qparams" in str(gm.graph)
    wanted = eager.quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig})(x)
    assert (gm(x) - wanted).abs().max() < 0.01


def with_qconfig(model: nn.Module, qconfig: Any) -> nn.Module:
    model.qconfig = qconfig
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: built("residual")[2], "is converted; start"),
        (Residual, "in training mode"),
        (lambda: Residual().eval(), "qconfig"),
        (
            lambda: eager.prepare_qat(with_qconfig(Residual().train(), get_default_qat_qconfig("x86"))).eval(),
            "was trained in eager mode",
        ),
    ],
)
def test_what_is_no_float_or_prepared_model_is_an_error(model, said):
    with pytest.raises(QuantizationError, match=said):
        eager_to_pt2e(model(), (INPUTS["residual"],))


@pytest.mark.slow
def test_a_bridged_model_runs_in_executorch():
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    x = INPUTS["residual"]
    bridge = eager_to_pt2e(with_qconfig(residual(), default_symmetric_qnnpack_qconfig), (x,))
    made = prepare_pt2e(bridge.exported, bridge.quantizer)
    made(x)
    gm = convert_pt2e(made)
    program = lower_to_executorch(gm)
    assert (program.run(x)[0] - gm(x)).abs().max() <= 2 / 256
