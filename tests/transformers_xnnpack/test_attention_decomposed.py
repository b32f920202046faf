"""scaled_dot_product_attention as matmul, mask, softmax, matmul: the same values, asked for or by the backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import CaptureError
from pt2e_quant.graph.module import clone, finish
from pt2e_quant.passes.decompose_attention import decompose_attention
from pt2e_quant.quantizer import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.transformers_xnnpack.small_transformers import calls

SDPA = torch.ops.aten.scaled_dot_product_attention.default
B, H, S, T, D = 2, 4, 5, 7, 8


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def keep(*shape: int) -> Tensor:
    """A boolean mask that leaves each row something to see."""
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True
    return mask


def decomposed(function: Callable[..., Tensor], *inputs: Tensor, **kwargs: object) -> torch.fx.GraphModule:
    gm = clone(torch.export.export(Call(function), inputs, **kwargs).module())
    decompose_attention(gm)
    assert not calls(gm, SDPA)
    return finish(gm)


q, k, v = torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
additive = torch.zeros(B, 1, S, T).masked_fill(~keep(B, 1, S, T), -torch.inf)
lowest = additive.clamp(min=torch.finfo(torch.float32).min)
narrow = torch.randn(B, 2, T, D)

CASES = {
    "no mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (q, k, v)),
    "scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.37), (q, k, v)),
    "boolean": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (q, k, v, keep(B, 1, S, T))),
    "-inf": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (q, k, v, additive)),
    "finfo.min": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (q, k, v, lowest)),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)),
    "grouped heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (q, narrow, narrow.flip(0)),
    ),
    "no batch": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (q[0, 0], k[0, 0], v[0, 0])),
}


@pytest.mark.parametrize("name", CASES)
def test_values_agree_up_to_rounding(name):
    function, inputs = CASES[name]
    torch.testing.assert_close(decomposed(function, *inputs)(*inputs), function(*inputs), rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_nothing_is_zero_behind_a_boolean_mask():
    mask = keep(B, 1, S, T)
    mask[0, 0, 2] = False
    result = decomposed(CASES["boolean"][0], q, k, v, mask)(q, k, v, mask)
    assert torch.equal(result[0, :, 2], torch.zeros(H, D))
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_one_mask_becomes_numbers_once_for_all_layers():
    def two(q, k, v, m):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, m), k, v, m)

    gm = decomposed(two, q, k, v, keep(B, 1, S, T))
    assert len(calls(gm, torch.ops.aten.where.Scalar)) == 1


def test_sizes_stay_dynamic():
    shapes = [({0: Dim("batch", max=9), 2: Dim("length", max=9)},) * 3]
    function = CASES["causal"][0]
    gm = decomposed(function, q, q, q, dynamic_shapes=shapes)
    x = torch.randn(3, H, 4, D)
    torch.testing.assert_close(gm(x, x, x), function(x, x, x), rtol=1e-5, atol=1e-6)


def test_a_view_that_relied_on_the_layout_of_the_fused_kernel_still_works():
    def merge(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, S, H * D)

    torch.testing.assert_close(decomposed(merge, q, k, v)(q, k, v), merge(q, k, v), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.project(x), x, x)


def converted(quantizer, **kwargs):
    exported = torch.export.export(Attention().eval(), (q,))
    return convert_pt2e(prepare_pt2e(exported, quantizer, **kwargs))


def xnnpack():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))


def test_xnnpack_asks_for_it_by_default_also_in_a_composition():
    assert not calls(converted(xnnpack()), SDPA)
    composed = ComposableQuantizer([EmbeddingQuantizer(), xnnpack()])
    assert composed.decompose == {"sdpa", "rnn"}
    assert not calls(converted(composed), SDPA)


def test_nothing_is_decomposed_for_who_asks_for_nothing():
    assert len(calls(converted(xnnpack(), decompose=()), SDPA)) == 1


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(CaptureError, match=r"'spda' is not known\. Did you mean 'sdpa'\?"):
        converted(xnnpack(), decompose={"spda"})
