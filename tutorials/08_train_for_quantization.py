"""Tutorial 8: training with rounding, where calibration is not enough: 8 bits beside 4, and how the net recovers.

Plots accuracy over epochs to a file where matplotlib is installed (the extra `plots`). Run it from anywhere, it takes
half a minute:

    python tutorials/08_train_for_quantization.py
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import QATSchedule, check_converted, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.quantizer import QuantizationConfig, with_learned_scales
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 0. The model and the data of tutorial 1: 8 x 8 images of digits.

torch.manual_seed(0)
torch.set_num_threads(1)  # layers this small lose more by sharing the work than they gain
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
learn, held_back = slice(0, 1200), slice(1200, None)

features = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
model = nn.Sequential(OrderedDict(features=features, head=nn.Linear(64, 10)))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, *hooks: object) -> None:
    """One epoch, as you would train any module; each hook is a schedule, whose step() follows the optimizer's."""
    module.train()
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images[batch]), labels[batch]).backward()
        optimizer.step()
        for hook in hooks:
            hook.step()
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module) -> float:
    return (module(images[held_back]).argmax(1) == labels[held_back]).double().mean().item() * 100


optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
for _ in range(8):
    train(model, optimizer)
in_float = accuracy(model)
print(f"accuracy of the float model      {in_float:.2f}%")

# ----------------------------------------------------------------------------------------------------------------------
# 1. Calibrate first. At 8 bits this net loses next to nothing, and training with rounding has nothing to win. At 4 bits
#    it has: 16 values for a whole activation, 15 for a weight. Bounds are all that says so; a backend that computes
#    with 4 bits has a configuration of its own.

exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2048)},))
steps, epochs = 19, 8  # steps of an epoch


def config(bits: int) -> QuantizationConfig:
    half = 2 ** (bits - 1)
    bounds = {"act_qmin": -half, "act_qmax": half - 1, "weight_qmin": 1 - half, "weight_qmax": half - 1}
    return get_symmetric_quantization_config(is_per_channel=True, **bounds)


def calibrate(bits: int) -> GraphModule:
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config(bits)))
    with torch.no_grad():
        for batch in images[learn][:256].split(64):
            prepared(batch)
    return prepared


calibrated = {bits: calibrate(bits) for bits in (8, 4)}
after_calibration = {bits: accuracy(convert_pt2e(prepared)) for bits, prepared in calibrated.items()}
for bits, percent in after_calibration.items():
    print(f"accuracy of {bits} bits, calibrated   {percent:.2f}%")

# ----------------------------------------------------------------------------------------------------------------------
# 2. Train with rounding. Three things make it work:
#    - it starts where calibration ended (calibration=...), not from ranges that the first batches happen to have;
#    - with_learned_scales makes parameters of the scales, so that ranges are trained like the weights (LSQ+);
#    - towards the end, what the integers depend on stands still: first the statistics of batch norms, then the ranges.
#    The rate is a fifth of that of the float training, and falls. The loop is the same as before.


def train_with_rounding(bits: int) -> tuple[GraphModule, list[float]]:
    """The prepared model, trained, and its accuracy before training and after every epoch."""
    quantizer = XNNPACKQuantizer().set_global(with_learned_scales(config(bits)))
    prepared = prepare_qat_pt2e(exported, quantizer, calibration=calibrated[bits])
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=0.001)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps * epochs)
    schedule = QATSchedule(prepared, freeze_norms_at=steps * 4, freeze_ranges_at=steps * 7)
    curve = [accuracy(prepared.eval())]
    for _ in range(epochs):
        train(prepared, optimizer, rate, schedule)
        curve.append(accuracy(prepared))
    return prepared, curve


trained, curves = {}, {}
for bits in (8, 4):
    trained[bits], curves[bits] = train_with_rounding(bits)

# ----------------------------------------------------------------------------------------------------------------------
# 3. Convert. What was trained is what runs: check_converted compares the two at each rounding, and raises where they
#    are more than one step apart.

for bits, prepared in trained.items():
    converted = convert_pt2e(prepared)
    parity = check_converted(prepared, converted, images[held_back].split(199))
    print(f"accuracy of {bits} bits, trained      {accuracy(converted):.2f}%")
    print(
        f"largest difference of {bits} bits from what was trained: {max(parity.steps):.2f} steps of the output's grid"
    )

# ----------------------------------------------------------------------------------------------------------------------
# 4. The plot: each curve begins at the accuracy of calibration.

if importlib.util.find_spec("matplotlib") is None:
    print("no plot: matplotlib is not installed (pip install matplotlib, or the extra `plots`)")
else:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(in_float, color="gray", linestyle=":", label="float")
    for bits, curve in curves.items():
        (line,) = axes.plot(curve, marker="o", label=f"{bits} bits, trained with rounding")
        axes.axhline(after_calibration[bits], color=line.get_color(), linestyle="--", label=f"{bits} bits, calibrated")
    axes.set(xlabel="epochs with rounding", ylabel="accuracy on held-back images (%)")
    axes.legend()
    plot = Path(tempfile.gettempdir()) / "train_for_quantization.png"
    figure.savefig(plot)
    print(f"plot: {plot}")

# Next: docs/qat.md says when training pays, what to freeze when, and how to distil from the float model.
