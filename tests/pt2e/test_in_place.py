"""Ops that write to their argument: quantizing makes copies, and no write may get lost in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CoverageError
from pt2e_quant.quantizer.overwritten import Overwritten
from tests.nets import export
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, annotate, calls, quantizes, the_call

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("_without_gradients")

EIGHT_BITS = 0.02  # of the largest value: steps are 1/235 of a range, a few of them add up


@pytest.fixture
def _without_gradients() -> Iterator[None]:
    """Autograd forbids some of these writes."""
    with torch.no_grad():
        yield


class Model(nn.Module):
    """Two convolutions and whatever a test does with the result."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(self.first(x)))


def then_read(y: Tensor) -> Tensor:
    """The in-place op's argument is read after it, where it has the new values."""
    torch.relu_(y)
    return y + y


def twice(y: Tensor) -> Tensor:
    y.relu_()
    y.add_(y)
    return torch.cat([y, y], 1)


def view_before(y: Tensor) -> Tensor:
    """A view taken before the write sees the write."""
    view = y.view(1, -1)
    torch.relu_(y)
    return view + view


def part(y: Tensor) -> Tensor:
    """The write goes to a part of a tensor that is read as a whole."""
    y[:, 1:3] = 0.25
    return y + y


def dropped(y: Tensor) -> Tensor:
    """In inference, dropout returns the very tensor that it is given."""
    same = torch.nn.functional.dropout(y, 0.15, training=False)
    torch.relu_(y)
    return same + same


def half(y: Tensor) -> Tensor:
    first, _ = y.split(2, 1)
    first.relu_()
    return y + y


FUNCTIONS = pytest.mark.parametrize("function", [then_read, twice, view_before, part, dropped, half])


@FUNCTIONS
def test_a_write_is_seen_by_those_who_read_behind_it(function):
    torch.manual_seed(0)
    model, x = Model(function), torch.randn(1, 3, 5, 5)
    prepared = prepare_pt2e(export(model, x), Toy(STATIC))
    expected = model(x)
    torch.testing.assert_close(prepared(x), expected, rtol=0, atol=0)
    difference = (convert_pt2e(prepared)(x) - expected).abs().max() / expected.abs().max()
    assert difference < EIGHT_BITS


@FUNCTIONS
def test_calibration_sees_what_the_model_reads(function):
    """By hand: the largest value that an observer of the last addition or concatenation saw is that of its input."""
    torch.manual_seed(0)
    model, x = Model(function), torch.randn(1, 3, 5, 5)
    prepared = prepare_pt2e(export(model, x), Toy(STATIC))
    prepared(x)
    last = calls(prepared, aten.add.Tensor, aten.cat.default)[-1]
    for source in last.all_input_nodes:
        if source.op == "call_module":
            observer = prepared.get_submodule(str(source.target))
            assert observer.min_val == min(0.0, (model(x) / (1 if function is twice else 2)).min().item())


def test_a_read_behind_an_in_place_op_reads_its_result():
    prepared = prepare_pt2e(export(Model(then_read), torch.randn(1, 3, 5, 5)), Toy(STATIC))
    assert [decision.rule for decision in explain(prepared).quantized] == ["conv_only", "conv_relu", "conv_relu", "add"]


def test_a_tensor_that_is_written_through_a_view_stays_in_float_with_the_reason():
    prepared = prepare_pt2e(export(Model(part), torch.randn(1, 3, 5, 5)), Toy(STATIC))
    reasons = {decision.node: decision.reason for decision in explain(prepared).skipped}
    assert reasons["conv2d_1"] == "fill_ writes to the memory of conv2d_1, which a quantized copy would miss"


def test_a_graph_of_such_tensors_alone_names_the_way_out_and_it_works():
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :2].relu_()
            return y

    exported = export(Partly(), torch.randn(1, 3, 5, 5))
    with pytest.raises(
        CoverageError, match=r"make all ops functional: prepare_pt2e\(exported.run_decompositions\({}\)"
    ):
        prepare_pt2e(exported, Toy(STATIC))
    prepared = prepare_pt2e(exported.run_decompositions({}), Toy(STATIC))
    assert [decision.rule for decision in explain(prepared).quantized] == ["conv_only"]


