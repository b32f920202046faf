"""Tutorial 9: weights of 4 bits lose accuracy, and there is no time to train. What wins it back without labels?

A net for handwritten digits with depthwise convolutions is calibrated, then improved by one algorithm after the other,
the cheapest first; in the end the advisor (`suggest`) chooses alone. Plots the SQNR of each to a file where matplotlib
is installed (the extra `plots`). Run it from anywhere, it takes about 15 seconds:

    python tutorials/09_win_back_accuracy.py
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch.fx import GraphModule

from demo.model import DigitsNet, load_images, train
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import adaround, correct_bias, suggest
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 1. The model and the data of tutorial 7. Calibration sees images without their labels; accuracy and SQNR (the part of
#    the signal that is left, in dB) are measured on images that nothing below sees.

torch.manual_seed(0)
torch.set_num_threads(1)  # layers this small lose more by sharing the work than they gain
learn, held_back = load_images()
model = DigitsNet(width=24)
train(model, learn, epochs=12)

data = list(learn.x[:256].split(32))
shapes = ({0: torch.export.Dim("batch", min=1, max=2048)},)
exported = torch.export.export(model, (data[0],), dynamic_shapes=shapes)
with torch.no_grad():
    in_float = model(held_back.x)
sqnr: dict[str, float] = {}


def report(name: str, prepared: GraphModule) -> None:
    with torch.no_grad():
        outputs = convert_pt2e(prepared)(held_back.x)
    right = (outputs.argmax(1) == held_back.y).float().mean()
    sqnr[name] = float(10 * torch.log10(in_float.pow(2).mean() / (outputs - in_float).pow(2).mean()))
    print(f"SQNR of {name}: {sqnr[name]:.1f} dB")
    print(f"accuracy of {name}: {right:.2%}")


print(f"accuracy of the float net: {(in_float.argmax(1) == held_back.y).float().mean():.2%}")

# ----------------------------------------------------------------------------------------------------------------------
# 2. Calibrate plainly: 15 values for a weight, one scale for each channel, 256 values for an activation. Bounds are all
#    that says 4 bits; a backend that computes with them has a configuration of its own.

config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-7, weight_qmax=7)
quantizer = XNNPACKQuantizer().set_global(config)
prepared = prepare_pt2e(exported, quantizer)
with torch.no_grad():
    for batch in data:
        prepared(batch)
report("calibration alone", prepared)

# ----------------------------------------------------------------------------------------------------------------------
# 3. Seconds: the errors of rounded weights have a mean in each channel, and a bias takes it away. Free at run time.
#    `share` is the part of a layer's squared error that the means were.

corrected, corrections = correct_bias(prepared, data)
worst = max(corrections, key=lambda one: one.share)
print(f"\nmeans of channels were {worst.share:.0%} of the error of {worst.module}")
report("correct_bias", corrected)

# ----------------------------------------------------------------------------------------------------------------------
# 4. Longer: round each weight up or down for what its layer returns, instead of each to its nearest. Rounding for the
#    outputs takes their means away too: a correction behind it finds little, and may as well be left out.

rounded, _ = adaround(prepared, data)
report("adaround", rounded)
report("adaround and correct_bias", correct_bias(rounded, data)[0])

# ----------------------------------------------------------------------------------------------------------------------
# 5. Or ask. The advisor holds a part of the data back, says what would help where, and keeps the steps that bring what
#    it held back nearer to the float net. There it is never worse than plain quantization. It works on three quarters
#    of the data, so the same algorithms by hand, with all of it, can be a little better.

advice = suggest(exported, quantizer, data)
print(f"\nthe first of its {len(advice.suggestions)} suggestions:\n{advice.suggestions[0]}\n")
advised = advice.apply(seconds=60)
print("tried, SQNR on what was held back in dB:", *advised.tried, sep="\n")
report("the advisor", advised.prepared)

# ----------------------------------------------------------------------------------------------------------------------
# 6. The plot.

if importlib.util.find_spec("matplotlib") is None:
    print("no plot: matplotlib is not installed (pip install matplotlib, or the extra `plots`)")
else:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(list(sqnr), list(sqnr.values())), fmt="%.1f")
    axes.invert_yaxis()
    axes.set(xlabel="SQNR of the outputs (dB), weights of 4 bits")
    plot = Path(tempfile.gettempdir()) / "win_back_accuracy.png"
    figure.savefig(plot)
    print(f"plot: {plot}")

# Next: docs/accuracy.md has all algorithms, and what they bring to three nets; docs/qat.md says when training pays.
