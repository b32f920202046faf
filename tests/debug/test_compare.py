"""compare: own and inherited errors by hand, planted faults come first, provenance joins all versions of a model."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.debug import Comparison, compare
from pt2e_quant.debug.compare import copy_to_run
from pt2e_quant.debug.pairs import join
from pt2e_quant.errors import CalibrationError, CaptureError, QuantizationError
from pt2e_quant.ops import is_dequantize, is_quantize
from pt2e_quant.pt2e.representation import reference_representation_rewrite
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.lowering.handmade import Body, Grid
from tests.nets import export, sqnr

PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)


class Parts(nn.Module):
    """Folded batch norm, a square weight, a residual, an op with two outputs, attention, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.square = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.square(x) + x)
        rows = self.mix(x.flatten(2).transpose(1, 2))
        rows = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        left, right = rows.chunk(2, 2)
        return self.head(torch.cat([right, left], 2)).mean(1)


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 6, 6, generator=generator),) for _ in range(2)]


@pytest.fixture(scope="module")
def exact(data: list[tuple[Tensor]]) -> ExportedProgram:
    torch.manual_seed(0)
    return export(Parts(), *data[0])


@pytest.fixture(scope="module")
def prepared(exact: ExportedProgram, data: list[tuple[Tensor]]) -> GraphModule:
    made = prepare_pt2e(exact, XNNPACKQuantizer(PER_CHANNEL))
    for batch in data:
        made(*batch)
    return made


@pytest.fixture(scope="module")
def converted(prepared: GraphModule) -> GraphModule:
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def comparison(exact: ExportedProgram, converted: GraphModule, data: list[tuple[Tensor]]) -> Comparison:
    return compare(exact, converted, data)


def graph(function: Any, *inputs: Tensor) -> GraphModule:
    return torch.export.export(Body(function), inputs).module()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_an_op_that_rounds_nothing_inherits_its_error():
    x = torch.tensor([0.1, 0.26, -1.0])
    grid = Grid(0.2, 0)  # relu gives 0.1 and 0.26, of which 0 and 0.2 are left: errors of 0.1 and 0.06
    found = compare(graph(lambda m, x: torch.relu(x) * 2, x), graph(lambda m, x: grid(torch.relu(x)) * 2, x), [x])
    of_input, rounded, doubled = found.nodes
    assert (of_input.node, rounded.node, doubled.node) == ("inputs_0", "relu", "mul")
    expected = 10 * math.log10((0.1**2 + 0.26**2) / (0.1**2 + 0.06**2))
    assert (of_input.sqnr, doubled.own, rounded.inherited) == (math.inf, math.inf, math.inf)
    assert [rounded.own, doubled.inherited, doubled.sqnr] == pytest.approx([expected] * 3, abs=1e-4)
    assert [rounded.largest, rounded.own_largest, doubled.largest] == pytest.approx([0.1, 0.1, 0.2], rel=1e-6)
    product = 0.26 * 0.2
    assert rounded.cosine == pytest.approx(product / (math.hypot(0.1, 0.26) * 0.2), rel=1e-6)


def test_own_errors_are_those_of_exact_inputs():
    x = torch.linspace(0, 3, 50)
    first, second = Grid(0.11, 0), Grid(0.07, 0)
    exact = graph(lambda m, x: torch.sin(torch.relu(x)), x)
    found = compare(exact, graph(lambda m, x: second(torch.sin(first(torch.relu(x)))), x), [x])
    row = next(row for row in found.nodes if row.node == "sin")
    alone, together = second(torch.sin(x)), second(torch.sin(first(x)))
    assert row.own == pytest.approx(sqnr(torch.sin(x), alone), abs=1e-4)
    assert row.sqnr == pytest.approx(sqnr(torch.sin(x), together), abs=1e-4)
    signal = torch.sin(x).square().sum()
    assert row.inherited == pytest.approx(float(10 * torch.log10(signal / (alone - together).square().sum())), abs=1e-4)


def test_an_op_that_writes_to_its_input_has_an_own_error_too():
    x = torch.linspace(-3, 3, 50)
    first, second = Grid(0.11, 0), Grid(0.07, 0)
    exact = graph(lambda m, x: torch.sin(x).add_(1.0) * 2, x)
    found = compare(exact, graph(lambda m, x: second(first(torch.sin(x)).add_(1.0)) * 2, x), [x])
    row = next(row for row in found.nodes if row.node == "add_")
    assert row.own == pytest.approx(sqnr(torch.sin(x) + 1, second(torch.sin(x) + 1)), abs=1e-4)
    assert math.isfinite(row.inherited)


