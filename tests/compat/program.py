"""A program as they are written for torch.quantization; it knows nothing of pt2e_quant."""

import sys

import torch
import torch.nn as nn
import torch.nn.quantized as nnq
from torch.quantization import DeQuantStub, QuantStub, default_dynamic_qconfig, quantize_dynamic


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.sum = nnq.FloatFunctional()

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.sum.add(self.relu(self.bn(self.conv(x))), x))


def dynamic():
    model, x = Tagger().eval(), torch.randn(5, 2, 8)
    made = quantize_dynamic(model, {nn.LSTM: default_dynamic_qconfig, nn.Linear: default_dynamic_qconfig})
    assert type(made.head) is torch.nn.quantized.dynamic.Linear
    return made(x) - model(x)


def static():
    model, x = Block().eval(), torch.randn(2, 3, 8, 8)
    model = torch.quantization.fuse_modules(model, [["conv", "bn", "relu"]])
    model.qconfig = torch.quantization.get_default_qconfig("fbgemm")
    torch.quantization.prepare(model, inplace=True)
    expected = model(x)
    torch.quantization.convert(model, inplace=True)
    assert isinstance(model.sum, nnq.QFunctional)
    assert isinstance(model.conv, torch.nn.intrinsic.quantized.ConvReLU2d)
    return model(x) - expected


def trained():
    model, x = Block().train(), torch.randn(2, 3, 8, 8)
    model.qconfig = torch.quantization.get_default_qat_qconfig("fbgemm")
    torch.quantization.prepare_qat(model, inplace=True)
    assert isinstance(model.conv, torch.nn.qat.Conv2d)
    model(x).sum().backward()
    expected = model.eval()(x)
    return torch.quantization.convert(model)(x) - expected


torch.manual_seed(0)
for error in (dynamic(), static(), trained()):
    assert error.abs().max() < 0.1, error
print("done", *sys.argv[1:])
