"""Tutorial 1: from a PyTorch model to an int8 file that ExecuTorch runs, and how to read every step.

Run it from anywhere, it takes a few seconds:    python tutorials/01_quantize_for_executorch.py
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 0. A model and data. Any model that torch.export takes will do; this one learns 8 x 8 images of digits.

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
learn, held_back = slice(0, 1200), slice(1200, None)

features = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
model = nn.Sequential(OrderedDict(features=features, head=nn.Linear(64, 10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
for _ in range(8):
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()  # batch norm must use its running statistics from here on: export records the mode that it finds

# ----------------------------------------------------------------------------------------------------------------------
# 1. The whole job. Export gives a graph; the quantizer says which tensors become integers; prepare puts an observer on
#    each of them; data shows the observers what values occur; convert turns ranges into scales; lowering makes a file.

exported = torch.export.export(model, (images[:1],))  # one image at a time, as on a phone
quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
prepared = prepare_pt2e(exported, quantizer)
for image in images[learn][:128].split(1):  # calibrate on data like that of later use, never on the held-back images
    prepared(image)
converted = convert_pt2e(prepared)
program = lower_to_executorch(converted)

# ----------------------------------------------------------------------------------------------------------------------
# 2. Read the converted graph. It does NOT call integer kernels. Around every operator it looks like this:
#
#        x ── quantize ── dequantize ──┐
#                                    conv2d ── relu ── quantize ── dequantize ── ...
#        weight (int8) ─ dequantize ───┘
#
#    quantize rounds real numbers to integers, q = clamp(round(x / scale) + zero_point, qmin, qmax); dequantize gives
#    back the real number that q stands for, (q - zero_point) * scale; conv2d then computes in float32. So the graph is
#    a *description in floats* of what an integer kernel computes, and running it shows the accuracy you will get, on
#    any machine. A backend finds each `dequantize -> conv2d -> relu -> quantize` and puts one integer kernel there.
#    That is why a converted graph is no faster than the float one, and why seeing conv2d in it is right.

print(converted.code)

#    What is an integer already: the weights. The float copies are gone.
for name, tensor in converted.state_dict().items():
    print(f"{name:<24} {tensor.dtype!s:<14} {tuple(tensor.shape)}")

# ----------------------------------------------------------------------------------------------------------------------
# 3. Ask what happened to each operator: by which rule it was quantized and how, or why it stayed in floating point.

print(explain(converted).text())

# ----------------------------------------------------------------------------------------------------------------------
# 4. Ask the same of the file. `delegates` counts the parts that XNNPACK runs (one is best: values then stay integers
#    from the first operator to the last); `undelegated` lists every operator left outside, with the reason.

print(f"{program.delegates} delegate, {len(program.undelegated)} operators outside")
for left in program.undelegated:
    print(f"  {left.op} ({left.module}): {left.reason}")

# ----------------------------------------------------------------------------------------------------------------------
# 5. Trust, but verify: run the file on the held-back images, beside the float model and the converted graph.


def accuracy(run) -> float:
    """Share of the held-back images that `run` names correctly."""
    answers = torch.cat([run(image).argmax(1) for image in images[held_back].split(1)])
    return (answers == labels[held_back]).double().mean().item()


with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "digits.pte"
    program.save(file)
    print(f"{file.name}: {file.stat().st_size / 1024:.1f} KiB")
    print(f"accuracy of the float model     {accuracy(model):.2%}")
    print(f"accuracy of the converted graph {accuracy(converted):.2%}")
    print(f"accuracy of the file            {accuracy(lambda image: program.run(image)[0]):.2%}")

# ----------------------------------------------------------------------------------------------------------------------
# 6. Change one thing. The more specific choice wins (module name > module type > operator > global), None means float,
#    and a name that matches nothing is an error, not a silent miss. Here the linear at the end stays in floating point.

quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
quantizer.set_module_name("head", None)
prepared = prepare_pt2e(exported, quantizer)
for image in images[learn][:128].split(1):
    prepared(image)
print(explain(convert_pt2e(prepared)).text())

# Next: 02_write_a_quantizer, a backend of your own in under 40 lines.
