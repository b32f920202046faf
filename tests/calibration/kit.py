"""A small model prepared with any observer, and calibrated, for the tests of calibration files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pt2e_quant import prepare_pt2e
from pt2e_quant.observer import MSEObserver
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["EXPORTED", "batches", "calibrated", "prepared"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(6 * 5 * 5, 4)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.head(self.flat(y + side))


def exported():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5), torch.randn(2, 6, 5, 5)
    return torch.export.export(Net().eval(), x)


EXPORTED = exported()


def batches(number: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(2, 3, 5, 5) * (1 + n), torch.randn(2, 6, 5, 5)) for n in range(number)]


def prepared(kind: type = MSEObserver, **arguments):
    config = get_symmetric_quantization_config(is_per_channel=True)
    bounds = {name: arguments.pop(name) for name in ("quant_min", "quant_max") if name in arguments}
    constructor = kind.with_args(eps=2**-12, **arguments)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=constructor, **bounds)
    quantizer = XNNPACKQuantizer().set_global(
        replace(config, input_activation=activation, output_activation=activation)
    )
    return prepare_pt2e(EXPORTED, quantizer)


def calibrated(data, kind: type = MSEObserver, **arguments):
    model = prepared(kind, **arguments)
    for batch in data:
        model(*batch)
    return model
