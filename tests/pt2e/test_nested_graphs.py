"""Models with control flow: the graphs inside of cond, while_loop, scan, map and autocast regions are quantized too.

Bounds in dB: 8 bits give some 40 dB and noise 0, so 25 dB shows that a layer computes what it did in float.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_over
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError, CoverageError, LoweringError
from pt2e_quant.graph.nested import graphs
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr
from tests.pt2e.kit import DYNAMIC, STATIC, WEIGHT_ONLY, Nothing, Toy, calls, dequantizes

aten = torch.ops.aten
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(5)).abs()  # -X takes the other branch
TRUE, FALSE = "true_graph_0", "false_graph_0"


class Branches(nn.Module):
    """Another layer on each side of cond, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: torch.relu(self.yes(x)), lambda x: self.no(x), (x,))
        return self.head(y)


class Convs(nn.Module):
    """Convolution and batch norm on one side, a convolution without bias on the other, dropout on both."""

    def __init__(self) -> None:
        super().__init__()
        self.yes = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.no = nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False)
        self.drop, self.other_drop = nn.Dropout(0.35), nn.Dropout(0.15)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(
            x.sum() > 0,
            lambda x: self.drop(torch.relu(self.norm(self.yes(x)))),
            lambda x: self.other_drop(self.no(x)),
            (x,),
        )


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(6)).abs()


def quantized(model: nn.Module, *batches: Tensor, quantizer=None) -> tuple[GraphModule, GraphModule]:
    """(prepared and calibrated, converted); exported with the first batch."""
    prepared = prepare_pt2e(export(model, batches[0]), quantizer or Toy(STATIC))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared, convert_pt2e(prepared)


def dtypes_of_weights(converted: GraphModule) -> set[torch.dtype]:
    """Of all that is a matrix or more; biases and scales have one dimension."""
    return {value.dtype for value in converted.state_dict().values() if value.dim() > 1}


def body(gm: GraphModule, path: str) -> GraphModule:
    return dict(graphs(gm))[path]


@pytest.fixture(scope="module")
def branches():
    """(float model, prepared, converted); read only."""
    torch.manual_seed(0)
    model = Branches().eval()
    return model, *quantized(model, X, -X)


# --- branches ---------------------------------------------------------------------------------------------------------


def test_a_branch_that_no_data_reached_is_named():
    """Users' item 3 and 21: the error lists the observers of the branch that was not taken, and no others."""
    with pytest.raises(CalibrationError, match=rf"node {FALSE}\.linear = .*\n +in module 'no', ") as raised:
        quantized(Branches(), X)
    assert TRUE not in str(raised.value)


def test_a_branch_that_no_data_reached_can_stay_in_float():
    """Users' item 3: allow_uncalibrated is the way out that the error names."""
    torch.manual_seed(0)
    model = Branches().eval()
    model.head = nn.Identity()
    prepared = prepare_pt2e(export(model, X), Toy(STATIC))
    prepared(X)
    converted = convert_pt2e(prepared, allow_uncalibrated=True)
    assert sqnr(model(X), converted(X)) > 25
    assert sqnr(model(-X), converted(-X)) > 25


@pytest.mark.parametrize("sign", [1, -1], ids=["true", "false"])
def test_both_branches_compute_what_they_did_in_float(branches, sign):
    """Users' item 21."""
    model, _, converted = branches
    assert sqnr(model(sign * X), converted(sign * X)) > 25


def test_no_float_copy_of_a_weight_in_a_branch_is_left(branches):
    """Users' item 21: weights of branches are integers in the state dict, and nowhere else."""
    assert dtypes_of_weights(branches[2]) == {torch.int8}
    assert not [name for _, part in graphs(branches[2]) for name, _ in part.named_parameters() if "weight" in name]


def test_convolutions_in_branches_are_quantized_and_the_batch_norm_is_folded():
    torch.manual_seed(0)
    model = Convs()
    prepared, converted = quantized(model, IMAGES, -IMAGES)
    assert not [node for _, part in graphs(prepared) for node in part.graph.nodes if "batch_norm" in str(node.target)]
    assert dtypes_of_weights(converted) == {torch.int8}
    for x in (IMAGES, -IMAGES):
        assert sqnr(model(x), converted(x)) > 25


