"""Every class and function returns what torch 2.13 returned, with the creation of torch's quantized types forbidden."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pt2e_quant.kernels import onednn, using
from pt2e_quant.qtensor import QTensor
from tests.nn.cases import DYNAMIC, FUNCTIONS, MODULES, WRONG_IN_TORCH, ours
from tests.nn.make_golden import PATH, as_numbers

CREATORS = (
    "quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic", "_empty_affine_quantized",
    "_empty_per_channel_affine_quantized", "_make_per_tensor_quantized_tensor", "_make_per_channel_quantized_tensor",
)  # fmt: skip


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads(PATH.read_text())


@pytest.fixture(autouse=True)
def _forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a tensor of torch's quantized types was made")

    for name in CREATORS:
        monkeypatch.setattr(torch, name, refused)


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_results_are_torchs_to_one_step(name: str) -> None:
    module, arguments = {**MODULES, **FUNCTIONS}[name](ours())
    made, wanted = as_numbers(module(*arguments)), golden()[name]
    assert made["shape"] == wanted["shape"]
    if "values" in wanted:
        assert made["values"] == pytest.approx(wanted["values"], abs=1e-5)  # float32 sums in another order
        return
    assert (made["scale"], made["zero_point"]) == pytest.approx((wanted["scale"], wanted["zero_point"]), rel=1e-6)
    # one step: torch's kernels and ours round the last product in different places
    assert max(abs(a - b) for a, b in zip(made["codes"], wanted["codes"], strict=True)) <= 1


def exact(module: Any, x: Tensor) -> Tensor:
    """Real numbers in, real numbers out, in float64."""
    weight = module.product
    values = x.dequantize() if isinstance(x, QTensor) else x
    bias = None if weight.bias is None else weight.bias.double()
    return weight.apply(values.double(), weight.quantized.dequantize().double(), bias)


@pytest.mark.parametrize("name", WRONG_IN_TORCH)
def test_transposed_convolutions_are_exact_where_torch_is_not(name: str) -> None:
    module, (x,) = WRONG_IN_TORCH[name](ours())
    steps = (module(x).dequantize() - exact(module, x).clamp(-6.25, 9.6875)).abs().max() / module.scale
    assert steps <= 0.5 + 1e-3  # half a step, and what float32 leaves of the product of scales


def test_a_transposed_convolution_of_64_to_32_channels_is_exact() -> None:
    space = ours()
    module = space.q.ConvTranspose2d(64, 32, 2, stride=2)
    generator = torch.Generator().manual_seed(0)
    module.set_weight_bias(
        space.per_tensor(torch.randn(64, 32, 2, 2, generator=generator) / 8, 1 / 300, 0, torch.qint8), None
    )
    x = space.per_tensor(torch.randn(1, 64, 7, 7, generator=generator), 1 / 32, 128, torch.quint8)
    module.scale, module.zero_point = 1 / 25, 128
    assert sqnr(exact(module, x), module(x).dequantize()) > 35


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_products_are_as_good_as_eight_bits_of_input(name: str) -> None:
    module, (x,) = DYNAMIC[name](ours())
    wanted = exact(module, x)
    wanted = wanted.relu() if "ReLU" in name else wanted
    # 256 steps of values in [-2, 2], evenly spread: 4.8 dB + 20 log10(255 / 2) - 4.8 dB = 42 dB, less for few products
    assert sqnr(wanted, module(x)) > 40


def sqnr(wanted: Tensor, made: Tensor) -> float:
    noise = (wanted - made.double()).square().sum()
    return float(10 * torch.log10(wanted.square().sum() / noise))


@pytest.mark.parametrize("name", ["Linear", "ConvReLU2d", "ConvTranspose2d", "Conv3d"])
def test_without_onednn_everything_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = MODULES[name](ours())
    monkeypatch.setattr(onednn, "_absent", lambda: "not here")
    made = copy.deepcopy(module)(*arguments)
    with using("exact"):
        wanted = module(*arguments)
    assert torch.equal(made.int_repr(), wanted.int_repr())
