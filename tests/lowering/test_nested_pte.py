"""Nested graphs in ExecuTorch's runtime: cond, scan and map run in portable kernels; what does not run is an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_over
from torch._higher_order_ops import scan, while_loop

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, while it captures cond

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class ControlFlow(nn.Module):
    """A linear that XNNPACK takes, then linears inside cond, map and scan."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.row, self.cell = (nn.Linear(4, 4) for _ in range(4))
        self.right = nn.Conv1d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cond(x.sum() > 0, lambda y: self.left(y), lambda y: self.right(y).relu(), (y,))
        y = map_over(lambda row: self.row(row).relu(), y)

        def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            new = self.cell(row) + state
            return new, new * 2

        return scan(step, torch.zeros_like(x[0]), y, dim=0)[1]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.step(y)), (start, x))[1]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inside(x).relu()


def quantized(model: nn.Module) -> torch.fx.GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(torch.export.export(model.eval(), (X,)), XNNPACKQuantizer(config))
    with torch.no_grad():
        for x in (X, -X, X.abs(), -X.abs()):
            prepared(x)
    return convert_pt2e(prepared)


def test_quantized_cond_map_and_scan_run_in_executorch():
    converted = quantized(ControlFlow())
    program = lower_to_executorch(converted, (X,))
    with torch.no_grad():
        for x in (X.abs(), -X.abs()):
            (actual,) = program.run(x)
            # A value on the border of two steps may be rounded to the other one by a sum in another order. Through
            # four linears with gains below 1 it stays a few steps of the last grid, each about 1/255 of the range.
            assert (actual - converted(x)).abs().max() <= 4 * converted(x).abs().max() / 255
    assert [kernel.precision for kernel in program.kernels if kernel.node == "linear"] == ["int8"]
    inside = {left.reason for left in program.undelegated if "." in left.node}
    assert inside == {"inside a nested graph, where XNNPACK takes no operators"}
    assert any(left.reason.startswith("it copies a result of cond") for left in program.undelegated)
    assert {"true_graph_0", "false_graph_0", "body_graph_0", "scan_combine_graph_0"} <= {
        left.node.partition(".")[0] for left in program.undelegated
    }


def test_while_loop_is_refused():
    with pytest.raises(LoweringError, match=r"ExecuTorch has no while_loop:\n.*node while_loop = while_loop"):
        lower_to_executorch(quantized(Loop()), (X,))


def test_control_flow_inside_control_flow_is_refused():
    """ExecuTorch lets the inner one overwrite what the outer one holds, and gives wrong numbers without a word."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return torch.cond(x.max() > 1, lambda x: x.sin(), lambda x: x.cos(), (x,)) + x

            return torch.cond(x.sum() > 0, inner, lambda x: x * 2, (x,))

    with pytest.raises(LoweringError, match=r"node true_graph_0\.cond = cond"):
        lower_to_executorch(torch.export.export(Twice(), (X,)))


def test_bfloat16_inside_autocast_is_refused_by_the_name_of_the_node():
    with pytest.raises(LoweringError, match=r"submod_1\.quantize_per_tensor.*bfloat16|bfloat16.*\n.*submod_1\."):
        lower_to_executorch(quantized(Autocast()), (X,))
