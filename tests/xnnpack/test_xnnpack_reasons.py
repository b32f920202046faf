"""What the report says of ops that have no rule is true: XNNPACK runs them in float, or does not run them at all."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from pt2e_quant.lowering.executorch.xnnpack.limits import FLOAT, OUTSIDE, REASONS
from quantizers.xnnpack import XNNPACKQuantizer
from tests.xnnpack.rows import RECIPES, Net

pytest.importorskip("executorch")

aten = torch.ops.aten

# One call of each op, on an image of shape (1, 4, 6, 6)
CALLS = {
    aten.avg_pool2d.default: lambda n, x: F.avg_pool2d(x, 2),
    aten.bmm.default: lambda n, x: torch.bmm(x[0], x[0]),
    aten.matmul.default: lambda n, x: x[0] @ x[0],
    aten.softmax.int: lambda n, x: torch.softmax(x, -1),
    aten.sigmoid.default: lambda n, x: torch.sigmoid(x),
    aten.tanh.default: lambda n, x: torch.tanh(x),
    aten.gelu.default: lambda n, x: F.gelu(x),
    aten.hardswish.default: lambda n, x: F.hardswish(x),
    aten.leaky_relu.default: lambda n, x: F.leaky_relu(x),
    aten.div.Tensor: lambda n, x: x / (x * x + 1.0),
    aten.exp.default: lambda n, x: torch.exp(x),
    aten.log.default: lambda n, x: torch.log(x * x + 1.0),
    aten.sqrt.default: lambda n, x: torch.sqrt(x * x),
    aten.rsqrt.default: lambda n, x: torch.rsqrt(x * x + 1.0),
    aten.neg.default: lambda n, x: -x,
    aten.abs.default: lambda n, x: x.abs(),
    aten.maximum.default: lambda n, x: torch.maximum(x, x * x),
    aten.minimum.default: lambda n, x: torch.minimum(x, x * x),
    aten.prelu.default: lambda n, x: F.prelu(x, n.slope),
    aten.batch_norm.default: lambda n, x: n.norm(x),
    aten.constant_pad_nd.default: lambda n, x: torch.constant_pad_nd(x, (1, 1), 0.0),
    aten.pad.default: lambda n, x: F.pad(x, (1, 1), value=0.5),
    aten.upsample_bilinear2d.vec: lambda n, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    aten.channel_shuffle.default: lambda n, x: F.channel_shuffle(x, 2),
    aten.pixel_shuffle.default: lambda n, x: F.pixel_shuffle(x, 2),
    aten.baddbmm.default: lambda n, x: torch.baddbmm(x[0], x[0], x[0]),
    aten.ceil.default: lambda n, x: torch.ceil(x),
    aten.cos.default: lambda n, x: torch.cos(x),
    aten.floor.default: lambda n, x: torch.floor(x),
    aten.glu.default: lambda n, x: F.glu(x, 1),
    aten.pixel_unshuffle.default: lambda n, x: F.pixel_unshuffle(x, 2),
    aten.rsub.Scalar: lambda n, x: 1.0 - x,
    aten.silu.default: lambda n, x: F.silu(x),
    aten.sin.default: lambda n, x: torch.sin(x),
    aten.square.default: lambda n, x: torch.square(x),
    aten.mm.default: lambda n, x: torch.mm(x[0, 0], x[0, 1]),
    aten.addmm.default: lambda n, x: torch.addmm(x[0, 0], x[0, 1], x[0, 2]),
    aten.amax.default: lambda n, x: x.amax(1),
    aten.cumsum.default: lambda n, x: x.cumsum(1),
    aten.erf.default: lambda n, x: torch.erf(x),
    aten.group_norm.default: lambda n, x: F.group_norm(x, 2),
    aten.index.Tensor: lambda n, x: x[:, [1, 0]],
    aten.instance_norm.default: lambda n, x: F.instance_norm(x),
    aten.log_softmax.int: lambda n, x: F.log_softmax(x, -1),
    aten.masked_fill.Scalar: lambda n, x: x.masked_fill(x > 0, 2.0),
    aten.max_pool1d.default: lambda n, x: F.max_pool1d(x[0], 2),
    aten.mean.default: lambda n, x: x.mean(),
    aten.reciprocal.default: lambda n, x: torch.reciprocal(x * x + 1.0),
    aten.round.default: lambda n, x: torch.round(x),
    aten.sum.dim_IntList: lambda n, x: x.sum((2, 3)),
    aten.tile.default: lambda n, x: x.tile(1, 2),
    aten.layer_norm.default: lambda n, x: F.layer_norm(x, (6,)),
    aten.rms_norm.default: lambda n, x: F.rms_norm(x, (6,)),
    aten.elu.default: lambda n, x: F.elu(x),
    aten.embedding.default: lambda n, x: F.embedding(x.abs().long(), n.table),
    aten.expand.default: lambda n, x: x[:, :1].expand(1, 4, 6, 6),
    aten.repeat.default: lambda n, x: x.repeat(1, 2, 1, 1),
    aten.flip.default: lambda n, x: x.flip(1),
    aten.stack.default: lambda n, x: torch.stack([x, -x]),
    aten.upsample_nearest2d.vec: lambda n, x: F.interpolate(x, scale_factor=2),
}
IMPOSSIBLE = {
    aten.conv3d.default: lambda: (nn.Conv3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4)),
    aten.conv3d.padding: lambda: (nn.Conv3d(1, 2, 3, padding="same"), torch.randn(1, 1, 4, 4, 4)),
    aten.conv_transpose3d.input: lambda: (nn.ConvTranspose3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4)),
}


class Calls(nn.Module):
    """All calls, each in a submodule of its own, so that the lowered ops can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(4)
        parts = {"slope": torch.tensor([0.1]), "norm": norm, "table": torch.randn(20, 3)}
        self.calls = nn.ModuleList(Net(call, **parts) for call in CALLS.values())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [call(x) for call in self.calls]


