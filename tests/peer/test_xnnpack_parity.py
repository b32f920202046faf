"""The same export, data and recipe through this engine and through torchao with ExecuTorch's XNNPACKQuantizer.

Each graph comes out equal (ops, qparams, integer weights, outputs) or different exactly as DIFFERENCES says, for the
reason that stands there. What XNNPACK does with each form was measured in its runtime; tests/xnnpack runs ours in it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.observer import HistogramObserver
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import randomize
from tests.peer.canonical import differences
from tests.peer.graphs import GRAPHS, RECIPES

STATIC, DYNAMIC = ("per tensor", "per channel"), ("dynamic",)
WEIGHT = {"per tensor": "int8 per tensor", "per channel": "int8 per channel 0", "dynamic": "int8 per channel 0"}
INPUT = {"per tensor": "int8 per tensor", "per channel": "int8 per tensor", "dynamic": "int8 per row at run time"}
OUTPUT = {"per tensor": "int8 per tensor", "per channel": "int8 per tensor", "dynamic": "float"}


@dataclass(frozen=True)
class Difference:
    """Sites that differ on purpose, as 'site: ours / theirs'; {weight}, {input}, {output} are those of the recipe."""

    graph: str
    recipes: tuple[str, ...]
    reason: str
    lines: tuple[str, ...]

    def expected(self, recipe: str) -> list[str]:
        words = {"weight": WEIGHT[recipe], "input": INPUT[recipe], "output": OUTPUT[recipe]}
        return [line.format(**words) for line in self.lines]


PER_ROW = (
    "XNNPACK's dynamic linear has a scale for each row whatever the graph says; a graph with one scale in all promises "
    "other numbers than those that the device computes"
)
DYNAMIC_RELU = (
    "the peer skips a dynamic convolution before relu; XNNPACK runs it in integers and the relu after it in float"
)
OWN_SCALE = "a mean of many values has a smaller range than they have, so it gets a scale of its own"
TO_LINEAR = (
    "XNNPACK has one integer linear, and refuses or fails on most forms of matmul and addmm by a constant; the peer "
    "leaves them in float"
)
FUSED_CLAMP = "XNNPACK clamps the convolution's output for nothing, so no requantization lies between the two"


def _run_time(site: str, source: str) -> str:
    return f"{site}: int8 per row at run time of {source} / int8 per tensor at run time of {source}"


DIFFERENCES = (
    Difference("linear", DYNAMIC, PER_ROW, (_run_time("linear.default#0[0]", "input input"),)),
    Difference("3-d linear", DYNAMIC, PER_ROW, (_run_time("linear.default#0[0]", "input input"),)),
    Difference(
        "mlp", DYNAMIC, PER_ROW,
        (_run_time("linear.default#0[0]", "input input"), _run_time("linear.default#1[0]", "relu.default#0")),
    ),
    Difference(
        "shared linear", DYNAMIC, PER_ROW,
        (_run_time("linear.default#0[0]", "input inputs_0"), _run_time("linear.default#1[0]", "input inputs_1")),
    ),
    Difference("qkv", DYNAMIC, PER_ROW, tuple(_run_time(f"linear.default#{n}[0]", "input inputs_0") for n in range(3))),
    *(
        Difference(
            graph, DYNAMIC, DYNAMIC_RELU,
            (
                "conv2d.default#0[0]: int8 per tensor at run time of input input / float of input input",
                "conv2d.default#0[1]: {weight} of a constant / float of a constant",
            ),
        )
        for graph in ("conv bn relu", "grouped conv relu")
    ),
    Difference(
        "transposed conv bn relu", DYNAMIC, DYNAMIC_RELU,
        (
            "conv_transpose2d.input#0[0]: int8 per tensor at run time of input input / float of input input",
            "conv_transpose2d.input#0[1]: int8 per channel 1 of a constant / float of a constant",
        ),
    ),
    Difference(
        "conv relu6", STATIC, FUSED_CLAMP,
        (
            "hardtanh.default#0[0]: float of conv2d.default#0 / int8 per tensor of conv2d.default#0",
            "output[0]: int8 per tensor of hardtanh.default#0, other qparams",
        ),
    ),
    Difference(
        "conv clamp", STATIC,
        f"{FUSED_CLAMP}; it does so for hardtanh only, which clamp is renamed to; the peer returns the clamp in float",
        (
            "clamp.default#0[0]: absent / int8 per tensor of conv2d.default#0",
            "hardtanh.default#0[0]: float of conv2d.default#0 / absent",
            "output[0]: int8 per tensor of hardtanh.default#0 / float of clamp.default#0",
        ),
    ),
    Difference(
        "shared conv", STATIC,
        "the peer marks the weight node as annotated by its first user and skips the second call of the same module",
        (
            "conv2d.default#0[0]: {input} of input inputs_0 / float of input inputs_0",
            "conv2d.default#0[1]: {weight} of a constant / float of a constant",
        ),
    ),
    Difference(
        "transposed conv, groups", ("per tensor",),
        "the peer skips every grouped transposed convolution; XNNPACK runs it in integers with one weight scale in all",
        (
            "conv_transpose2d.input#0[0]: {input} of input input / float of input input",
            "conv_transpose2d.input#0[1]: {weight} of a constant / float of a constant",
            "output[0]: {output} of conv_transpose2d.input#0 / float of conv_transpose2d.input#0",
        ),
    ),
    Difference(
        "matmul", tuple(RECIPES), TO_LINEAR,
        (
            "linear.default#0[0]: {input} of input inputs_0 / absent",
            "linear.default#0[1]: {weight} of a constant / absent",
            "matmul.default#0[0]: absent / float of input inputs_0",
            "matmul.default#0[1]: absent / float of a constant",
            "output[0]: {output} of linear.default#0 / float of matmul.default#0",
        ),
    ),
    Difference(
        "addmm", STATIC, TO_LINEAR,
        (
            "addmm.default#0[0]: absent / float of a constant",
            "addmm.default#0[1]: absent / float of input inputs_0",
            "addmm.default#0[2]: absent / float of a constant",
            "linear.default#0[0]: {input} of input inputs_0 / absent",
            "linear.default#0[1]: {weight} of a constant / absent",
            "linear.default#0[2]: float of a constant / absent",
            "output[0]: {output} of linear.default#0 / float of addmm.default#0",
        ),
    ),
    Difference(
        "attention scores", STATIC,
        "t() preserves values, so it works on the integers of its input; the peer's list has transpose but not t",
        ("matmul.default#0[1]: int8 per tensor of t.default#0 / float of t.default#0",),
    ),
    Difference(
        "add x to x", STATIC,
        "a tensor is dequantized once for each use, since XNNPACK refuses a cat that reads one dequantize twice",
        ("dequantize_per_tensor.default: 3 / 2 times",),
    ),
    Difference(
        "mul relu", STATIC,
        "XNNPACK runs mul fused with relu in float; apart, both are integer kernels and the relu is exact",
        (
            "output[0]: int8 per tensor of relu.default#0, other qparams",
            "relu.default#0[0]: int8 per tensor of mul.Tensor#0 / float of mul.Tensor#0",
        ),
    ),
    Difference(
        "sub", STATIC, "XNNPACK subtracts in integers; the peer has no pattern for it",
        (
            "output[0]: int8 per tensor of sub.Tensor#0 / float of sub.Tensor#0",
            "sub.Tensor#0[0]: int8 per tensor of input inputs_0 / float of input inputs_0",
            "sub.Tensor#0[1]: int8 per tensor of input inputs_1 / float of input inputs_1",
        ),
    ),
    Difference(
        "pool, flatten, linear", STATIC, OWN_SCALE,
        (
            "flatten.using_ints#0[0]: int8 per tensor of adaptive_avg_pool2d.default#0, other qparams",
            "linear.default#0[0]: int8 per tensor of flatten.using_ints#0, other qparams",
        ),
    ),
    Difference(
        "pool an input", STATIC,
        "a float tensor is averaged in float, inside the delegate: rounding it first costs accuracy and saves nothing",
        (
            "adaptive_avg_pool2d.default#0[0]: float of input input / int8 per tensor of input input",
            "flatten.using_ints#0[0]: float of adaptive_avg_pool2d.default#0 "
            "/ int8 per tensor of adaptive_avg_pool2d.default#0",
            "linear.default#0[0]: int8 per tensor of flatten.using_ints#0, other qparams",
        ),
    ),
    Difference(
        "mean", STATIC,
        f"{OWN_SCALE}; the integer kernel keeps the averaged dimensions, and a flatten drops them",
        (
            "flatten.using_ints#0[0]: int8 per tensor of mean.dim#0 / absent",
            "linear.default#0[0]: int8 per tensor of flatten.using_ints#0 / int8 per tensor of mean.dim#0",
        ),
    ),
)  # fmt: skip

EXPECTED = {(entry.graph, recipe): entry for entry in DIFFERENCES for recipe in entry.recipes}
CASES = [(name, recipe) for name, graph in GRAPHS.items() for recipe in graph.recipes]


def peers_quantizer(recipe, *, all_patterns=False):
    """The peer's quantizer. Its patterns with batch norm, which serve training, take seconds and are left out here."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer

    quantizer = peer.XNNPACKQuantizer().set_global(peer.get_symmetric_quantization_config(**RECIPES[recipe]))
    if not all_patterns:
        quantizer.SUPPORTED_PATTERNS = [one for one in quantizer.SUPPORTED_PATTERNS if "_bn" not in one.name]
    return quantizer


