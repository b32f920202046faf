"""BERT, ViT and Llama export, prepare and convert, with fused and eager attention and dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.ops import LINEAR
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import sqnr
from tests.transformers_xnnpack.small_transformers import bert, export_tokens, llama, tokens, vit

pytest.importorskip("transformers")

DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
STATIC = get_symmetric_quantization_config(is_per_channel=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [bert, llama])
def test_every_linear_is_quantized_and_sizes_stay_dynamic(build, attention):
    model = build(attention)
    exported = export_tokens(model, batch=True)
    linears = sum(node.target in LINEAR for node in exported.graph.nodes)
    converted = convert_pt2e(prepare_pt2e(exported, XNNPACKQuantizer().set_global(DYNAMIC), require=["linear"]))
    quantized = [decision for decision in explain(converted).quantized if "linear" in decision.op]
    assert len(quantized) == linears
    inputs = tokens(length=9, batch=3, padding=2)
    with torch.no_grad():
        assert sqnr(model(*inputs), converted(*inputs)) > 30  # 8 bits: about 40 dB at one place, a chain of 7 here


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vit_is_quantized_with_a_dynamic_batch(attention):
    model = vit(attention)
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"pixels": {0: Dim("batch", max=8)}}
        )
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, DYNAMIC)
    converted = convert_pt2e(prepare_pt2e(exported, quantizer, require=["linear"]))
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert sqnr(model(x), converted(x)) > 30


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [bert, llama])
def test_masks_are_never_observed(build, attention):
    """With everything static that XNNPACK can run so, one observer of a mask would hold numbers of 3e38."""
    model = build(attention)
    prepared = prepare_pt2e(export_tokens(model, length=False), XNNPACKQuantizer().set_global(STATIC))
    with torch.no_grad():
        prepared(*tokens())
    highest = {
        name: float(module.max_val.abs().max())
        for name, module in prepared.named_modules()
        if getattr(module, "max_val", None) is not None and module.max_val.numel()
    }
    assert len(highest) > 10
    assert max(value for value in highest.values() if value != float("inf")) < 100
    masks = [d for d in explain(prepared).record.decisions if d.reason and "attention mask" in d.reason]
    assert masks


def test_a_mask_that_is_an_input_is_not_observed_either():
    class Attention(torch.nn.Module):
        def forward(self, scores, mask):
            return torch.softmax(scores * 2.0 + mask, -1)

    exported = torch.export.export(Attention(), (torch.randn(2, 4, 4), torch.zeros(2, 4, 4)))
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(STATIC))
    mask = torch.zeros(2, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    prepared(torch.randn(2, 4, 4), mask)  # an observer refuses -inf
    assert "attention mask" in next(d.reason for d in explain(prepared).record.decisions if d.node == "add")


def test_a_clamp_ends_a_mask():
    class Clamped(torch.nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, -1e30).clamp(-4.0, 4.0) + x

    prepared = prepare_pt2e(torch.export.export(Clamped(), (torch.randn(8),)), XNNPACKQuantizer().set_global(STATIC))
    assert "add" in {d.node for d in explain(prepared).record.decisions if d.quantized}
