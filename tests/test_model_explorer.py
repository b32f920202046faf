"""Node data for Google's Model Explorer: its published format, on the nodes that it shows of the exported model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pt2e_quant import Report, explain, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export


class Net(nn.Module):
    """A batch norm, a cat of quiet and loud, a mean that XNNPACK's transform rewrites, a branch, a float op."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.net.bn1(self.net.stem(images)), 16 * torch.relu(self.net.stem(images))], 1)
        x = torch.cond(images.sum() > 0, lambda x: x.cos(), lambda x: x * 2, (x,))
        return x.mean((2, 3)).sin()


@pytest.fixture(scope="module")
def saved() -> tuple[ExportedProgram, Report]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model = export(Net(), x)
        prepared = prepare_pt2e(model, XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True)))
        for batch in (x, -x):  # both branches
            prepared(batch)
        return model, explain(prepared, [x, -x])


COLUMNS = ["decision", "bits_lost"]


@pytest.mark.parametrize("column", COLUMNS)
def test_it_has_the_form_that_the_format_prescribes(saved, column):
    """ModelNodeData of ai-edge-model-explorer 0.1.34: one GraphNodeData for each graph, and no field beside these."""
    data = saved[1].to_model_explorer(column)
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["graph"]
    (graph,) = data.values()
    assert set(graph) <= {"results", "name", "thresholds", "gradient", "showExpandedSummaryOnGroupNode"}
    assert isinstance(graph["name"], str)
    assert [item["stop"] for item in graph.get("gradient", [])] in ([], [0, 1])  # both ends are demanded
    for result in graph["results"].values():
        assert set(result) <= {"value", "bgColor", "textColor"}
        assert isinstance(result["value"], (str, int, float))


@pytest.mark.parametrize("column", COLUMNS)
def test_every_key_is_a_node_of_the_exported_program(saved, column):
    model, report = saved
    names = {node.name for node in model.graph.nodes}
    assert report.to_model_explorer(column)["graph"]["results"].keys() <= names


def test_every_float_op_of_the_exported_program_has_its_fate(saved):
    model, report = saved
    results = report.to_model_explorer()["graph"]["results"]
    ops = {
        node.name
        for node in model.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
    }
    missing = ops - results.keys()
    assert missing <= {"sum_1"}  # feeds the condition of the branch alone


def test_values_say_what_became_of_the_op(saved):
    results = saved[1].to_model_explorer()["graph"]["results"]
    assert results["batch_norm"]["value"] == "folded into conv2d"
    assert results["cat"]["value"] == "int8: cat"
    assert results["sin"]["value"] == "float: unsupported_op"
    assert results["batch_norm"]["bgColor"] != results["cat"]["bgColor"] != results["sin"]["bgColor"]


def test_costs_are_the_bits_that_sharing_takes(saved):
    """relu times 16 decides the range that cat gives to both: the other needs less than a quarter of it."""
    results = saved[1].to_model_explorer("bits_lost")["graph"]["results"]
    assert results["cat"]["value"] < 0.1
    assert results["conv2d"]["value"] > 2


@pytest.fixture(scope="module")
def explorer() -> tuple[ModuleType, ModuleType]:
    """Their classes of node data and their reader of .pt2 files; both work without the viewer, a server of 130 MB."""
    package = importlib.util.find_spec("model_explorer")
    if package is None:
        pytest.skip("needs Model Explorer: pip install --no-deps ai-edge-model-explorer")
    with pytest.MonkeyPatch.context() as patch:
        bare = ModuleType("model_explorer")  # its own __init__ starts with the server
        bare.__path__ = list(package.submodule_search_locations)
        patch.setitem(sys.modules, "model_explorer", bare)
        names = "node_data_builder", "pytorch_exported_program_adapter_impl"
        return tuple(importlib.import_module(f"model_explorer.{name}") for name in names)


@pytest.mark.parametrize("column", COLUMNS)
def test_model_explorer_itself_reads_it_and_shows_the_nodes(saved, explorer, column, tmp_path):
    """With the package's own classes and its adapter for .pt2 files."""
    builder, adapter = explorer
    model, report = saved
    fields = report.to_model_explorer(column)["graph"]
    results = {name: builder.NodeDataResult(**result) for name, result in fields.pop("results").items()}
    gradient = [builder.GradientItem(**item) for item in fields.pop("gradient", [])]
    data = builder.ModelNodeData({"graph": builder.GraphNodeData(results, gradient=gradient, **fields)})
    data.save_to_file(tmp_path / "theirs.json")
    ours = report.to_model_explorer(column)["graph"]
    theirs = json.loads((tmp_path / "theirs.json").read_text())["graph"]
    assert {key: theirs[key] for key in ours} == ours
    torch.export.save(model, tmp_path / "model.pt2")
    settings = {"const_element_count_limit": 4}
    loaded = torch.export.load(tmp_path / "model.pt2")
    (graph,) = adapter.PytorchExportedProgramAdapterImpl(loaded, settings).convert()["graphs"]
    assert graph.id == "graph"
    assert results.keys() <= {node.id for node in graph.nodes}