def exported(name):
    """An exported graph and three batches of data."""
    graph = GRAPHS[name]
    data = [tuple(torch.randn(shape) for shape in graph.shapes) for _ in range(3)]
    return torch.export.export(randomize(graph.make()).eval(), data[0]), data


def with_the_peers_observer(recipe):
    """Our own recipe searches its ranges better, and so comes to other qparams."""
    config = get_symmetric_quantization_config(**RECIPES[recipe])
    if config.is_dynamic:
        return config
    ctr = HistogramObserver.with_args(eps=2**-12)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=ctr)
    return replace(config, input_activation=activation, output_activation=activation)


def ours(program, data, recipe):
    quantizer = XNNPACKQuantizer().set_global(with_the_peers_observer(recipe))
    prepared = prepare_pt2e(program, quantizer, allow_empty=True)
    for batch in data:
        prepared(*batch)
    return convert_pt2e(prepared)


def theirs(program, data, quantizer):
    from torchao.quantization.pt2e import quantize_pt2e as peer

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the peer
        prepared = peer.prepare_pt2e(program.module(), quantizer)
        for batch in data:
            prepared(*batch)
        return peer.convert_pt2e(prepared)


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=lambda value: value)
def test_a_graph_equals_the_peers_or_differs_as_listed(name, recipe):
    program, data = exported(name)
    one, other = ours(program, data, recipe), theirs(program, data, peers_quantizer(recipe))
    if (name, recipe) in EXPECTED:
        assert differences(one, other) == EXPECTED[name, recipe].expected(recipe)
    else:
        assert differences(one, other) == []
        torch.testing.assert_close(one(*data[0]), other(*data[0]))


