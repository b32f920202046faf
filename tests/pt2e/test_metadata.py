"""Every node that the engine adds says where it comes from and what its value looks like."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.where import module_path, source_line
from tests.nets import MLP, ConvNet, Residual, export
from tests.pt2e.kit import DYNAMIC, STATIC, WEIGHT_ONLY, Toy, calls, dequantizes, quantizes

CONFIGS = {"static": STATIC, "dynamic": DYNAMIC, "weight_only": WEIGHT_ONLY}
NETS = {"ConvNet": (ConvNet, (1, 3, 16, 16)), "Residual": (Residual, (1, 4, 6, 6)), "MLP": (MLP, (2, 10))}


class Case:
    """One model on its way: exported, prepared, converted."""

    def __init__(self, net: str, config: str) -> None:
        kind, shape = NETS[net]
        self.x = torch.randn(*shape)
        program = export(kind(), self.x)
        self.exported = {node.name: node for node in program.module().graph.nodes}
        self.prepared = prepare_pt2e(program, Toy(CONFIGS[config]))
        self.prepared(self.x)
        self.converted = convert_pt2e(self.prepared)

    def new(self) -> list[Node]:
        """The nodes of both graphs that the exported one has not."""
        nodes = itertools.chain(self.prepared.graph.nodes, self.converted.graph.nodes)
        return [node for node in nodes if node.name not in self.exported]

    def origin(self, node: Node) -> Node:
        """The exported node that a new node stems from, along from_node."""
        source = node.meta["from_node"][-1]
        while source.name not in self.exported:
            source = source.from_node[-1]
        return self.exported[source.name]


@pytest.fixture(scope="module", params=itertools.product(NETS, CONFIGS), ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return Case(*request.param)


def watches_nothing(node: Node) -> bool:
    """A get_attr that only keeps an observer in the graph has no value."""
    return node.op == "get_attr" and str(node.target).startswith("activation_post_process")


def test_every_new_node_leads_back_to_the_exported_graph(case):
    assert case.new()
    assert all(isinstance(case.origin(node), Node) for node in case.new())


def test_a_new_node_has_stack_trace_and_modules_where_its_origin_had(case):
    for node in case.new():
        origin = case.origin(node)
        for key in ("stack_trace", "nn_module_stack"):
            if key in origin.meta:
                assert node.meta.get(key) == origin.meta[key], (node, key)


def test_integers_and_their_dequantize_point_at_a_line_of_the_model(case):
    """Of an input there is no line to point at; of everything else there is."""
    for node in (*quantizes(case.converted), *dequantizes(case.converted)):
        if case.origin(node).op != "placeholder":
            assert source_line(node) is not None
            assert module_path(node) is not None


def test_a_dequantized_weight_belongs_to_the_layer_that_uses_it(case):
    for node in dequantizes(case.converted):
        if node.args[0].op == "get_attr":
            (user,) = node.users
            assert module_path(node) == module_path(user)


class _Watch(torch.fx.Interpreter):
    """Runs a graph and keeps dtype and shape of every value."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value
        return value


def kinds(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return [kinds(item) for item in value] if isinstance(value, (tuple, list)) else type(value)


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_recorded_values_have_the_dtype_and_shape_of_the_real_ones(case, stage):
    gm = getattr(case, stage)
    watch = _Watch(gm)
    watch.run(case.x)
    for node, value in watch.seen.items():
        if node.op != "output" and "guards" not in node.name and not watches_nothing(node):
            assert kinds(node.meta["val"]) == kinds(value), node


def test_tensor_meta_agrees_with_the_recorded_value(case):
    for node in case.new():
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            meta = node.meta["tensor_meta"]
            assert (meta.dtype, tuple(meta.shape), meta.stride) == (value.dtype, tuple(value.shape), value.stride())


def test_no_annotation_stays_in_the_converted_graph(case):
    keys = {key for node in case.converted.graph.nodes for key in node.meta}
    assert [key for key in keys if key.startswith("quantization")] == []


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def test_custom_metadata_of_an_op_reaches_the_nodes_made_for_it():
    program = export(Custom(), torch.randn(2, 3)).module()
    for node in program.graph.nodes:
        node.meta["custom"] = {"debug_handle": 7}
    prepared = prepare_pt2e(program, Toy(STATIC))
    prepared(torch.randn(2, 3))
    converted = convert_pt2e(prepared)
    assert len(calls(converted, torch.ops.aten.add.Tensor)) == 1
    assert {node.meta["custom"]["debug_handle"] for node in dequantizes(converted)} == {7}


class Tagged(Toy):
    """Says of each linear which part of the model it belongs to, as quantizers for several accelerators do."""

    def annotate(self, model: GraphModule) -> GraphModule:
        model = super().annotate(model)
        for index, node in enumerate(calls(model, torch.ops.aten.linear.default)):
            node.meta["quantization_tag"] = f"part {index}"
        return model


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("config", ["static", "dynamic"])
def test_the_tags_of_a_quantizer_stay_and_hold_for_what_is_made_around_an_op(config, tmp_path):
    """A dequantize is the reader's, and so is what chooses qparams at run time; a static quantize is the maker's."""
    x = torch.randn(3, 6)
    prepared = prepare_pt2e(export(Pair(), x), Tagged(CONFIGS[config]))
    prepared(x)
    converted = convert_pt2e(prepared)
    torch.save(converted, tmp_path / "converted.pt")
    for gm in (converted, torch.load(tmp_path / "converted.pt", weights_only=False)):
        first, second = calls(gm, torch.ops.aten.linear.default)
        assert [node.meta["quantization_tag"] for node in (first, second)] == ["part 0", "part 1"]
        for linear, quantize_of_input in ((first, "part 0"), (second, "part 0" if config == "static" else "part 1")):
            assert {node.meta["quantization_tag"] for node in linear.args[:2]} == {linear.meta["quantization_tag"]}
            quantize = linear.args[0].args[0]
            assert quantize.meta["quantization_tag"] == quantize_of_input
            if config == "dynamic":
                chosen = quantize.args[1]
                assert {node.meta["quantization_tag"] for node in (chosen, chosen.args[0])} == {quantize_of_input}
