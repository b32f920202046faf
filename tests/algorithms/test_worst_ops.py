"""worst_ops on nets of convolutions: what one costs when quantized alone, and what leaving out the worst brings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import Sensitivity, worst_ops
from pt2e_quant.observer import MinMaxObserver
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr

_STATIC = get_symmetric_quantization_config(is_per_channel=True)
_WHOLE = replace(_STATIC.input_activation, observer_or_fake_quant_ctr=MinMaxObserver)
STATIC = replace(_STATIC, input_activation=_WHOLE, output_activation=_WHOLE)  # whole ranges, as worst_ops takes them


def data(count: int = 2) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(2, 3, 9, 9, generator=generator),) for _ in range(count)]


def static_sqnr(model: nn.Module, exported: torch.export.ExportedProgram, left: list[Sensitivity] = ()) -> float:
    """Of the converted graph, over all batches, with some ops left in float."""
    quantizer = XNNPACKQuantizer().set_global(STATIC)
    for op in left:
        quantizer.set_node_name(op.node, None)
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in data():
            prepared(*batch)
        converted = convert_pt2e(prepared)
        exact, rounded = (torch.cat([net(*batch) for batch in data()]) for net in (model, converted))
    return sqnr(exact, rounded)


ALONE: dict[str, list[nn.Module]] = {
    "conv, batch norm, relu": [nn.Conv2d(3, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU()],
    "depthwise, relu6": [nn.Conv2d(3, 6, 3, groups=3, stride=2), nn.ReLU6()],
    "transposed": [nn.ConvTranspose2d(3, 5, 2, stride=2)],
}


@pytest.mark.parametrize("name", ALONE)
def test_a_convolution_alone_costs_what_the_converted_graph_loses(name):
    """The same grids, up to the smallest scale that an observer allows; float32 moves values on an edge: 0.1 dB."""
    torch.manual_seed(2)
    model = nn.Sequential(*ALONE[name]).eval()
    exported = export(model, *data()[0])
    fallen, kept = worst_ops(exported, data(), target=0.0)
    assert not fallen
    assert kept[0].sqnr == pytest.approx(static_sqnr(model, exported), abs=0.1)


class Stretched(nn.Module):
    """Four convolutions; one channel of what the third reads is a hundred times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2)
        with torch.no_grad():
            self.b.weight[3] *= 100.0
            self.c.weight[:, 3] /= 100.0

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


def test_a_net_of_convolutions_is_told_which_to_leave_in_float():
    """What makes the large channel and what reads it have its range; with both in float, 25 dB become 47."""
    model = Stretched().eval()
    exported = export(model, *data()[0])
    plain = static_sqnr(model, exported)
    fallen, kept = worst_ops(exported, data(), target=plain + 10)
    assert {op.module for op in fallen} == {"b", "c"}
    assert {op.module for op in kept} == {"a", "d"}
    assert static_sqnr(model, exported, fallen) > plain + 10
