"""Models in bfloat16 and float16: integer kernels as in float32, and results as near to the real ones as the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.x86_inductor import X86InductorQuantizer
from tests.nets import randomize
from tests.x86.x86_rows import RECIPES, Net

CONV, SUM, LINEAR, ADDED = (
    "onednn.qconv_pointwise", "onednn.qconv2d_pointwise.binary", "onednn.qlinear_pointwise",
    "onednn.qlinear_pointwise.binary",
)  # fmt: skip


def _forward(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.stem(x))
    y = F.relu(net.second(F.hardswish(net.first(y))) + y).mean((2, 3))
    z = net.up(y)
    return torch.sigmoid(y + net.down(F.gelu(z)))


def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net(
        _forward, stem=nn.Conv2d(3, 8, 3, bias=False), first=nn.Conv2d(8, 8, 3, padding=1),
        second=nn.Conv2d(8, 8, 3, padding=1, groups=2), up=nn.Linear(8, 24), down=nn.Linear(24, 8),
    )  # fmt: skip
    return randomize(net).eval()


def noise(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).square().mean())


def compiled(recipe: str, dtype: torch.dtype, mode: str):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net = model().to(dtype)
    prepared = prepare_pt2e(
        torch.export.export(net, (x.to(dtype),)), X86InductorQuantizer().set_global(RECIPES[recipe])
    )
    with torch.no_grad():
        prepared(x.to(dtype))
        graph = convert_pt2e(prepared)
        program = lower_to_inductor(graph, mode=mode)
        found, wanted = program(x.to(dtype)), graph(x.to(dtype))
        real = model()
        real.load_state_dict(net.state_dict())
        return program, found, wanted, real(x)


def judge(dtype: torch.dtype, mode: str) -> None:
    program, found, wanted, real = compiled("static", dtype, mode)
    assert [" + ".join((kernel.kernel, *kernel.fused)) for kernel in program.kernels] == [
        f"{CONV} + quantize", f"{CONV} + hardswish + quantize", f"{SUM} + sum + quantize",
        f"{LINEAR} + gelu + quantize", f"{ADDED} + sum",
    ]  # fmt: skip
    half = str(dtype).removeprefix("torch.")
    assert {r.text for r in program.remarks} == {f"its kernel computes in float32, where the graph rounds to {half}"}
    assert found.dtype is wanted.dtype is dtype
    assert noise(found, real) <= 1.1 * noise(wanted, real)
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.0)  # a step of the coarsest grid after the sigmoid


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="without VNNI, 8 bits overflow in half precision")
def test_bfloat16_has_the_kernels_of_float32():
    judge(torch.bfloat16, "compile")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode"), [(torch.bfloat16, "aoti"), (torch.float16, "compile")])
def test_so_has_a_package_and_float16(dtype, mode):
    judge(dtype, mode)


@pytest.mark.slow
def test_linears_with_run_time_qparams_in_bfloat16():
    program, found, wanted, real = compiled("dynamic", torch.bfloat16, "compile")
    assert program.count("dynamic") == 2
    assert noise(found, real) <= 1.1 * noise(wanted, real)
