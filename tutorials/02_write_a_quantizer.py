"""Tutorial 2: a quantizer for a chip of your own, from nothing.

Say the chip multiplies and adds 8-bit integers. It has a kernel for convolution with an optional relu, one for linear,
and an adder whose two operands and result must have one scale. Its convolution knows no groups. That is all we write
down: specs, rules, and a reason. The framework walks the graph, decides who shares a scale, and reports.

Run it: python tutorials/02_write_a_quantizer.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.observer import MinMaxObserver, PerChannelMinMaxObserver
from pt2e_quant.quantizer import Match, QuantizationConfig, QuantizationSpec, RuleQuantizer, op, rule, same_as

aten = torch.ops.aten

# --- the whole backend ------------------------------------------------------------------------------------------------

# A spec says how one tensor becomes integers: q = clamp(round(x / scale) + zero_point, quant_min, quant_max).
ACT = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)

# Declared ops: alternatives that take their operands in the same places. In-place twins (relu_) are found for you.
conv = op(aten.conv2d.default, aten.conv2d.padding)
linear = op(aten.linear.default)
relu = op(aten.relu.default)
plus = op(aten.add.Tensor)


def grouped(match: Match) -> str | None:
    """A reason for leaving a match in float; it appears in the report. None: the rule applies."""
    groups = match.argument(conv, "groups")
    return f"groups={groups}, the chip's convolution takes 1" if groups != 1 else None


# A rule is a pattern that reads like model code, with a spec for each tensor that becomes integers.
@rule(x=ACT, w=WEIGHT, output=ACT, unless=[grouped])
def conv_relu(x, w, b):
    return relu(conv(x, w, b))


@rule(x=ACT, w=WEIGHT, output=ACT, unless=[grouped])
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=ACT, w=WEIGHT, output=ACT)
def linear_only(x, w, b):
    return linear(x, w, b)


@rule(a=ACT, b=same_as("a"), output=same_as("a"))
def add(a, b):
    return plus(a, b)


class ChipQuantizer(RuleQuantizer):
    """The first rule that fits a node takes it, so the larger pattern stands first."""

    rules = (conv_relu, conv_only, linear_only, add)


# --- and how it is used -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution with relu, a grouped one, and their sum: the chip runs all but the grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(x)
        return self.head(x.mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    data = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    exported = torch.export.export(model, (data[0],))

    # The specs stand in the rules, so the config only says "quantize everything"; None would say "leave it in float".
    # Rules for several recipes (per tensor, dynamic, ...) use the roles INPUT, WEIGHT, OUTPUT of the config instead.
    everything = QuantizationConfig(ACT, ACT, WEIGHT)
    prepared = prepare_pt2e(exported, ChipQuantizer(everything))
    for batch in data:
        prepared(batch)
    converted = convert_pt2e(prepared)

    report = explain(converted)
    print(report)
    print("\nWhy is the grouped convolution not quantized?")
    print(report.why("grouped"))
    print("\nThe adder has one scale for a, b and the result:")
    print(next(group.members for group in report.groups if "add" in group.members))
    with torch.no_grad():
        error = (converted(data[0]) - model(data[0])).abs().max()
    print(f"\nlargest difference to the float model: {error:.4f}")


if __name__ == "__main__":
    main()