def test_an_annotation_of_such_a_tensor_is_refused_too():
    """The same for quantizers that write annotations themselves."""

    def function(gm: GraphModule) -> None:
        annotate(calls(gm, aten.conv2d.default)[-1], {}, ACT)
        annotate(the_call(gm, aten.add.Tensor), {}, ACT)

    x = torch.randn(1, 3, 5, 5)
    prepared = prepare_pt2e(export(Model(part), x), ByHand(function))
    prepared(x)
    (q,) = quantizes(convert_pt2e(prepared))
    assert q.args[0].target is aten.add.Tensor


class Cache(nn.Module):
    """A buffer that the model adds to, read by a linear: the state of a decoder in small."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(x)
        return self.linear(self.state)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_a_buffer_that_the_model_writes_to_keeps_what_is_written(strict):
    """By hand: after two calls it holds the sum of both inputs."""
    x = torch.randn(2, 4)
    prepared = prepare_pt2e(export(Cache(), x, strict=strict), Toy(STATIC))
    prepared(x)
    converted = convert_pt2e(prepared)
    converted.state.zero_()
    converted(x)
    converted(x)
    torch.testing.assert_close(converted.state, x + x, rtol=0, atol=0)


def test_the_linear_after_such_a_buffer_is_quantized():
    prepared = prepare_pt2e(export(Cache(), torch.randn(2, 4)), Toy(STATIC))
    assert [decision.node for decision in explain(prepared).quantized] == ["linear"]


class Stream(nn.Module):
    """What the last call left is read before it is replaced, as a streaming convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randn(2, 4))
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(self.state)
        self.state.copy_(x)
        return y + self.after(self.state)


@pytest.mark.parametrize("functional", [False, True])
def test_a_buffer_that_is_read_before_the_write_is_quantized_for_that_reader(functional):
    torch.manual_seed(0)
    model, x = Stream().eval(), torch.randn(2, 4)
    exported = export(model, x)
    prepared = prepare_pt2e(exported.run_decompositions({}) if functional else exported, Toy(STATIC))
    linears = [decision for decision in explain(prepared).quantized if "linear" in decision.op]
    assert list(linears[0].inputs) == ["state", "before_weight"]
    again = torch.randn(2, 4)
    prepared(x), prepared(again)
    converted = convert_pt2e(prepared)
    for batch in (x, again):  # the second reads what the first has left
        expected = model(batch)
        assert (converted(batch) - expected).abs().max() < 2 * EIGHT_BITS * expected.abs().max()
        torch.testing.assert_close(converted.state, batch, rtol=0, atol=0)


def test_a_view_that_is_read_after_the_write_stays_in_float():
    class Late(Stream):
        def forward(self, x: Tensor) -> Tensor:
            view = self.state[:1]
            self.state.copy_(x)
            return self.before(view)

    (skipped,) = [
        decision
        for decision in explain(prepare_pt2e(export(Late(), torch.randn(2, 4)), Toy(STATIC), allow_empty=True)).skipped
        if "linear" in decision.op
    ]
    assert skipped.code == "overwritten"


def test_an_annotation_of_such_a_read_is_taken_too():
    def function(gm: GraphModule) -> None:
        first, last = calls(gm, aten.linear.default)
        for linear in (first, last):
            annotate(linear, {linear.args[0]: ACT})

    x = torch.randn(2, 4)
    prepared = prepare_pt2e(export(Stream(), x), ByHand(function))
    prepared(x)
    assert "state" in {q.args[0].name for q in quantizes(convert_pt2e(prepared))}


def test_an_in_place_activation_in_a_row_of_ops_is_no_obstacle():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    graph = export(model, torch.randn(1, 3, 5, 5)).module().graph
    written = Overwritten(graph)
    assert not [node for node in graph.nodes if written.write(node) is not None]
