"""QATSchedule turns the switches at its steps, in a loop of the user's, and goes on from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import QATSchedule, enable_observer, prepare_qat_pt2e
from pt2e_quant.errors import TargetingError
from pt2e_quant.fake_quantize import is_fake_quantizer
from pt2e_quant.quantizer import with_learned_scales
from tests.nets import ConvNet, export
from tests.pt2e.kit import STATIC, Toy, calls
from tests.qat.kit import TRAINED, images

X = images(1, 4, 3, 16, 16)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return export(ConvNet(), X, train=True)


@pytest.fixture
def graph(program) -> GraphModule:
    return prepare_qat_pt2e(program, Toy().set_global(TRAINED))


def switches(graph: GraphModule) -> tuple[set[int], set[int], set[bool]]:
    """Rounding, observing, and batch norms that take statistics."""
    fakes = [module for module in graph.modules() if is_fake_quantizer(module)]
    trains = {node.args[5] for node in calls(graph, torch.ops.aten.batch_norm.default)}
    return {int(one.fake_quant_enabled) for one in fakes}, {int(one.observer_enabled) for one in fakes}, trains


def test_parts_begin_at_their_steps(graph):
    schedule = QATSchedule(graph, round_at=2, freeze_norms_at=4, freeze_ranges_at=5)
    seen = []
    for step in range(7):
        assert schedule.at == step
        seen.append(switches(graph))
        schedule.step()
    observing, rounding, norms, frozen = (
        ({0}, {1}, {True}),
        ({1}, {1}, {True}),
        ({1}, {1}, {False}),
        ({1}, {0}, {False}),
    )
    assert seen == [observing, observing, rounding, rounding, norms, frozen, frozen]


def test_switches_of_the_user_stay_between_the_parts(graph):
    schedule = QATSchedule(nn.Sequential(graph), freeze_ranges_at=2)
    for _ in range(3):
        schedule.step()
    enable_observer(graph)
    schedule.step()
    assert switches(graph)[1] == {1}


def test_learned_scales_follow_then_learn_then_stay(program):
    graph = prepare_qat_pt2e(program, Toy().set_global(with_learned_scales(STATIC)))
    schedule = QATSchedule(graph, round_at=1, freeze_ranges_at=2)
    fakes = [module for module in graph.modules() if is_fake_quantizer(module)]
    seen = []
    for _ in range(3):
        graph(X)
        seen.append(
            {(int(one.fake_quant_enabled), int(one.static_enabled), int(one.learning_enabled)) for one in fakes}
        )
        schedule.step()
    assert seen == [{(0, 1, 0)}, {(1, 0, 1)}, {(1, 0, 0)}]


def test_ranges_of_a_calibration_rest_from_the_start(program):
    graph = prepare_qat_pt2e(program, Toy().set_global(TRAINED), calibration=[X])
    before = copy.deepcopy({name: value for name, value in graph.state_dict().items() if "max_val" in name})
    QATSchedule(graph, freeze_norms_at=3)
    graph(X * 5)
    after = graph.state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == set()


def test_a_resumed_schedule_is_where_it_was(program, graph):
    schedule = QATSchedule(graph, round_at=1, freeze_norms_at=2, freeze_ranges_at=4)
    for _ in range(3):
        schedule.step()
    again = prepare_qat_pt2e(program, Toy().set_global(TRAINED))
    resumed = QATSchedule(again, round_at=1, freeze_norms_at=2, freeze_ranges_at=4)
    again.load_state_dict(graph.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(3):
        assert switches(again) == switches(graph)
        assert resumed.at == schedule.at
        schedule.step()
        resumed.step()


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (nn.Linear(2, 2), {}, "no fake quantizer"),
        (None, {"round_at": 3, "freeze_ranges_at": 2}, "parts follow one another"),
        (None, {"round_at": -1}, "parts follow one another"),
        (None, {"round_at": 1.5}, "round_at must be an int"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused_at_once(graph, model, arguments, says):
    with pytest.raises(TargetingError, match=says):
        QATSchedule(model or graph, **arguments)


def test_norms_that_are_not_there_are_refused_before_the_first_step():
    graph = prepare_qat_pt2e(export(nn.Sequential(nn.Linear(3, 3)), images(1, 2, 3)), Toy().set_global(TRAINED))
    with pytest.raises(TargetingError, match="no batch norm"):
        QATSchedule(graph, freeze_norms_at=900)


@pytest.mark.parametrize("state", [{}, {"at": -1}, {"at": "3"}, {"at": 1, "lr": 0.1}])
def test_a_state_of_something_else_is_refused(graph, state):
    with pytest.raises(TargetingError, match=r"what state_dict\(\) returned"):
        QATSchedule(graph).load_state_dict(state)