def test_every_listed_difference_belongs_to_a_compared_graph():
    assert EXPECTED.keys() <= set(CASES)
    assert sum(len(entry.recipes) for entry in DIFFERENCES) == len(EXPECTED)


def test_most_graphs_are_equal():
    """So that the table above cannot grow into the rule."""
    static = [(name, recipe) for name, recipe in CASES if recipe != "dynamic"]
    assert len(set(static) - EXPECTED.keys()) >= 48


def test_the_patterns_left_out_of_the_peer_match_nothing_here():
    program, data = exported("conv bn relu")
    some = theirs(program, data, peers_quantizer("per channel"))
    assert differences(some, theirs(program, data, peers_quantizer("per channel", all_patterns=True))) == []


def _other_scale(gm):
    node = next(node for node in gm.graph.nodes if "quantize_per_tensor.default" in str(node.target))
    node.update_arg(1, node.args[1] * 1.001)


def _other_zero_point(gm):
    node = next(node for node in gm.graph.nodes if "dequantize_per_tensor.default" in str(node.target))
    node.update_arg(2, node.args[2] + 1)


def _other_range(gm):
    node = next(node for node in gm.graph.nodes if "dequantize_per_channel" in str(node.target))
    node.update_arg(4, -128)


def _other_axis(gm):
    node = next(node for node in gm.graph.nodes if "dequantize_per_channel" in str(node.target))
    node.update_arg(3, 1)


def _other_code(gm):
    gm._frozen_param0 = gm._frozen_param0.clone()
    gm._frozen_param0[0, 0, 0, 0] += 1


def _other_channel_scale(gm):
    gm._scale_0 = gm._scale_0 * torch.tensor([1.0] * 7 + [1.01])


def _other_bias(gm):
    bias = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.conv2d.default).args[2]
    gm.get_parameter(bias.target).data[0] += 0.1


def _no_output(gm):
    output = gm.graph.output_node()
    (value,) = output.all_input_nodes
    output.replace_input_with(value, value.args[0].args[0])


@pytest.mark.parametrize(
    "change",
    [
        _other_scale,
        _other_zero_point,
        _other_range,
        _other_axis,
        _other_code,
        _other_channel_scale,
        _other_bias,
        _no_output,
    ],
)
def test_the_comparison_sees_one_change(change):
    program, data = exported("conv bn relu")
    one = ours(program, data, "per channel")
    other = copy.deepcopy(one)
    assert differences(one, other) == []
    change(other)
    assert len(differences(one, other)) == 1
