"""Values to one side of zero (softmax, gelu, silu, attention over positive values) have grids that are, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.ops import is_dequantize
from quantizers.arm_inductor import ArmInductorQuantizer, get_default_arm_inductor_quantization_config
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.xpu_inductor import XPUInductorQuantizer, get_default_xpu_inductor_quantization_config

QUANTIZERS = {
    "xnnpack": XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    "x86": X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "onnx": OnnxRuntimeQuantizer().set_global(get_onnx_runtime_quantization_config()),
    "xpu": XPUInductorQuantizer().set_global(get_default_xpu_inductor_quantization_config()),
    "arm": ArmInductorQuantizer().set_global(get_default_arm_inductor_quantization_config()),
}
ONE_SIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: (3 * x).softmax(-1),
    "gelu": F.gelu,
    "silu": F.silu,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x.abs()),
}


class Between(nn.Module):
    """A function between two linears."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("function", ONE_SIDED.values(), ids=ONE_SIDED)
def test_the_grid_reaches_as_far_as_the_values_and_zero(quantizer, function):
    net, x = Between(function).eval(), 2 * torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    prepared = prepare_pt2e(torch.export.export(net, (x,)), quantizer)
    prepared(x)
    last = [node for node in convert_pt2e(prepared).graph.nodes if "linear" in node.name][-1]
    assert is_dequantize(last.args[0])
    _, scale, zero_point, quant_min, quant_max, *_ = last.args[0].args
    values = function(net.first(x)).detach()
    ends = min(float(values.min()), 0.0), float(values.max())
    # rounding the zero point moves both ends by half a step, a search for the least square error by a few
    assert (quant_min - zero_point) * scale == pytest.approx(ends[0], abs=4 * scale)
    assert (quant_max - zero_point) * scale == pytest.approx(ends[1], abs=4 * scale)
