"""Tutorial 4: the same model on an x86 server, through Inductor: in this process, and as a package for another one.

Run it from anywhere; compiling takes a minute the first time:    python tutorials/04_quantize_for_x86.py
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_int4_weight_only_quantization_config,
)

# ----------------------------------------------------------------------------------------------------------------------
# 0. A model and data: 8 x 8 images of digits, with a residual block, as servers like them.


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)  # used twice, which is no problem here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm2(self.second(self.relu(self.norm(self.first(x))))) + x)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
learn, held_back = slice(0, 1200), slice(1200, None)
features = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), Block(32),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
model = nn.Sequential(OrderedDict(features=features, head=nn.Linear(32, 10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
for _ in range(8):
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()

# ----------------------------------------------------------------------------------------------------------------------
# 1. The job is that of tutorial 1 with another quantizer and another lowering. The batch stays free, as servers need.

batch = torch.export.Dim("batch", min=1, max=1024)
exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
prepared = prepare_pt2e(exported, quantizer)
with torch.no_grad():
    for part in images[learn][:256].split(64):
        prepared(part)
converted = convert_pt2e(prepared)
program = lower_to_inductor(converted)

# ----------------------------------------------------------------------------------------------------------------------
# 2. What became of each operator. The names are those of the graph; `sum` says that the residual is added inside the
#    convolution's kernel, `quantize` that the kernel's output is uint8. If a quantized operator had become a float
#    kernel, lower_to_inductor would have raised: a fallback is never silent, and never slower without a word.

print(program.text())

# ----------------------------------------------------------------------------------------------------------------------
# 3. Where integers end. Unlike XNNPACK, oneDNN's kernels may end in float, so an output becomes integers only where
#    something reads integers: the head's output stays float, which costs nothing and keeps its precision.

print(explain(converted).why("head"))

# ----------------------------------------------------------------------------------------------------------------------
# 4. The same ahead of time: a package that any process loads with torch alone, by torch._inductor.aoti_load_package.

with tempfile.TemporaryDirectory() as folder:
    package = lower_to_inductor(converted, mode="aoti")
    file = package.save(Path(folder) / "digits.pt2")
    loaded = torch._inductor.aoti_load_package(str(file))
    with torch.no_grad():
        answers = {
            "float model": model(images[held_back]),
            "converted graph": converted(images[held_back]),
            "program": program(images[held_back]),
            "package": loaded(images[held_back]),
        }
for name, answer in answers.items():
    print(f"accuracy of the {name:<16} {(answer.argmax(1) == labels[held_back]).double().mean().item():.2%}")

# ----------------------------------------------------------------------------------------------------------------------
# 5. What Inductor cannot run rightly is refused, before it is compiled. A transposed convolution, for one: Inductor's
#    pattern takes it for an ordinary one. The quantizer leaves it in float and says why.

upscale = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3))
exported = torch.export.export(upscale.eval(), (images[:2],))
quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
print(explain(prepare_pt2e(exported, quantizer)).why("conv_transpose2d"))

# ----------------------------------------------------------------------------------------------------------------------
# 6. Linear layers alone can do with less: no calibration. is_dynamic computes the range of their input while running.

head = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)).eval()
config = get_default_x86_inductor_quantization_config(is_dynamic=True)
prepared = prepare_pt2e(torch.export.export(head, (torch.randn(4, 32),)), X86InductorQuantizer().set_global(config))
print(explain(convert_pt2e(prepared)).text())

# ----------------------------------------------------------------------------------------------------------------------
# 7. Weights alone, in 8 or 4 bits, keep activations in float and need no data. In bfloat16 models torch has kernels for
#    them, fastest for few rows at a time, as decoders have. In float32 they save memory only; the program says so.

config = get_x86_inductor_int4_weight_only_quantization_config(group_size=32)
exported = torch.export.export(head.bfloat16(), (torch.randn(4, 32, dtype=torch.bfloat16),))
print(explain(convert_pt2e(prepare_pt2e(exported, X86InductorQuantizer().set_global(config)))).text())

# Next: 02_write_a_quantizer, if your chip is neither of the two.
