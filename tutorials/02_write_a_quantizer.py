"""Tutorial 2: a quantizer for a chip of your own, in under 40 lines, and how to know that it is right.

A *quantizer* tells the engine which tensors of a model become integers, and how. It knows one backend: what the
kernels of that chip can do. Here the chip is made up, and its data sheet says:

- conv2d, with or without relu, and linear: int8 activations, int8 weights with one scale per output channel. Weights
  are stored in the chip beforehand. A grouped convolution is too much for it.
- add: both operands and the result must have the same scale.
- sigmoid: its result always lies between 0 and 1, so the chip has a fixed scale for it.
- whatever only changes the shape of a tensor leaves its integers as they are.

Run it from anywhere, it takes a few seconds:    python tutorials/02_write_a_quantizer.py
"""

from __future__ import annotations

import torch
from torch import nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.observer import MinMaxObserver, PerChannelMinMaxObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    FixedQParamsQuantizationSpec,
    Match,
    QuantizationConfig,
    QuantizationSpec,
    RuleQuantizer,
    op,
    rule,
    same_as,
)
from pt2e_quant.testing import check_quantizer

# ----------------------------------------------------------------------------------------------------------------------
# 1. The quantizer, in 34 lines. A rule is a *pattern* with a spec on each tensor. The pattern is an ordinary function
#    that reads like model code: its parameters are the tensors around the match, its body says which ops they meet.

aten = torch.ops.aten
conv, linear, relu = op(aten.conv2d.default), op(aten.linear.default), op(aten.relu.default)
plus, sigmoid_of = op(aten.add.Tensor), op(aten.sigmoid.default)
reshaping = op(aten.view.default, aten.flatten.using_ints, aten.permute.default)

ACTIVATION = QuantizationSpec(torch.int8, MinMaxObserver, qscheme=torch.per_tensor_affine)
CHANNELS = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)
FROM_0_TO_1 = FixedQParamsQuantizationSpec(torch.int8, scale=1 / 256, zero_point=-128)


def grouped(match: Match) -> str | None:
    groups = match.argument(conv, "groups")
    return f"groups={groups}, the chip convolves one group only" if groups != 1 else None


def computed(match: Match) -> str | None:
    return None if match.is_constant("w") else f"its weight {match.captures['w']} is computed while the model runs"


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[grouped, computed])
def conv_relu(x, w, b):
    return relu(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[grouped, computed])
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[computed])
def fully_connected(x, w, b):
    return linear(x, w, b)


@rule(a=INPUT, b=same_as("a"), output=same_as("a"))
def add(a, b):
    return plus(a, b)


@rule(x=INPUT, output=FROM_0_TO_1)
def sigmoid(x):
    return sigmoid_of(x)


@rule(x=INHERIT, output=same_as("x"))
def reshape(x):
    return reshaping(x)


NO_RULE = {aten.max_pool2d.default: "the chip cannot compare"}


class ChipQuantizer(RuleQuantizer):
    rules = (conv_relu, conv_only, fully_connected, add, sigmoid, reshape)  # the first that fits an op takes it
    reasons = NO_RULE


CONFIG = QuantizationConfig(input_activation=ACTIVATION, output_activation=ACTIVATION, weight=CHANNELS)

#    That is all of it. What the words mean:
#    op(...)            an operator of the graph that torch.export makes. In-place twins (relu_) are included.
#    ACTIVATION, ...    specs: type, range, one scale or one per channel, and the observer that watches the values.
#    INPUT, WEIGHT, ... roles: "the spec that the user's config has for inputs". So one rule serves many configs.
#    same_as("a")       the same scale and zero point as `a`. The engine finds out who must share with whom, through
#                       the whole model, before it inserts a single observer.
#    INHERIT            as the tensor comes. The rule applies where the producer of `x` is quantized, with its scale.
#    unless=[...]       functions that look at a match and return the reason why the chip cannot run it, or None. The
#                       user reads that reason in the report, so say what would help.
#    reasons            the same for ops that no rule is about.
#    `b` has no spec, so the bias stays float. A spec that depends on others is a DerivedQuantizationSpec.

# ----------------------------------------------------------------------------------------------------------------------
# 2. A model that asks for all of this, and has two ops that the chip cannot run.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(4)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)  # folded into the convolution before any rule sees the graph
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(self.pool(x))))
        x = self.left(x) + self.right(x)
        return torch.sigmoid(self.head(x.flatten(1)))


torch.manual_seed(0)
model = Net().eval()
example = torch.randn(1, 3, 8, 8)
exported = torch.export.export(model, (example,))

# ----------------------------------------------------------------------------------------------------------------------
# 3. Use it like any other quantizer. Every choice that users have comes with RuleQuantizer: set_global,
#    set_module_name, set_module_type, set_operator_type, set_node_name, set_filter_function.

prepared = prepare_pt2e(exported, ChipQuantizer().set_global(CONFIG))
for _ in range(8):
    prepared(torch.randn(1, 3, 8, 8))
converted = convert_pt2e(prepared)

#    The report names the rule that took each op, and for the others the reason that you wrote above. Look at `right`
#    (grouped), at max_pool2d, and under "Observers" at the tensors that share the scale of the addition.
report = explain(converted)
print(report.text())
print(report.why("right"))

#    The signal-to-quantization-noise ratio, in dB, says how much of the signal is left: for 8 bits, 20 is poor, 30 and
#    more is good.
error = converted(example) - model(example)
print(f"\nSQNR: {10 * torch.log10(model(example).pow(2).mean() / error.pow(2).mean()):.0f} dB")

# ----------------------------------------------------------------------------------------------------------------------
# 4. Is the quantizer itself right? The conformance check tries it on awkward models (shared tensors, in-place ops,
#    several outputs, integers among floats, ...) and lists each rule of the trade that it breaks. Ours breaks none.

findings = check_quantizer(ChipQuantizer().set_global(CONFIG))
print("\nconformance:", "\n".join(map(str, findings)) or "no problems found")

#    `computed`, above, is there because of this check. Without it, a linear whose weight is computed from the input of
#    the model gets a spec for a weight that nobody can store, in one of those awkward models:


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def careless(x, w, b):
    return linear(x, w, b)


class CarelessQuantizer(RuleQuantizer):
    rules = (careless,)


print("\nand without `computed`:", *check_quantizer(CarelessQuantizer().set_global(CONFIG)), sep="\n")

# Next: quantizers/xnnpack.py is a whole backend written this way. Rules there use four more things that a chip may
# need: WEIGHT.at(1), channels on another dimension; one_scale(...), a list of tensors; a function of the config instead
# of a spec; and transforms, rewrites of the graph before the rules are tried.
