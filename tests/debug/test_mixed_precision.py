"""Mixed precision: the integer program by hand, budgets as measured, and a choice that is saved, edited and applied."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.debug import Budget, MixedPrecision, Precisions, mixed_precision
from pt2e_quant.debug.assignment import Option, greedy, integer_program
from pt2e_quant.errors import FileError, QuantizationError, TargetingError
from pt2e_quant.latency import KernelTime, Profile
from pt2e_quant.ops import is_dequantize
from quantizers.x86_inductor import X86InductorQuantizer
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import sqnr

pytest.importorskip("scipy")


class Net(nn.Module):
    """Four linears; one row of the second is much larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 64)
        self.c, self.d = nn.Linear(64, 32), nn.Linear(32, 10)
        with torch.no_grad():
            self.b.weight[0] *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(x: Tensor) -> ExportedProgram:
    return torch.export.export(Net().eval(), (x,))


@pytest.fixture(scope="module")
def found(exported: ExportedProgram, x: Tensor) -> MixedPrecision:
    return mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(sqnr=22.0))


def made(exported: ExportedProgram, quantizer: XNNPACKQuantizer, x: Tensor) -> GraphModule:
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    return convert_pt2e(prepared)


# --- choosing ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    Option(op, name, noise, size)
    for op, rows in {
        "a": {"int4": (9.0, 4), "int8": (1.0, 8), "float": (0.0, 32)},
        "b": {"int4": (2.0, 10), "int8": (0.5, 20), "float": (0.0, 80)},
        "c": {"int4": (30.0, 6), "int8": (0.25, 12), "float": (0.0, 48)},
    }.items()
    for name, (noise, size) in rows.items()
]


def best(*, noise: float = float("inf"), size: float = float("inf")) -> tuple[float, float]:
    """(size, noise) of the best choice, by trying all."""
    by_op = [[one for one in OPTIONS if one.op == op] for op in "abc"]
    sums = [(sum(o.size for o in some), sum(o.noise for o in some)) for some in itertools.product(*by_op)]
    fits = [one for one in sums if one[1] <= noise and one[0] <= size]
    return min(fits) if noise != float("inf") else min(fits, key=lambda one: one[1])


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.8, 4.0, 12.0, 50.0])
def test_the_smallest_choice_within_a_bound_of_noise(noise):
    chosen = integer_program(OPTIONS, noise=noise)
    assert [one.op for one in chosen] == ["a", "b", "c"]
    assert (sum(o.size for o in chosen), sum(o.noise for o in chosen)) == best(noise=noise)
    near = greedy(OPTIONS, noise=noise)
    assert sum(o.noise for o in near) <= noise
    assert sum(o.size for o in near) >= best(noise=noise)[0]


@pytest.mark.parametrize("size", [20, 27, 40, 100, 160])
def test_the_least_noise_within_a_bound_of_size(size):
    chosen = integer_program(OPTIONS, size=size)
    assert (sum(o.size for o in chosen), sum(o.noise for o in chosen)) == best(size=size)
    assert sum(o.size for o in greedy(OPTIONS, size=size)) <= size


def test_no_choice_is_empty():
    assert integer_program(OPTIONS, size=19) == greedy(OPTIONS, size=19) == []


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_accuracy_is_met_as_measured_and_saves_bytes(found, exported, x):
    chosen, by_greed, int8, int4 = found.trials
    assert [one.method for one in found.trials] == ["integer program", "greedy", "all int8", "all int4"]
    assert chosen.meets
    assert not int4.meets
    assert int4.size < chosen.size <= by_greed.size < int8.size
    assert {"int4", "int8"} == set(found.precisions.formats.values())
    graph = made(exported, found.precisions.apply(XNNPACKQuantizer(int8_config())), x)
    assert sqnr(exported.module()(x), graph(x)) == pytest.approx(chosen.value, abs=1e-4)


def int8_config():
    return get_symmetric_quantization_config(is_per_channel=True)


def test_bytes_are_those_of_packed_integers_and_their_scales(found):
    _, _, int8, int4 = found.trials
    weights, channels = 32 * 64 + 64 * 64 + 64 * 32 + 32 * 10, 64 + 64 + 32 + 10
    assert int8.size == weights + 4 * channels
    assert int4.size == weights // 2 + 4 * weights // 32  # one float32 for each group of 32, as the graph stores it


def test_a_budget_of_size_gives_more_accuracy_than_one_format_of_that_size(exported, x):
    limit = 8000
    found = mixed_precision(exported, [x], X86InductorQuantizer(), budget=Budget(size=limit))
    chosen, _, int8, int4 = found.trials
    assert int4.size < chosen.size <= limit < int8.size
    assert chosen.value > int4.value
    assert "chosen:\n  linear: " in found.text()


def test_a_metric_may_fall_by_so_much(exported, x):
    wanted = exported.module()(x).argmax(1)

    def agreement(model: GraphModule) -> float:
        return float((model(x).argmax(1) == wanted).float().mean())

    found = mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(drop=0.05), metric=agreement)
    assert found.metric == "agreement"
    assert found.trials[0].meets
    assert found.trials[0].value >= 0.95


