"""Whatever torch.export hands over (program or module, strict or not, with gradients or without) is quantized alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import QuantizationError
from pt2e_quant.passes.runner import run_pass
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import STATIC, ByHand, Nothing, Toy, calls, quantizes

aten = torch.ops.aten


class WithoutGradients(MLP):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Regions(nn.Module):
    """Regions with and without gradients inside each other, and a parameter that two of them read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.one(x)
            with torch.enable_grad():
                x = self.two(x)
                with torch.no_grad():
                    x = self.three(x)
        x = torch.relu(x)
        with torch.no_grad():
            return self.one(x)


class Branches(nn.Module):
    """A branch outside and one inside a region without gradients: two pairs of nested graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        with torch.no_grad():
            y = self.linear(y)
            return y + torch.cond(x.sum() > 0, lambda x: x * 5, lambda x: x * 7, (y,))


def quantized_ops(model: object) -> list[str]:
    return [decision.node for decision in explain(prepare_pt2e(model, Toy(STATIC))).quantized]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("as_module", [True, False], ids=["module", "program"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_every_way_of_exporting_gives_the_same_quantized_ops(strict, as_module, gradients):
    with torch.set_grad_enabled(gradients):
        exported = export(ConvNet(), torch.randn(1, 3, 16, 16), strict=strict)
    model = exported.module() if as_module else exported
    assert quantized_ops(model) == ["conv2d", "relu_", "conv2d_1", "linear"]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_a_forward_without_gradients_is_quantized_like_any_other(strict):
    x = torch.randn(3, 10)
    prepared = prepare_pt2e(export(WithoutGradients(), x, strict=strict), Toy(STATIC))
    prepared(x)
    assert len(quantizes(convert_pt2e(prepared))) == 3
    assert len(explain(prepared).quantized) == 3


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_nested_regions_without_gradients_are_inlined(strict):
    model, x = Regions(), torch.randn(2, 4)
    prepared = prepare_pt2e(export(model, x, strict=strict), Nothing(), allow_empty=True)
    assert len(calls(prepared, aten.linear.default)) == 4
    assert calls(prepared, torch.ops.higher_order.wrap_with_set_grad_enabled) == []
    torch.testing.assert_close(prepared(x), model(x), rtol=0, atol=0)


def test_branches_inside_a_region_without_gradients_keep_their_own_graphs():
    model, x = Branches(), torch.randn(2, 4)
    prepared = prepare_pt2e(export(model, x), Nothing(), allow_empty=True)
    for value in (x, -x):
        torch.testing.assert_close(prepared(value), model(value), rtol=0, atol=0)


def test_an_inlined_op_keeps_module_and_source_line():
    prepared = prepare_pt2e(export(WithoutGradients(), torch.randn(3, 10)), Toy(STATIC))
    decision = explain(prepared).quantized[0]
    assert (decision.module, "super().forward(x)" in str(decision.source) or "self.up(x)" in str(decision.source)) == (
        "up",
        True,
    )


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "program"])
def test_the_callers_model_is_left_as_it_was(as_module):
    exported = export(ConvNet(), torch.randn(1, 3, 16, 16))
    model = exported.module() if as_module else exported
    graph_module = model if as_module else exported.graph_module
    parameters = dict(model.named_parameters())
    state = model.state_dict() if as_module else model.state_dict
    values = {name: value.clone() for name, value in state.items()}
    code = graph_module.code
    metas = {node.name: set(node.meta) for node in graph_module.graph.nodes}
    prepared = prepare_pt2e(model, Toy(STATIC))
    prepared(torch.randn(1, 3, 16, 16))
    convert_pt2e(prepared)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    torch.testing.assert_close(dict(state), values, rtol=0, atol=0)
    assert graph_module.code == code
    assert {node.name: set(node.meta) for node in graph_module.graph.nodes} == metas


def test_parameters_that_are_not_quantized_are_shared_with_the_callers_model():
    model = MLP()
    prepared = prepare_pt2e(export(model, torch.randn(3, 10)), Toy(STATIC))
    assert prepared.get_parameter("up.bias") is model.up.bias


def test_example_inputs_of_a_program_are_kept_for_lowering():
    x = torch.randn(3, 10)
    exported = export(MLP(), x)
    assert explain(prepare_pt2e(exported, Toy(STATIC))).record.example_inputs == ((x,), {})
    assert explain(prepare_pt2e(exported.module(), Toy(STATIC))).record.example_inputs is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda program: program], ids=["copy", "itself"])
def test_a_program_can_be_prepared_many_times(copied):
    exported = export(MLP(), torch.randn(3, 10))
    first, second = prepare_pt2e(copied(exported), Toy(STATIC)), prepare_pt2e(exported, Toy(STATIC))
    assert first.code == second.code
    assert first.state_dict().keys() == second.state_dict().keys()


class Dead(nn.Module):
    """Computes something that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


def test_what_nobody_reads_is_not_quantized():
    x = torch.randn(2, 4)
    prepared = prepare_pt2e(export(Dead(), x), Toy(STATIC))
    prepared(x)
    assert [decision.module for decision in explain(prepared).quantized] == ["used"]
    assert len(quantizes(convert_pt2e(prepared))) == 2


# --- passes -----------------------------------------------------------------------------------------------------------


def failing(model: torch.fx.GraphModule) -> None:
    raise KeyError("val")


def returning_nothing(model: torch.fx.GraphModule) -> None:
    return None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (failing, r"pass 'failing' failed on this graph: KeyError: 'val'"),
        (returning_nothing, r"pass 'returning_nothing' must return a GraphModule, it returned NoneType"),
    ],
)
def test_a_pass_that_fails_is_named(step: Callable[..., None], message: str):
    with pytest.raises(QuantizationError, match=message):
        run_pass(step, export(MLP(), torch.randn(3, 10)).module())


def test_a_quantizer_that_fails_is_reported_as_the_pass_that_it_is():
    with pytest.raises(QuantizationError, match="pass 'annotate' failed on this graph: KeyError: 'val'"):
        prepare_pt2e(export(MLP(), torch.randn(3, 10)), ByHand(failing))
