"""check_quantizer finds each broken rule where it was broken, and nothing else; what keeps the rules passes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from pt2e_quant import QuantizationError
from pt2e_quant.errors import LoweringError
from pt2e_quant.graph.values import is_float_tensor
from pt2e_quant.lowering.executorch.xnnpack.contract import check_xnnpack_contract
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import (
    ComposableQuantizer,
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    Quantizer,
    RuleQuantizer,
    SharedQuantizationSpec,
    refuse,
)
from pt2e_quant.testing import CONVERTED_RULES, RULES, Finding, assert_conforms, check_quantizer, default_models
from pt2e_quant.where import copy_origin
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, export
from tests.pt2e.kit import (
    ACT,
    DYNAMIC,
    PER_CHANNEL,
    STATIC,
    WEIGHT_ONLY,
    ByHand,
    Nothing,
    Toy,
    annotate,
    calls,
    conv_only,
)

aten = torch.ops.aten


class Branches(nn.Module):
    """Two linears on one input, in no order that data flow would give them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.left(x)) * torch.tanh(self.right(x))


class Tokens(nn.Module):
    """Integers that an embedding reads, one op with several outputs, one that writes to a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.register_buffer("seen", torch.zeros(2, 5, 8))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        rows = self.table(ids + 1)
        return (*torch.relu(rows).chunk(2, -1), self.seen.add_(rows))


class ByInput(nn.Module):
    """A linear whose weight is computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.relu(x), x)


MODELS = {
    "mlp": export(MLP(), torch.randn(3, 10)),
    "branches": export(Branches(), torch.randn(3, 6)),
    "tokens": export(Tokens(), torch.randint(0, 10, (2, 5))),
    "by input": export(ByInput(), torch.randn(4, 6)),
}


def linears(gm: GraphModule) -> list[Node]:
    """Those with a weight that is stored."""
    return [node for node in calls(gm, aten.linear.default) if node.args[1].op == "get_attr"]


def good(gm: GraphModule) -> None:
    """What all quantizers below do right."""
    for node in linears(gm):
        if "quantization_annotation" not in node.meta:
            annotate(node, {node.args[0]: ACT, node.args[1]: PER_CHANNEL}, ACT)


def but(fault: Callable[[GraphModule], None]) -> ByHand:
    """A good quantizer with one fault."""

    def both(gm: GraphModule) -> None:
        good(gm)
        fault(gm)

    return ByHand(both)


def at(target: Any, function: Callable[[Node], None]) -> ByHand:
    """A good quantizer that does one thing to each call of an op."""

    def fault(gm: GraphModule) -> None:
        for node in calls(gm, target):
            function(node)

    return but(fault)


def spec(**fields: Any) -> SimpleNamespace:
    """A spec of another package: fields and no checks."""
    defaults = {"dtype": torch.int8, "quant_min": None, "quant_max": None, "qscheme": torch.per_tensor_affine}
    return SimpleNamespace(**{**defaults, "observer_or_fake_quant_ctr": MinMaxObserver, **fields})


# The faults: one class or function for each rule ----------------------------------------------------------------------


class NoValidate:
    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        return model


class ReturnsNothing(ByHand):
    def annotate(self, model: GraphModule) -> GraphModule:
        good(model)
        return None  # type: ignore[return-value]


class Transforms(ByHand):
    """A good quantizer that edits the graph before."""

    def __init__(self, edit: Callable[[GraphModule], None]) -> None:
        super().__init__(good)
        self.edit = edit

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        self.edit(model)
        return model


class Moody(ByHand):
    """Changes its mind with every graph."""

    def __init__(self) -> None:
        super().__init__(self.every_other)
        self.count = 0

    def every_other(self, gm: GraphModule) -> None:
        self.count += 1
        for node in linears(gm):
            annotate(node, {node.args[0]: ACT, node.args[1]: PER_CHANNEL}, ACT if self.count % 2 else None)


