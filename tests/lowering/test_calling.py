"""A program takes every layout of its inputs, whatever the layout of the examples that it was compiled with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.common.calling import CallingConvention
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

CHANNELS_LAST = torch.channels_last


def _quantized(quantizer: Any, example: Tensor) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)).eval()
    prepared = prepare_pt2e(torch.export.export(model, (example,)), quantizer)
    with torch.no_grad():
        prepared(torch.randn(2, 4, 9, 7))
    return convert_pt2e(prepared)


def _layouts(x: Tensor) -> list[Tensor]:
    return [x, x.contiguous(memory_format=CHANNELS_LAST), x.transpose(2, 3).contiguous().transpose(2, 3)]


EXAMPLES = {
    "channels last": torch.randn(2, 4, 9, 7).contiguous(memory_format=CHANNELS_LAST),
    "a view": torch.randn(7, 9, 4, 2).permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("mode", ["compile", pytest.param("aoti", marks=pytest.mark.slow)])
def test_inductor_takes_every_layout_behind_a_channels_last_example(mode: Any) -> None:
    config = get_default_x86_inductor_quantization_config()
    converted = _quantized(X86InductorQuantizer().set_global(config), EXAMPLES["channels last"])
    program = lower_to_inductor(converted, mode=mode)
    x = torch.randn(2, 4, 9, 7)
    wanted = converted(x)
    for given in _layouts(x):
        torch.testing.assert_close(program(given), wanted)  # the same integers; float sums in another order


@pytest.mark.parametrize("example", EXAMPLES)
def test_executorch_takes_every_layout(example: str) -> None:
    config = get_symmetric_quantization_config(is_per_channel=True)
    converted = _quantized(XNNPACKQuantizer().set_global(config), EXAMPLES[example])
    program = lower_to_executorch(converted)
    x = torch.randn(2, 4, 9, 7)
    first, *others = [program.run(given)[0] for given in _layouts(x)]
    assert all(torch.equal(first, other) for other in others)
    step = (converted(x) - first).unique().abs().max() / (first.unique().diff().min())
    assert step <= 1.01  # XNNPACK rounds ties otherwise than PyTorch: one step of the output at most


def test_examples_keep_channels_last_and_lose_other_strides() -> None:
    last = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    view, number = torch.randn(5, 4).t(), 3
    calling = CallingConvention.of((last, view), {"number": number})
    assert calling.layouts == (torch.channels_last_3d, torch.contiguous_format, torch.contiguous_format)
    (laid, plain), kwargs = calling.plain((last, view), {"number": number})
    assert laid is last
    assert plain.stride() == (5, 1)
    assert kwargs == {"number": 3}


def test_one_channel_counts_as_contiguous() -> None:
    x = torch.randn(2, 1, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    assert CallingConvention.of((x,), {}).layouts == (torch.contiguous_format,)


def test_other_containers_are_refused() -> None:
    calling = CallingConvention.of(([torch.zeros(2)],), {})
    with pytest.raises(LoweringError, match="containers as the model takes them"):
        calling.flatten((torch.zeros(2),), {})