def test_batches_add_up(exact, converted, data, comparison):
    wanted = torch.cat([exact.module()(*batch) for batch in data]).detach()
    given = torch.cat([converted(*batch) for batch in data]).detach()
    assert comparison.sqnr == pytest.approx(sqnr(wanted, given), abs=1e-4)
    assert comparison.outputs[0].largest == pytest.approx(float((wanted - given).abs().max()), rel=1e-6)


# --- faults -----------------------------------------------------------------------------------------------------------


def scale_of_a_channel(gm: GraphModule) -> None:
    weight = _weight_of(gm, "conv2d_1")
    scale = getattr(gm, weight.args[1].target)
    scale.data = scale.detach().clone()
    scale.data[3] *= 100


def swapped_axis(gm: GraphModule) -> None:
    _weight_of(gm, "linear").update_arg(3, 1)


def wrong_zero_point(gm: GraphModule) -> None:
    quantize = next(node for node in gm.graph.nodes if is_quantize(node) and node.args[0].name == "relu_1")
    quantize.update_arg(2, quantize.args[2] + 20)


def _weight_of(gm: GraphModule, layer: str) -> Any:
    node = next(node for node in gm.graph.nodes if node.name == layer)
    return next(source for source in node.all_input_nodes if is_dequantize(source) and "channel" in str(source.target))


@pytest.mark.parametrize(
    ("plant", "node", "module"),
    [(scale_of_a_channel, "conv2d_1", "square"), (swapped_axis, "linear", "mix"), (wrong_zero_point, "relu_1", "")],
)
def test_a_planted_fault_ranks_first(plant: Callable[[GraphModule], None], node, module, exact, converted, data):
    broken = copy.deepcopy(converted)
    plant(broken)
    broken.recompile()
    found = compare(exact, broken, data)
    worst, second = found.worst(2)
    assert (worst.node, worst.module) == (node, module)
    assert worst.own < second.own - 10  # dB
    assert worst.source.startswith("test_compare.py:")
    assert f"{node} (aten." in found.text().splitlines()[2]


# --- versions of a model ----------------------------------------------------------------------------------------------


def saved_and_loaded(gm: GraphModule, *inputs: Tensor) -> GraphModule:
    file = io.BytesIO()
    torch.export.save(torch.export.export(gm, inputs), file)
    file.seek(0)
    return torch.export.load(file).module()


