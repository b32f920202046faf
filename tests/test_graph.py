"""Utilities on exported graphs: copies that share, constants, metadata, names, train and eval."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from pt2e_quant.errors import CaptureError
from pt2e_quant.graph.attributes import attribute, free_name, insert_attribute, set_attribute, state_bytes
from pt2e_quant.graph.constants import Constants
from pt2e_quant.graph.module import ExportedModule, clone, finish, is_guard, set_training, tidy
from pt2e_quant.graph.values import fake_like, is_float_tensor, set_value
from pt2e_quant.where import copy_origin
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import calls, the_call

aten = torch.ops.aten

X = torch.randn(3, 10)


def mlp() -> GraphModule:
    return export(MLP(), X).module()


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_clone_has_its_own_graph_and_modules_and_the_same_parameters():
    gm = mlp()
    other = clone(gm)
    assert other.graph is not gm.graph
    assert other.get_submodule("up") is not gm.get_submodule("up")
    assert other.get_parameter("up.weight") is gm.get_parameter("up.weight")


def test_a_clone_runs_before_and_after_it_is_finished():
    gm = mlp()
    for other in (clone(gm), finish(clone(gm))):
        torch.testing.assert_close(other(X), gm(X), rtol=0, atol=0)


def test_a_draft_shows_the_code_of_its_graph_as_it_is_now():
    draft = clone(mlp())
    the_call(draft, aten.relu.default).target = aten.sigmoid.default
    assert "aten.sigmoid.default" in draft.code
    assert "aten.sigmoid.default" in str(draft)


class Transient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("dropped", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept + self.dropped


def test_buffers_that_are_not_saved_stay_so():
    gm = finish(clone(export(Transient(), torch.randn(3)).module()))
    assert list(gm.state_dict()) == ["kept"]


def test_finishing_drops_what_the_graph_does_not_name():
    draft = clone(mlp())
    draft.register_buffer("unused", torch.ones(1))
    relu = the_call(draft, aten.relu.default)
    relu.replace_input_with(relu.args[0], next(node for node in draft.graph.nodes if node.op == "placeholder"))
    tidy(draft)
    down = the_call(draft, aten.linear.default)
    down.replace_all_uses_with(relu)
    assert list(finish(tidy(draft)).state_dict()) == []


def test_finishing_leaves_modules_of_others_alone():
    """A module that the graph no longer calls may still be called by the graph that it came from."""
    shared = nn.BatchNorm1d(3)
    draft = clone(mlp())
    draft.add_module("shared", shared)
    finish(draft)
    assert shared.weight is not None
    assert not hasattr(draft, "shared")


@pytest.mark.parametrize("make", [mlp, lambda: finish(clone(mlp()))], ids=["exported", "ours"])
def test_a_clone_survives_deepcopy(make):
    gm = clone(make())
    other = copy.deepcopy(gm)
    assert isinstance(other, ExportedModule)
    torch.testing.assert_close(other(X), gm(X), rtol=0, atol=0)


def test_the_flag_says_in_which_mode_the_model_was_captured():
    for mode in (True, False):
        gm = export(ConvNet(), torch.randn(2, 3, 16, 16), train=mode).module()
        assert finish(clone(gm)).training is mode


def test_set_training_counts_the_ops_that_changed():
    gm = export(ConvNet(), torch.randn(2, 3, 16, 16)).module()
    assert [set_training(gm.graph, mode) for mode in (True, True, False)] == [3, 0, 3]


# --- attributes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.ones(2)), torch.zeros(3), nn.Linear(2, 2)], ids=["parameter", "buffer", "module"]
)
def test_attributes_are_set_and_read_by_dotted_path(value):
    root = nn.Module()
    set_attribute(root, "a.b.c", value)
    assert attribute(root, "a.b.c") is value
    assert isinstance(root.get_submodule("a.b"), nn.Module)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (torch.ones(2), nn.Parameter(torch.zeros(2)), "_parameters"),
        (nn.Parameter(torch.zeros(2)), torch.ones(2), "_buffers"),
        (torch.ones(2), torch.zeros(2), "_buffers"),
    ],
    ids=["buffer by parameter", "parameter by buffer", "buffer by buffer"],
)
def test_an_attribute_may_be_replaced_by_one_of_another_kind(first, second, kind):
    root = nn.Module()
    set_attribute(root, "a.w", first)
    set_attribute(root, "a.w", second)
    assert list(getattr(root.get_submodule("a"), kind)) == ["w"]
    assert attribute(root, "a.w") is second


def test_free_names_skip_those_that_are_taken():
    root = nn.Module()
    root.register_buffer("_scale_0", torch.ones(1))
    root.register_buffer("_scale_2", torch.ones(1))
    names = free_name(root, "_scale_")
    assert [next(names), next(names)] == ["_scale_1", "_scale_3"]


def test_an_inserted_attribute_has_value_and_origin():
    draft = clone(mlp())
    relu = the_call(draft, aten.relu.default)
    with draft.graph.inserting_before(relu):
        node = insert_attribute(draft, "extra", torch.zeros(2, 5, dtype=torch.int8), relu, "test")
    assert (node.meta["val"].shape, node.meta["val"].dtype) == ((2, 5), torch.int8)
    assert node.meta["stack_trace"] == relu.meta["stack_trace"]
    assert (node.meta["from_node"][-1].name, node.meta["from_node"][-1].pass_name) == ("relu", "test")


def test_bytes_of_shared_memory_count_once():
    root = nn.Module()
    root.one = nn.Parameter(torch.zeros(10))
    root.same = root.one
    root.register_buffer("view", root.one.detach()[2:4])
    root.register_buffer("own", torch.zeros(3, dtype=torch.int8))
    assert state_bytes(root) == 10 * 4 + 3


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_guards_are_told_from_other_calls():
    gm = mlp()
    assert [node.name for node in gm.graph.nodes if is_guard(node)] == ["_guards_fn"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(1), True),
        (torch.ones(1).half(), True),
        (torch.ones(1).int(), False),
        ([torch.ones(1)], False),
        (None, False),
    ],
    ids=["float", "half", "int", "list", "nothing"],
)
def test_float_tensors_are_told_by_their_recorded_value(value, expected):
    node = Graph().placeholder("x")
    if value is not None:
        node.meta["val"] = value
    assert is_float_tensor(node) is expected


def test_a_tensor_value_comes_with_its_layout_and_a_list_without():
    graph = Graph()
    one, several = graph.placeholder("x"), graph.placeholder("y")
    set_value(one, torch.zeros(2, 3).half())
    set_value(several, [torch.zeros(2)])
    assert (one.meta["tensor_meta"].dtype, tuple(one.meta["tensor_meta"].shape)) == (torch.float16, (2, 3))
    assert "tensor_meta" not in several.meta


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3).t(),
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(1, 3).expand(4, 3),
        torch.zeros(3, 1, 4).transpose(0, 1),
    ],
    ids=["contiguous", "transposed", "channels_last", "expanded", "stride_of_one"],
)
def test_a_fake_tensor_has_the_layout_that_empty_like_gives_under_its_mode(value):
    mode = FakeTensorMode()
    made = fake_like(value, mode, torch.int8)
    with mode:
        wanted = torch.empty_like(mode.from_tensor(value), dtype=torch.int8)
    assert made.fake_mode is mode
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        wanted.shape,
        wanted.stride(),
        torch.int8,
        value.device,
    )


def test_copying_an_origin_keeps_what_the_node_has_already():
    graph = Graph()
    node, source = graph.placeholder("x"), graph.placeholder("y")
    node.meta["stack_trace"] = "mine"
    source.meta.update(stack_trace="theirs", custom={"a": 1})
    copy_origin(node, source, "test")
    assert (node.meta["stack_trace"], node.meta["custom"]) == ("mine", {"a": 1})


# --- constants --------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A parameter, what is computed from it, something random, and a buffer that the model writes to through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("state", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.state.view(2).add_(1.0)
        first, second = (self.weight * 2).chunk(2, 1)
        noise = torch.nn.functional.dropout(self.weight, 0.5, training=True)
        return x @ first + x @ second + torch.relu(self.state) + torch.sigmoid(noise).sum()


@pytest.mark.parametrize(
    ("op", "constant"),
    [
        (aten.mul.Tensor, True),
        (aten.chunk.default, True),
        (aten.dropout.default, False),
        (aten.sigmoid.default, False),
        (aten.view.default, False),
        (aten.relu.default, False),
        (aten.matmul.default, False),
    ],
    ids=str,
)
def test_constants_are_what_no_input_no_write_and_no_chance_can_change(op, constant):
    gm = export(Mixed(), torch.randn(3, 4)).module()
    constants = Constants(gm)
    assert [node in constants for node in calls(gm, op)] == [constant] * len(calls(gm, op))
    assert calls(gm, op)


def test_the_value_of_a_constant_is_computed_without_gradients():
    model = Mixed()
    gm = export(model, torch.randn(3, 4)).module()
    value = Constants(gm).value(the_call(gm, aten.mul.Tensor))
    torch.testing.assert_close(value, model.weight.detach() * 2, rtol=0, atol=0)
    assert not value.requires_grad


def test_a_chain_of_constants_may_be_longer_than_pythons_stack():
    graph = Graph()
    node = graph.get_attr("weight")
    for _ in range(3001):
        node = graph.call_function(aten.neg.default, (node,))
    graph.output(node)
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(2))
    assert Constants(GraphModule(root, graph)).value(node).tolist() == [-1.0, -1.0]


def test_asking_for_the_value_of_what_is_not_constant_is_an_error():
    gm = mlp()
    with pytest.raises(CaptureError, match=r"known only when the model runs:\nnode relu"):
        Constants(gm).value(calls(gm, aten.relu.default)[0])
