"""absorb_biases: outputs stay where all values are above what is absorbed, and ranges shrink."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2e_quant.algorithms import absorb_biases
from tests.nets import sqnr

X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def high(second: nn.Module) -> nn.Module:
    """A convolution whose results lie far above 0, and what reads them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), second).eval()
    with torch.no_grad():
        net[0].bias += torch.arange(8.0) * 4
    return net


READERS = {
    "conv": lambda: nn.Conv2d(8, 4, 3),
    "groups": lambda: nn.Conv2d(8, 4, 3, groups=2),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 4)),
}


@pytest.mark.parametrize("name", READERS)
def test_outputs_stay_and_the_bias_is_smaller(name):
    """Of a channel, 1 in 700 values lies 3 deviations and more below the mean, and is cut there: more than 45 dB."""
    net = high(READERS[name]())
    gm, (done,) = absorb_biases(torch.export.export(net, (X,)), [(X,)])
    assert sqnr(net(X), gm(X)) > 45
    assert done.channels >= 6
    assert 20 < done.largest < 30


def test_a_reader_that_pads_is_left_alone():
    _, (done,) = absorb_biases(torch.export.export(high(nn.Conv2d(8, 4, 3, padding=1)), (X,)), [(X,)])
    assert done.reason == "conv2d_1 pads with zeros"


def test_without_a_relu_there_is_nothing_to_absorb():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    _, (done,) = absorb_biases(torch.export.export(net, (X,)), [(X,)])
    assert done.reason == "there is no relu between them"