VERSIONS: dict[str, Callable[..., Any]] = {
    "converted": lambda gm, x: gm,
    "deepcopy": lambda gm, x: copy.deepcopy(gm),
    "exported again": lambda gm, x: torch.export.export(gm, (x,)),
    "file": saved_and_loaded,
    "decomposed": lambda gm, x: torch.export.export(gm, (x,)).run_decompositions(),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_quantized_tensor_finds_its_float_twin(version, exact, converted, data, comparison):
    found = VERSIONS[version](converted, *data[0])
    pairs = join(copy_to_run(exact), copy_to_run(found))
    assert pairs.missing == []
    rows = {row.node: row.own for row in compare(exact, found, data).nodes}
    assert rows.keys() == {row.node for row in comparison.nodes} >= {"batch_norm", "getitem", "getitem_1", "cat"}
    wanted = {row.node: row.own for row in comparison.nodes}
    apart = {name: (rows[name], wanted[name]) for name in rows if abs(rows[name] - wanted[name]) > 0.1}
    assert apart == {}  # decomposed ops add in another order, some values round to the other side


def test_before_convert_a_model_computes_what_the_float_one_does(exact, prepared, data):
    found = compare(exact, prepared, data)
    assert found.sqnr > 100  # folding a batch norm costs float32 roundings, 144 dB each
    assert len(found.nodes) > 10


def test_a_prepared_model_shows_the_tensors_that_its_observers_watch(prepared, converted, data):
    found = {node.node: node for node in compare(prepared, converted, data).nodes}
    assert not any("activation_post_process" in name for name in found)
    assert found["linear"].module == "mix"
    assert found["linear"].op == "aten.linear.default"


def test_codes_go_by_the_name_of_what_was_quantized(converted, data):
    found = {row.node: row for row in compare(converted, reference_representation_rewrite(converted), data).nodes}
    assert not any("quantize" in name for name in found)
    assert (found["linear"].module, found["linear"].op) == ("mix", "aten.linear.default")


def test_no_error_is_no_negative_one(exact, data):
    assert "error 0\n" in f"{compare(exact, exact.module(), data).text()}\n"


def test_a_model_in_training_is_compared_with_its_ranges_as_they_are(exact, data):
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    trained = prepare_qat_pt2e(exact, XNNPACKQuantizer(config)).train()
    trained(*data[0])
    state = copy.deepcopy(trained.state_dict())
    found = compare(exact, trained, [(5 * data[1][0],)])
    assert {row.node for row in found.nodes} >= {"batch_norm", "conv2d_1", "cat"}
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    assert trained.training
    converted = compare(exact, convert_pt2e(trained), [(5 * data[1][0],)])
    assert found.sqnr == pytest.approx(converted.sqnr, abs=0.5)  # fake-quantized and converted agree within roundings


def test_codes_of_the_integer_reference_are_read_as_real_numbers(exact, converted, data, comparison):
    reference = compare(exact, reference_representation_rewrite(converted), data)
    of_graph = {row.node: row.sqnr for row in comparison.nodes}
    held = {row.node: row.sqnr for row in reference.nodes}
    assert held.keys() >= {"relu", "conv2d_1", "relu_1", "cat"}
    assert all(abs(held[name] - of_graph[name]) < 0.5 for name in held)


def test_scales_that_come_with_each_tensor_are_compared_too(data):
    exact = export(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), data[0][0])
    for quantizer in (
        XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)),
        X86InductorQuantizer(get_default_x86_inductor_quantization_config(is_dynamic=True)),
    ):
        found = compare(exact, convert_pt2e(prepare_pt2e(exact, quantizer)), data)
        assert [row.node for row in found.nodes] == ["input_1", "linear", "relu", "linear_1"]
        assert all(30 < row.own < 80 for row in found.nodes)


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("held", torch.zeros(2, 3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.held.add_(self.layer(x))
        self.held[:, :1].mul_(0.5)
        return self.held * 1.0


def test_buffers_stay_what_they_were(data):
    exact = export(Cache(), data[0][0])
    prepared = prepare_pt2e(exact, XNNPACKQuantizer(PER_CHANNEL))
    prepared(*data[0])
    converted = convert_pt2e(prepared)
    first, second = (compare(exact, converted, data) for _ in range(2))
    assert first == second
    assert not converted.held.any()
    pairs = [(exact.module(), copy.deepcopy(converted))]
    wanted, found = zip(*((one(*batch), other(*batch)) for one, other in pairs for batch in data), strict=True)
    assert first.sqnr == pytest.approx(sqnr(torch.cat(wanted), torch.cat(found)), abs=1e-3)  # from batch to batch


# --- programs, and what cannot be compared ----------------------------------------------------------------------------


class Program:
    """Stands for what lowering returns; one memory for all outputs."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph, self._memory, self.resets = graph, torch.empty(2, 5), 0

    def run_flat(self, *args: Tensor) -> list[Tensor]:
        return [self._memory.copy_(self._graph(*args))]

    def reset(self) -> None:
        self.resets += 1


def test_a_lowered_program_shows_its_outputs_and_says_so(exact, converted, data, comparison):
    program = Program(converted)
    found = compare(exact, program, data)
    assert found.outputs == comparison.outputs
    assert (found.nodes, program.resets) == ((), 2)
    assert found.text().endswith("compare the converted graph that was lowered")


@pytest.mark.slow
def test_a_pte_shows_what_delegates_return_and_what_runs_outside_of_them(exact, converted, data, comparison):
    from pt2e_quant.lowering.executorch import lower_to_executorch

    found = compare(exact, lower_to_executorch(converted, data[0]), data)
    assert found.sqnr == pytest.approx(comparison.sqnr, abs=1)
    assert [row.node for row in found.nodes] == ["linear_1", "mean"]  # XNNPACK takes no mean of three dimensions
    of_delegate, outside = found.nodes
    wanted = next(row for row in comparison.nodes if row.node == "linear_1")
    assert of_delegate.sqnr == pytest.approx(wanted.sqnr, abs=1)
    assert outside.sqnr == pytest.approx(found.sqnr, abs=1e-6)
    assert math.isnan(outside.own)
    assert "what delegates return" in found.text()


def test_a_comparison_is_plain_data(comparison):
    plain = json.loads(comparison.to_json())
    assert plain["nodes"][0].keys() >= {"node", "found", "own", "inherited", "cosine", "largest", "module", "source"}
    assert plain["nodes"][0]["inherited"] is None  # an input inherits nothing: infinite dB


def test_models_that_do_not_stem_from_each_other_are_refused(exact, data):
    other = graph(lambda m, x: torch.tanh(x), *data[0])
    with pytest.raises(CaptureError, match="no node of the second model stems from the first one"):
        compare(exact, other, data)


def test_no_data_and_other_outputs_are_refused(exact, converted, data):
    with pytest.raises(CalibrationError, match="no batch"):
        compare(exact, converted, [])
    two = Program(converted)
    two.run_flat = lambda *args: [converted(*args)] * 2
    with pytest.raises(QuantizationError, match="has 1 floating-point outputs, the other one 2"):
        compare(exact, two, data)
