"""Several quantizers on one model: the first one that claims a node keeps it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError
from pt2e_quant.meta import ANNOTATION_KEY
from pt2e_quant.quantizer import ComposableQuantizer, QuantizationConfig
from tests.nets import MLP, export
from tests.pt2e.kit import ACT, DYNAMIC, PER_CHANNEL, STATIC, ByHand, Toy, annotate, calls, quantizes, the_call

aten = torch.ops.aten

X = torch.randn(3, 10)
NARROW = QuantizationConfig(dataclasses.replace(ACT, quant_max=77), dataclasses.replace(ACT, quant_max=77), PER_CHANNEL)


def bounds(quantizer: Any) -> dict[str, int]:
    """Upper bound of the integers of each annotated output."""
    prepared = prepare_pt2e(export(MLP(), X), quantizer)
    annotations = {node.name: node.meta.get(ANNOTATION_KEY) for node in prepared.graph.nodes}
    return {name: a.output_qspec.quant_max for name, a in annotations.items() if a and a.output_qspec}


def test_the_first_quantizer_has_priority():
    """Users' item 16: the priority of composed quantizers is their order."""
    assert bounds(ComposableQuantizer([Toy(STATIC), Toy(NARROW)])) == {"relu": 115, "linear_1": 115}
    assert bounds(ComposableQuantizer([Toy(NARROW), Toy(STATIC)])) == {"relu": 77, "linear_1": 77}


def test_a_later_quantizer_takes_what_the_first_left():
    parts = [Toy().set_module_name("up", NARROW), Toy(STATIC)]
    assert bounds(ComposableQuantizer(parts)) == {"relu": 77, "linear_1": 115}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_does_not_matter_where_claims_are_disjoint(order):
    """Users' item 16: the result does not depend on the order where the claims are disjoint."""
    parts = [Toy().set_module_name("up", NARROW), Toy().set_module_name("down", STATIC)]
    assert bounds(ComposableQuantizer(parts[number] for number in order)) == {"relu": 77, "linear_1": 115}


def test_static_and_dynamic_parts_work_in_one_model():
    parts = [Toy().set_module_name("up", DYNAMIC), Toy().set_module_name("down", STATIC)]
    prepared = prepare_pt2e(export(MLP(), X), ComposableQuantizer(parts))
    prepared(X)
    converted = convert_pt2e(prepared)
    assert [str(node.target).split(".")[-1] for node in quantizes(converted)] == ["tensor", "default", "default"]


def test_the_report_names_all_parts():
    prepared = prepare_pt2e(export(MLP(), X), ComposableQuantizer([Toy(NARROW), Toy(STATIC)]))
    assert explain(prepared).record.quantizer == "Toy + Toy"


def test_a_part_that_changes_what_another_annotated_is_an_error_that_names_both():
    class Careless(ByHand):
        pass

    def overwrite(gm: GraphModule) -> None:
        annotate(calls(gm, aten.linear.default)[-1], {}, ACT)

    with pytest.raises(AnnotationError) as caught:
        bounds(ComposableQuantizer([Toy(STATIC), Careless(overwrite)]))
    message = str(caught.value)
    assert message.startswith("Careless changed what Toy had annotated on\nnode linear_1 = aten.linear.default")
    assert "nets.py:" in message
    assert "Change the order, or keep the later one away from this node" in message


def test_a_part_that_adds_to_an_annotation_in_place_is_noticed_too():
    def add_output(gm: GraphModule) -> None:
        the_call(gm, aten.relu.default).meta[ANNOTATION_KEY].output_qspec = NARROW.output_activation

    with pytest.raises(AnnotationError, match="ByHand changed what Toy had annotated on"):
        bounds(ComposableQuantizer([Toy(STATIC), ByHand(add_output)]))


class Recording(Toy):
    """Writes down which of its methods were called."""

    def __init__(self, log: list[str], name: str, config: QuantizationConfig) -> None:
        super().__init__(config)
        self.log, self.label = log, name

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        self.log.append(f"{self.label}.transform")
        return super().transform_for_annotation(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        self.log.append(f"{self.label}.annotate")
        return super().annotate(model)

    def validate(self, model: GraphModule) -> None:
        self.log.append(f"{self.label}.validate")

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, nn.Module]) -> None:
        self.log.append(f"{self.label}.callback")


def test_every_method_of_the_contract_reaches_every_part():
    log: list[str] = []
    parts = [Recording(log, "one", STATIC), Recording(log, "two", NARROW)]
    prepare_pt2e(export(MLP(), X), ComposableQuantizer(parts))
    assert log == [
        f"{part}.{method}" for method in ("transform", "annotate", "validate", "callback") for part in ("one", "two")
    ]


def test_a_part_that_refuses_the_graph_stops_the_preparation():
    class Strict(Toy):
        def validate(self, model: GraphModule) -> None:
            raise AnnotationError("this chip has no linear")

    with pytest.raises(AnnotationError, match="this chip has no linear"):
        prepare_pt2e(export(MLP(), X), ComposableQuantizer([Toy(STATIC), Strict(NARROW)]))


class Minimal:
    """A quantizer of another package, older than the callback."""

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        annotate(the_call(model, aten.relu.default), {}, ACT)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def test_a_part_needs_no_base_class_and_no_callback():
    assert bounds(ComposableQuantizer([Minimal()])) == {"relu": 115}


def test_a_composition_of_nothing_is_refused():
    with pytest.raises(AnnotationError, match="at least one quantizer"):
        ComposableQuantizer([])


def test_the_report_names_who_else_wanted_an_op():
    """Users' item 16: overlaps are reported as rejected because of a previous annotation; the priority is the order."""
    parts = [Toy().set_module_name("up", NARROW), Toy(STATIC)]
    report = explain(prepare_pt2e(export(MLP(), X), ComposableQuantizer(parts)))
    assert {d.node: d.overlaps for d in report.quantized} == {"linear": ("Toy",), "relu": ("Toy",), "linear_1": ()}
    assert "  quantized by linear_relu\n  Toy wanted it as well, and came later" in report.why("linear")
    assert "Wanted by another quantizer as well, which came later\n  linear: Toy\n  relu: Toy" in report.text()
    assert type(report).from_json(report.to_json()).record.decisions == report.record.decisions


def test_disjoint_parts_overlap_nowhere():
    parts = [Toy().set_module_name("up", NARROW), Toy().set_module_name("down", STATIC)]
    report = explain(prepare_pt2e(export(MLP(), X), ComposableQuantizer(parts)))
    assert [d.overlaps for d in report.quantized] == [(), (), ()]


def test_an_op_that_is_marked_without_a_spec_says_so():
    def mark(gm: GraphModule) -> None:
        annotate(the_call(gm, aten.relu.default))

    def skipped(*parts: Any) -> dict[str, tuple[str | None, str | None]]:
        report = explain(prepare_pt2e(export(MLP(), X), ComposableQuantizer(parts)))
        return {decision.node: (decision.reason, decision.code) for decision in report.skipped}

    down = Toy().set_module_name("down", STATIC)
    marked = ("ByHand + Toy marked it as annotated, without a spec for integers", "config_none")
    assert skipped(ByHand(mark), down)["relu"] == marked
    taken = ("already annotated by another quantizer", "already_annotated")
    assert skipped(ByHand(mark), Toy(STATIC)) == {"relu": taken}


def test_an_op_that_another_part_took_is_not_reported_as_left_in_float():
    report = explain(prepare_pt2e(export(MLP(), X), ComposableQuantizer([Toy(NARROW), Toy(STATIC)])))
    assert report.skipped == []