@functools.cache
def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Calls().eval(), (torch.randn(1, 4, 6, 6),))


@functools.cache
def reasons() -> dict[str, str]:
    prepared = prepare_pt2e(exported(), XNNPACKQuantizer().set_global(RECIPES["per channel"]), allow_empty=True)
    return {decision.node: decision.reason or "" for decision in explain(prepared).skipped}


@functools.cache
def lowered() -> ExecutorchProgram:
    return lower_to_executorch(exported())


def node_of(op) -> torch.fx.Node:
    place = f"calls.{list(CALLS).index(op)}"
    found = [n for n in exported().graph.nodes if n.target is op and place in str(n.meta.get("nn_module_stack"))]
    assert len(found) == 1
    return found[0]


def test_there_is_a_call_of_every_op_with_a_reason():
    assert CALLS.keys() | IMPOSSIBLE.keys() == REASONS.keys()


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_the_report_gives_the_reason(op):
    assert REASONS[op] in reasons()[node_of(op).name].split("; ")


@pytest.mark.parametrize("op", FLOAT, ids=str)
def test_an_op_said_to_run_in_float_is_inside_the_delegate(op):
    name = node_of(op).name
    assert {kernel.precision for kernel in lowered().kernels if kernel.node == name} == {"float"}
    assert [left for left in lowered().undelegated if left.node == name] == []


@pytest.mark.parametrize("op", OUTSIDE, ids=str)
def test_an_op_said_to_be_left_out_is_outside_the_delegate(op):
    name = node_of(op).name
    assert [left for left in lowered().undelegated if left.node == name] != []


@pytest.mark.parametrize("op", IMPOSSIBLE, ids=str)
def test_a_3d_convolution_cannot_be_lowered(op):
    module, x = IMPOSSIBLE[op]()
    program = torch.export.export(module.eval(), (x,))
    assert op in [node.target for node in program.graph.nodes]
    with pytest.raises(LoweringError, match="no kernel for 3-D convolution"):
        lower_to_executorch(program)


def test_the_float_ops_compute_what_the_model_computes():
    x = torch.randn(1, 4, 6, 6)
    expected = exported().module()(x)
    for op, got, want in zip(CALLS, lowered().run(x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3, msg=lambda text, op=op: f"{op}: {text}")
