"""Where SmoothQuant's division goes, or why it goes nowhere; whatever it does, the function stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant.algorithms import smooth_quant
from pt2e_quant.algorithms.smooth_quant import ALPHAS
from tests.transformers_xnnpack.small_transformers import calls

LINEAR = torch.ops.aten.linear.default
WIDTH, HEADS, NARROW = 16, 4, 2  # query heads of width 4, and key and value heads that two of them share


class Net(nn.Module):
    """Layers with an outlier in their second channel, put together by a function that ends in `last`."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.layer_norm, self.rms_norm = nn.LayerNorm(WIDTH, eps=1e-3), nn.RMSNorm(WIDTH, eps=1e-3)
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.first, self.gate, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.small = nn.Linear(WIDTH, WIDTH // HEADS * NARROW, bias=False)
        with torch.no_grad():
            for parameter in (self.layer_norm.weight, self.rms_norm.weight, self.gain, self.first.weight[:, 0]):
                parameter[1] = 40.0
            self.small.weight[1] *= 40.0
            nn.init.normal_(self.layer_norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def written_rms(net: Net, x: Tensor) -> Tensor:
    return net.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def written_layer_norm(net: Net, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return net.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)) + net.shift


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], -1, count, WIDTH // HEADS).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def repeated(x: Tensor) -> Tensor:
    batch, count, length, width = x.shape
    wide = x[:, :, None].expand(batch, count, HEADS // NARROW, length, width)
    return wide.reshape(batch, HEADS, length, width)


def attend(q: Tensor, v: Tensor, **kwargs) -> Tensor:
    return merged(F.scaled_dot_product_attention(q * 0.1, q, v, **kwargs))


def grouped_by_torch(net: Net, x: Tensor) -> Tensor:
    q, v = heads(net.gate(x), HEADS), heads(net.small(x), NARROW)
    return merged(F.scaled_dot_product_attention(q * 0.1, v, v.clone(), enable_gqa=True))


def eager(net: Net, x: Tensor, v: Tensor) -> Tensor:
    q = heads(net.gate(x), HEADS) * 0.1
    return merged(torch.softmax(q @ q.transpose(2, 3), -1) @ v)


FOLDED = {
    "layer_norm": (lambda n, x: n.layer_norm(x), "layer_norm"),
    "layer_norm, bare": (lambda n, x: F.layer_norm(x * n.gain, (WIDTH,)), "layer_norm"),
    "layer_norm, no bias": (lambda n, x: F.layer_norm(x, (WIDTH,), n.gain), "layer_norm"),
    "layer_norm, written out": (written_layer_norm, "mul"),
    "rms_norm": (lambda n, x: n.rms_norm(x), "rms_norm"),
    "rms_norm, bare": (lambda n, x: F.rms_norm(x * n.gain, (WIDTH,)), "rms_norm"),
    "rms_norm, written out": (written_rms, "mul"),
    "linear": (lambda n, x: n.first(x), "linear"),
    "linear, relu": (lambda n, x: torch.relu(n.first(x)), "linear"),
    "linear, leaky_relu": (lambda n, x: F.leaky_relu(n.first(x), 0.2), "linear"),
    "linear, moved": (lambda n, x: n.first(x).transpose(0, 1).clone(), "linear"),
    "gate": (lambda n, x: F.silu(n.gate(x)) * n.first(x), "linear"),
    "gate after": (lambda n, x: n.first(x) * F.gelu(n.gate(x)), "linear"),
    "attention": (lambda n, x: attend(heads(n.gate(x), HEADS), heads(n.first(x), HEADS)), "linear"),
    "attention, eager": (lambda n, x: eager(n, x, heads(n.first(x), HEADS)), "linear"),
    "attention, grouped heads": (
        lambda n, x: attend(heads(n.gate(x), HEADS), repeated(heads(n.small(x), NARROW))), "linear",
    ),
    "attention, grouped heads, eager": (lambda n, x: eager(n, x, repeated(heads(n.small(x), NARROW))), "linear"),
}  # fmt: skip
REFUSED = {
    "gelu": (lambda n, x: F.gelu(n.first(x)), "a factor does not pass through gelu"),
    "tanh": (lambda n, x: torch.tanh(n.first(x)), "a factor does not pass through tanh"),
    "clamp at six": (lambda n, x: F.relu6(n.first(x)), "does not pass through"),
    "square": (lambda n, x: (lambda y: y * y)(n.first(x)), "mul reads linear twice"),
    "transposed channels": (lambda n, x: n.first(x)[:, :WIDTH].transpose(1, 2), "channels are mixed"),
    "shared parameter": (lambda n, x: F.rms_norm(x * n.gain, (WIDTH,), n.gain), "other operators read it too"),
    "input": (lambda n, x: x, "is an input of the model"),
    "values that are keys, too": (grouped_by_torch, "is also read by"),
}
X = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.cat(
    (torch.tensor([1.0, 30.0]), torch.ones(WIDTH - 2))
)


def smoothed(function, x: Tensor = X, **kwargs):
    net = Net(lambda n, y: n.last(function(n, y))).eval()
    shapes = ({0: Dim("batch", max=8)},)
    gm, done = smooth_quant(torch.export.export(net, (x,), dynamic_shapes=shapes), [(x,)], **kwargs)
    return net, gm, done[-1]


@pytest.mark.parametrize("name", FOLDED)
def test_the_division_is_folded_and_the_function_stays(name):
    function, into = FOLDED[name]
    net, gm, last = smoothed(function, alphas=(0.5,), products=False)
    assert last.alpha == 0.5
    assert (last.folded_into or "").startswith(into)
    assert last.reason is None
    products = [len(calls(graph, torch.ops.aten.mul.Tensor)) for graph in (gm, torch.export.export(net, (X,)).module())]
    assert products[0] == products[1]
    x = torch.randn(3, 16, WIDTH)
    torch.testing.assert_close(gm(x), net(x), rtol=1e-4, atol=1e-4)  # sums of 16 in another order, values up to 100


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_algebra_does_not_hold_the_reason_is_given(name):
    function, reason = REFUSED[name]
    net, gm, last = smoothed(function, products=False)
    assert (last.alpha, last.gain, last.folded_into) == (0.0, 1.0, None)
    assert reason in last.reason
    torch.testing.assert_close(gm(X), net(X), rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_read_elsewhere_keeps_its_scale_and_says_who_reads_it():
    net = Net(lambda n, x: (lambda y: n.last(y) + y)(n.layer_norm(x))).eval()
    exported = torch.export.export(net, (X,))
    _, (done,) = smooth_quant(exported, [(X,)], products=False)
    assert done.reason == "layer_norm is also read by add"
    gm, (done,) = smooth_quant(exported, [(X,)])
    assert done.alpha > 0
    assert done.folded_into is None
    assert "layer_norm is also read by add" in str(done)
    torch.testing.assert_close(gm(X), net(X), rtol=1e-4, atol=1e-4)


def test_a_norm_that_several_linears_read_is_divided_once_for_all():
    net = Net(lambda n, x: (lambda y: n.last(y) + n.gate(y))(n.layer_norm(x))).eval()
    gm, (done,) = smooth_quant(torch.export.export(net, (X,)), [(X,)])
    assert done.linears == ("linear", "linear_1")
    assert done.folded_into == "layer_norm"
    torch.testing.assert_close(gm(X), net(X), rtol=1e-4, atol=1e-4)


def test_heads_that_were_repeated_share_a_factor():
    """Channel c of the merged heads stems from row (c // 8) * 4 + c % 4 of the values' linear: 4 heads out of 2."""
    net, gm, _ = smoothed(FOLDED["attention, grouped heads"][0], alphas=(0.5,))
    last = calls(gm, LINEAR)[-1]
    factor = (getattr(gm, str(last.args[1].target)) / net.last.weight)[0]
    rows = torch.tensor([c // 8 * 4 + c % 4 for c in range(WIDTH)])
    for row in range(8):
        torch.testing.assert_close(factor[rows == row], factor[rows == row][:1].expand(2))
    assert factor.max() / factor.min() > 2


def int8_error(x: Tensor, weight: Tensor, factor: Tensor) -> float:
    """Mean square of what int8 changes: one scale for all of x / s (256 steps), one for each row of W * s."""
    scaled, wide = x / factor, weight * factor
    low, high = min(float(scaled.min()), 0.0), max(float(scaled.max()), 0.0)
    scale = (high - low) / 255
    zero_point = min(max(round(-128 - low / scale), -128), 127)
    steps = wide.abs().amax(1, keepdim=True) / 127
    rounded = torch.fake_quantize_per_tensor_affine(scaled, scale, zero_point, -128, 127)
    return float((rounded @ ((wide / steps).round() * steps).T - x @ weight.T).pow(2).mean())


@pytest.mark.parametrize("outlier", [3.0, 300.0])
def test_alpha_is_the_one_with_the_smallest_measured_error(outlier):
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    x[:, 1] *= outlier
    net = nn.Sequential(nn.Linear(WIDTH, 8)).eval()
    _, (done,) = smooth_quant(torch.export.export(net, (x,)), [(x,)])
    weight, peak = net[0].weight.detach(), x.abs().amax(0)
    errors = {}
    for alpha in ALPHAS:
        factor = peak**alpha / weight.abs().amax(0) ** (1 - alpha) if alpha else torch.ones(WIDTH)
        errors[alpha] = int8_error(x, weight, factor / factor.log().mean().exp())
    assert done.alpha == min(errors, key=errors.get)
    assert done.gain == pytest.approx(errors[0.0] / errors[done.alpha], rel=0.02)


def test_alpha_is_chosen_for_each_layer():
    """A layer without outliers gains from another alpha, or from none, than one whose input has them."""
    torch.manual_seed(0)
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        first.weight[3] *= 100.0
    net = nn.Sequential(first, nn.ReLU(), second).eval()
    _, done = smooth_quant(torch.export.export(net, (X[..., :] / X.abs().amax((0, 1)),)), [(X / X.abs().amax((0, 1)),)])
    assert len({one.alpha for one in done}) == 2
