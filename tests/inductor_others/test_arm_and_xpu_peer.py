"""ArmInductorQuantizer and XPUInductorQuantizer beside torchao's: which ops are quantized, and to which numbers.

torchao's quantizers look for modules by source, so the exports are strict. What differs stands in a table, with the
reason. What Inductor matches is asked of Inductor on this machine: the patterns are the same on every device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import LoweringError, QuantizationError
from pt2e_quant.lowering.inductor import lower_to_inductor
from tests.inductor_others.others_rows import MODELS, converted, quantizer
from tests.nets import MLP, export

arm = pytest.importorskip("torchao.quantization.pt2e.quantizer.arm_inductor_quantizer")
xpu = pytest.importorskip("torchao.quantization.pt2e.quantizer.xpu_inductor_quantizer")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
engine = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")

DYNAMIC_CONV = "torchao computes qparams of convolutions at run time, which Inductor supports for linear only"
NO_CONV1D = "torchao's quantizer for Arm has no conv1d, Inductor packs it as it does conv2d"
CONV1D_RELU = "Inductor fuses the relu into it, and the kernel of Intel GPUs raises when it runs"
# (model, recipe): (only ours, only theirs, why)
DIFFERENCES = {
    ("branches", "arm, dynamic"): (set(), {"conv2d", "conv2d_1", "conv2d_2"}, DYNAMIC_CONV),
    ("chain", "arm, dynamic"): (set(), {"conv2d", "conv2d_1"}, DYNAMIC_CONV),
    ("signal", "arm"): ({"conv1d"}, set(), NO_CONV1D),
    ("signal", "xpu"): (set(), {"conv1d"}, CONV1D_RELU),
}
ASKED: dict[str, Any] = MODELS | {
    "signal": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.ReLU()), (2, 3, 9))
}


def reference(recipe: str) -> Any:
    """torchao's quantizer with its own default."""
    if recipe == "xpu":
        return xpu.XPUInductorQuantizer().set_global(xpu.get_default_xpu_inductor_quantization_config())
    config = arm.get_default_arm_inductor_quantization_config(is_dynamic="dynamic" in recipe)
    return arm.ArmInductorQuantizer().set_global(config)


def products(exported: torch.export.ExportedProgram, by: Any) -> set[str]:
    """The convolutions and linears of a graph that are quantized."""
    found = explain(prepare_pt2e(exported, by, allow_empty=True)).record.decisions
    return {d.node for d in found if d.quantized and d.op.startswith(("aten.conv", "aten.linear"))}


CASES = [(name, recipe) for name in ASKED for recipe in ("arm", "arm, dynamic", "xpu")]


@pytest.mark.parametrize(("name", "recipe"), [case for case in CASES if case != ("signal", "arm, dynamic")])
def test_the_same_products_are_quantized(name, recipe):
    make, shape = ASKED[name]
    exported = export(make(), torch.randn(shape), strict=True)
    ours, theirs = products(exported, quantizer(recipe)), products(exported, reference(recipe))
    only_ours, only_theirs, _ = DIFFERENCES.get((name, recipe), (set(), set(), ""))
    assert (ours - theirs, theirs - ours) == (only_ours, only_theirs)
    assert ours | theirs


@pytest.mark.parametrize("recipe", ["arm", "xpu"])
def test_a_padding_by_name_is_read_where_torchao_raises(recipe):
    exported = export(nn.Conv2d(3, 4, 3, padding="same"), torch.randn(2, 3, 8, 8), strict=True)
    with pytest.raises(QuantizationError, match="is not an aten conv2d operator"):
        products(exported, reference(recipe))
    assert products(exported, quantizer(recipe)) == {"conv2d"}


def through_torchao(name: str, by: Any) -> tuple[Tensor, Tensor]:
    """A model quantized by torchao alone, on the batch of `converted`: the batch, and what comes out."""
    torch.manual_seed(5)
    make, shape = MODELS[name]
    exported, x = export(make(), torch.zeros(shape), strict=True), torch.randn(shape)
    prepared = engine.prepare_pt2e(exported.module(), by)
    prepared(x)
    return x, engine.convert_pt2e(prepared)(x)


@pytest.mark.parametrize("name", MODELS)
def test_xpu_computes_what_torchao_computes(name):
    graph, x, _ = converted(name, quantizer("xpu"))
    same, theirs = through_torchao(name, reference("xpu"))
    assert torch.equal(x, same)
    torch.testing.assert_close(graph(x), theirs, rtol=1e-6, atol=1e-6)  # float32 rounding


ARM_CASES = [(name, dynamic) for name in ("attention", "mlp", "chain") for dynamic in (False, True)]


@pytest.mark.parametrize(("name", "dynamic"), [case for case in ARM_CASES if case != ("chain", True)])
def test_arm_computes_what_torchao_computes_with_the_numbers_of_x86(name, dynamic):
    """Those have a scale per output channel, as ours. Signed or not, dynamic activations have the same values.

    Not "branches": torchao quantizes the second operand of a sum as well, which no kernel reads on Arm.
    """
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    graph, x, _ = converted(name, quantizer("arm, dynamic" if dynamic else "arm"))
    _, theirs = through_torchao(name, arm.ArmInductorQuantizer().set_global(config))
    torch.testing.assert_close(graph(x), theirs, rtol=1e-6, atol=1e-6)  # float32 rounding


# --- why the recipe for Arm is not the reference's --------------------------------------------------------------------


def through_ours(by: Any) -> GraphModule:
    x = torch.randn(3, 10)
    prepared = prepare_pt2e(export(MLP(), x, strict=True), by)
    prepared(x)
    return convert_pt2e(prepared)


def test_inductor_packs_no_weights_with_one_scale_in_all():
    with pytest.raises(LoweringError, match="its weight has one scale in all") as raised:
        lower_to_inductor(through_ours(reference("arm")))
    assert "2 quantized operators fell back to floating point" in str(raised.value)


def test_inductor_packs_what_our_recipe_makes():
    kernels = lower_to_inductor(through_ours(quantizer("arm"))).kernels
    assert [kernel.kernel for kernel in kernels] == ["onednn.qlinear_pointwise"] * 2


def test_the_convolution_of_processors_takes_no_signed_activations():
    """The check stands before anything that depends on the processor."""
    weight, scales = torch.ones(4, 3, 3, 3, dtype=torch.int8), torch.ones(4)
    layout = ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, 0.1, 0, *layout, [1, 3, 8, 8])
    rest = (0.1, 0, packed, scales, torch.zeros(4, dtype=torch.int64), None, *layout, 1.0, 0, torch.float32, "none", [])
    unsigned = torch.ones(1, 3, 8, 8, dtype=torch.uint8)
    assert torch.ops.onednn.qconv_pointwise(unsigned, *rest, "").shape == (1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="should have uint8"):
        torch.ops.onednn.qconv_pointwise(unsigned.to(torch.int8), *rest, "")
