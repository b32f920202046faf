"""What may happen between prepare and convert, and what quantizers of others may do: the contract of the ecosystem."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError, ConversionError
from pt2e_quant.quantizer import ComposableQuantizer, Quantizer
from tests.nets import export
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, annotate, calls, the_call

aten = torch.ops.aten


def drop_dead(prepared: GraphModule) -> GraphModule:
    prepared.graph.eliminate_dead_code()
    prepared.recompile()
    return prepared


@pytest.mark.parametrize("hygiene", [drop_dead, lambda gm: copy.deepcopy(drop_dead(gm))], ids=["dead", "dead, copied"])
def test_dead_code_elimination_before_convert_changes_nothing(hygiene: Callable[[GraphModule], GraphModule]):
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    prepared = prepare_pt2e(export(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), x), Toy(STATIC))
    prepared(x)
    expected = convert_pt2e(prepared)(x)
    assert torch.equal(convert_pt2e(hygiene(prepared))(x), expected)


def test_a_node_that_is_gone_at_convert_is_named():
    x = torch.randn(3, 5)
    prepared = prepare_pt2e(export(nn.Linear(5, 4), x), Toy(STATIC))
    prepared(x)
    linear = the_call(prepared, aten.linear.default)
    with prepared.graph.inserting_before(linear):
        linear.replace_all_uses_with(prepared.graph.call_function(aten.linear.default, linear.args))
    prepared.graph.erase_node(linear)
    with pytest.raises(ConversionError, match="are gone: linear"):
        convert_pt2e(prepared)


class Silent(Toy):
    """Annotates and returns nothing, as the contract of the reference allows."""

    def annotate(self, model: GraphModule) -> None:  # type: ignore[override]
        super().annotate(model)


@pytest.mark.parametrize("make", [lambda: Silent(STATIC), lambda: ComposableQuantizer([Silent(STATIC)])])
def test_annotate_may_return_nothing(make: Callable[[], Quantizer]):
    prepared = prepare_pt2e(export(nn.Linear(5, 4), torch.randn(3, 5)), make())
    assert [decision.node for decision in explain(prepared).quantized] == ["linear"]


@pytest.mark.parametrize("erase", [lambda meta: meta.update(quantization_annotation=None), lambda meta: meta.clear()])
def test_a_part_of_a_composition_that_clears_a_claim_is_named_with_the_node(erase: Callable[[dict], None]):
    eraser = ByHand(lambda gm: erase(the_call(gm, aten.linear.default).meta))
    with pytest.raises(AnnotationError, match=r"(?s)ByHand changed what Toy had annotated on\nnode linear"):
        prepare_pt2e(export(nn.Linear(5, 4), torch.randn(3, 5)), ComposableQuantizer([Toy(STATIC), eraser]))


# --- buffers ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A buffer written through out=, by one op or by one of several outputs."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.seen, x)
        return torch.tanh(self.seen * 0.5)


def view_out(seen: Tensor, x: Tensor) -> None:
    torch.mul(seen[1:], 3.0, out=seen[1:])
    seen.add_(x)


@pytest.mark.parametrize("write", [lambda seen, x: torch.add(seen, x, out=seen), view_out], ids=["whole", "view"])
def test_calibration_leaves_a_buffer_written_through_out_as_it_was(write: Callable[[Tensor, Tensor], object]):
    """By hand: the first call of the converted model computes tanh of half of x."""
    x = torch.tensor([0.5, -1.0, 2.0])
    model = export(Counting(write), x)
    prepared = prepare_pt2e(model, Toy(STATIC), allow_empty=True)
    prepared(x)
    prepared(x)
    assert model.state_dict["seen"].tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(convert_pt2e(prepared)(x), torch.tanh(x * 0.5), atol=0.02)  # a few steps of 2 / 235


class WrittenLater(nn.Module):
    """A view of a view of the buffer is written after the buffer was read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hist", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 + self.hist
        self.hist[1:].view(3, 1).add_(x.sum())
        return y


def test_a_spec_on_the_way_to_a_view_that_is_written_later_takes_no_write_away():
    def function(gm: GraphModule) -> None:
        (sliced,) = calls(gm, aten.slice.Tensor)
        annotate(sliced, {sliced.args[0]: ACT})
        add = the_call(gm, aten.add.Tensor)
        annotate(add, {add.args[0]: ACT, add.args[1]: ACT})

    x = torch.tensor([1.0, -0.5, 0.25, 2.0])
    prepared = prepare_pt2e(export(WrittenLater(), x), ByHand(function))
    prepared(x)
    report, converted, float_model = explain(prepared), convert_pt2e(prepared), WrittenLater()
    for _ in range(3):
        assert torch.allclose(converted(x), float_model(x), atol=0.05)  # a step of a range of 5 is 5 / 235
    reason = "add_ writes to the memory of hist, which a quantized copy would miss"
    assert f"asked for and left in float: {reason}" in report.why("add")
    assert f"add: {reason}" in report.text()