class Refuses(ByHand):
    def validate(self, model: GraphModule) -> None:
        raise QuantizationError("this backend has no linear\n  and says so at length")


class Breaks(MinMaxObserver):
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise RuntimeError("not today")


def fails_without_linear(gm: GraphModule) -> None:
    good(gm)
    linears(gm)[0]


def drop_relu(gm: GraphModule) -> None:
    for node in calls(gm, aten.relu.default):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def numbers_become_floats(gm: GraphModule) -> None:
    for node in calls(gm, aten.add.Tensor):
        if isinstance(node.args[1], int):
            node.update_arg(1, float(node.args[1]))


def one_output_less(gm: GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = (output.args[0][:1],)
    gm.graph.set_codegen(CodeGen())  # the new signature is positional


def insert_a_node(gm: GraphModule) -> None:
    for node in calls(gm, aten.relu.default):
        with gm.graph.inserting_before(node):
            copy_origin(gm.graph.call_function(aten.neg.default, node.args), node, "test")


def set_an_argument(gm: GraphModule) -> None:
    for node in calls(gm, aten.chunk.default):
        node.update_arg(1, 4)


def forget_a_value(gm: GraphModule) -> None:
    for node in calls(gm, aten.sigmoid.default):
        node.meta["val"] = node.meta["val"].clone()


def scale_a_parameter(gm: GraphModule) -> None:
    for name, parameter in gm.named_parameters():
        if name == "left.weight":
            parameter.detach().mul_(1.0)


def one_more(gm: GraphModule) -> None:
    """Annotates tanh, and sigmoid where tanh has an annotation already."""
    for target in (aten.tanh.default, aten.sigmoid.default):
        fresh = [node for node in calls(gm, target) if "quantization_annotation" not in node.meta]
        for node in fresh:
            annotate(node, {node.args[0]: ACT})
        if fresh:
            return


def only_the_first(gm: GraphModule) -> None:
    for node in linears(gm)[:1]:
        annotate(node, {node.args[0]: ACT, node.args[1]: PER_CHANNEL}, ACT)


def only_named_left(gm: GraphModule) -> None:
    for node in calls(gm, aten.sigmoid.default):
        if any(path == "left" for path, _ in node.args[0].meta.get("nn_module_stack", {}).values()):
            annotate(node, {node.args[0]: ACT})


def needs_a_source(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["stack_trace"]


def stranger(node: Node) -> None:
    if node.args[0].args:
        annotate(node, {node.args[0].args[0]: ACT})


def with_output(output: Any) -> Callable[[Node], None]:
    return lambda node: annotate(node, {}, output)


def with_input(wanted: Any) -> Callable[[Node], None]:
    return lambda node: annotate(node, {node.args[0]: wanted})


def in_a_circle(node: Node) -> None:
    annotate(node, {node.args[0]: SharedQuantizationSpec(node)}, SharedQuantizationSpec((node.args[0], node)))


def shared_with_float(node: Node) -> None:
    annotate(node, {}, SharedQuantizationSpec((node.args[0], node)))


def derived_from_float(node: Node) -> None:
    derived = DerivedQuantizationSpec([(node.args[0], node)], lambda found: found[0].calculate_qparams(), torch.int8)
    annotate(node, {}, derived)


def run_time_weight(gm: GraphModule) -> None:
    for node in calls(gm, aten.linear.default):
        if node.args[1].op != "get_attr":
            annotate(node, {node.args[0]: ACT, node.args[1]: ACT})


FAULTS: list[tuple[str, object, str, str]] = [
    ("contract", NoValidate(), "", "NoValidate has no method validate"),
    ("contract", Toy, "", "Toy is a class"),
    ("contract", ReturnsNothing(good), "mlp", "annotate must return the GraphModule, it returned NoneType"),
    ("runs", ByHand(fails_without_linear), "tokens", "annotate raised IndexError: list index out of range"),
    ("runs", Refuses(good), "mlp", "validate raised QuantizationError: this backend has no linear"),
    (
        "runs",
        at(aten.relu.default, with_input(spec(observer_or_fake_quant_ctr=Breaks))),
        "mlp",
        "calculate_qparams of Breaks does not give a scale and a zero point: RuntimeError: not today",
    ),
    ("claims-something", Nothing(), "", "no node of mlp, branches, tokens, by input was annotated"),
    ("same-model", Transforms(drop_relu), "mlp", "transform_for_annotation changed its value"),
    ("same-model", Transforms(numbers_become_floats), "tokens", "the model raises RuntimeError"),
    ("same-model", Transforms(one_output_less), "tokens", "3 outputs before transform_for_annotation, 1 after it"),
    ("only-annotates", but(insert_a_node), "neg", "annotate added this node"),
    ("only-annotates", ByHand(lambda gm: (drop_relu(gm), good(gm))), "relu", "annotate removed this node"),
    ("only-annotates", but(set_an_argument), "chunk", "annotate changed its arguments"),
    ("only-annotates", but(forget_a_value), "sigmoid", "annotate changed its recorded value"),
    ("only-annotates", but(scale_a_parameter), "left.weight", "changed in place"),
    ("deterministic", Moody(), "linear", "at first: "),
    ("idempotent", but(one_more), "linear -> sigmoid", "at first: nothing; the second time: int8"),
    ("order-independent", ByHand(only_the_first), "x -> linear_1", "in another order of the nodes: int8"),
    ("ops-and-values-only", but(only_named_left), "linear -> sigmoid", "without other metadata: nothing"),
    ("ops-and-values-only", but(needs_a_source), "mlp", "annotate raised KeyError: 'stack_trace'"),
    ("disjoint-claims", ComposableQuantizer([Toy(STATIC), Toy(WEIGHT_ONLY)]), "linear", "part 0 (Toy): "),
    ("keys-are-inputs", at(aten.relu.default, stranger), "relu", "is not among the inputs of relu"),
    ("one-tensor", at(aten.chunk.default, with_output(ACT)), "chunk", "chunk has a list of outputs"),
    (
        "floats-only",
        at(aten.embedding.default, lambda node: annotate(node, {node.args[1]: ACT})),
        "add",
        "add is int64",
    ),
    ("legal-specs", at(aten.relu.default, with_output(spec(quant_max=300))), "relu", "[-128, 300] is not a range of"),
    ("legal-specs", at(aten.relu.default, with_output(spec(dtype="int8"))), "relu", "dtype is 'int8'"),
    ("legal-specs", at(aten.relu.default, with_output(spec(qscheme="affine"))), "relu", "qscheme is 'affine'"),
    (
        "legal-specs",
        at(aten.relu.default, with_output(SimpleNamespace(dtype=torch.int8))),
        "relu",
        "is not a quantizat",
    ),
    ("legal-specs", at(aten.relu.default, with_output(spec(dtype=torch.float16, quant_min=0))), "relu", "no meaning"),
    (
        "legal-specs",
        at(aten.relu.default, with_output(spec(qscheme=torch.per_channel_affine, ch_axis=5))),
        "relu",
        "ch_axis=5, the tensor has 2 dimensions",
    ),
    (
        "legal-specs",
        at(aten.relu.default, with_output(spec(qscheme=torch.per_channel_affine))),
        "relu",
        "without ch_axis",
    ),
    (
        "legal-specs",
        at(aten.relu.default, with_output(spec(qscheme=torch.per_channel_affine, ch_axis=0, is_dynamic=True))),
        "relu",
        "dynamic and per channel",
    ),
    (
        "legal-specs",
        at(aten.relu.default, with_output(spec(observer_or_fake_quant_ctr=8))),
        "relu",
        "makes no observer",
    ),
    (
        "legal-specs",
        at(aten.relu.default, with_output(spec(observer_or_fake_quant_ctr=nn.ReLU))),
        "mlp",
        "ReLU cannot be",
    ),
    ("sharing-solvable", at(aten.relu.default, in_a_circle), "mlp", "in a circle, none of them says which"),
    ("sharing-solvable", at(aten.relu.default, shared_with_float), "mlp", "which is not quantized itself"),
    ("sharing-solvable", at(aten.relu.default, derived_from_float), "mlp", "which is not quantized"),
    ("constant-weights", but(run_time_weight), "x -> linear", "x is computed from the model's input"),
    ("becomes-integer", at(aten.add_.Tensor, with_input(ACT)), "seen -> add_", "add_ still reads seen in float"),
]


@pytest.mark.parametrize(
    ("rule", "quantizer", "place", "message"),
    FAULTS,
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_rule_is_found_where_it_was_broken(rule, quantizer, place, message):
    found = check_quantizer(quantizer, MODELS)
    assert {finding.rule for finding in found} == {rule}, list(map(str, found))
    assert any(message in finding.message and place in str(finding) for finding in found), list(map(str, found))


def test_a_rule_can_be_left_out():
    quantizer = at(aten.chunk.default, with_output(ACT))
    assert check_quantizer(quantizer, MODELS) != []
    assert check_quantizer(quantizer, MODELS, ignore=["one-tensor"]) == []


@pytest.mark.parametrize("mark", [{}, {"output": ACT}], ids=["a mark", "a spec"])
def test_a_claimed_batch_norm_that_cannot_be_folded_is_found(mark):
    """The convolution before it has a second reader, so it stays and runs in float."""

    def claim(gm: GraphModule) -> None:
        good(gm)
        for node in calls(gm, aten.batch_norm.default):
            annotate(node, **mark)

    residual = {"residual": default_models()["residual"]}
    quantizer = ComposableQuantizer([ByHand(claim), Toy(STATIC)])
    (finding,) = check_quantizer(quantizer, residual)
    assert (finding.rule, finding.where) == ("folds-possible", "batch_norm")
    assert "conv2d has 2 users" in finding.message


def test_every_rule_has_a_planted_fault():
    """The rules of converted graphs have theirs in test_converted.py; two have a test of their own here."""
    assert {rule for rule, *_ in FAULTS} | {"backend-runs-it", "folds-possible", *CONVERTED_RULES} == set(RULES)


# What passes ----------------------------------------------------------------------------------------------------------


def test_the_quantizer_that_the_faults_start_from_is_sound():
    assert check_quantizer(ByHand(good), MODELS) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"is_per_channel": True}, {"is_per_channel": True, "is_dynamic": True}],
    ids=["per tensor", "per channel", "dynamic"],
)
def test_our_xnnpack_quantizer_conforms(options):
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))
    assert_conforms(quantizer, backend=check_xnnpack_contract)


