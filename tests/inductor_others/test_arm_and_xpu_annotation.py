"""What ArmInductorQuantizer and XPUInductorQuantizer claim, in which numbers, and what they leave, with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.quantizer import QuantizationConfig
from pt2e_quant.specs import QuantizationSpec
from pt2e_quant.testing import assert_conforms
from quantizers.arm_inductor import RULES as ARM_RULES
from quantizers.arm_inductor import ArmInductorQuantizer
from quantizers.xpu_inductor import RULES as XPU_RULES
from quantizers.xpu_inductor import XPUInductorQuantizer
from tests.inductor_others.others_rows import MODELS, RECIPES, Branches, converted, quantizer, readers, report
from tests.nets import MLP, ConvNet, Residual, export, sqnr
from tests.x86.x86_rows import Net

IMAGE, ROWS, SIGNAL = (2, 3, 8, 8), (2, 4, 6), (2, 3, 9)
aten = torch.ops.aten
Q = torch.ops.quantized_decomposed


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_contract_is_kept(recipe):
    assert_conforms(quantizer(recipe))


# name: (recipe, model, shape of its input, the rule of each op in graph order; None is float)
CLAIMS = {
    "arm: conv and linear only": (
        "arm", ConvNet, (2, 3, 16, 16),
        ("conv_only", None, "conv_only", None, None, None, None, "linear_only"),
    ),
    "arm: a sum is float": ("arm", Residual, (2, 4, 8, 8), ("conv_only", "conv_only", None, None, None)),
    "arm: conv1d with what follows": (
        "arm", lambda: nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.SiLU()), SIGNAL, ("conv_only", None)
    ),
    "arm: dynamic is for linear": (
        "arm, dynamic", Branches, IMAGE, (None,) * 8 + ("linear_only",)
    ),
    "xpu: fused as on x86": (
        "xpu", ConvNet, (2, 3, 16, 16),
        ("conv_unary", "conv_unary", "conv_unary", "conv_unary", None, None, None, "linear_only"),
    ),
    "xpu: a sum goes with its convolution": (
        "xpu", Residual, (2, 4, 8, 8), ("conv_add_relu", "conv_only", "conv_add_relu", "conv_add_relu", None)
    ),
    "xpu: linear with gelu and add": (
        "xpu", lambda: Net(lambda n, x: n.b(F.gelu(n.a(x))) + x, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), ROWS,
        ("linear_unary", "linear_unary", "linear_add", "linear_add"),
    ),
    "xpu: conv1d alone": ("xpu", lambda: nn.Conv1d(3, 4, 3, padding=2), SIGNAL, ("conv_only",)),
    "xpu: conv1d before an op that nothing fuses": (
        "xpu", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Sigmoid()), SIGNAL, ("conv_only", None)
    ),
    "xpu: integers pass through": (
        "xpu",
        lambda: Net(
            lambda n, x: n.c(F.pad(F.dropout(torch.cat([n.a(x), n.b(x)], 1), 0.3, False).transpose(2, 3), (0, 1))),
            a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1), c=nn.Conv2d(4, 3, 1),
        ),
        IMAGE,
        ("conv_only", "conv_only", "cat", "copy", "move", "pad", "conv_only"),
    ),
    "xpu: the mean has a scale of its own": (
        "xpu", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)), IMAGE,
        ("conv_unary", "conv_unary", "average_pool", "conv_only"),
    ),
    "xpu: sums": (
        "xpu",
        lambda: Net(
            lambda n, x: F.relu(n.c(n.a(x) + n.b(x)) + x), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6)
        ),
        ROWS,
        ("linear_add", "linear_only", "linear_add", "linear_add_relu", "linear_add_relu", "linear_add_relu"),
    ),
    "xpu: conv_add": (
        "xpu", lambda: Net(lambda n, x: torch.sigmoid(n.a(x) + n.b(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)),
        IMAGE, ("conv_add", "conv_only", "conv_add", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_each_op_has_the_rule_of_its_kernel(name):
    recipe, make, shape, rules = CLAIMS[name]
    assert tuple(decision.rule for decision in report(make(), shape, quantizer(recipe)).record.decisions) == rules


@pytest.mark.parametrize(("recipe", "rules"), [("arm", ARM_RULES), ("xpu", XPU_RULES)], ids=["arm", "xpu"])
def test_every_rule_is_driven(recipe, rules):
    driven = {rule for name, _, _, found in CLAIMS.values() if name == recipe for rule in found}
    assert driven - {None} == {rule.name for rule in rules} - {"matmul"}


def test_a_rule_that_stands_twice_is_named_once():
    """With and without an output for max pooling."""
    unused = report(nn.Linear(6, 4), ROWS, quantizer("xpu")).unused_rules
    assert sorted(unused) == sorted({rule.name for rule in XPU_RULES} - {"linear_only"})


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_arm_reads_unsigned_activations_and_signed_weights_per_channel():
    graph, _, _ = converted("chain", quantizer("arm"))
    quantizes = graph.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default)
    weights = graph.graph.find_nodes(op="call_function", target=Q.dequantize_per_channel.default)
    assert [node.args[3:] for node in quantizes] == [(0, 255, torch.uint8)] * 2
    assert [node.args[3:] for node in weights] == [(0, -128, 127, torch.int8)] * 2
    assert not any(getattr(graph, str(node.args[2].target)).any() for node in weights)


def test_arm_computes_signed_qparams_at_run_time():
    graph, _, _ = converted("mlp", quantizer("arm, dynamic"))
    chosen = graph.graph.find_nodes(op="call_function", target=Q.choose_qparams.tensor)
    assert [(node.args[1:3], node.args[4]) for node in chosen] == [((-128, 127), torch.int8)] * 2


@pytest.mark.parametrize("name", MODELS)
def test_arm_has_floats_between_its_kernels(name):
    """Each quantize is undone before one convolution or linear, and nothing else reads it."""
    graph, _, _ = converted(name, quantizer("arm"))
    reads = readers(graph, Q.dequantize_per_tensor.default)
    assert {node.target for node in reads} <= {aten.conv2d.default, aten.linear.default}
    assert {node.target for node in readers(graph, Q.quantize_per_tensor.default)} == {Q.dequantize_per_tensor.default}


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv2d(4, 4, 1)], ids=["linear", "conv"])
def test_on_arm_the_integers_of_one_reader_are_no_concern_of_another(layer):
    model, x = Net(lambda n, x: [(n.b(y), torch.tanh(y)) for y in (n.a(x),)], a=layer, b=layer), torch.randn(2, 4, 6, 6)
    prepared = prepare_pt2e(export(model, x), quantizer("arm"))
    prepared(x)
    (tanh,) = convert_pt2e(prepared).graph.find_nodes(op="call_function", target=aten.tanh.default)
    assert tanh.args[0].target in (aten.linear.default, aten.conv2d.default)


def test_xpu_activations_are_signed():
    graph, _, _ = converted("chain", quantizer("xpu"))
    quantizes = graph.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default)
    assert [node.args[3:] for node in quantizes] == [(-128, 127, torch.int8)] * 2


@pytest.mark.parametrize("name", MODELS)
def test_symmetric_activations_have_no_zero_points(name):
    graph, _, _ = converted(name, quantizer("xpu, symmetric"))
    quantizes = graph.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default)
    assert {node.args[2] for node in quantizes} == {0}
    asymmetric, _, _ = converted(name, quantizer("xpu"))
    others = asymmetric.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default)
    assert {node.args[2] for node in others} != {0}


def test_on_intel_gpus_max_pooling_reads_floats():
    """Inductor takes pooling between a dequantize and a quantize for the integer pooling of processors."""
    graph, _, _ = converted("branches", quantizer("xpu"))
    (pool,) = graph.graph.find_nodes(op="call_function", target=aten.max_pool2d.default)
    assert pool.args[0].target is aten.relu.default
    found = {d.op: d for d in report(Branches(), IMAGE, quantizer("xpu")).record.decisions}
    assert found["aten.max_pool2d.default"].reason == (
        "Inductor has integer max pooling for processors only, not for Intel GPUs"
    )


def test_what_max_pooling_reads_is_no_integer_cat():
    def function(n, x):
        both = torch.cat([n.a(x), n.b(x)], 1)
        return n.c(both), F.max_pool2d(both, 2)

    parts = {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 2, 1), "c": nn.Conv2d(4, 3, 1)}
    found = {d.op: d for d in report(Net(function, **parts), IMAGE, quantizer("xpu")).record.decisions}
    assert found["aten.cat.default"].reason == "max pooling reads its output, which Intel GPUs have in float only"
    assert found["aten.conv2d.default"].quantized


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe) for name in MODELS for recipe in RECIPES if (name, recipe) != ("chain", "arm, dynamic")],
)
def test_the_converted_graph_computes_the_float_model(name, recipe):
    """8 bits over a range of 4 deviations either side are 41 dB for one tensor, 6 dB less for what uses half of it;
    the longest model rounds its data five times, which is 7 dB: 28 dB at the least."""
    graph, x, wanted = converted(name, quantizer(recipe))
    assert sqnr(wanted, graph(x)) > 28


# --- what stays in float ----------------------------------------------------------------------------------------------


def spec(dtype: torch.dtype, **options: object) -> QuantizationSpec:
    return replace(RECIPES["arm"][1].input_activation, dtype=dtype, **options)


ARM, XPU = RECIPES["arm"][1], RECIPES["xpu"][1]
SIGNED = spec(torch.int8, quant_min=-128, quant_max=127)
WIDE = spec(torch.int16, quant_min=-32768, quant_max=32767)
PER_TENSOR = replace(SIGNED, qscheme=torch.per_tensor_symmetric)
WEIGHTS = "Inductor's integer kernels take int8 weights with torch.per_channel_symmetric"
FLOAT = "the configuration keeps activations in float, so Inductor computes in float"
# name: (quantizer, configuration, model, shape, op, reason)
REFUSALS = {
    "arm: signed convolution": (
        ArmInductorQuantizer, replace(ARM, input_activation=SIGNED), lambda: nn.Conv2d(3, 4, 3), IMAGE,
        "aten.conv2d.default",
        "int8 activations: Inductor's convolution fails on signed ones when it runs; use torch.uint8",
    ),
    "arm: weights per tensor": (
        ArmInductorQuantizer, replace(ARM, weight=PER_TENSOR), lambda: nn.Linear(6, 4), ROWS, "aten.linear.default",
        WEIGHTS,
    ),
    "arm: float weights": (
        ArmInductorQuantizer, replace(ARM, weight=None), lambda: nn.Linear(6, 4), ROWS, "aten.linear.default",
        "the configuration keeps weights in float, so Inductor would multiply in float",
    ),
    "arm: weights alone": (
        ArmInductorQuantizer, ARM.weight_only(), lambda: nn.Linear(6, 4), ROWS, "aten.linear.default", FLOAT
    ),
    "arm: weights alone, conv": (
        ArmInductorQuantizer, ARM.weight_only(), lambda: nn.Conv2d(3, 4, 3), IMAGE, "aten.conv2d.default", FLOAT
    ),
    "arm: 16 bits": (
        ArmInductorQuantizer, replace(ARM, input_activation=WIDE), lambda: nn.Linear(6, 4), ROWS, "aten.linear.default",
        "int16 activations: Inductor's integer kernels take torch.uint8 and torch.int8",
    ),
    "arm: transposed": (
        ArmInductorQuantizer, ARM, lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE, "aten.conv_transpose2d.input",
        "Inductor mistakes its weight for that of an ordinary convolution and computes wrong numbers",
    ),
    "arm: relu": (
        ArmInductorQuantizer, ARM, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE, "aten.relu.default",
        "Inductor computes it in float, in one loop with its neighbours",
    ),
    "arm: cat": (
        ArmInductorQuantizer, ARM, lambda: Net(lambda n, x: torch.cat([n.a(x), x], 1), a=nn.Conv2d(3, 4, 1)), IMAGE,
        "aten.cat.default", "on Arm, Inductor computes it in float: it fuses nothing with integers there",
    ),
    "arm: embedding": (
        ArmInductorQuantizer, ARM, lambda: Net(lambda n, x: n.e(x.abs().long() % 9), e=nn.Embedding(9, 6)), ROWS,
        "aten.embedding.default", "this quantizer has no recipe for tables of integers",
    ),
    "arm: matmul unasked": (
        ArmInductorQuantizer, ARM, lambda: Net(lambda n, x: x @ x.transpose(1, 2)), ROWS, "aten.matmul.default",
        "Inductor multiplies two activations in float; set_function_type_qconfig(torch.matmul, ...) quantizes them",
    ),
    "xpu: conv1d and relu": (
        XPUInductorQuantizer, XPU, lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), SIGNAL, "aten.conv1d.default",
        "Inductor fuses what follows into it, which Intel GPUs do for conv2d only",
    ),
    "xpu: conv1d and a sum": (
        XPUInductorQuantizer, XPU, lambda: Net(lambda n, x: n.a(x) + x, a=nn.Conv1d(3, 3, 3, padding=1)), SIGNAL,
        "aten.conv1d.default", "Inductor fuses what follows into it, which Intel GPUs do for conv2d only",
    ),
    "xpu: weights per tensor": (
        XPUInductorQuantizer, replace(XPU, weight=PER_TENSOR), lambda: nn.Conv2d(3, 4, 3), IMAGE, "aten.conv2d.default",
        WEIGHTS,
    ),
    "xpu: weights alone": (
        XPUInductorQuantizer, XPU.weight_only(), lambda: nn.Linear(6, 4), ROWS, "aten.linear.default", FLOAT
    ),
    "xpu: dynamic convolution": (
        XPUInductorQuantizer, RECIPES["arm, dynamic"][1], lambda: nn.Conv2d(3, 4, 3), IMAGE, "aten.conv2d.default",
        "its qparams would be computed at run time, which Inductor supports for linear only",
    ),
    "xpu: no batch": (
        XPUInductorQuantizer, XPU, lambda: nn.Conv2d(3, 4, 3), (3, 8, 8), "aten.conv2d.default",
        "the input has no batch dimension; Inductor's integer kernels need one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_integer_kernel_stays_in_float_with_the_reason(name):
    kind, config, make, shape, op, reason = REFUSALS[name]
    found = report(make(), shape, kind().set_global(config)).record.decisions
    decision = next(decision for decision in found if decision.op == op)
    assert (decision.quantized, decision.reason) == (False, reason)


@pytest.mark.parametrize(("kind", "config"), [(ArmInductorQuantizer, ARM), (XPUInductorQuantizer, XPU)])
def test_both_signs_are_taken_where_the_kernel_takes_them(kind: type, config: QuantizationConfig):
    for activation in (SIGNED, spec(torch.uint8)):
        both = replace(config, input_activation=activation, output_activation=activation)
        (linear,) = report(nn.Linear(6, 4), ROWS, kind().set_global(both)).record.decisions
        assert linear.quantized


@pytest.mark.parametrize("recipe", ["arm", "xpu"])
def test_matmul_is_quantized_on_request(recipe):
    kind, config = RECIPES[recipe]
    model = Net(lambda n, x: n.a(x) @ x.transpose(1, 2), a=nn.Linear(6, 6))
    found = report(model, ROWS, kind().set_function_type_qconfig(torch.matmul, config))
    assert {d.op for d in found.record.decisions if d.quantized} == {"aten.matmul.default"}


@pytest.mark.parametrize("recipe", ["arm", "xpu"])
def test_the_selectors_are_those_of_x86(recipe):
    kind, config = RECIPES[recipe]
    by = kind().set_module_type_qconfig(nn.Linear, config).set_module_name_qconfig("down", None)
    found = report(MLP(), (3, 10), by)
    assert [d.quantized for d in found.record.decisions if "linear" in d.op] == [True, False]
    assert by.get_global_quantization_config() is None
    assert by.set_global(config).get_global_quantization_config() is config
