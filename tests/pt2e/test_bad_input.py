"""Whatever a user gets wrong is a typed error that names the place and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import QuantizationError, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import (
    AnnotationError,
    CalibrationError,
    CalibrationWarning,
    CaptureError,
    ConversionError,
    CoverageError,
)
from tests.nets import MLP, export
from tests.pt2e.kit import ACT, STATIC, ByHand, Nothing, Toy, annotate, calls, the_call

aten = torch.ops.aten

X = torch.randn(3, 10)


def exported() -> torch.export.ExportedProgram:
    return export(MLP(), X)


def calibrated() -> GraphModule:
    prepared = prepare_pt2e(exported(), Toy(STATIC))
    prepared(X)
    return prepared


# --- what prepare is given --------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (MLP, "got the nn.Module MLP"),
        (lambda: torch.fx.symbolic_trace(MLP()), "calls up where ATen ops are expected"),
        (lambda: torch.fx.symbolic_trace(Functional()), "carries no recorded values"),
        (lambda: "model.pt2", "got str"),
    ],
    ids=["nn.Module", "fx with modules", "fx with functions", "path"],
)
def test_what_is_not_exported_is_refused_with_the_call_that_exports_it(model: Callable[[], Any], what: str):
    with pytest.raises(CaptureError) as caught:
        prepare_pt2e(model(), Toy(STATIC))
    assert what in str(caught.value)
    assert "torch.export.export(model.eval(), example_inputs)" in str(caught.value)


@pytest.mark.parametrize(
    ("quantizer", "what"),
    [(STATIC, "got QuantizationConfig"), (Toy, "got the class Toy"), (None, "got NoneType")],
    ids=["config", "class", "None"],
)
def test_what_is_no_quantizer_is_refused_with_an_example(quantizer: Any, what: str):
    with pytest.raises(CaptureError) as caught:
        prepare_pt2e(exported(), quantizer)
    assert what in str(caught.value)
    assert "XNNPACKQuantizer()" in str(caught.value)


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_preparing_again_is_refused_and_says_what_to_prepare(stage: str):
    model = calibrated()
    with pytest.raises(CaptureError, match=rf"this model was {stage} before \(by Toy\).*keep the ExportedProgram"):
        prepare_pt2e(convert_pt2e(model) if stage == "converted" else model, Toy(STATIC))


# --- what convert and explain are given -------------------------------------------------------------------------------


def test_converting_again_is_refused():
    with pytest.raises(ConversionError, match="converted already"):
        convert_pt2e(convert_pt2e(calibrated()))


@pytest.mark.parametrize(
    "model", [MLP, exported, lambda: exported().module()], ids=["nn.Module", "program", "exported module"]
)
def test_converting_what_was_not_prepared_is_refused_with_the_call_that_prepares_it(model: Callable[[], Any]):
    with pytest.raises(ConversionError, match=r"prepared = prepare_pt2e\(exported, quantizer\)"):
        convert_pt2e(model())


def test_explaining_what_was_not_prepared_is_refused():
    with pytest.raises(CaptureError, match="nothing to explain on this MLP"):
        explain(MLP())


# --- calibration data -------------------------------------------------------------------------------------------------


def test_a_batch_with_nan_is_refused_at_the_input_that_has_it():
    x = X.clone()
    x[1, 2] = torch.nan
    with pytest.raises(CalibrationError) as caught:
        prepare_pt2e(exported(), Toy(STATIC))(x)
    assert str(caught.value).startswith("input x: 1 NaN among 30 values in calibration")


class Logarithm(nn.Module):
    """log makes -inf of 0, in a module with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(10, 10), Functional())

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.block(x)) + x


def test_infinity_inside_the_model_is_left_out_of_the_range_with_one_warning_that_names_node_and_line():
    prepared = prepare_pt2e(export(Logarithm(), X), Toy(STATIC))
    with pytest.warns(CalibrationWarning) as caught:
        [prepared(X) for _ in range(2)]
    messages = [str(warning.message) for warning in caught if "node log =" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].startswith("node log = aten.log.default(relu)")
    assert "in Logarithm, test_bad_input.py:" in messages[0]
    assert "return torch.log(self.block(x)) + x" in messages[0]
    assert "infinite" in messages[0]


def test_a_refused_batch_leaves_no_trace():
    prepared = calibrated()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with pytest.raises(CalibrationError):
        prepared(X * float("nan"))
    torch.testing.assert_close(dict(prepared.state_dict()), before, rtol=0, atol=0)


# --- annotations ------------------------------------------------------------------------------------------------------