@pytest.mark.parametrize("config", [STATIC, DYNAMIC, WEIGHT_ONLY], ids=["static", "dynamic", "weight only"])
def test_a_quantizer_of_few_rules_conforms(config):
    """Weights computed from the input are claimed by its linear rule, which refuses nothing."""
    assert_conforms(Toy(config), ignore=["constant-weights"])


def test_a_run_time_weight_is_fine_when_the_reason_is_recorded():
    def fault(gm: GraphModule) -> None:
        run_time_weight(gm)
        for node in calls(gm, aten.linear.default):
            refuse(node, "test", "its weight comes from the input")

    assert check_quantizer(but(fault), MODELS) == []


def test_selectors_by_module_may_read_module_names():
    quantizer = XNNPACKQuantizer().set_module_name("left", get_symmetric_quantization_config())
    branches = {"branches": MODELS["branches"]}
    assert check_quantizer(quantizer, branches) == []
    assert check_quantizer(ComposableQuantizer([quantizer]), branches) == []


def test_parts_that_claim_different_nodes_are_disjoint():
    class Convolutions(RuleQuantizer):
        rules = (conv_only,)

    def relus(gm: GraphModule) -> None:
        for node in calls(gm, aten.sigmoid.default):
            annotate(node, {node.args[0]: ACT})

    assert check_quantizer(ComposableQuantizer([ByHand(good), ByHand(relus), Convolutions(STATIC)]), MODELS) == []


