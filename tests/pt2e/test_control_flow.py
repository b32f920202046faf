"""Control flow, strictly exported or not: what is selected, reported and observed inside cond, while_loop, scan, map.

Users' pains 1 (nothing quantized in silence), 3 (observers that never ran), 21 (control flow). The quantizer `Toy` has
static int8 grids of 236 steps; `close` says what follows for the error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_over
from torch._higher_order_ops import scan, while_loop
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError, CoverageError, QuantizationError, TargetingError
from pt2e_quant.graph.nested import graphs
from pt2e_quant.ops import CONV, EMBEDDING, LINEAR, MATMUL
from tests.pt2e.kit import DYNAMIC, STATIC, WEIGHT_ONLY, ByHand, Toy

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch, while it captures cond
    pytest.mark.filterwarnings("ignore:torch.compile is ignored when called inside"),  # strict export of scan
]

aten = torch.ops.aten
higher_order = torch.ops.higher_order
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Cond(nn.Module):
    """A linear with dropout in one branch, a convolution without bias in the other; the condition is the sign."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Conv1d(3, 3, 1, bias=False)
        self.dropout = nn.Dropout(0.15)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.dropout(self.left(x)), lambda x: self.right(x).relu(), (x,))


class Nested(nn.Module):
    """cond in cond, after a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        def outer(y: Tensor) -> Tensor:
            return torch.cond(x.abs().max() > 2, lambda y: self.block["a"](y), lambda y: self.block["b"](y), (y,))

        return torch.cond(x.sum() > 0, outer, lambda y: self.block["a"](y) * 0.5, (self.stem(x),))


class While(nn.Module):
    """Three runs of linear and relu."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.step(y).relu()), (start, x))[1]


class Scan(nn.Module):
    """A recurrent cell, after a linear, so that what it reads has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            new = self.cell(row) + state * 0.5
            return new, new * 2

        return scan(step, torch.zeros_like(x[0]), self.stem(x), dim=0)[1]


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return map_over(lambda row: self.row(row).relu(), x)


class NoGrad(nn.Module):
    """A region without gradients in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)

    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return self.left(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.frozen(x).relu(), lambda x: x * 2, (x,))


