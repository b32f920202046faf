"""equalize: the function stays, ranges of channels meet, and what no factor passes has a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import equalize
from tests.algorithms.frame import quantizer
from tests.nets import ConvNet, export, sqnr

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def stretched(net: nn.Module) -> nn.Module:
    """Rows of the first weight from a hundredth to a hundred times as large."""
    torch.manual_seed(3)
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    with torch.no_grad():
        first.weight *= torch.logspace(-2, 2, len(first.weight)).reshape(-1, *[1] * (first.weight.dim() - 1))
    return net.eval()


NETS = {
    "conv, relu, conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "conv, norm, relu, depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)
    ),
    "conv, pad, groups": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3, groups=2)),
    "conv, leaky relu, max pool, transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 2, groups=2)
    ),
    "conv, average pools, flatten, linear": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ),
    "linear, relu, linear": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5, bias=False)),
    "several readers": lambda: Several(),
}


class Several(nn.Module):
    """Two convolutions read what one makes; a mean over places, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_and_ranges_meet(name):
    torch.manual_seed(0)
    net = stretched(NETS[name]())
    gm, done = equalize(export(net, X))
    pair = next(one for one in done if one.reason is None)
    assert pair.after[1] / pair.after[0] < pair.before[1] / pair.before[0] / 20  # of 10,000, the root remains
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(gm(x), net(x), rtol=1e-4, atol=1e-4)  # sums of float32 whose terms were scaled


def test_ranges_of_a_pair_become_the_root_of_their_product():
    """Rows 4 and 1, columns 1 and 9: both sides have 2 and 3."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0], [1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, -9.0]]))
    gm, (_, pair) = equalize(torch.export.export(net, (torch.ones(1, 1),)))
    assert (pair.before, pair.after) == ((1.0, 4.0), (2.0, 3.0))
    assert [value.abs().flatten().tolist() for value in gm.parameters() if value.dim() == 2] == [[2, 3], [2, 3]]


def test_weights_with_one_scale_lose_less():
    """Rows of a hundredth to a hundred times the size, and columns that undo that: one scale of 8 bits loses most."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    sizes = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        net[0].weight *= sizes.reshape(-1, 1, 1, 1)
        net[0].bias *= sizes
        net[2].weight /= sizes.reshape(1, -1, 1, 1)
    program = export(net, X)
    found = []
    for model in (program, equalize(program)[0]):
        prepared = prepare_pt2e(model, quantizer(weight_bits=8, per_channel=False))
        prepared(X)
        found.append(sqnr(net(X), convert_pt2e(prepared)(X)))
    assert found[1] > found[0] + 15


def test_relu6_is_in_the_way_unless_it_may_become_a_relu():
    program = export(ConvNet(), X)
    _, done = equalize(program)
    assert "does not pass through hardtanh" in " ".join(one.reason or "" for one in done)
    gm, done = equalize(program, replace_relu6=True)
    assert len([one for one in done if one.reason is None]) == 2
    assert not [node for node in gm.graph.nodes if "relu6" in str(node.target) or "hardtanh" in str(node.target)]


def test_what_is_read_elsewhere_is_left_alone():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + self.second(x)

    _, done = equalize(export(Residual(), X))
    assert [one.reason for one in done] == [
        "x is an input of the model or a parameter",
        "conv2d is also read by add",
    ]


def test_channels_are_followed_past_a_size_that_data_decides():
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x[x[:, 0] > 0.5])

    x = torch.rand(9, 4)
    net = stretched(Picked())
    gm, done = equalize(export(net, x))
    assert [one.reason for one in done if one.producer] == [None]
    assert torch.allclose(gm(x), net(x), rtol=1e-4, atol=1e-5)
