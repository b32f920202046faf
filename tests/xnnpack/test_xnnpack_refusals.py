"""What XNNPACKQuantizer leaves in float, with its reason, and that the rest of such a model still comes out right."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from quantizers.xnnpack import RULES
from tests.quick import quick
from tests.xnnpack.rows import Net, Outcome, Row, after_conv, outcomes, report

pytest.importorskip("executorch")

IMAGE, ONE_IMAGE, VECTOR, PAIR = ((2, 3, 6, 6),), ((1, 3, 6, 6),), ((2, 6),), ((2, 6), (2, 6))
STATIC_ONLY = "XNNPACK runs it in integers with static qparams only, which this configuration does not use"
NO_BATCH = "its input has {} dimensions and its weight {}; XNNPACK needs as many, with the batch"
MEAN = "XNNPACK averages in integers over dimensions 2 and 3 of a 4-d tensor with keepdim=True only"


@dataclass(frozen=True)
class Refusal:
    """row: the model; op: the op that stays float; by: the function that says so; reason: its words.

    runs: ExecuTorch can run the model, with the op in float.
    """

    row: Row
    op: str
    by: str
    reason: str
    runs: bool = True


def conv(channels: int = 3, **options: object) -> nn.Module:
    return nn.Conv2d(channels, 4, 3, **options)


def linear() -> nn.Module:
    return nn.Linear(6, 6)


def _net(function, **parts) -> functools.partial:
    return functools.partial(Net, function, **parts)


REFUSALS = {
    "weight only": Refusal(
        Row(linear, VECTOR, "weight only"), "aten.linear.default", "half_in_float",
        "only its weight is quantized, and XNNPACK has no weight-only kernel",
    ),
    "activation only": Refusal(
        Row(conv, IMAGE, "activation only"), "aten.conv2d.default", "half_in_float",
        "its weight stays in float, so XNNPACK would multiply in float",
    ),
    "dynamic, one weight scale": Refusal(
        Row(linear, VECTOR, "dynamic per tensor"), "aten.linear.default", "dynamic_per_tensor",
        "XNNPACK's dynamic kernels need per-channel weights; set is_per_channel=True",
    ),
    "convolution, groups of weights": Refusal(
        Row(conv, ONE_IMAGE, "groups"), "aten.conv2d.default", "grouped_weights",
        "XNNPACK's convolutions take one weight scale per channel, not one per group", runs=False,
    ),
    "static, groups of weights": Refusal(
        Row(lambda: nn.Linear(32, 6), ((2, 32),), "static groups"), "aten.linear.default", "grouped_weights",
        "XNNPACK takes groups of weights with dynamic activations only; set is_dynamic=True", runs=False,
    ),
    "rows that fill no group": Refusal(
        Row(linear, VECTOR, "groups"), "aten.linear.default", "grouped_weights",
        "its 6 inputs do not split into groups of 32", runs=False,
    ),
    "computed weight": Refusal(
        Row(lambda: Net(lambda n, x, w: F.conv2d(x, w)), (*IMAGE, (4, 3, 1, 1))), "aten.conv2d.default",
        "computed_parameters",
        "its weight inputs_1 is computed at run time; XNNPACK packs constant weights and biases only",
    ),
    "computed bias": Refusal(
        Row(lambda: Net(lambda n, x, b: F.linear(x, n.w, b), w=torch.randn(6, 6)), (*VECTOR, (6,))),
        "aten.linear.default", "computed_parameters",
        "its bias inputs_1 is computed at run time; XNNPACK packs constant weights and biases only",
    ),
    "dynamic add": Refusal(
        Row(lambda: Net(lambda n, x: n.f(x) + x, f=linear()), VECTOR, "dynamic"), "aten.add.Tensor", "not_static",
        STATIC_ONLY,
    ),
    "dynamic cat": Refusal(
        Row(lambda: Net(lambda n, x: torch.cat([n.f(x), x]), f=linear()), VECTOR, "dynamic"), "aten.cat.default",
        "not_static", STATIC_ONLY,
    ),
    "dynamic transposed conv1d": Refusal(
        Row(lambda: nn.ConvTranspose1d(3, 4, 3), ((1, 3, 9),), "dynamic"), "aten.conv_transpose1d.default",
        "dynamic_convolution", "XNNPACK's dynamic convolutions are 2-d only",
    ),
    "dynamic transposed conv of one channel": Refusal(
        Row(lambda: nn.ConvTranspose2d(1, 4, 3), ((1, 1, 6, 6),), "dynamic"), "aten.conv_transpose2d.input",
        "dynamic_convolution", "XNNPACK has no dynamic depthwise convolution",
    ),
    "dynamic transposed conv of two images": Refusal(
        Row(lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE, "dynamic"), "aten.conv_transpose2d.input", "one_scale_in_all",
        "its batch is 2; XNNPACK's dynamic convolution has a scale for each image, the graph one in all",
    ),
    "conv without batch": Refusal(
        Row(conv, ((3, 6, 6),)), "aten.conv2d.default", "unbatched", NO_BATCH.format(3, 4)
    ),
    "conv1d without batch": Refusal(
        Row(lambda: nn.Conv1d(3, 4, 3), ((3, 9),)), "aten.conv1d.default", "unbatched", NO_BATCH.format(2, 3)
    ),
    "padded with ones": Refusal(
        Row(lambda: Net(lambda n, x: n.c(F.pad(x, (1, 1, 1, 1), value=1.0)), c=conv()), IMAGE), "aten.pad.default",
        "not_zero_padding", "mode='constant', value=1.0: XNNPACK's convolutions pad with zeros",
    ),
    "padded by reflection": Refusal(
        Row(lambda: Net(lambda n, x: n.c(F.pad(x, (1, 1, 1, 1), mode="reflect")), c=conv()), IMAGE), "aten.pad.default",
        "not_zero_padding", "mode='reflect', value=None: XNNPACK's convolutions pad with zeros",
    ),
    "cropped": Refusal(
        Row(lambda: Net(lambda n, x: n.c(F.pad(x, (-1, 1, 0, 0))), c=conv()), IMAGE), "aten.pad.default",
        "not_zero_padding", "pad=[-1, 1, 0, 0]: it crops, XNNPACK's convolutions only pad", runs=False,
    ),
    "dynamic conv1d": Refusal(
        Row(lambda: nn.Conv1d(3, 4, 3), ((1, 3, 9),), "dynamic"), "aten.conv1d.default", "dynamic_convolution",
        "XNNPACK's dynamic convolutions are 2-d only",
    ),
    "dynamic depthwise": Refusal(
        Row(lambda: conv(4, groups=4), ((1, 4, 6, 6),), "dynamic"), "aten.conv2d.default", "dynamic_convolution",
        "XNNPACK has no dynamic depthwise convolution",
    ),
    "dynamic conv of one channel": Refusal(
        Row(lambda: conv(1), ((1, 1, 6, 6),), "dynamic"), "aten.conv2d.default", "dynamic_convolution",
        "XNNPACK has no dynamic depthwise convolution",
    ),
    "dynamic conv of two images": Refusal(
        Row(conv, IMAGE, "dynamic"), "aten.conv2d.default", "one_scale_in_all",
        "its batch is 2; XNNPACK's dynamic convolution has a scale for each image, the graph one in all",
    ),
    "transposed, grouped": Refusal(
        Row(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), ((2, 4, 5, 5),)), "aten.conv_transpose2d.input",
        "grouped_transpose",
        "with per-channel weights, XNNPACK's transposed convolution needs axis=1 and groups=1, this one has groups=2",
    ),
    "add, alpha": Refusal(
        Row(lambda: Net(lambda n, x, y: torch.add(n.f(x), y, alpha=2), f=linear()), PAIR), "aten.add.Tensor",
        "scaled_operand", "alpha=2; the integer kernel takes alpha=1",
    ),
    "sub, alpha": Refusal(
        Row(lambda: Net(lambda n, x, y: torch.sub(n.f(x), y, alpha=0.5), f=linear()), PAIR), "aten.sub.Tensor",
        "scaled_operand", "alpha=0.5; the integer kernel takes alpha=1",
    ),
    "attention mask": Refusal(
        Row(_net(lambda n, x: torch.sigmoid(n.f(x) + n.mask), f=linear(), mask=torch.tensor([0.0] * 5 + [-1e9])),
            VECTOR),
        "aten.add.Tensor", "huge_constant",
        "the constant mask reaches beyond 1e+06; next to it all other values would round to one",
    ),
    "a number computed at run time": Refusal(
        Row(lambda: Net(lambda n, x, y: n.f(x) * y, f=linear()), (*VECTOR, ())), "aten.mul.Tensor", "scalar_operand",
        "inputs_1 is a single number computed at run time; 8 bits would take its digits for all values",
    ),
    "cat of one": Refusal(
        after_conv(lambda y: torch.cat([y], 1)), "aten.cat.default", "alone", "XNNPACK concatenates two tensors or more"
    ),
    "mean over channels": Refusal(
        after_conv(lambda y: y.mean((1, 3), keepdim=True)), "aten.mean.dim", "not_spatial_mean", MEAN
    ),
    "mean of a 2-d tensor": Refusal(
        Row(lambda: Net(lambda n, x: n.f(x).mean(-1), f=linear()), VECTOR), "aten.mean.dim", "not_spatial_mean", MEAN
    ),
    "mean with dtype": Refusal(
        after_conv(lambda y: y.mean((2, 3), keepdim=True, dtype=torch.float32)), "aten.mean.dim", "not_spatial_mean",
        "dtype=torch.float32, which XNNPACK's mean does not convert to; leave it out",
    ),
    "pool to 2 x 2": Refusal(
        after_conv(lambda y: F.adaptive_avg_pool2d(y, 2)), "aten.adaptive_avg_pool2d.default", "not_to_one",
        "output size [2, 2]; XNNPACK pools in integers to 1 x 1 of a batch only",
    ),
    "max pool that skips": Refusal(
        after_conv(lambda y: F.max_pool2d(y, 2, 3)), "aten.max_pool2d.default", "unusual_pool",
        "stride (3, 3) is larger than the kernel (2, 2); XNNPACK's max pooling cannot skip",
    ),
    "dropout that drops": Refusal(
        after_conv(lambda y: F.dropout(y, 0.3, training=True)), "aten.dropout.default", "drops_values",
        "captured in training mode, it drops values; call model.eval() before export", runs=False,
    ),
}  # fmt: skip

NEIGHBOURS = {
    "zeros padded to integers": after_conv(lambda y: F.pad(y, (1, 2, 0, 1))),
    "zeros padded, then a float op": after_conv(lambda y: torch.sigmoid(F.pad(y, (1, 1)))),
    "zeros padded twice": after_conv(lambda y: F.pad(F.pad(y, (1, 1)), (0, 0, 1, 1))),
    "zeros padded for two": after_conv(lambda y: (lambda z: torch.sigmoid(z) + z)(F.pad(y, (1, 1)))),
    "one tensor for float and integers": after_conv(lambda y: torch.relu(y) + torch.sigmoid(y)),
    "silu between": Row(
        lambda: Net(lambda n, x: n.d(F.silu(n.c(x))), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 4, 3)), IMAGE
    ),
    "layer norm between": Row(
        lambda: Net(lambda n, x: n.g(n.norm(n.f(x))), f=linear(), norm=nn.LayerNorm(6), g=linear()), VECTOR
    ),
    "one bias for integers and float": Row(
        lambda: Net(lambda n, x: F.linear(x, n.w, n.b) / n.b, w=torch.randn(4, 6), b=torch.rand(4) + 1), VECTOR
    ),
    "attention": Row(
        lambda: Net(
            lambda n, x: n.o(torch.softmax(n.q(x) @ n.k(x).transpose(-1, -2), -1) @ n.v(x)),
            q=linear(), k=linear(), v=linear(), o=linear(),
        ),
        ((2, 5, 6),),
    ),
    "scores of two inputs": Row(
        lambda: Net(lambda n, x, y: n.f(x) @ n.f(2.0 * y).t(), f=linear()), ((2, 6), (3, 6))
    ),
    "constants added to each other": Row(
        lambda: Net(lambda n, x: n.f(x) + (n.a + n.b), f=linear(), a=torch.randn(6), b=torch.randn(6)), VECTOR
    ),
}  # fmt: skip

BATCH = {0: Dim("batch", min=1, max=8)}
SIZES = {**BATCH, 2: Dim("height", min=4, max=9)}
DYNAMIC_SHAPES = {
    "slice": (
        Refusal(
            after_conv(lambda y: y[:, 1:]), "aten.slice.Tensor", "dynamic_slice", "XNNPACK slices static shapes only"
        ),
        ((BATCH,),),
    ),
    "max pool, ceil_mode": (
        Refusal(
            after_conv(lambda y: F.max_pool2d(y, 2, ceil_mode=True)), "aten.max_pool2d.default", "unusual_pool",
            "ceil_mode with dynamic shapes",
        ),
        ((BATCH,),),
    ),
    "unsqueeze": (
        Refusal(
            after_conv(lambda y: y.unsqueeze(1)), "aten.unsqueeze.default", "unknown_sizes",
            "2 sizes are dynamic; XNNPACK reshapes with one",
        ),
        ((SIZES,),),
    ),
    "dynamic conv": (
        Refusal(
            Row(conv, IMAGE, "dynamic"), "aten.conv2d.default", "one_scale_in_all",
            "its batch is s0; XNNPACK's dynamic convolution has a scale for each image, the graph one in all",
        ),
        (BATCH,),
    ),
}  # fmt: skip


CODES = {
    "scaled_operand": "factor",
    "unusual_pool": "stride",
    "not_to_one": "average",
    "not_spatial_mean": "average",
    "alone": "single",
}


def reasons(case: Refusal, **options: object) -> list[str]:
    """Why the op stayed float, each reason on its own; symbols of dynamic sizes become s0."""
    (found,) = [d.reason or "" for d in report(case.row, **options).record.decisions if d.op == case.op]
    return [re.sub(r"\bs\d+\b", "s0", reason) for reason in found.split("; ")]


@pytest.mark.filterwarnings("ignore:the model was exported in training mode")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_xnnpack_cannot_run_stays_float_with_the_reason(name):
    case = REFUSALS[name]
    assert set(case.reason.split("; ")) <= set(reasons(case))


@pytest.mark.parametrize("name", DYNAMIC_SHAPES)
def test_sizes_unknown_before_the_run_are_a_reason_as_well(name):
    case, shapes = DYNAMIC_SHAPES[name]
    assert set(case.reason.split("; ")) <= set(reasons(case, dynamic_shapes=shapes))


@pytest.mark.filterwarnings("ignore:the model was exported in training mode")
@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if case.by in CODES])
def test_each_argument_that_a_kernel_lacks_has_a_way_out_of_its_own(name):
    case = REFUSALS[name]
    (found,) = [decision for decision in report(case.row).record.decisions if decision.op == case.op]
    assert found.code == ("conversion" if "dtype=" in case.reason else CODES[case.by])


def test_every_refusal_of_every_rule_stands_in_a_table():
    cases = (*REFUSALS.values(), *(case for case, _ in DYNAMIC_SHAPES.values()))
    assert {case.by for case in cases} == {check.__name__ for rule in RULES for check in rule.unless}


@functools.cache
def in_the_runtime(recipe: str) -> dict[str, Outcome]:
    return outcomes({name: c.row for name, c in REFUSALS.items() if c.runs and c.row.recipe == recipe})


@functools.cache
def neighbours() -> dict[str, Outcome]:
    return outcomes(NEIGHBOURS)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_integers_next_to_floats_compute_what_the_converted_graph_says(name):
    outcome = neighbours()[name]
    assert outcome.error <= (outcome.step or 6 / 255) * 1.01
    assert outcome.varies


@pytest.mark.parametrize(
    "name", quick((name for name, case in REFUSALS.items() if case.runs), lambda position, _: position % 4 == 0)
)
def test_the_rest_of_a_model_with_a_float_op_computes_what_the_converted_graph_says(name):
    outcome = in_the_runtime(REFUSALS[name].row.recipe)[name]
    # One step of an integer kernel, 1/255 of a range of at most 6, is all that may lie between the two.
    assert outcome.error <= (outcome.step or 6 / 255) * 1.01
    assert outcome.varies