# Backends, models, words ----------------------------------------------------------------------------------------------


def test_what_a_backend_cannot_run_is_found():
    def returns(gm: GraphModule) -> list[object]:
        node = next(iter(calls(gm, aten.relu.default)), None)
        fatal, mild = SimpleNamespace(node=node, fatal=True), SimpleNamespace(node=node, fatal=False)
        return [fatal, mild] if node else []

    def raises(gm: GraphModule) -> None:
        if calls(gm, aten.relu.default):
            raise LoweringError("no relu here\n  because of it")

    mlp = {"mlp": MODELS["mlp"]}
    (objection,) = check_quantizer(ByHand(good), mlp, backend=returns)
    assert (objection.rule, objection.model, objection.where) == ("backend-runs-it", "mlp", "relu")
    assert check_quantizer(ByHand(good), mlp, backend=raises) == [Finding("backend-runs-it", "mlp", "", "no relu here")]
    assert check_quantizer(ByHand(good), mlp, backend=lambda gm: None) == []


def test_models_may_come_without_names():
    (finding,) = check_quantizer(Nothing(), [MODELS["mlp"]])
    assert "no node of model 0 was annotated" in finding.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": [MLP()]}, "model 0 is MLP; check_quantizer takes what torch.export.export"),
        ({"ignore": ["tidiness"]}, "no rule is called tidiness"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        check_quantizer(Toy(STATIC), **arguments)


def test_the_assertion_lists_findings_and_what_the_rules_demand():
    with pytest.raises(AssertionError) as caught:
        assert_conforms(at(aten.chunk.default, with_output(ACT)), MODELS)
    first, *findings, rule = str(caught.value).splitlines()
    assert first == "ByHand breaks 1 rules:"
    assert findings == [
        "  one-tensor: tokens: chunk: chunk has a list of outputs; annotate the getitem nodes that take one tensor"
    ]
    assert rule == f"  [one-tensor] {RULES['one-tensor']}"


def test_checking_leaves_the_models_as_they_were():
    model = MODELS["mlp"]
    before = str(model.graph), {name: value.clone() for name, value in model.state_dict.items()}
    check_quantizer(Toy(STATIC), {"mlp": model})
    assert str(model.graph) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict.items())
    assert not any("quantization_annotation" in node.meta for node in model.graph.nodes)


