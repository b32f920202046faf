"""The situations of torchao's tests of its x86 quantizer, through both engines.

Rebuilt small. Converted graphs are equal, or differ as DIFFERENT says. Both engines get the same export, which is
strict, as torchao's quantizer reads sources. What the programs compute is tested in test_x86_situations.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pt2e_quant
from pt2e_quant.quantizer import QuantizationConfig
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from tests.peer.canonical import differences
from tests.peer.graphs import Net

peer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
engine = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")

pytestmark = pytest.mark.slow
IMAGE, ROWS, HEADS = (2, 3, 8, 8), (2, 16), (2, 4, 16)
Made = Callable[[], nn.Module]


def conv(*sizes: int) -> nn.Conv2d:
    return nn.Conv2d(*sizes, padding=1)


def linears(function: Callable[..., Tensor], *names: str) -> Made:
    return lambda: Net(function, **{name: nn.Linear(16, 16) for name in names})


def _residuals(net: Net, x: Tensor) -> Tensor:
    y = net.first(x)
    y = F.relu(net.second(y) + net.third(y))
    return F.relu(net.fourth(y) + y)


def _twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x).flatten(2)
    return torch.cat([y, y], -1).transpose(1, 2)


def _read_twice(net: Net, x: Tensor) -> Tensor:
    y = net.first(x)
    return y + net.second(y)


def _attention(net: Net, x: Tensor) -> Tensor:
    query, key, value = (part(x).view(2, 4, 4, 4).permute(0, 2, 1, 3) for part in (net.query, net.key, net.value))
    return (query @ key.transpose(-1, -2) / 4).softmax(-1) @ value


def _pooled(net: Net, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(net.conv(x)), 1).pow(2)


FOUR = ("first", "second", "third", "fourth")
EQUAL: dict[str, tuple[Made, tuple[int, ...]]] = {
    "a convolution": (lambda: conv(3, 6, 3), IMAGE),
    "its sum with another tensor": (lambda: Net(lambda net, x: net.conv(x) + x.relu(), conv=conv(3, 3, 3)), IMAGE),
    "in place": (lambda: Net(lambda net, x: net.conv(x).add_(x.relu()), conv=conv(3, 3, 3)), IMAGE),
    "residuals": (lambda: Net(_residuals, **{name: conv(3, 3, 3) for name in FOUR}), IMAGE),
    "linear and gelu": (lambda: nn.Sequential(nn.Linear(16, 16, bias=False), nn.GELU("tanh")), ROWS),
    "sum of two linears": (linears(lambda net, x: F.relu(net.first(x) + net.second(x)), *FOUR[:2]), ROWS),
    "residuals of linears": (linears(_residuals, *FOUR), ROWS),
    "attention": (linears(_attention, "query", "key", "value"), HEADS),
}
INTEGERS_FOR_FLOATS = "integers alone between floats cost a conversion and precision"
DIFFERENT: dict[str, tuple[Made, tuple[int, ...], str, list[str], str]] = {
    # model, shape of its input, recipe, what differs as 'site: ours / theirs', and why
    "a pool that floats read": (
        lambda: Net(_pooled, conv=conv(3, 3, 3)), IMAGE, "static",
        [
            "max_pool2d.default#0[0]: float of relu.default#0 / uint8 per tensor of relu.default#0",
            "pow.Tensor_Scalar#0[0]: float of max_pool2d.default#0 / uint8 per tensor of max_pool2d.default#0",
        ],
        INTEGERS_FOR_FLOATS,
    ),
    "one tensor twice": (
        lambda: Net(_twice, conv=conv(3, 6, 4)), IMAGE, "static",
        [
            "cat.default#0[0]: float of flatten.using_ints#0 / uint8 per tensor of flatten.using_ints#0",
            "cat.default#0[1]: float of flatten.using_ints#0 / uint8 per tensor of flatten.using_ints#0",
            "flatten.using_ints#0[0]: float of conv2d.default#0 / uint8 per tensor of conv2d.default#0",
            "transpose.int#0[0]: float of cat.default#0 / uint8 per tensor of cat.default#0",
        ],
        INTEGERS_FOR_FLOATS,
    ),
    "a linear that a sum and a linear read": (
        linears(_read_twice, *FOUR[:2]), ROWS, "static",
        ["add.Tensor#0[0]: uint8 per tensor of linear.default#0 / float of linear.default#0"],
        "the kernel of the first ends in integers for the second; there, it ends in float for the sum",
    ),
    "qparams at run time": (
        lambda: nn.Linear(16, 8), ROWS, "dynamic",
        ["linear.default#0[0]: uint8 per tensor at run time of input input, other qparams"],
        "there, a scale is at least 2**-12, so a range below 0.06 has fewer than 255 steps",
    ),
    "a product of two tensors, asked for": (
        linears(lambda net, x: net.first(x) * x, "first"), ROWS, "static, products",
        [
            "mul.Tensor#0[0]: float of linear.default#0 / uint8 per tensor of linear.default#0",
            "mul.Tensor#0[1]: float of input inputs_0 / uint8 per tensor of input inputs_0",
        ],
        "Inductor has no integer kernel for it",
    ),
    "two readers at run time, trained": (
        linears(lambda net, x: net.first(x) + net.second(x), *FOUR[:2]), ROWS, "trained, dynamic",
        ["dequantize_per_tensor.tensor: 2 / 1 times"],
        "each reader has a dequantize of its own, as with static qparams",
    ),
}  # fmt: skip


@functools.cache
def both(make: Made, shape: tuple[int, ...], recipe: str) -> list[str]:
    """How the two converted graphs differ."""
    torch.manual_seed(0)
    training, model, x = "trained" in recipe, make(), torch.randn(shape)
    exported = torch.export.export(model.train(training), (x,), strict=True)
    options = {"is_qat": training, "is_dynamic": "dynamic" in recipe}
    converted = []
    for module, quantizer, default in (
        (pt2e_quant, X86InductorQuantizer(), get_default_x86_inductor_quantization_config),
        (engine, peer.X86InductorQuantizer(), peer.get_default_x86_inductor_quantization_config),
    ):
        quantizer.set_global(default(**options))
        if "products" in recipe:
            quantizer.set_function_type_qconfig(torch.mul, default(**options))
        prepare = module.prepare_qat_pt2e if training else module.prepare_pt2e
        prepared = prepare(exported.module(), quantizer)
        prepared(x)
        converted.append(module.convert_pt2e(prepared))
    return differences(*converted)


@pytest.mark.parametrize("name", EQUAL)
def test_converted_graphs_are_equal(name):
    assert both(*EQUAL[name], "static") == []


def gap(module: ModuleType, quantizer: X86InductorQuantizer, config: QuantizationConfig) -> float:
    """The largest difference between what a linear returns while it is trained and after convert."""
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    exported = torch.export.export(nn.Linear(16, 16), (x,), strict=True).module()
    prepared = module.prepare_qat_pt2e(exported, quantizer.set_global(config))
    trained = prepared(x)
    return float((module.convert_pt2e(prepared)(x) - trained).detach().abs().max())


def test_weights_are_trained_on_the_grid_that_convert_writes():
    """There, steps of weights are 127.5 / 128 of those while they are trained."""
    ours = get_default_x86_inductor_quantization_config(is_qat=True)
    theirs = peer.get_default_x86_inductor_quantization_config(is_qat=True)
    assert gap(pt2e_quant, X86InductorQuantizer(), ours) <= 1e-6  # float32's rounding of outputs near 1
    assert gap(engine, peer.X86InductorQuantizer(), theirs) > 1e-3


@pytest.mark.parametrize("name", DIFFERENT)
def test_converted_graphs_differ_only_on_purpose(name):
    make, shape, recipe, lines, _ = DIFFERENT[name]
    assert both(make, shape, recipe) == lines