def test_folding_alone_changes_no_value_of_a_branch():
    model = Convs()
    prepared = prepare_pt2e(export(model, IMAGES), Nothing(), allow_empty=True)
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES))


def test_branches_inside_of_branches():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            def positive(x: Tensor) -> Tensor:
                return torch.cond(x.sum() > 200, lambda x: self.first(x), lambda x: self.second(x), (x,))

            return torch.cond(x.sum() > 0, positive, lambda x: self.third(x), (x,))

    torch.manual_seed(0)
    model = Deep().eval()
    assert 0 < X.sum() < 200 < 3 * X.sum()
    _, converted = quantized(model, X, 3 * X, -X)
    assert dtypes_of_weights(converted) == {torch.int8}
    assert f"{TRUE}.{TRUE}.linear" in {decision.node for decision in explain(converted).quantized}
    for x in (X, 3 * X, -X):
        assert sqnr(model(x), converted(x)) > 25


def test_a_weight_that_both_branches_and_the_graph_around_them_read_is_stored_once():
    """Users' item 7."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: torch.relu(self.layer(x)), (x,))
            return self.layer(y)

    torch.manual_seed(0)
    model = Model().eval()
    _, converted = quantized(model, X, -X)
    for x in (X, -X):
        assert sqnr(model(x), converted(x)) > 25
    assert [value.dtype for value in converted.state_dict().values() if value.dim() > 1] == [torch.int8]
    again = torch.export.export(converted, (X,)).module()
    assert torch.equal(again(-X), converted(-X))


@torch.no_grad()  # with gradients, torch warns while it exports a cond after a cond
def test_branches_one_after_the_other_keep_their_own_qparams():
    """The tensors of all branches get names next to each other; results are those of the exported graph as well."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 8)
            self.more = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
            with torch.no_grad():
                self.large.weight *= 9  # reading another's scale would show
                self.more[1].weight *= 7

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cond(x.sum() > 0, lambda x: self.small(x), lambda x: self.large(x), (x,))
            return torch.cond(x.sum() > 0, lambda y: self.more[0](y), lambda y: self.more[1](torch.relu(y)), (y,))

    torch.manual_seed(0)
    model = Model().eval()
    _, converted = quantized(model, X, -X / 9)
    again = torch.export.export(converted, (X,)).module()
    for x in (X, -X / 9):
        assert sqnr(model(x), converted(x)) > 25
        assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_free_sizes_stay_free_in_branches(strict):
    """Users' item 18 and 21."""
    torch.manual_seed(0)
    model, shapes = Branches().eval(), ({0: torch.export.Dim("batch", min=2, max=64)},)
    prepared = prepare_pt2e(torch.export.export(model, (X,), dynamic_shapes=shapes, strict=strict), Toy(STATIC))
    for x in (X, -X, X[:3]):
        prepared(x)
    converted = convert_pt2e(prepared)
    for x in (X[:5], -X[:7]):
        assert sqnr(model(x), converted(x)) > 25


# --- loops ------------------------------------------------------------------------------------------------------------


