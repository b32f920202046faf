"""A program as they are written for torch.quantization; it knows nothing of pt2e_quant."""

import sys

import torch
import torch.nn as nn
import torch.nn.quantized as nnq
from torch.quantization import default_dynamic_qconfig, quantize_dynamic


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


torch.manual_seed(0)
model = Net().eval()
x = torch.randn(5, 2, 8)
quantized = quantize_dynamic(model, {nn.LSTM: default_dynamic_qconfig, nn.Linear: default_dynamic_qconfig})
assert type(quantized.head) is torch.nn.quantized.dynamic.Linear, type(quantized.head)
error = (quantized(x) - model(x)).abs().max().item()
assert error < 0.05, error

conv = nnq.Conv2d(3, 4, 3)
conv.set_weight_bias(torch.quantize_per_tensor(torch.randn(4, 3, 3, 3), 0.05, 0, torch.qint8), None)
conv.scale, conv.zero_point = 0.1, 64
y = conv(torch.quantize_per_tensor(torch.randn(1, 3, 8, 8), 0.05, 64, torch.quint8))
assert y.dequantize().shape == (1, 4, 6, 6)
print("done", *sys.argv[1:])