class Autocast(nn.Module):
    """Linears outside and inside of a region that computes in bfloat16, or is switched off."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.stem, self.inside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            y = self.inside(x).relu()
        return y.float()


CONTROL_FLOW = {"cond": Cond, "nested": Nested, "while_loop": While, "scan": Scan, "map": Map, "no_grad": NoGrad}
MODELS: dict[str, Callable[[], nn.Module]] = {**CONTROL_FLOW, "autocast": Autocast}
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
EVERY = pytest.mark.parametrize("name", MODELS)


def export(model: nn.Module, **kwargs: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (X,), **kwargs)


@functools.cache
def exported(name: str, strict: bool = False) -> torch.export.ExportedProgram:
    """One export serves many tests, none of which changes it."""
    torch.manual_seed(0)
    return export(MODELS[name](), strict=strict)


def batches() -> Iterator[Tensor]:
    """Of both signs, small and large: they reach every branch of the models above."""
    generator = torch.Generator().manual_seed(1)
    for scale in (0.4, 1.5):
        for _ in range(3):
            x = torch.randn(X.shape, generator=generator).clamp(-1.9 * 0.5 / scale, 1.9 * 0.5 / scale) * scale
            yield from (x, -x, x.abs() + 1.5, -x.abs() - 1.5)


def prepare(model: nn.Module | str, quantizer: Any = None, **kwargs: Any) -> GraphModule:
    program = exported(model) if isinstance(model, str) else export(model)
    return prepare_pt2e(program, quantizer or Toy(STATIC), **kwargs)


def quantize(model: nn.Module | str, quantizer: Any = None) -> GraphModule:
    prepared = prepare(model, quantizer)
    for x in batches():
        prepared(x)
    return convert_pt2e(prepared)


def close(actual: Any, expected: Any) -> None:
    """A step of the grid is 1/236 of a range, up to three grids follow each other, and gains are about 1."""
    for ours, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        reach = max(1.0, float(theirs.abs().max()))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * reach)


def calls_everywhere(gm: GraphModule) -> list[str]:
    nodes = [node for _, part in graphs(gm) for node in part.graph.nodes if node.op == "call_function"]
    return [str(node.target) for node in nodes]


# --- what is quantized ------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_bodies_are_quantized_and_stay_close_to_the_float_model(name):
    """Item 21: annotated recursively."""
    model, converted = exported(name).module(), quantize(name)
    for x in batches():
        close(converted(x), model(x))


@EVERY
@STRICT
def test_every_weighted_op_in_every_graph_is_quantized_or_has_a_reason(name, strict):
    """Item 1: the property of the report."""
    program = exported(name, strict)
    weighted = {str(op) for op in (*CONV, *LINEAR, *MATMUL, *EMBEDDING)}
    wanted = sum(target in weighted for target in calls_everywhere(program.module()))
    for quantizer in (Toy(STATIC), Toy(STATIC).set_operator_type(aten.linear.default, None)):
        report = explain(prepare_pt2e(program, quantizer, allow_empty=True))
        found = [decision for decision in report.record.decisions if decision.op in weighted]
        assert len(found) == wanted > 0
        assert all(decision.quantized or decision.reason for decision in found)
    assert all(not decision.quantized for decision in found if "linear" in decision.op)


@pytest.mark.parametrize("config", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight only"])
@pytest.mark.parametrize("name", CONTROL_FLOW)
@torch.no_grad()
def test_dynamic_and_weight_only_bodies_need_no_calibration(name, config):
    """Item 3."""
    model = exported(name).module()
    converted = convert_pt2e(prepare(name, Toy(config)))
    for x in (X, -X):
        close(converted(x), model(x))


def test_branches_keep_ranges_of_their_own():
    """Else a branch that calibration never reached would have the range of another one."""
    groups = explain(prepare("nested")).groups
    graphs_of = [{member.rpartition(".")[0].partition(" ")[0] for member in group.members} for group in groups]
    assert all(len(paths) == 1 for paths in graphs_of)


def test_a_parameter_that_two_branches_read_is_passed_once():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: self.linear(x).relu(), (x,))

    (call,) = quantize(Both()).graph.find_nodes(op="call_function", target=higher_order.cond)
    assert [operand.target for operand in call.args[3]].count("linear.bias") == 1


def test_a_buffer_that_a_branch_writes_to_stays_a_buffer_of_the_model():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            def count(x: Tensor) -> Tensor:
                self.count.add_(1.0)
                return self.linear(x) + self.count

            return torch.cond(x.sum() > 0, count, lambda x: self.linear(x) * self.count, (x,))

    with torch.no_grad():  # torch forbids writes in branches otherwise
        converted = quantize(Counting())
        start = converted.count.clone()
        converted(X.abs())
        converted(X.abs())
        converted(-X.abs())
    assert torch.equal(converted.count, start + 2)


def test_gradients_flow_through_prepared_bodies():
    prepared = prepare("scan")
    x = X.clone().requires_grad_()
    prepared(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_autocast_that_is_off_is_inlined_and_one_that_is_on_keeps_its_dtype():
    off, on = prepare(Autocast(enabled=False)), quantize("autocast")
    assert [path for path, _ in graphs(off)] == [""]
    assert len(explain(off).quantized) == 3
    (inner,) = [part for path, part in graphs(on) if path]
    (linear,) = inner.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert linear.meta["val"].dtype is torch.bfloat16
    (dequantize,) = [n for n in inner.graph.nodes if n.kwargs.get("out_dtype") is torch.bfloat16]
    assert dequantize.args[0].args[0].name == "relu"


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_branch_that_was_never_taken_is_named():
    """Items 3 and 21."""
    prepared = prepare("cond")
    prepared(X.abs())
    with pytest.raises(CalibrationError) as caught:
        convert_pt2e(prepared)
    text = str(caught.value)
    assert "node false_graph_0.relu = aten.relu.default" in text
    assert "input false_graph_0.x" in text
    assert "test_control_flow.py:" in text
    assert "true_graph_0" not in text
    prepared(-X.abs())
    assert torch.isfinite(convert_pt2e(prepared)(X)).all()


@pytest.mark.parametrize("name", CONTROL_FLOW)
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_observers_in_bodies_see_what_the_float_model_computes(name, gradients):
    """Also while gradients are recorded, where torch would trace the bodies of scan."""
    model, prepared = exported(name).module(), prepare(name)
    for x in batches():
        with torch.no_grad():
            expected = model(x)
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(prepared(x), expected, rtol=1e-6, atol=1e-6)  # rounding of float32
    assert all(float(v.max()) < 1e9 for n, v in prepared.named_buffers() if n.endswith("max_val") and v.numel())
    convert_pt2e(prepared)


# --- who asks for what ------------------------------------------------------------------------------------------------


@STRICT
def test_modules_are_selected_by_name_inside_bodies(strict):
    program = exported("nested", strict)
    report = explain(prepare_pt2e(program, Toy(STATIC).set_module_name("block.a", None)))
    left = {decision.node: decision.reason for decision in report.skipped if "linear" in decision.op}
    assert set(left.values()) == {"kept in float by module name 'block.a'"}
    assert sorted(left) == ["false_graph_0.linear_1", "true_graph_0.true_graph_0.linear_1"]
    report = explain(prepare_pt2e(program, Toy().set_module_name("block.*", STATIC)))
    assert sorted(decision.node for decision in report.quantized) == [
        "false_graph_0.linear_1",
        "true_graph_0.false_graph_0.linear_1",
        "true_graph_0.true_graph_0.linear_1",
    ]


def test_modules_are_selected_by_type_inside_bodies_where_export_records_types():
    quantizer = Toy(STATIC).set_module_type(nn.Linear, None)
    report = explain(prepare_pt2e(exported("cond", True), quantizer))
    assert [decision.op for decision in report.quantized] == ["aten.conv1d.default", "aten.relu.default"]


def test_nodes_are_selected_by_name_inside_bodies():
    quantizer = Toy(STATIC).set_node_name("true_graph_0.linear", None)
    assert [d.node for d in explain(prepare("cond", quantizer)).quantized] == [
        "false_graph_0.conv1d",
        "false_graph_0.relu",
    ]


@pytest.mark.parametrize(
    "quantizer", [Toy(STATIC).set_module_name("lefd", None), Toy(STATIC).set_node_name("true_graph_0.lineer", None)]
)
def test_a_selector_that_matches_nothing_in_any_graph_is_an_error(quantizer):
    with pytest.raises(TargetingError, match="matches nothing"):
        prepare("cond", quantizer)


@pytest.mark.parametrize(
    ("require", "node"),
    [
        ("linear", "true_graph_0.linear"),
        ("conv", "false_graph_0.conv1d"),
        ("true_graph_0.linear", "true_graph_0.linear"),
        ("left", "true_graph_0.linear"),
        ("right", "false_graph_0.conv1d"),
        ("false_graph_0.*", "false_graph_0.conv1d"),
    ],
)
def test_coverage_that_is_demanded_of_bodies_is_found_there(require, node):
    assert node in {decision.node for decision in explain(prepare("cond", require=require)).quantized}
    with pytest.raises(CoverageError, match=node):
        prepare("cond", Toy(STATIC).set_node_name(node, None), require=require)


def test_a_miss_in_a_body_is_named():
    """Item 1."""
    with pytest.raises(CoverageError, match=r"true_graph_0.linear = aten.linear.default: kept in float by operator"):
        prepare("cond", Toy(STATIC).set_operator_type(aten.linear, None), require="linear")


def test_nothing_annotated_counts_the_ops_of_bodies():
    """Item 1: sum, getitem, linear, dropout, conv1d and relu."""
    with pytest.raises(CoverageError, match="annotated none of the 6 float ops"):
        prepare("cond", ByHand(lambda gm: None))


def test_a_quantizer_is_shown_every_graph_once():
    seen: list[int] = []
    prepare("nested", ByHand(lambda gm: seen.append(len(gm.graph.nodes))), allow_empty=True)
    assert len(seen) == len(list(graphs(exported("nested").module())))


def test_an_error_of_a_quantizer_names_the_body():
    def failing(gm: GraphModule) -> None:
        if any(node.target is aten.conv1d.default for node in gm.graph.nodes):
            raise KeyError("val")

    with pytest.raises(QuantizationError, match="'annotate' failed on false_graph_0: KeyError"):
        prepare("cond", ByHand(failing))


def test_the_report_explains_nodes_of_bodies():
    """Item 21; ids of nodes are paths."""
    report = explain(quantize("nested"))
    assert "int8" in report.why("true_graph_0.false_graph_0.linear_1")
    assert report.why("block.b") == report.why("true_graph_0.false_graph_0.linear_1")
    scales = [group.scale for group in report.groups if any("true_graph_0.false" in m for m in group.members)]
    assert len(scales) == 3
    assert None not in scales


# --- what the results are good for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROL_FLOW)
@STRICT
def test_a_converted_model_is_exported_again_saved_and_loaded_bit_for_bit(name, strict, tmp_path):
    converted = quantize(name)
    again = torch.export.export(converted, (X,), strict=strict)
    torch.export.save(again, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for x in (X, -X):
            assert torch.equal(again.module()(x), converted(x))
            assert torch.equal(loaded(x), converted(x))


def test_state_moves_between_prepared_models():
    first, second = prepare("nested"), prepare("nested")
    for x in batches():
        first(x)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(convert_pt2e(second)(X), convert_pt2e(first)(X))