class While(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.layer(x)

        return while_loop(lambda i, x: i < 3, step, (torch.zeros((), dtype=torch.int64), x))[1]


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.state(h) + x
            return h, self.out(h)

        last, outputs = scan(step, torch.zeros(8), x)
        return torch.cat([last, outputs.flatten()])


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return map_over(lambda row: torch.relu(self.layer(row)), x)


@pytest.mark.parametrize("kind", [While, Scan, Map])
def test_the_body_of_a_loop_is_quantized_and_computes_what_it_did(kind):
    """Users' item 21."""
    torch.manual_seed(0)
    model = kind().eval()
    _, converted = quantized(model, X)
    assert dtypes_of_weights(converted) == {torch.int8}
    assert sqnr(model(X), converted(X)) > 25


@pytest.mark.parametrize("config", [DYNAMIC, WEIGHT_ONLY], ids=["dynamic", "weight-only"])
@pytest.mark.parametrize("kind", [Branches, While, Scan, Map])
def test_what_needs_no_data_needs_none_in_nested_graphs_either(kind, config):
    """Users' item 3: dynamic and weight-only configurations convert without a calibration."""
    torch.manual_seed(0)
    model = kind().eval()
    converted = convert_pt2e(prepare_pt2e(export(model, X), Toy(config)))
    assert dtypes_of_weights(converted) == {torch.int8}
    for x in (X, -X):
        with torch.no_grad():  # with gradients torch traces scan backwards as well, and warns of ops that have none
            assert sqnr(model(x), converted(x)) > 25


@pytest.mark.parametrize("kind", [While, Scan])
def test_what_a_loop_carries_has_the_same_qparams_going_in_and_coming_out(kind):
    """Users' item 21: the result of one run is the input of the next."""
    torch.manual_seed(0)
    _, converted = quantized(kind().eval(), X)
    path, part = next((p, g) for p, g in graphs(converted) if calls(g, aten.linear.default))
    carried = 1 if kind is While else 0
    start = part.graph.find_nodes(op="placeholder")[carried]
    (quantize,) = start.users
    result = part.graph.output_node().args[0][carried]
    assert result in dequantizes(part), path
    assert result.args[1:] == quantize.args[1:]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_a_forward_without_gradients_is_quantized():
    """Users' item 1: under no_grad the whole forward used to stay in float, without a word."""

    class Model(Branches):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Model().eval()
    _, converted = quantized(model, X, -X)
    assert dtypes_of_weights(converted) == {torch.int8}
    for x in (X, -X):
        assert sqnr(model(x), converted(x)) > 25


def test_an_autocast_region_is_quantized_and_keeps_its_dtype():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inside(x)
            return y, self.outside(y.float())

    torch.manual_seed(0)
    model = Model().eval()
    _, converted = quantized(model, X)
    for expected, result in zip(model(X), converted(X), strict=True):
        assert result.dtype is expected.dtype
        assert sqnr(expected, result) > 25
    assert dtypes_of_weights(converted) == {torch.int8}


# --- reports ----------------------------------------------------------------------------------------------------------


def test_require_reaches_into_branches():
    """Users' item 1: what was demanded and is in float inside of a branch is named."""
    config = get_symmetric_quantization_config(is_per_channel=True)
    quantizer = XNNPACKQuantizer(config).set_module_name("no", None)
    with pytest.raises(CoverageError, match=rf"{FALSE}\.linear") as raised:
        prepare_pt2e(export(Branches(), X), quantizer, require=["linear"])
    assert TRUE not in str(raised.value)
    prepare_pt2e(export(Branches(), X), XNNPACKQuantizer(config), require=["linear"])


def test_the_report_names_ops_with_the_path_of_their_graph(branches):
    report = explain(branches[2])
    nodes = [decision.node for decision in report.quantized]
    assert nodes == ["linear", f"{TRUE}.linear", f"{TRUE}.relu", f"{FALSE}.linear"]
    assert f"{TRUE}.linear = aten.linear.default" in report.why(f"{TRUE}.linear")
    assert "[yes, test_nested_graphs.py:" in report.why(f"{TRUE}.linear")


# --- the modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_train_and_eval_switch_dropout_inside_of_branches_and_keep_its_probability(stage):
    prepared, converted = quantized(Convs(), IMAGES, -IMAGES)
    model = prepared if stage == "prepared" else converted

    def dropouts() -> list[tuple[object, ...]]:
        return [
            (*node.args[1:], *node.kwargs.values())
            for path in (TRUE, FALSE)
            for node in calls(body(model, path), aten.dropout.default)
        ]

    assert dropouts() == [(0.35, False), (0.15, False)]
    model.train()
    assert dropouts() == [(0.35, True), (0.15, True)]
    model.eval()
    assert dropouts() == [(0.35, False), (0.15, False)]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_prepared_model_with_branches_is_one_of_its_own(branches, copied):
    """Users' item 12: what calibrates the copy leaves the original as it was, and both convert."""
    _, prepared, converted = branches
    again = copied(prepared)
    assert torch.equal(convert_pt2e(again)(-X), converted(-X))
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    again(-9 * X)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("model", [Branches, While, Scan, Map])
def test_a_converted_model_is_exported_saved_and_loaded_bit_by_bit(model):
    """Users' item 30 and 21."""
    torch.manual_seed(0)
    batches = (X, -X) if model is Branches else (X,)
    _, converted = quantized(model().eval(), *batches)
    file = io.BytesIO()
    torch.export.save(torch.export.export(converted, (X,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in batches:
        assert torch.equal(loaded(x), converted(x))


def test_what_the_caller_exported_stays_as_it_was():
    exported = export(Convs(), IMAGES).module()

    def content() -> tuple[list[str], list[list[str]]]:
        parts = [part for _, part in graphs(exported)]
        return [part.code for part in parts], [sorted(dict(part.named_modules())) for part in parts]

    before, state = content(), {name: value.clone() for name, value in exported.state_dict().items()}
    prepared = prepare_pt2e(exported, Toy(STATIC))
    for x in (IMAGES, -IMAGES):
        prepared(x)
    convert_pt2e(prepared)
    assert content() == before
    assert exported.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in exported.state_dict().items())


# --- after convert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Branches, Convs])
def test_portable_kernels_run_both_branches(kind):
    """Users' item 21: the same values, but for single steps of rounding (each some -50 dB)."""
    torch.manual_seed(0)
    x = X if kind is Branches else IMAGES
    _, converted = quantized(kind(), x, -x)
    program = lower_to_executorch(converted, backend=None)
    for batch in (x, -x):
        assert sqnr(converted(batch), program.run(batch)[0]) > 40


def test_what_xnnpack_cannot_take_out_of_a_branch_runs_in_portable_kernels_and_is_named():
    """Users' item 39 and 21: XNNPACK's partitioner keeps a linear in a branch whole, and takes it not."""
    torch.manual_seed(0)
    quantizer = XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True))
    _, converted = quantized(Branches(), X, -X, quantizer=quantizer)
    program = lower_to_executorch(converted)
    for batch in (X, -X):
        assert sqnr(converted(batch), program.run(batch)[0]) > 40  # single steps of rounding
    assert {(kernel.node, kernel.precision) for kernel in program.kernels} >= {("linear", "int8")}
    left = {one.node: one.reason for one in program.undelegated}
    assert "inside a nested graph" in left[f"{TRUE}.linear"]
    assert "inside a nested graph" in left[f"{FALSE}.linear"]


def test_integer_arithmetic_leaves_branches_as_they_are_and_says_so(branches):
    _, prepared, converted = branches
    rewritten = convert_pt2e(prepared, use_reference_representation=True)
    for x in (X, -X):
        assert sqnr(converted(x), rewritten(x)) > 40  # single steps of rounding
    representation = explain(rewritten).record.representation
    assert set(representation.forms) == {"linear"}
    assert {name for name in representation.left if name.endswith("linear")} == {f"{TRUE}.linear", f"{FALSE}.linear"}
    assert "nested graph" in representation.left[f"{TRUE}.linear"]
    assert f"{TRUE}.linear: " in str(explain(rewritten))


def test_a_loop_that_executorch_does_not_know_is_a_typed_error():
    """Users' item 39: ExecuTorch 1.5 runs cond, map and some scans, but no while_loop."""
    _, converted = quantized(While(), X)
    with pytest.raises(LoweringError, match="ExecuTorch has no while_loop"):
        lower_to_executorch(converted, backend=None)


def test_a_mapped_body_runs_in_portable_kernels():
    """Users' item 21: the same values, but for single steps of rounding."""
    torch.manual_seed(0)
    _, converted = quantized(Map(), X)
    assert sqnr(converted(X), lower_to_executorch(converted, backend=None).run(X)[0]) > 40
