"""EmbeddingQuantizer: which integers, which scales, what is refused, and what a tied output layer does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import SharingError, SpecError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.observer import PerGroupMinMaxObserver
from pt2e_quant.quantizer import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.x86_inductor import X86InductorQuantizer
from quantizers.x86_inductor import get_default_x86_inductor_quantization_config as X86
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config
from tests.transformers_xnnpack.small_transformers import calls

IDS = torch.tensor([[3, 0, 9], [1, 1, 7]])


class Table(nn.Module):
    def __init__(self, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, width, padding_idx=0)
        self.head = nn.Linear(width, 10, bias=False) if tied else None
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x if self.head is None else self.head(torch.tanh(x))


def converted(model: nn.Module, *quantizers):
    return convert_pt2e(prepare_pt2e(torch.export.export(model, (IDS,)), ComposableQuantizer(quantizers)))


def by_hand(weight: Tensor, high: int, group: int) -> Tensor:
    """Symmetric rounding with one scale for each `group` neighbours; -8..7 has its scale from 2 b / 15."""
    groups = weight.detach().reshape(-1, group)
    reach = groups.abs().amax(1, keepdim=True).clamp_min(1e-3)  # the row of padding_idx is 0
    scale = reach / 127 if high == 127 else 2 * reach / 15
    return (torch.clamp(torch.round(groups / scale), -127 if high == 127 else -8, high) * scale).reshape(weight.shape)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, None), (4, 4)])
def test_values_are_rounded_as_by_hand(bits, group):
    model = Table()
    result = converted(model, EmbeddingQuantizer(get_embedding_config(bits, group)))(IDS)
    table = by_hand(model.table.weight, 127 if bits == 8 else 7, group or 8)
    torch.testing.assert_close(result, table[IDS], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "group"), [(8, 4), (4, 4)])
def test_the_program_returns_the_same_numbers(bits, group):
    pytest.importorskip("executorch")
    graph = converted(Table(), EmbeddingQuantizer(get_embedding_config(bits, group)))
    program = lower_to_executorch(graph, (IDS,))
    torch.testing.assert_close(program.run(IDS)[0], graph(IDS), rtol=1e-6, atol=1e-7)
    assert [left.op for left in program.undelegated] == [
        f"quantized_decomposed.embedding_{'byte' if bits == 8 else '4bit'}.default"
    ]


REFUSALS = {
    "groups": (get_embedding_config(8, 3), 8, "rows of 8 do not split into groups of 3"),
    "half a byte": (get_embedding_config(4), 7, "rows of 7 values of 4 bits do not fill bytes"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_kernel_stays_float_with_the_reason(name):
    config, width, reason = REFUSALS[name]
    exported = torch.export.export(Table(width), (IDS,))
    prepared = prepare_pt2e(exported, EmbeddingQuantizer(config), allow_empty=True)
    assert reason in next(d.reason for d in explain(prepared).record.decisions if d.node == "embedding")


def test_other_widths_are_refused():
    with pytest.raises(SpecError, match="8 or 4 bits, got 6"):
        get_embedding_config(6)


def test_a_tied_table_of_the_same_integers_is_stored_once():
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    graph = converted(Table(tied=True), EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config))
    stored = [name for name, value in graph.named_buffers() if value.dtype is torch.int8]
    assert len(stored) == 1
    assert not [value for value in graph.parameters() if value.dim() == 2]


def test_a_tied_table_of_other_integers_is_refused_by_name():
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    with pytest.raises(SharingError, match=r"'head\.weight' would be stored 2 times, each time as other integers"):
        converted(Table(tied=True), EmbeddingQuantizer(get_embedding_config(4)), XNNPACKQuantizer().set_global(config))


DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


def test_a_tied_table_is_stored_twice_in_a_file_for_xnnpack_and_a_remark_says_so():
    """800 values: for the look-up 800 bytes beside the delegate, and 800 inside of it that XNNPACK has packed."""
    pytest.importorskip("executorch")
    quantizers = EmbeddingQuantizer(), XNNPACKQuantizer().set_global(DYNAMIC)
    tied, apart = (lower_to_executorch(converted(Table(80, tied=one), *quantizers), (IDS,)) for one in (True, False))
    assert [remark.node for remark in tied.remarks] == ["embedding"]
    assert "840 bytes more than once" in tied.remarks[0].text  # and ten scales
    assert not apart.remarks
    assert tied.sizes.constants >= 800
    assert tied.sizes.delegates >= 800


TIED = {
    "linear alone": ([XNNPACKQuantizer().set_global(DYNAMIC)], "embedding", "as integers for linear"),
    "linear alone, x86": ([X86InductorQuantizer().set_global(X86(is_dynamic=True))], "embedding", "for linear"),
    "table alone": ([EmbeddingQuantizer()], "linear", "as integers for embedding"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_that_one_side_quantizes_is_stored_twice_and_the_other_says_why(name):
    quantizers, left, told = TIED[name]
    graph = converted(Table(tied=True), *quantizers)
    sizes = {value.dtype: value.numel() for value in graph.state_dict().values() if value.dim() == 2}
    assert sizes == {torch.int8: 80, torch.float32: 80}
    (reason,) = (decision.reason for decision in explain(graph).skipped if decision.node == left)
    assert "so head.weight is stored in float here and " in reason
    assert told in reason


def test_a_tied_table_for_inductor_is_stored_once_under_one_spec_and_a_conflict_is_named():
    """oneDNN's weights have 256 codes, EmbeddingQuantizer's 255; the x86 quantizer can do both with its own."""
    config = X86(is_dynamic=True)
    with pytest.raises(SharingError, match=r"'head\.weight' would be stored 2 times"):
        converted(Table(tied=True), EmbeddingQuantizer(), X86InductorQuantizer().set_global(config))
    quantizer = X86InductorQuantizer().set_global(config)
    quantizer.set_function_type_qconfig(F.embedding, config.weight_only())
    model = Table(16, tied=True)
    graph = converted(model, quantizer)
    assert [value.numel() for value in graph.state_dict().values() if value.dim() == 2] == [160]
    program = lower_to_inductor(graph, (IDS,))
    assert {kernel.node for kernel in program.kernels} == {"embedding", "linear"}
    torch.testing.assert_close(program(IDS), graph(IDS), rtol=1e-4, atol=1e-5)


def test_groups_have_scales_of_their_rows_rounded_to_what_is_stored():
    observer = PerGroupMinMaxObserver(4, quant_min=-8, quant_max=7, scale_dtype=torch.bfloat16)
    weight = torch.randn(3, 8)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    expected = (weight.reshape(3, 2, 4).abs().amax(-1) * 2 / 15).to(torch.bfloat16).float()
    assert torch.equal(scale, expected)
    assert not zero_point.any()


def test_groups_that_do_not_fill_a_row_are_refused():
    with pytest.raises(SpecError, match="not a matrix whose rows split into groups of 3"):
        PerGroupMinMaxObserver(3)(torch.randn(2, 8))


def test_xnnpack_takes_groups_of_32_and_leaves_rows_that_do_not_fill_them():
    with pytest.raises(SpecError, match="multiple of 32, got 16"):
        get_8da4w_config(16)
    exported = torch.export.export(nn.Linear(40, 8), (torch.randn(2, 40),))
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(get_8da4w_config()), allow_empty=True)
    assert "its 40 inputs do not split into groups of 32" in explain(prepared).record.decisions[0].reason


def test_two_tables_with_one_weight_share_a_kernel_constant():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) + self.table(ids + 1)

    graph = converted(Twice(), EmbeddingQuantizer())
    assert len(calls(graph, torch.ops.aten.embedding.default)) == 2
    assert sum(value.dtype is torch.int8 for _, value in graph.named_buffers()) == 1
