"""The report says what became of every float op, and its numbers are those of the graph."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CaptureError, TargetingError
from tests.nets import MLP, ConvNet, Residual, export
from tests.pt2e.kit import DYNAMIC, STATIC, Toy, dequantizes, quantizes


class Indexed(nn.Module):
    """A source line with brackets, which a terminal library may take for markup."""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4)])

    def forward(self, x: Tensor) -> Tensor:
        i = 1
        return torch.sigmoid(self.i[i](self.i[0](x)))


LINE = f"test_report.py:{Indexed.forward.__code__.co_firstlineno + 2}: return torch.sigmoid(self.i[i](self.i[0](x)))"

NETS = {"ConvNet": (ConvNet, (1, 3, 16, 16)), "Residual": (Residual, (1, 4, 6, 6)), "MLP": (MLP, (2, 10))}


def stages(module: nn.Module, x: Tensor, quantizer: Toy) -> tuple[GraphModule, GraphModule]:
    prepared = prepare_pt2e(export(module, x), quantizer)
    prepared(x)
    return prepared, convert_pt2e(prepared)


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[GraphModule, GraphModule]:
    kind, shape = NETS[request.param]
    return stages(kind(), torch.randn(*shape), Toy(STATIC))


@pytest.fixture(scope="module")
def indexed() -> tuple[GraphModule, GraphModule]:
    return stages(Indexed(), torch.randn(2, 6), Toy(STATIC))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_there_is_one_quantize_or_folded_weight_for_each_point(net):
    """Users' item 2: the counts of the report equal the q/dq pairs in the converted graph."""
    report, gm = explain(net[1]), net[1]
    frozen = [name for name, _ in gm.named_buffers() if name.startswith("_frozen_param")]
    assert len(quantizes(gm)) + len(frozen) == len(report.record.points)


def test_there_is_one_dequantize_for_each_consumer_of_a_point(net):
    report, gm = explain(net[1]), net[1]
    assert len(dequantizes(gm)) == sum(len(point.consumers) for point in report.record.points)


def test_a_quantized_input_of_the_report_is_a_dequantize_in_the_graph(net):
    nodes = {node.name: node for node in net[1].graph.nodes}
    for decision in explain(net[1]).quantized:
        read = [node for node in nodes[decision.node].all_input_nodes if node in dequantizes(net[1])]
        assert len(read) == len(decision.inputs)


def test_a_quantized_output_of_the_report_is_a_quantize_in_the_graph(net):
    nodes = {node.name: node for node in net[1].graph.nodes}
    for decision in explain(net[1]).quantized:
        written = [node for node in nodes[decision.node].users if node in quantizes(net[1])]
        assert len(written) == (decision.output is not None)


def test_every_float_op_is_either_quantized_or_left_with_a_reason(net):
    """Users' item 2: each op has its rule, or the reason why not."""
    report = explain(net[0])
    ops = {node.name for node in net[0].graph.nodes if node.op == "call_function"}
    assert {decision.node for decision in (*report.quantized, *report.skipped)} == ops
    assert all(decision.reason for decision in report.skipped)
    assert all(decision.rule for decision in report.quantized)


def test_groups_have_no_qparams_before_and_qparams_after_conversion(net):
    prepared, converted = map(explain, net)
    assert {(group.scale, group.zero_point) for group in prepared.groups} == {(None, None)}
    assert all(group.scale and group.zero_point is not None for group in converted.groups)


def test_qparams_of_the_report_are_the_literals_of_the_graph(net):
    single = {(g.scale, g.zero_point) for g in explain(net[1]).groups if not isinstance(g.scale, list)}
    assert single == {node.args[1:3] for node in quantizes(net[1])}


def test_qparams_per_channel_are_the_buffers_of_the_graph(net):
    lists = [group.scale for group in explain(net[1]).groups if isinstance(group.scale, list)]
    buffers = [value.tolist() for name, value in net[1].named_buffers() if name.startswith("_scale")]
    assert sorted(lists) == sorted(buffers)


def test_bytes_before_and_after_are_those_of_the_parameters():
    """By hand, float32 before: 240 + 24 + 144 values. After: a byte for each of 384 weights, 12 for the scale (float32)
    and zero point (int64) of each of 30 channels, and the 24 values of the bias."""
    _, converted = stages(MLP(), torch.randn(2, 10), Toy(STATIC))
    record = explain(converted).record
    assert (record.bytes_before, record.bytes_after) == (408 * 4, 384 + (24 + 6) * 12 + 24 * 4)


def test_bytes_before_are_those_of_the_model_before_batch_norm_was_folded():
    model = ConvNet()
    prepared = prepare_pt2e(export(model, torch.randn(1, 3, 16, 16)), Toy(STATIC))
    assert explain(prepared).record.bytes_before == sum(
        value.numel() * value.element_size() for value in model.state_dict().values()
    )


# --- questions --------------------------------------------------------------------------------------------------------


def test_why_answers_for_a_node(indexed):
    assert explain(indexed[0]).why("linear").splitlines()[:2] == [
        f"linear = aten.linear.default   [i.0, {LINE}]",
        "  quantized by linear_only",
    ]


