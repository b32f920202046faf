"""A net of quantized modules through torch.export and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.errors import QuantizedTensorError
from pt2e_quant.nn import intrinsic, quantized
from pt2e_quant.qtensor import quantize_per_channel, quantize_per_tensor
from pt2e_quant.qtensor.tensor import wrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.dequantize = quantized.Quantize(0.03, 100, torch.quint8), quantized.DeQuantize()
        self.conv, self.up = intrinsic.quantized.ConvReLU2d(3, 8, 3, padding=1), quantized.ConvTranspose2d(8, 4, 2, 2)
        self.norm, self.sum, self.act = quantized.BatchNorm2d(8), quantized.QFunctional(), quantized.Hardswish(0.05, 10)
        self.linear = quantized.Linear(64, 5)
        scales, zeros = torch.full((8,), 0.003), torch.zeros(8, dtype=torch.int64)
        self._fill(self.conv, quantize_per_channel(torch.randn(8, 3, 3, 3) / 9, scales, zeros, 0, torch.qint8), 8, 0.02)
        self._fill(self.up, quantize_per_tensor(torch.randn(8, 4, 2, 2) / 9, 0.003, 0, torch.qint8), 4, 0.02)
        self._fill(self.linear, quantize_per_tensor(torch.randn(5, 64) / 9, 0.003, 0, torch.qint8), 5, 0.05)
        self.sum.scale, self.norm.scale = 0.03, torch.tensor(0.03)

    def _fill(self, module: Any, weight: Tensor, outputs: int, scale: float) -> None:
        module.set_weight_bias(weight, torch.randn(outputs))
        module.scale, module.zero_point = scale, 100

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.quantize(x))
        y = self.act(self.sum.add_relu(y, self.norm(y)))
        y = self.up(nn.functional.max_pool2d(y, 2))
        return self.dequantize(self.linear(nn.functional.adaptive_avg_pool2d(y, 4).flatten(1)))


NET, X = Net().eval(), torch.randn(2, 3, 8, 8)
STEPS = 2 * 0.05  # a step of a convolution may move the linear's output by one, and its own rounding by another


def test_an_exported_net_is_dequantize_operator_quantize() -> None:
    program = torch.export.export(NET, (X,))
    assert (program.module()(X) - NET(X)).abs().max() <= STEPS
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"aten.conv2d.default", "quantized_decomposed.dequantize_per_channel.default"} <= targets
    assert not any("quantized::" in target for target in targets)


@pytest.mark.slow
def test_a_compiled_net_breaks_into_graphs_and_is_right() -> None:
    assert (torch.compile(NET, backend="aot_eager")(X) - NET(X)).abs().max() <= STEPS


def test_a_compiled_net_is_one_graph_where_wrap_is_allowed() -> None:
    torch.compiler.allow_in_graph(wrap)
    assert (torch.compile(NET, backend="aot_eager", fullgraph=True)(X) - NET(X)).abs().max() <= STEPS


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_torchscript_trace_follows_dynamic_modules_and_refuses_static_ones() -> None:
    dynamic: Any = quantized.dynamic.Linear(8, 4)
    traced, x = torch.jit.trace(dynamic, (torch.randn(3, 8),)), 3 * torch.randn(3, 8)
    torch.testing.assert_close(traced(x), dynamic(x))
    with pytest.raises(QuantizedTensorError, match=r"torch\.export"):
        torch.jit.trace(quantized.Quantize(0.1, 0, torch.quint8), (x,))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize(
    "module",
    [
        NET,
        quantized.DeQuantize(),
        quantized.dynamic.Linear(8, 4),
        quantized.dynamic.LSTM(4, 4),
        quantized.dynamic.GRUCell(4, 4),
        quantized.Embedding(4, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_torchscript_is_refused_with_the_way_out(module: nn.Module) -> None:
    with pytest.raises(QuantizedTensorError, match=r"torch\.jit\.script cannot compile .*torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(module))
