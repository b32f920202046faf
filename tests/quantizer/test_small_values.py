"""What a logarithm reads stays in float in static recipes: its small values count, and integers have none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.sqnr import sqnr
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export

aten = torch.ops.aten


class FilterBank(nn.Module):
    """The logarithm of a filter bank of squares, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        waves = torch.arange(64) * torch.arange(33)[:, None] * (2 * math.pi / 64)
        self.cosines, self.sines = (nn.Conv1d(1, 33, 64, stride=32, bias=False) for _ in range(2))
        self.bank, self.after = nn.Linear(33, 12, bias=False), nn.Conv1d(12, 8, 3)
        window = torch.hann_window(64)
        with torch.no_grad():
            self.cosines.weight.copy_((waves.cos() * window)[:, None])
            self.sines.weight.copy_((waves.sin() * window)[:, None])
            self.bank.weight.copy_(torch.rand(12, 33).pow(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        power = self.cosines(x).square() + self.sines(x).square()
        found = torch.log(self.bank(power.mT) + 1e-5).mT
        return found, self.after(found)


def fading(seed: int) -> Tensor:
    """Tones that fade away."""
    random, times = torch.Generator().manual_seed(seed), torch.arange(1024) / 400
    tones = [torch.rand(2, 1, generator=random) * torch.sin(2 * math.pi * f * times) for f in (20.0, 60.0, 150.0)]
    return (sum(tones) * torch.exp(-3 * times))[:, None]


def xnnpack() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def x86() -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def quality(model: nn.Module, quantizer: XNNPACKQuantizer | X86InductorQuantizer) -> list[float]:
    """SQNR of each output, on an input that calibration did not see."""
    prepared = prepare_pt2e(export(model, fading(0)), quantizer)
    for seed in range(4):
        prepared(fading(seed))
    converted = convert_pt2e(prepared)
    with torch.no_grad():
        return [sqnr(one, other) for one, other in zip(model(fading(9)), converted(fading(9)), strict=True)]


@pytest.mark.parametrize("make", [xnnpack, x86])
def test_a_filter_bank_stays_in_float_and_what_follows_does_not(make):
    """The layer behind it keeps what 8 bits give; selected by operator, the bank has a tenth of the signal as noise."""
    torch.manual_seed(0)
    model = FilterBank().eval()
    bank, after = quality(model, make())
    assert bank == math.inf
    assert 30 < after < math.inf
    asked = make()
    for name in ("cosines", "sines", "bank"):
        asked.set_module_name(name, configuration(make))
    assert quality(model, asked)[0] < 20


def configuration(make: Callable[[], object]) -> object:
    if make is xnnpack:
        return get_symmetric_quantization_config(is_per_channel=True)
    return get_default_x86_inductor_quantization_config()


class Net(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.f, self.g, self.h = function, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


READ: dict[str, tuple[Callable[..., Tensor], list[str | None]]] = {
    "at once": (lambda n, x: n.f(x).log(), ["magnified"]),
    "behind a floor": (lambda n, x: torch.log10(n.f(x).clamp(min=1e-6)), ["magnified"]),
    "as an energy": (lambda n, x: n.f(x).square().sum(-1).add(1e-6).log(), ["magnified"]),
    "moved": (lambda n, x: n.f(x).reshape(-1).log2(), ["magnified"]),
    "through a product": (lambda n, x: n.g(n.f(x).relu()).log(), ["magnified", "magnified"]),
    "through a product of two": (lambda n, x: (n.f(x) @ torch.ones(6, 6)).log(), ["magnified"]),
    "through two products": (lambda n, x: n.h(n.g(n.f(x)).relu()).log(), [None, "magnified", "magnified"]),
    "as one of several readers": (lambda n, x: (lambda y: n.g(y) + y.log())(n.f(x)), ["magnified", None]),
    "behind what has no small values": (lambda n, x: n.f(x).sigmoid().log(), [None]),
    "as a logarithm of 1 + x": (lambda n, x: n.f(x).log1p(), [None]),
    "as a divisor": (lambda n, x: x / n.f(x), ["magnified"]),
    "as what is divided": (lambda n, x: n.f(x) / x, [None]),
    "in a sum that divides": (lambda n, x: x / (n.f(x).abs() + 1e-3), [None]),
    "with a negative exponent": (lambda n, x: n.f(x).pow(-2), ["magnified"]),
    "as a norm": (lambda n, x: (lambda y: y * y.square().mean(-1, True).rsqrt())(n.f(x)), [None]),
}


@pytest.mark.parametrize(("function", "codes"), READ.values(), ids=READ)
def test_what_a_logarithm_reads(function, codes):
    prepared = prepare_pt2e(export(Net(function), torch.rand(4, 6)), xnnpack(), allow_empty=True)
    decisions = [one for one in explain(prepared).record.decisions if one.op == "aten.linear.default"]
    assert [one.code for one in decisions] == codes


DIVIDED: dict[str, Callable[..., Tensor]] = {
    "divided": lambda net, x: x / (net.f(x).abs() + 1e-3),
    "reciprocal": lambda net, x: (net.f(x).square() + 1e-3).reciprocal(),
    "rsqrt": lambda net, x: (net.f(x).square() + 1e-3).rsqrt(),
    "root": lambda net, x: x / (net.f(x).square() + 1e-3).sqrt(),
    "power": lambda net, x: (net.f(x).abs() + 1e-3).pow(-1.5),
}


@pytest.mark.parametrize("function", DIVIDED.values(), ids=DIVIDED)
def test_what_divides_is_never_rounded_to_zero(function):
    """A step of the sum is larger than the 1e-3 that keeps it from zero."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    prepared = prepare_pt2e(export(Net(function), x), xnnpack())
    prepared(x)
    assert convert_pt2e(prepared)(x).isfinite().all()


def test_dynamic_recipes_and_narrow_selectors_quantize_it_all_the_same():
    exported = export(Net(lambda net, x: net.f(x).log()), torch.rand(4, 6))
    for quantizer in (
        XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)),
        XNNPACKQuantizer().set_operator_type(aten.linear.default, get_symmetric_quantization_config()),
    ):
        (linear,) = [one for one in explain(prepare_pt2e(exported, quantizer)).record.decisions if "linear" in one.op]
        assert linear.quantized
