"""Every message says where: graph node, module, line of the user's code."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from pt2e_quant import errors
from pt2e_quant.errors import QuantizationError
from pt2e_quant.where import locate, locate_all, module_path, module_stack, module_type, source_line, type_name
from tests.nets import export
from tests.pt2e.kit import the_call

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layers[0](x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + 1.5


MODULES = {strict: export(Net(), torch.randn(2, 3), strict=strict).module() for strict in (True, False)}


@pytest.fixture(params=[True, False], ids=["strict", "non-strict"])
def gm(request: pytest.FixtureRequest) -> GraphModule:
    return MODULES[request.param]


def test_all_errors_have_one_base():
    public = [value for name in errors.__all__ if inspect.isclass(value := getattr(errors, name))]
    assert len(public) > 5
    assert all(issubclass(kind, (QuantizationError, Warning)) for kind in public)


def test_a_node_is_located_by_call_module_and_line(gm):
    first, second = locate(the_call(gm, aten.linear.default)).splitlines()
    assert first == "node linear = aten.linear.default(x, block_layers_0_weight, block_layers_0_bias)"
    assert second.startswith("  in module 'block.layers.0' (Linear), test_errors.py:")
    assert second.endswith(": return torch.sigmoid(self.layers[0](x))")


def test_a_node_of_the_root_names_its_class(gm):
    assert "\n  in Net, test_errors.py:" in locate(the_call(gm, aten.add.Tensor))


def test_an_input_is_called_an_input(gm):
    assert locate(next(node for node in gm.graph.nodes if node.op == "placeholder")) == "input x"


def test_a_parameter_is_located_by_its_path(gm):
    node = next(node for node in gm.graph.nodes if node.op == "get_attr")
    assert locate(node).splitlines()[0] == "node block_layers_0_weight = get_attr[block.layers.0.weight]()"


def test_long_arguments_are_cut():
    node = Graph().call_function(aten.cat.default, ([1.25] * 50,))
    assert locate(node) == "node cat_default = aten.cat.default([1.25, 1.25, 1.25, 1.25, 1.25, 1.25, ...)"


def test_a_node_without_metadata_is_located_by_its_call_alone():
    assert locate(Graph().call_function(aten.relu.default, (7,))) == "node relu_default = aten.relu.default(7)"


def test_several_nodes_are_listed_up_to_a_limit():
    graph = Graph()
    nodes = [graph.call_function(aten.relu.default, (number,)) for number in range(5)]
    assert locate_all(nodes, limit=2).splitlines() == [
        "  node relu_default = aten.relu.default(0)",
        "  node relu_default_1 = aten.relu.default(1)",
        "  ... and 3 more",
    ]


def test_module_paths_are_dotted_in_both_modes_of_export(gm):
    node = the_call(gm, aten.linear.default)
    assert [path for path, _ in module_stack(node)][:2] == ["", "block"]
    assert (module_path(node), module_type(node)) == ("block.layers.0", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self']", ""),
        ("L['self'].block.conv", "block.conv"),
        ("L['self'].layers[0].conv", "layers.0.conv"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("L__self___block.conv", "block.conv"),
        ("block.layers.0", "block.layers.0"),
    ],
)
def test_all_spellings_of_a_path_are_read(recorded, path):
    node = Graph().call_function(aten.relu.default, (7,))
    node.meta["nn_module_stack"] = {"key": (recorded, nn.ReLU)}
    assert module_path(node) == path


def test_what_is_not_recorded_is_none():
    node = Graph().call_function(aten.relu.default, (7,))
    assert (module_path(node), module_type(node), source_line(node), module_stack(node)) == (None, "?", None, [])


TRACE = """  File "net.py", line 12, in forward
    return self.conv(x)
  File "site-packages/torch/nn/modules/conv.py", line 565, in forward
    return self._conv_forward(input, self.weight, self.bias)
"""


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        (TRACE, "net.py:12: return self.conv(x)"),
        ('  File "C:\\me\\net.py", line 3, in forward\n    y = x + 1\n', "net.py:3: y = x + 1"),
        ('  File "x/torch/nn/functional.py", line 9, in relu\n    return r\n', "functional.py:9: return r"),
        ("no frames", None),
    ],
    ids=["innermost outside torch", "windows", "torch alone", "none"],
)
def test_the_line_is_the_users_innermost(trace, line):
    node = Graph().call_function(aten.relu.default, (7,))
    node.meta["stack_trace"] = trace
    assert source_line(node) == line


@pytest.mark.parametrize(
    ("kind", "name"), [(nn.Linear, "torch.nn.modules.linear.Linear"), ("a.b.C", "a.b.C"), (Block, f"{__name__}.Block")]
)
def test_a_type_is_named_by_module_and_class(kind, name):
    assert type_name(kind) == name


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        (["", "encoder.0", "encoder.1", "xyz"], " Did you mean 'encoder.1' or 'encoder.0'?"),
        (["", "xyz", "wvu"], " Known names: 'wvu', 'xyz'."),
        (list("uvwxyz"), " Known names: 'u', 'v', 'w', 'x', 'y' and others."),
        ([""], ""),
        ([], ""),
    ],
    ids=["near", "far", "many", "the root module", "nothing"],
)
def test_a_wrong_name_is_answered_with_names_that_exist_and_never_with_an_empty_one(known, sentence):
    assert errors.did_you_mean("encodr.1", known) == sentence
