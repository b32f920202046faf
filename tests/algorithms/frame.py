"""What the tests of algorithms share: nets with weights that 4 bits hurt, quantized by XNNPACK's rules, and data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr

__all__ = ["Pair", "batches", "calibrated", "exported", "loss_of", "quantizer"]


def quantizer(weight_bits: int = 4, bits: int = 8, per_channel: bool = True) -> XNNPACKQuantizer:
    half, weight_half = 2 ** (bits - 1), 2 ** (weight_bits - 1)
    bounds = {"act_qmin": -half, "act_qmax": half - 1, "weight_qmin": 1 - weight_half, "weight_qmax": weight_half - 1}
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel, **bounds))


class Pair(nn.Module):
    """A convolution with batch norm, one without a bias, a residual sum, and a linear that is written twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU())
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.inner(x)).mean((2, 3))
        return self.tied(torch.relu(self.head(x)))


def batches(count: int = 4, rows: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(rows, 3, 6, 6, generator=generator),) for _ in range(count)]


@functools.cache
def exported(kind: type[nn.Module] = Pair) -> ExportedProgram:
    torch.manual_seed(1)
    shapes = ({0: torch.export.Dim("rows", min=2, max=512)},)
    return export(kind(), *batches()[0], dynamic_shapes=shapes)


def calibrated(
    program: ExportedProgram, weight_bits: int = 4, bits: int = 8, rows: Tensor | None = None
) -> GraphModule:
    prepared = prepare_pt2e(program, quantizer(weight_bits, bits))
    with torch.no_grad():
        for batch in batches() if rows is None else [(rows,)]:
            prepared(*batch)
    return prepared


@torch.no_grad()
def loss_of(program: ExportedProgram, prepared: GraphModule, data: list[tuple[Tensor]] | None = None) -> float:
    """SQNR in dB of what convert makes of a prepared model, against the float model."""
    data, exact, converted = data or batches(), program.module(), convert_pt2e(prepared)
    return sqnr(*(torch.cat([net(*batch) for batch in data]) for net in (exact, converted)))
