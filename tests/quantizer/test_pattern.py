"""A pattern is an ordinary function over op declarations; what it matches is told by targets and arguments alone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant.errors import AnnotationError
from pt2e_quant.quantizer import Constants, Match, op, trace
from tests.nets import export

aten = torch.ops.aten

conv = op(aten.conv2d.default, aten.conv2d.padding)
linear = op(aten.linear.default)
relu = op(aten.relu.default)
sigmoid = op(aten.sigmoid.default)
plus = op(aten.add.Tensor)
minus = op(aten.sub.Tensor)
times = op(aten.mul.Tensor)
concatenate = op(aten.cat.default)
hardtanh = op(aten.hardtanh.default)
softmax = op(aten.softmax.int)


class Function(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


X, Y, W = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 3)


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    return export(Function(function), *(inputs or (X,))).module()


def matches(pattern: Callable[..., object], function: Callable[..., Tensor], *inputs: Tensor) -> list[Match]:
    """All matches of a pattern in the graph of a function, in graph order."""
    gm = graph_of(function, *inputs)
    constants = Constants(gm)
    found = [trace(pattern).match(node, constants) for node in gm.graph.nodes]
    return [match for match in found if match is not None]


def captures(match: Match) -> dict[str, str | None]:
    return {name: None if node is None else str(node) for name, node in match.captures.items()}


def linear_relu(x, w, b):
    return relu(linear(x, w, b))


# --- captures ---------------------------------------------------------------------------------------------------------


def test_captures_are_the_arguments_by_parameter_name():
    (match,) = matches(linear_relu, lambda x, w, b: torch.relu(nn.functional.linear(x, w, b)), X, W, torch.randn(4))
    assert captures(match) == {"x": "inputs_0", "w": "inputs_1", "b": "inputs_2"}


def test_an_absent_bias_is_captured_as_none():
    (match,) = matches(linear_relu, lambda x, w: torch.relu(nn.functional.linear(x, w)), X, W)
    assert captures(match) == {"x": "inputs_0", "w": "inputs_1", "b": None}


def test_root_anchor_and_users_name_the_matched_nodes():
    (match,) = matches(linear_relu, lambda x, w: torch.relu(nn.functional.linear(x, w)), X, W)
    assert (match.root.name, match.anchor.name, [node.name for node in match.nodes]) == (
        "relu",
        "linear",
        ["linear", "relu"],
    )
    assert {name: user.name for name, user in match.users.items()} == {"x": "linear", "w": "linear", "b": "linear"}


def test_a_list_capture_takes_all_tensors_of_a_list():
    def cat(*tensors):
        return concatenate(tensors)

    (match,) = matches(cat, lambda x, y: torch.cat([x, y, x], 1), X, Y)
    assert [str(node) for node in match.captures["tensors"]] == ["inputs_0", "inputs_1", "inputs_0"]
    assert [(name, str(node)) for name, node in match.pairs()] == [
        ("tensors", "inputs_0"),
        ("tensors", "inputs_1"),
        ("tensors", "inputs_0"),
    ]


def test_a_list_capture_takes_no_list_of_numbers():
    def view(x, *sizes):
        return op(aten.view.default)(x, sizes)

    assert matches(view, lambda x: x.view(3, 2)) == []
    assert len(matches(lambda x: op(aten.view.default)(x), lambda x: x.view(3, 2))) == 1


def test_a_number_is_no_capture():
    """There is nothing to put a spec on; `lift_scalars` turns numbers into tensors for backends that want them."""
    assert matches(lambda a, b: plus(a, b), lambda x: x + 2.5) == []


def test_a_capture_that_stands_twice_wants_one_tensor_twice():
    def square(a):
        return times(a, a)

    assert len(matches(square, lambda x: x * x)) == 1
    assert matches(square, lambda x, y: x * y, X, Y) == []


def test_a_literal_wants_the_same_argument():
    def relu6(x):
        return hardtanh(x, 0.0, 6.0)

    assert len(matches(relu6, lambda x: nn.functional.hardtanh(x, 0.0, 6.0))) == 1
    assert matches(relu6, lambda x: nn.functional.hardtanh(x, 0.0, 5.0)) == []


def test_a_literal_may_be_given_by_name_and_equals_a_default():
    def scaled(a, b):
        return plus(a, b, alpha=1)

    assert len(matches(scaled, lambda x, y: x + y, X, Y)) == 1
    assert matches(scaled, lambda x, y: torch.add(x, y, alpha=3), X, Y) == []


# --- the shape of the graph -------------------------------------------------------------------------------------------


def test_an_interior_node_with_a_second_user_does_not_match():
    assert matches(linear_relu, lambda x, w: torch.relu(y := nn.functional.linear(x, w)) + y, X, W) == []


def test_an_interior_node_that_is_an_output_does_not_match():
    assert matches(linear_relu, lambda x, w: (torch.relu(y := nn.functional.linear(x, w)), y), X, W) == []


def test_the_root_may_have_any_number_of_users():
    assert len(matches(linear_relu, lambda x, w: (y := torch.relu(nn.functional.linear(x, w))) * y + y, X, W)) == 1


def test_a_pattern_ends_where_the_graph_does():
    assert matches(linear_relu, lambda x: torch.relu(x)) == []


# --- commutativity ----------------------------------------------------------------------------------------------------


def residual(a, b):
    """The sigmoid stands on the left."""
    return plus(sigmoid(a), b)


@pytest.mark.parametrize(
    "function", [lambda x, y: torch.sigmoid(x) + y, lambda x, y: y + torch.sigmoid(x)], ids=["as written", "swapped"]
)
def test_operands_of_a_commutative_op_match_in_both_orders(function):
    (match,) = matches(residual, function, X, Y)
    assert captures(match) == {"a": "inputs_0", "b": "inputs_1"}


def test_a_scaled_addition_is_not_swapped():
    """x + 3 y is not y + 3 x."""
    assert matches(residual, lambda x, y: torch.add(y, torch.sigmoid(x), alpha=3), X, Y) == []
    assert len(matches(residual, lambda x, y: torch.add(torch.sigmoid(x), y, alpha=3), X, Y)) == 1


def test_an_op_that_does_not_commute_is_not_swapped():
    def difference(a, b):
        return minus(sigmoid(a), b)

    assert matches(difference, lambda x, y: y - torch.sigmoid(x), X, Y) == []


def test_a_declaration_may_say_whether_it_commutes():
    fixed = op(aten.add.Tensor, commutative=False)
    assert matches(lambda a, b: fixed(sigmoid(a), b), lambda x, y: y + torch.sigmoid(x), X, Y) == []


def test_a_failed_order_leaves_nothing_behind():
    """The first order matches the left side halfway; what it captured must not show in the second."""

    def pattern(a, b):
        return plus(relu(sigmoid(a)), relu(b))

    (match,) = matches(pattern, lambda x, y: torch.relu(y) + torch.relu(torch.sigmoid(x)), X, Y)
    assert captures(match) == {"a": "inputs_0", "b": "inputs_1"}
    assert len(match.nodes) == 4


# --- alternatives -----------------------------------------------------------------------------------------------------


def test_in_place_twins_match_the_functional_declaration():
    (match,) = matches(linear_relu, lambda x, w: torch.relu_(nn.functional.linear(x, w)), X, W)
    assert match.root.target is aten.relu_.default


def test_each_overload_of_a_declaration_matches():
    def pattern(x, w, b):
        return conv(x, w, b)

    image, kernel = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
    for padding in (1, "same"):
        assert len(matches(pattern, lambda x, w, p=padding: nn.functional.conv2d(x, w, padding=p), image, kernel)) == 1


# --- reading a match --------------------------------------------------------------------------------------------------


def only(pattern: Callable[..., object], function: Callable[..., Tensor], *inputs: Tensor) -> Match:
    (match,) = matches(pattern, function, *inputs)
    return match


def test_an_argument_is_read_by_its_name_given_or_default():
    image, kernel = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
    match = only(
        lambda x, w, b: conv(x, w, b), lambda x, w: nn.functional.conv2d(x, w, stride=2, groups=2), image, kernel
    )
    assert (match.argument(conv, "groups"), match.argument(conv, "stride"), match.argument(conv, "dilation")) == (
        2,
        [2, 2],
        [1, 1],
    )


def test_an_argument_that_the_overload_or_the_pattern_has_not_is_none():
    match = only(lambda x: relu(x), torch.relu)
    assert match.argument(relu, "groups") is None
    assert match.argument(conv, "groups") is None


def test_a_capture_has_the_shape_that_export_recorded():
    match = only(lambda x: relu(x), torch.relu)
    assert match.value("x").shape == (2, 3)


def test_parameters_and_what_is_computed_from_them_are_constant():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    gm = export(model, X).module()
    constants = Constants(gm)
    (match,) = filter(None, (trace(lambda x, w, b: linear(x, w, b)).match(node, constants) for node in gm.graph.nodes))
    assert (match.is_constant("x"), match.is_constant("w"), match.is_constant("b")) == (False, True, True)


# --- what is no pattern -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [torch.relu, aten.relu, operator.add, "relu"], ids=["function", "packet", "python operator", "name"]
)
def test_an_op_is_declared_by_its_overload(target):
    with pytest.raises(AnnotationError, match=r"op\(\) takes overloads such as torch\.ops\.aten\.relu\.default"):
        op(target)


def test_a_pattern_returns_a_declared_op():
    def nothing(x):
        return x

    with pytest.raises(AnnotationError, match="pattern 'nothing' must return a declared op applied to its parameters"):
        trace(nothing)