def test_why_answers_for_a_module_with_all_that_is_inside(indexed):
    assert [line for line in explain(indexed[0]).why("i").splitlines() if " = " in line] == [
        line for node in ("linear", "linear_1") for line in explain(indexed[0]).why(node).splitlines()[:1]
    ]


def test_why_says_why_not(indexed):
    assert "float: no rule for aten.sigmoid.default" in explain(indexed[0]).why("sigmoid")


def test_why_names_the_nearest_when_nothing_has_the_name(indexed):
    with pytest.raises(
        TargetingError, match=r"no op 'liner_1' and no module 'liner_1' in this report. Did you mean '.*linear_1"
    ):
        explain(indexed[0]).why("liner_1")


def test_rules_that_fitted_nothing_are_listed(indexed):
    assert explain(indexed[0]).unused_rules == ["conv_relu", "conv_only", "linear_relu", "add", "cat", "move"]


# --- text, table, JSON ------------------------------------------------------------------------------------------------


def test_the_text_says_all_that_the_record_holds(indexed):
    text = explain(indexed[1]).text()
    for piece in (
        "converted by Toy: 2 of 3 float ops quantized",
        "Read a converted graph as: quantize, then dequantize",
        "int8 [-119, 119] per channel of dim 0, symmetric, PerChannelMinMaxObserver",
        "i.0",
        LINE,
        "1 x no rule for aten.sigmoid.default",
        "5 scales in [",
        "zero point ",
        "Rules that matched nothing: conv_relu, conv_only, linear_relu, add, cat, move",
    ):
        assert piece in text


def test_the_text_of_a_prepared_model_has_no_qparams_and_no_legend(indexed):
    text = explain(indexed[0]).text()
    assert text.startswith("prepared by Toy: 2 of 3 float ops quantized")
    assert "Read a converted graph" not in text
    assert "zero point" not in text


def test_printing_a_report_is_its_text(indexed):
    assert str(explain(indexed[1])) == explain(indexed[1]).text()


def test_the_text_lists_folded_batch_norms():
    prepared = prepare_pt2e(export(ConvNet(), torch.randn(1, 3, 16, 16)), Toy(STATIC))
    assert "Batch norm folded\n  batch_norm into conv2d\n  batch_norm_1 into conv2d_1" in explain(prepared).text()


def test_json_is_the_dictionary_of_plain_values(net):
    report = explain(net[1])
    data = json.loads(report.to_json())
    assert data["stage"] == "converted"
    assert [item["node"] for item in data["decisions"]] == [decision.node for decision in report.record.decisions]
    assert data["groups"][0]["scale"] == report.groups[0].scale
    assert "example_inputs" not in data


@pytest.mark.parametrize("stage", [0, 1], ids=["prepared", "converted"])
def test_a_report_comes_back_from_its_json(net, stage):
    report = explain(net[stage])
    assert Report.from_json(report.to_json()).text() == report.text()


def test_a_dynamic_model_has_a_report_too():
    _, converted = stages(MLP(), torch.randn(2, 10), Toy(DYNAMIC))
    report = explain(converted)
    assert any("dynamic" in group.spec for group in report.groups)
    assert Report.from_json(report.to_json()).text() == report.text()


def test_saving_writes_text_json_node_data_and_page_next_to_each_other(net, tmp_path):
    report = explain(net[1])
    text, data, explorer, page = report.save(tmp_path / "model.report")
    names = ("model.report.txt", "model.report.json", "model.report.model_explorer.json", "model.report.html")
    assert (text.name, data.name, explorer.name, page.name) == names
    assert json.loads(explorer.read_text()) == report.to_model_explorer()
    assert text.read_text().rstrip("\n") == report.text()
    assert Report.load(data).text() == report.text()


@pytest.mark.parametrize("content", ["", "[]", '{"stage": "prepared"}'], ids=["empty", "list", "half"])
def test_what_is_no_report_is_refused(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(CaptureError, match="this is not the JSON of a report"):
        Report.load(path)


def test_a_report_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CaptureError, match="cannot read"):
        Report.load(tmp_path / "nothing.json")


def rendered(report: Report) -> str:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=300)
    console.print(report)
    return console.file.getvalue()


def test_the_table_shows_source_lines_with_their_brackets(indexed):
    table = rendered(explain(indexed[1]))
    assert "return torch.sigmoid(self.i[i](self.i[0](x)))" in table
    assert "no rule for aten.sigmoid.default" in table
    assert "activation_post_process_0" in table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_table(indexed, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stdout", Terminal())
    explain(indexed[1]).show()
    assert "┃" in sys.stdout.getvalue()


def test_a_terminal_without_rich_shows_the_text(indexed, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    explain(indexed[1]).show()
    assert sys.stdout.getvalue() == explain(indexed[1]).text() + "\n"


def test_what_is_no_terminal_shows_the_text(indexed, capsys):
    explain(indexed[1]).show()
    assert capsys.readouterr().out == explain(indexed[1]).text() + "\n"