def annotated_by(function: Callable[[GraphModule], None], model: nn.Module | None = None, x: Tensor = X) -> GraphModule:
    return prepare_pt2e(export(model or MLP(), x), ByHand(function))


def test_a_stale_annotation_names_node_key_and_line():
    """Users' item 39: an error carries node, source line and a way out."""

    def function(gm: GraphModule) -> None:
        first, second = calls(gm, aten.linear.default)
        annotate(second, {first: ACT})

    with pytest.raises(AnnotationError) as caught:
        annotated_by(function)
    message = str(caught.value)
    assert "names linear, which is not among its inputs (relu, down_weight)" in message
    assert "node linear_1 = aten.linear.default(relu, down_weight)" in message
    assert "in module 'down' (Linear), nets.py:" in message
    assert "Annotate last" in message


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return first + second


def test_an_annotation_of_an_op_with_several_outputs_says_what_to_annotate():
    with pytest.raises(AnnotationError) as caught:
        annotated_by(lambda gm: annotate(the_call(gm, aten.chunk.default), {}, ACT), Chunks())
    assert "chunk is a list, not one tensor" in str(caught.value)
    assert "annotate the getitem nodes" in str(caught.value)


def test_the_parts_of_an_op_with_several_outputs_can_be_annotated():
    def function(gm: GraphModule) -> None:
        for node in the_call(gm, aten.chunk.default).users:
            annotate(node, {}, ACT)

    prepared = annotated_by(function, Chunks())
    prepared(X)
    assert [group.members for group in explain(convert_pt2e(prepared)).groups] == [("getitem",), ("getitem_1",)]


def test_an_annotation_of_a_node_without_recorded_value_is_refused():
    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.relu.default)
        del node.meta["val"]
        annotate(node, {}, ACT)

    with pytest.raises(AnnotationError, match=r"relu has no recorded value \(meta\['val'\]\)"):
        annotated_by(function)


class Lookup(nn.Module):
    """Integer and boolean tensors on the way to an embedding and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        shifted = tokens + tokens
        both = torch.cat([shifted, tokens], 1)
        return self.table(both) + self.table(both + both)


def test_integer_tensors_are_never_observed():
    tokens = torch.randint(0, 6, (2, 4))
    prepared = prepare_pt2e(export(Lookup(), tokens), Toy(STATIC))
    prepared(tokens)
    converted = convert_pt2e(prepared)
    assert [decision.node for decision in explain(converted).quantized] == ["add_2"]
    assert converted(tokens).shape == (2, 8, 4)


def test_an_annotation_of_an_integer_tensor_is_refused_with_its_dtype():
    tokens = torch.randint(0, 6, (2, 4))

    def function(gm: GraphModule) -> None:
        for node in calls(gm, aten.add.Tensor):
            annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)

    prepared = annotated_by(function, Lookup(), tokens)
    assert "tokens is int64, only float32, float16 and bfloat16 are quantized" in explain(prepared).why("add")


def test_double_precision_is_left_alone_with_the_reason():
    """The q/dq ops do not take it."""
    with pytest.raises(CoverageError, match=r"\(x\) is float64, only float32, float16 and bfloat16 are quantized"):
        prepare_pt2e(export(MLP().double(), X.double()), Toy(STATIC))


def test_an_annotation_of_double_precision_is_refused_with_the_reason():
    def function(gm: GraphModule) -> None:
        annotate(the_call(gm, aten.relu.default), {}, ACT)

    with pytest.raises(CoverageError, match="relu is float64, only float32, float16 and bfloat16 are quantized"):
        annotated_by(function, MLP().double(), X.double())


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_nothing_quantized_is_an_error_with_reasons_places_and_the_way_out():
    with pytest.raises(CoverageError) as caught:
        prepare_pt2e(exported(), Toy(STATIC).set_filter_function(lambda node: False))
    message = str(caught.value)
    assert message.startswith("nothing would be quantized: Toy annotated none of the 3 float ops of this graph.")
    assert "3 x kept in float by the filter function, such as" in message
    assert "node linear = aten.linear.default" in message
    assert "in module 'up' (Linear), nets.py:" in message
    assert "allow_empty=True" in message


def test_a_quantizer_that_annotates_nothing_is_named():
    with pytest.raises(CoverageError, match="Nothing annotated none of the 3 float ops"):
        prepare_pt2e(exported(), Nothing())


@pytest.mark.parametrize(
    "error", [CaptureError, AnnotationError, ConversionError, CalibrationError, CoverageError], ids=lambda e: e.__name__
)
def test_every_error_is_a_quantization_error(error: type[Exception]):
    assert issubclass(error, QuantizationError)