class Clocked:
    """A program whose linears take 40 us in float, 10 us in int8, 6 us in int4, and 20 us lie outside of them."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph = graph

    def profile(self, *args: Tensor) -> Profile:
        linears = self._graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        times = {node.name: self._time(str(node.args[1].target)) for node in linears}
        kernels = tuple(KernelTime("linear", 1, time, (name,)) for name, time in times.items())
        return Profile(20.0 + sum(times.values()), kernels)

    def _time(self, weight: str) -> float:
        if "dequantize" not in weight:
            return 40.0
        return 6.0 if "channel_group" in weight else 10.0


def test_a_budget_of_latency_goes_where_it_saves_most_noise(exported, x):
    found = mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(latency=90.0), lower=Clocked)
    chosen, by_greed, int8, int4 = found.trials
    assert [one.latency for one in (int8, int4)] == [20 + 4 * 10, 20 + 4 * 6]
    assert chosen.latency == 20 + 40 + 3 * 10  # one op in float is all that there is time for
    assert sorted(found.precisions.formats.values()) == ["float", "int8", "int8", "int8"]
    assert chosen.value > int8.value
    assert by_greed.meets
    assert "90 us" in str(chosen)


def test_a_budget_of_latency_needs_a_profile_of_every_op(exported, x):
    with pytest.raises(QuantizationError, match=r"no choice meets Budget\(.*latency=43.*44 us"):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(latency=43.0), lower=Clocked)
    with pytest.raises(TargetingError, match="needs lower="):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(latency=43.0))
    mute = SimpleNamespace(profile=lambda *args: Profile(9.0, (KernelTime("linear", 4, 8.0, ("linear", "linear_1")),)))
    with pytest.raises(TargetingError, match=r"'float'.* joins no kernel with linear, linear_1, linear_2, linear_3"):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(latency=43.0), lower=lambda graph: mute)


@pytest.mark.slow
def test_a_budget_of_latency_is_met_by_a_program_of_executorch(exported, x):
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    found = mixed_precision(
        exported, [x], XNNPACKQuantizer(), budget=Budget(latency=1e6),
        lower=lambda graph: lower_to_executorch(graph, verify=False),
    )  # fmt: skip
    assert set(found.precisions.formats.values()) == {"float"}
    assert all(0 < trial.latency < 1e6 for trial in found.trials)


def test_ops_that_the_user_keeps_in_float_stay_there(exported, x):
    quantizer = XNNPACKQuantizer().set_module_name("b", None)
    found = mixed_precision(exported, [x], quantizer, budget=Budget(sqnr=20.0))
    assert "linear_1" not in found.precisions.formats
    assert quantizer.global_config is None  # it stays as it was


# --- the choice as a value --------------------------------------------------------------------------------------------


def test_a_choice_is_saved_edited_and_applied_to_another_export(found, x, tmp_path):
    file = found.precisions.save(tmp_path / "precisions.json")
    assert Precisions.load(file) == found.precisions
    plain = json.loads(file.read_text())
    plain["formats"] |= {"linear": "float", "linear_3": "int4"}
    file.write_text(json.dumps(plain))
    again = torch.export.export(Net().eval(), (x,))
    graph = made(again, Precisions.load(file).apply(XNNPACKQuantizer(int8_config())), x)
    layers = {node.name: node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default}
    assert not is_dequantize(layers["linear"].args[1])
    assert "channel_group" in str(layers["linear_3"].args[1].target)


def test_a_choice_is_part_of_a_recipe(found, exported, x):
    from pt2e_quant.recipes import Recipe
    from pt2e_quant.recipes.configuring import quantizer_of

    recipe = Recipe(target="xnnpack", precisions=dict(found.precisions.formats))
    graph = made(exported, quantizer_of(recipe), x)
    assert sqnr(exported.module()(x), graph(x)) == pytest.approx(found.trials[0].value, abs=1e-4)


def test_a_choice_that_does_not_fit_is_refused(found, exported, x):
    with pytest.raises(TargetingError, match=r"linear is to be in 'int5', which XNNPACKQuantizer lacks. Did you mean"):
        Precisions({"linear": "int5"}).apply(XNNPACKQuantizer(int8_config()))
    with pytest.raises(TargetingError, match="matches nothing"):
        prepare_pt2e(exported, Precisions({"linear_9": "int8"}).apply(XNNPACKQuantizer(int8_config())))


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9, "formats": {}}', '{"version": 1, "formats": {"a": 4}}'])
def test_a_file_that_holds_something_else_is_refused(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(FileError, match=r"file\.json"):
        Precisions.load(tmp_path / "file.json")


def test_what_cannot_be_searched_is_refused(exported, x):
    with pytest.raises(QuantizationError, match=r"no choice meets Budget\(.*at best, integer program"):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(size=100))
    with pytest.raises(TargetingError, match="a budget is one of"):
        Budget(sqnr=20.0, size=3)
    with pytest.raises(TargetingError, match="needs a metric to measure"):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(drop=0.1))
    with pytest.raises(TargetingError, match="declares no precisions"):
        mixed_precision(exported, [x], XNNPACKQuantizer(), budget=Budget(sqnr=1.0), precisions={})


def test_a_format_that_no_op_can_have_is_no_choice():
    """Groups of 32 inputs do not fit into narrower linears, which int8 takes."""
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (rows,))
    found = mixed_precision(program, [rows], XNNPACKQuantizer(), budget=Budget(sqnr=20.0))
    assert set(found.precisions.formats.values()) == {"int8"}
