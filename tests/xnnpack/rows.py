"""Tables of small models for the XNNPACK tests: a row is one model; a whole table is lowered as one program.

Lowering costs seconds, most of it the same for one operator and for a hundred. So the rows of a table are branches of
one module, each on inputs of its own, and every row is judged on its own kernels and its own output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config
from tests.nets import randomize

__all__ = ["RECIPES", "Net", "Outcome", "Row", "after_conv", "chain", "outcomes", "report"]

_PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)
RECIPES = {
    "per channel": _PER_CHANNEL,
    "per tensor": get_symmetric_quantization_config(is_per_channel=False),
    "dynamic": get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True),
    "dynamic per tensor": get_symmetric_quantization_config(is_per_channel=False, is_dynamic=True),
    "groups": get_8da4w_config(32),
    "static groups": replace(_PER_CHANNEL, weight=get_8da4w_config(32).weight),
    "weight only": _PER_CHANNEL.weight_only(),
    "activation only": _PER_CHANNEL.activation_only(),
}


class Net(nn.Module):
    """`function(net, *inputs)` as a module; keywords become its submodules and parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Row:
    """make: builds the model; shapes: of its inputs; recipe: key of RECIPES."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    recipe: str = "per channel"

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Outcome:
    """What became of one row in ExecuTorch's runtime.

    kernels:     precision ('int8', 'dynamic', 'float') of each operator inside a delegate, with the operator
    undelegated: operators outside every delegate
    error:       largest difference from the converted graph
    step:        scale of the output; None when it is floating point
    varies:      the output holds more than one value
    """

    kernels: list[tuple[str, str]]
    undelegated: list[str]
    error: float
    step: float | None
    varies: bool

    @property
    def steps(self) -> float:
        """The error in steps of the output's grid (LSB)."""
        assert self.step is not None
        return self.error / self.step


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def after_conv(function: Callable[[Tensor], Tensor]) -> Row:
    """A row for ops that need a quantized producer: a 1 x 1 convolution to (2, 4, 6, 6), then `function`."""
    return Row(lambda: Net(lambda net, x: function(net.conv(x)), conv=nn.Conv2d(3, 4, 1)), ((2, 3, 6, 6),))


def report(row: Row, **options: Any) -> Report:
    """The report after prepare, of the row alone; `options` go to torch.export."""
    exported = torch.export.export(randomize(row.make()).eval(), row.inputs(), **options)
    return explain(prepare_pt2e(exported, _quantizer(row.recipe), allow_empty=True))


def outcomes(rows: dict[str, Row]) -> dict[str, Outcome]:
    """Prepare, calibrate, convert, lower and run a table, whose rows have one recipe."""
    (recipe,) = {row.recipe for row in rows.values()}
    names = {f"row{number}": name for number, name in enumerate(rows)}
    table = _Table({key: randomize(rows[name].make()) for key, name in names.items()}).eval()
    data = [{key: rows[name].inputs() for key, name in names.items()} for _ in range(2)]
    exported: ExportedProgram = torch.export.export(table, (data[0],))
    prepared = prepare_pt2e(exported, _quantizer(recipe), allow_empty=True)
    for batch in data:
        prepared(batch)
    converted = convert_pt2e(prepared)
    program = lower_to_executorch(converted, (data[0],))
    with torch.no_grad():
        got, expected = program.run(data[0]), converted(data[0])
    home = {decision.node: decision.module for decision in explain(converted).record.decisions}
    steps = [_step(node) for node in converted.graph.output_node().args[0]]
    found = {}
    for place, (key, name) in enumerate(names.items()):
        found[name] = Outcome(
            [(kernel.op, kernel.precision) for kernel in program.kernels if _inside(home.get(kernel.node), key)],
            [left.op for left in program.undelegated if _inside(left.module, key)],
            float((got[place] - expected[key]).abs().max()),
            steps[place],
            bool(got[place].unique().numel() > 1),
        )
    return found


class _Table(nn.Module):
    def __init__(self, rows: dict[str, nn.Module]) -> None:
        super().__init__()
        self.rows = nn.ModuleDict(rows)

    def forward(self, inputs: dict[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {key: row(*inputs[key]) for key, row in self.rows.items()}


def _quantizer(recipe: str) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(RECIPES[recipe])


def _inside(module: str | None, key: str) -> bool:
    return module is not None and f"{module}.".startswith(f"rows.{key}.")


def _step(node: torch.fx.Node) -> float | None:
    return node.args[1] if "dequantize_per_tensor.default" in str(node.target) else None
