"""Tutorial 7: int8 loses the accuracy. Which layer is it, why, and what are the ways out?

A net for handwritten digits is accurate in float and useless in int8. Three questions lead to the layer: where does the
error *come from* (`compare`), what does it *do to the outputs* (`sensitivity`), and what is gained if the layer stays
in float (`exact_sensitivity`, with the accuracy itself as the metric)? In the end `mixed_precision` finds a way out
alone.

Run it from anywhere, it takes about 20 seconds:    python tutorials/07_find_the_bad_layer.py
"""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule

from demo.model import DigitsNet, load_images, train
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.debug import Budget, compare, exact_sensitivity, mixed_precision, sensitivity
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 1. A net that hides something. Training sometimes leaves a channel that is always zero, and weights after it that
#    no gradient ever reaches. Here is one, planted. The float net does not notice: 0 * 60 is 0.

torch.manual_seed(0)
torch.set_num_threads(1)
learn, held_back = load_images()
model = DigitsNet(width=32)
train(model, learn, epochs=6)

block = model.blocks[1]
with torch.no_grad():
    block.depthwise_norm.weight[5] = 0
    block.depthwise_norm.bias[5] = -1  # relu makes a zero of it
    block.pointwise.weight[:, 5] = 60


def accuracy(net) -> float:
    """Share of the images held back that the net gets right."""
    with torch.no_grad():
        return float((net(held_back.x).argmax(1) == held_back.y).float().mean())


def quantize(exported: torch.export.ExportedProgram) -> GraphModule:
    prepared = prepare_pt2e(exported, XNNPACKQuantizer(config))
    for batch in data:
        prepared(batch)
    return convert_pt2e(prepared)


config = get_symmetric_quantization_config(is_per_channel=True)
data = list(learn.x[:256].split(64))
sizes = ({0: torch.export.Dim("batch", min=2)},)
exported = torch.export.export(model, (data[0],), dynamic_shapes=sizes)
converted = quantize(exported)
print(f"accuracy of the float net: {accuracy(model):.1%}")
print(f"accuracy of the int8 net: {accuracy(converted):.1%}")

# ----------------------------------------------------------------------------------------------------------------------
# 2. Where does the error come from? Both models run side by side. *Own* is the error of an op on exact inputs;
#    *inherited* is what the errors before it do to it. Everything after the bad layer inherits a lot, and only one
#    row has a bad own.

comparison = compare(exported, converted, data)
print(f"\n{comparison.text(3)}")
worst = comparison.worst(1)[0]
print(f"look at module {worst.module!r}: SQNR {worst.own:.1f} dB on exact inputs")

# ----------------------------------------------------------------------------------------------------------------------
# 3. What does it do to the outputs? One forward and one backward run for each batch estimate it for every layer: the
#    SQNR of the outputs if that layer alone were quantized. 30 dB is good, 10 dB is not.

effects = sensitivity(exported, converted, data)
print(f"\n{effects.text(3)}")

# ----------------------------------------------------------------------------------------------------------------------
# 4. And what is it worth? With a metric of your own, measured: all layers quantized but one. `resume="file.json"`
#    would let a long measurement go on after a break; `measured.plot()` draws the table.

measured = exact_sensitivity(exported, converted, mode="without", metric=accuracy)
print(f"\n{measured.text(3)}")

# ----------------------------------------------------------------------------------------------------------------------
# 5. Why? The module and the source line say where to look. One column of the weights is huge, so the steps of the
#    grid are, and all other weights become 0. The input of that column is always 0: nothing is lost without it.

weights = dict(model.named_modules())[worst.module.removesuffix("_norm")].weight.detach().abs().amax((0, 2, 3))
print(
    f"\nlargest weight of column 5: {weights[5]:.0f}, of all others: {torch.cat([weights[:5], weights[6:]]).max():.2f}"
)
mended = copy.deepcopy(model)
with torch.no_grad():
    mended.blocks[1].pointwise.weight[:, 5] = 0
again = torch.export.export(mended, (data[0],), dynamic_shapes=sizes)
print(f"accuracy of the mended net in int8: {accuracy(quantize(again)):.1%}")

# ----------------------------------------------------------------------------------------------------------------------
# 6. Nobody at hand who may change the weights? Give an accuracy budget, and let an integer program choose for each
#    layer between float and what the quantizer declares. The choice is a value: save it, edit it, apply it to a new
#    export.

found = mixed_precision(exported, data, XNNPACKQuantizer(config), budget=Budget(drop=0.01), metric=accuracy)
in_float = [layer for layer, name in found.precisions.formats.items() if name == "float"]
print(f"\nmixed precision keeps {', '.join(in_float)} in float")
print(f"accuracy of mixed precision: {found.trials[0].value:.1%}")
