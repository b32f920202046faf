"""What X86InductorQuantizer claims and what it leaves, with the reason; strict or not, modules and functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import SpecError, TargetingError
from quantizers.x86_inductor import (
    RULES,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_int4_weight_only_quantization_config,
    get_x86_inductor_linear_dynamic_fp16_config,
)
from tests.nets import export
from tests.x86.x86_rows import RECIPES, Net, report

IMAGE, ROWS = (2, 3, 8, 8), (2, 4, 6)
aten = torch.ops.aten
Q = torch.ops.quantized_decomposed


def conv(channels: int = 3, out: int = 3, size: int = 3, **options: object) -> nn.Module:
    return nn.Conv2d(channels, out, size, **options)


def linear() -> nn.Module:
    return nn.Linear(6, 6)


def two(function, **parts: nn.Module) -> nn.Module:
    """function, then a convolution that reads integers."""
    return Net(lambda net, x: net.last(function(net, x)), last=conv(size=1), **parts)


# name: (model, shape of its input, the rule of each op in graph order; None is float)
CLAIMS = {
    "conv bn hardswish": (
        lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(3, eps=1e-3), nn.Hardswish()),
        IMAGE,
        ("conv_unary", "conv_unary"),
    ),
    "conv silu, same": (lambda: nn.Sequential(conv(padding="same"), nn.SiLU()), IMAGE, ("conv_unary",) * 2),
    "conv clamp": (lambda: Net(lambda n, x: n.c(x).clamp(-0.1, 0.2), c=conv()), IMAGE, ("conv_unary",) * 2),
    "conv sigmoid": (lambda: nn.Sequential(conv(), nn.Sigmoid()), IMAGE, ("conv_only", None)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, groups=1, dilation=2), (2, 3, 9), ("conv_only",)),
    "add_ and relu_ in place": (
        lambda: two(lambda n, x: n.a(x).add_(n.b(x)).relu_(), a=conv(), b=conv()),
        IMAGE,
        ("conv_add_relu", "conv_only", "conv_add_relu", "conv_add_relu", "conv_only"),
    ),
    "add on the left": (
        lambda: two(lambda n, x: n.b(x) + n.a(n.b(x)), a=conv(padding=1), b=conv()),
        IMAGE,
        ("conv_add", "conv_only", "conv_only", "conv_add", "conv_only"),
    ),
    "linear gelu": (lambda: nn.Sequential(linear(), nn.GELU("tanh")), ROWS, ("linear_unary",) * 2),
    "linear add relu": (
        lambda: Net(lambda n, x: F.relu(x + n.a(x)), a=linear()), ROWS, ("linear_add_relu",) * 3
    ),
    "addmm": (
        lambda: Net(lambda n, x: torch.addmm(n.b, x, n.w), w=torch.randn(6, 5), b=torch.randn(5)),
        (4, 6),
        ("linear_only",),
    ),
    "functional conv and linear": (
        lambda: Net(
            lambda n, x: F.linear(F.conv2d(x, n.w, padding=1).mean((2, 3)), n.v), w=torch.randn(4, 3, 3, 3),
            v=torch.randn(2, 4),
        ),
        IMAGE,
        ("conv_only", "average_pool", "linear_only"),
    ),
    "pool between convolutions": (
        lambda: two(lambda n, x: F.avg_pool2d(F.max_pool2d(n.a(x), 2), 1), a=conv()),
        IMAGE,
        ("conv_only", "max_pool2d", "average_pool", "conv_only"),
    ),
    "cat, dropout": (
        lambda: Net(
            lambda n, x: n.c(F.dropout(torch.cat([n.a(x), n.b(x)], 1), 0.3, False)), a=conv(), b=conv(), c=conv(6)
        ),
        IMAGE,
        ("conv_only", "conv_only", "cat", "copy", "conv_only"),
    ),
    "uneven padding": (
        lambda: two(lambda n, x: F.pad(n.a(x), (0, 1, 2, 0)), a=conv()), IMAGE, ("conv_only", "pad", "conv_only")
    ),
    "even padding is the convolution's own": (
        lambda: two(lambda n, x: n.a(F.pad(x, (1, 1, 2, 2))), a=conv(size=4, padding=1)), IMAGE,
        ("conv_only", "conv_only"),
    ),
    "flatten": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)), IMAGE,
        ("conv_unary", "conv_unary", "move", "linear_only"),
    ),
    "reused relu": (lambda: _Reused(), IMAGE, ("conv_unary",) * 4),
    "subclass of Linear": (lambda: _Own(6, 4), ROWS, ("linear_only",)),
}  # fmt: skip


class _Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = conv(), conv(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


class _Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", CLAIMS)
def test_each_op_has_the_rule_of_its_kernel(name, strict):
    make, shape, rules = CLAIMS[name]
    found = report(make(), torch.randn(shape), strict=strict)
    assert tuple(decision.rule for decision in found.record.decisions) == rules


def test_every_rule_is_driven():
    driven = {rule for _, _, rules in CLAIMS.values() for rule in rules}
    elsewhere = {
        "matmul",
        "embedding",
        "embedding_bag",
        "linear_add",
    }  # on request only, and with dynamic qparams, below
    assert driven - {None} == {rule.name for rule in RULES} - elsewhere


SIGNED = "int8 activations: Inductor's convolution fails on signed ones when it runs; use torch.uint8"
TRANSPOSED = "Inductor mistakes its weight for that of an ordinary convolution and computes wrong numbers"
# name: (model, shape, recipe, op, reason)
REFUSALS = {
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE, "static", "aten.conv_transpose2d.input", TRANSPOSED),
    "conv3d": (
        lambda: nn.Conv3d(3, 4, 2), (1, 3, 4, 4, 4), "static", "aten.conv3d.default",
        "Inductor has integer convolutions in 1-d and 2-d only",
    ),
    "no batch": (
        conv, (3, 8, 8), "static", "aten.conv2d.default",
        "the input has no batch dimension; Inductor's integer kernels need one",
    ),
    "a vector": (
        linear, (6,), "static", "aten.linear.default",
        "the input has no batch dimension; Inductor's integer kernels need one",
    ),
    "same with an even kernel": (
        lambda: conv(size=4, padding="same", dilation=1), IMAGE, "static", "aten.conv2d.padding",
        "padding='same' pads unevenly here; oneDNN pads both sides alike",
    ),
    "windows in the padding": (
        lambda: conv(size=1, padding=2), IMAGE, "static", "aten.conv2d.default",
        "a window sees padding only: oneDNN's sums are wrong there, or it reads memory that is not its own",
    ),
    "dynamic conv": (
        conv, IMAGE, "dynamic", "aten.conv2d.default",
        "its qparams would be computed at run time, which Inductor supports for linear only",
    ),
    "fp16 conv": (
        conv, IMAGE, "fp16", "aten.conv2d.default",
        "the configuration keeps activations in float, so Inductor computes in float",
    ),
    "computed weight": (
        lambda: Net(lambda n, x: F.linear(x, n.w * x.mean()), w=torch.randn(4, 6)), ROWS, "static",
        "aten.linear.default", "mul is computed at run time; Inductor packs constant weights and biases only",
    ),
    "matmul unasked": (
        lambda: Net(lambda n, x: x @ x.transpose(1, 2)), ROWS, "static", "aten.matmul.default",
        "Inductor multiplies two activations in float; set_function_type_qconfig(torch.matmul, ...) quantizes them",
    ),
    "groups that do not divide a row": (
        lambda: nn.Linear(48, 8), (2, 48), "int4", "aten.linear.default",
        "its 48 inputs do not split into groups of 32",
    ),
    "pool that nothing reads": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.Sigmoid()), IMAGE, "static", "aten.max_pool2d.default",
        "nothing that runs in integers reads its output",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_integer_kernel_stays_in_float_with_the_reason(name):
    make, shape, recipe, op, reason = REFUSALS[name]
    decision = next(d for d in report(make(), torch.rand(shape), recipe).record.decisions if d.op == op)
    assert (decision.quantized, decision.reason) == (False, reason)
    assert decision.code != "arguments", "the way out for all arguments alike"


def test_signed_activations_are_refused():
    config = RECIPES["static"]
    signed = replace(config.input_activation, dtype=torch.int8, quant_min=-128, quant_max=127)
    quantizer = X86InductorQuantizer().set_global(replace(config, input_activation=signed, output_activation=signed))
    found = explain(prepare_pt2e(export(conv(), torch.randn(IMAGE)), quantizer, allow_empty=True))
    assert [decision.reason for decision in found.record.decisions] == [SIGNED]


OTHER_SUMS = {
    "alpha": lambda n, x: torch.add(n.a(x), n.b(x), alpha=2),
    "broadcast": lambda n, x: n.a(x) + n.b(x).mean((2, 3), True),
    "constant": lambda n, x: n.a(x) + n.k,
    "own input": lambda n, x: n.p(x) + x,
    "view": lambda n, x: n.a(x) + n.b(x).transpose(2, 3),
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_a_sum_that_onednn_cannot_fuse_is_computed_in_float(name):
    parts = {"a": conv(), "b": conv(), "p": conv(padding=1), "k": torch.randn(2, 3, 6, 6)}
    found = report(two(OTHER_SUMS[name], **parts), torch.randn(IMAGE))
    (add,) = (decision for decision in found.record.decisions if decision.op == "aten.add.Tensor")
    assert not add.quantized
    assert all(decision.quantized for decision in found.record.decisions if "conv2d" in decision.op)


def test_an_output_is_quantized_only_where_integers_are_read():
    model = Net(lambda n, x: (n.b(F.relu(n.a(x))), torch.sigmoid(n.c(x))), a=conv(), b=conv(), c=conv())
    found = {decision.node: decision for decision in report(model, torch.randn(IMAGE)).record.decisions}
    assert [found[name].output for name in ("conv2d_1", "conv2d_2")] == [None, None]
    assert found["relu"].output is not None


def test_reduce_range_keeps_activations_in_seven_bits():
    x = torch.randn(IMAGE)
    prepared = prepare_pt2e(export(conv(), x), X86InductorQuantizer().set_global(RECIPES["reduced"]))
    prepared(x)
    (quantize,) = convert_pt2e(prepared).graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default)
    assert quantize.args[3:] == (0, 127, torch.uint8)


def test_weights_have_the_whole_range_however_small_they_are():
    model = nn.Linear(6, 4, bias=False)
    model.weight.data = torch.randn(4, 6) * 1e-4
    x = torch.randn(ROWS)
    prepared = prepare_pt2e(torch.export.export(model, (x,)), X86InductorQuantizer().set_global(RECIPES["dynamic"]))
    converted = convert_pt2e(prepared)
    codes = next(buffer for _, buffer in converted.named_buffers() if buffer.dtype is torch.int8)
    assert (codes.int().abs().amax(1) >= 127).all()


def test_a_function_selects_its_operator_everywhere():
    quantizer = X86InductorQuantizer().set_global(RECIPES["static"]).set_function_type_qconfig(F.linear, None)
    model = nn.Sequential(conv(), nn.Flatten(), nn.Linear(108, 2))
    found = explain(prepare_pt2e(export(model, torch.randn(IMAGE)), quantizer))
    assert {d.op: d.quantized for d in found.record.decisions} == {
        "aten.conv2d.default": True, "aten.flatten.using_ints": False, "aten.linear.default": False,
    }  # fmt: skip


def test_max_pool2d_of_functional_is_its_operator():
    quantizer = X86InductorQuantizer().set_global(RECIPES["static"]).set_function_type_qconfig(F.max_pool2d, None)
    model = nn.Sequential(conv(), nn.MaxPool2d(2), conv())
    found = explain(prepare_pt2e(export(model, torch.randn(IMAGE)), quantizer))
    assert [d.quantized for d in found.record.decisions] == [True, False, True]


def test_matmul_is_quantized_on_request():
    model = Net(lambda n, x: n.a(x) @ x.transpose(1, 2), a=linear())
    quantizer = X86InductorQuantizer().set_function_type_qconfig(torch.matmul, RECIPES["static"])
    found = explain(prepare_pt2e(export(model, torch.randn(ROWS)), quantizer))
    assert {d.op for d in found.record.decisions if d.quantized} == {"aten.matmul.default"}


def test_embedding_is_quantized_on_request():
    model = Net(lambda n, x: n.a(n.e(x)), e=nn.Embedding(9, 6), a=linear())
    x = torch.tensor([[1, 2], [3, 8]])
    quantizer = X86InductorQuantizer().set_function_type_qconfig(F.embedding, RECIPES["weight only"])
    prepared = prepare_pt2e(torch.export.export(model, (x,)), quantizer)
    converted = convert_pt2e(prepared)
    (table,) = converted.graph.find_nodes(op="call_function", target=Q.dequantize_per_channel.default)
    assert next(iter(table.users)).target is aten.embedding.default
    step = model.e.weight.detach().abs().amax(1, keepdim=True) / 127.5
    (codes, scales) = (getattr(converted, str(node.target)) for node in table.args[:2])
    error = (codes * scales.unsqueeze(1) - model.e.weight).abs()
    assert (error <= step * 0.51).all()  # -128..127 reaches half a step beyond the largest weight


INDICES, OFFSETS = torch.tensor([1, 4, 2, 0]), torch.tensor([0, 3])


def bags(config, computed: bool = False, **options) -> tuple[bool, str | None]:
    """(quantized, reason) of an embedding_bag on a table of 9 rows of 6 values."""
    model = Net(
        lambda n, i: F.embedding_bag(i, n.w * i.float().mean() if computed else n.w, OFFSETS, **options),
        w=torch.randn(9, 6),
    )
    exported = torch.export.export(model, (INDICES,))
    prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(config), allow_empty=True)
    (decision,) = (d for d in explain(prepared).record.decisions if "embedding_bag" in d.op)
    return decision.quantized, decision.reason


@pytest.mark.parametrize("options", [{}, {"mode": "sum", "padding_idx": 2}], ids=["mean", "sum without a row"])
def test_bags_are_quantized_where_weights_alone_are(options):
    assert bags(RECIPES["weight only"], **options) == (True, None)


BAGS = {
    "max": (
        {"mode": "max"}, "weight only",
        "mode='max': torch's kernel for tables of integers adds rows up, it has no maximum",
    ),
    "mean without a row": (
        {"padding_idx": 2}, "weight only",
        "mode='mean' with padding_idx=2: torch's kernel does not count what it leaves out",
    ),
    "groups": ({}, "int4", "weights in groups: torch's kernel for bags takes one scale for each row"),
    "static": (
        {}, "static",
        "a table of integers saves memory, not time; ask for it with set_function_type_qconfig(F.embedding, ...)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAGS)
def test_bags_that_the_kernel_does_not_take_stay_in_float_with_the_reason(name):
    options, recipe, reason = BAGS[name]
    assert bags(RECIPES[recipe], **options) == (False, reason)


def test_a_table_that_is_computed_is_no_table():
    assert bags(RECIPES["weight only"], computed=True) == (False, "mul is computed at run time; no table is stored")


@pytest.mark.parametrize("size", [16, 48, 512])
def test_groups_without_a_kernel_are_refused(size):
    with pytest.raises(SpecError, match=f"groups of 32, 64, 128 or 256 weights of 4 bits, got group_size={size}"):
        get_x86_inductor_int4_weight_only_quantization_config(size)


def test_weights_of_four_bits_have_scales_that_bfloat16_holds():
    x = torch.randn(2, 96)
    prepared = prepare_pt2e(export(nn.Linear(96, 4), x), X86InductorQuantizer().set_global(RECIPES["int4"]))
    converted = convert_pt2e(prepared)
    (weight,) = converted.graph.find_nodes(op="call_function", target=Q.dequantize_per_channel_group.default)
    codes, scales = (getattr(converted, str(node.target)) for node in weight.args[:2])
    assert (codes.shape, scales.shape) == ((4, 96), (4, 3))
    assert torch.equal(scales, scales.bfloat16().float())
    assert (codes >= -8).all()
    assert (codes <= 7).all()
    assert codes.abs().max() >= 7


def test_module_selectors_have_the_names_of_the_reference():
    static = RECIPES["static"]
    model = nn.Sequential(conv(), conv(), conv())
    quantizer = X86InductorQuantizer().set_module_type_qconfig(nn.Conv2d, static).set_module_name_qconfig("1", None)
    found = explain(prepare_pt2e(export(model, torch.randn(IMAGE)), quantizer))
    assert [d.quantized for d in found.record.decisions] == [True, False, True]


def test_the_global_configuration_can_be_asked_for():
    quantizer = X86InductorQuantizer()
    assert quantizer.get_global_quantization_config() is None
    config = get_default_x86_inductor_quantization_config(is_dynamic=True)
    assert quantizer.set_global(config).get_global_quantization_config() is config


def test_a_linear_in_float16_holds_the_pair_of_casts_that_inductor_matches():
    x = torch.randn(ROWS)
    quantizer = X86InductorQuantizer().set_global(get_x86_inductor_linear_dynamic_fp16_config())
    converted = convert_pt2e(prepare_pt2e(export(linear(), x), quantizer))
    (node,) = converted.graph.find_nodes(op="call_function", target=aten.linear.default)
    back = node.args[1]
    assert back.target is Q.convert_element_type.no_fuse
    assert back.args[1] is torch.float32
    assert back.args[0].meta["val"].dtype is torch.float16


def test_an_unknown_function_is_an_error():
    with pytest.raises(TargetingError, match="no operator belongs to"):
        X86InductorQuantizer().set_function_type_qconfig(export, None)