def test_the_built_in_models_hold_what_quantizers_stumble_over():
    targets = {str(node.target) for model in default_models().values() for node in model.graph.nodes}
    for op in (
        "conv2d.default",
        "linear.default",
        "embedding.default",
        "chunk.default",
        "cat.default",
        "matmul.default",
    ):
        assert f"aten.{op}" in targets
    floats = [
        node
        for model in default_models().values()
        for node in model.graph.nodes
        if node.op == "call_function" and not is_float_tensor(node)
    ]
    assert floats  # integers, booleans, lists


def test_a_foreign_annotation_is_read_by_its_fields():
    class Theirs:
        """As other packages write it: a class of their own, a quantizer that subclasses nothing of ours."""

        def __init__(self, inputs: dict[Node, Any], output: Any) -> None:
            self.input_qspec_map, self.output_qspec = inputs, output
            self.allow_implicit_sharing, self._annotated = True, True

    def foreign(gm: GraphModule) -> None:
        for node in linears(gm):
            node.meta["quantization_annotation"] = Theirs({node.args[0]: spec(), node.args[1]: spec()}, spec())

    assert not issubclass(Theirs, QuantizationAnnotation)
    assert issubclass(ByHand, Quantizer)
    assert check_quantizer(ByHand(foreign), MODELS) == []
