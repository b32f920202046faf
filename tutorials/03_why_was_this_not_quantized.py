"""Tutorial 3: why was this op not quantized, and what did sharing a scale cost? How to ask, and what to do about it.

Nothing is silent here: every float op of a model is either quantized, by a rule that has a name, or left alone for a
reason that can be printed. This tutorial starts from a model in which half of the ops stay in float, and asks until
every one of them is explained.

Run it from anywhere, it takes a few seconds:    python tutorials/03_why_was_this_not_quantized.py
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from pt2e_quant import Report, explain, prepare_pt2e
from pt2e_quant.errors import CoverageError, TargetingError
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 1. A model with a bit of everything: batch norms, a transposed convolution in groups, a write into the memory of
#    another tensor, a quiet and a loud branch that are concatenated, an op without an integer kernel.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.quiet = nn.Conv2d(8, 8, 1)
        self.loud = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.quiet(x), 20 * self.loud(x)], 1)
        x = torch.sin(self.up(x)).mean((2, 3))
        before = x[:, :4]
        x.mul_(0.5)  # writes to the memory of `before` as well
        return self.head(x) + before


torch.manual_seed(0)
model = Net().eval()
batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
with torch.no_grad():
    exported = torch.export.export(model, (batches[0],))

config = get_symmetric_quantization_config(is_per_channel=True)
prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))

# ----------------------------------------------------------------------------------------------------------------------
# 2. Count. The report is there as soon as the model is prepared, before any data ran. Each op that was skipped has a
#    reason in words and a *code*, so that scripts can count.

report = explain(prepared)
print(f"{len(report.quantized)} ops quantized, {len(report.skipped)} left in float")
for code, count in Counter(skipped.code for skipped in report.skipped).most_common():
    print(f"  {count} x {code}")

# ----------------------------------------------------------------------------------------------------------------------
# 3. Ask for one op, by the name of its node; or for all that is inside a module, by the name of the module. The answer
#    has the source line, every reason that a rule gave for refusing, and the way out.

for name in ("sin", "mul_", "up"):
    print(f"\nwhy {name!r}?\n{report.why(name)}")

#    A batch norm has no kernel of its own: it was folded into the convolution before it. Ask, and the report says where
#    it went. Selecting it, to keep it in float, is an error that says the same.
print(f"\nwhy 'stem.1'?\n{report.why('stem.1')}")
try:
    prepare_pt2e(exported, XNNPACKQuantizer().set_global(config).set_module_name("stem.1", None))
except TargetingError as error:
    print(f"{type(error).__name__}: {error}")

# ----------------------------------------------------------------------------------------------------------------------
# 4. Demand instead of asking. `require` names what must be quantized: families of ops, modules, nodes. What is missing
#    is an error with the reasons, at prepare, and not a slow model in production.

prepare_pt2e(exported, XNNPACKQuantizer().set_global(config), require=["linear", "stem", "cat"])
try:
    prepare_pt2e(exported, XNNPACKQuantizer().set_global(config), require=["linear", "mean*"])
except CoverageError as error:
    print(f"\n{type(error).__name__}: {error}")

# ----------------------------------------------------------------------------------------------------------------------
# 5. Ask how, too. `cat` can only move integers, so all that goes in and comes out has one scale, and the loud branch
#    decides it. How many bits does that cost the quiet one? Give the calibration data to `explain` once more: it runs
#    them without observers and compares the range of each single tensor with the range that they share.

for batch in batches:
    prepared(batch)
report = explain(prepared, batches)
print(f"\nwhy 'cat'?\n{report.why('cat')}")

#    Almost five bits of eight are gone. What helps: bring the branches to one scale before they meet (here, multiply by
#    20 after the cat), or keep the cat in float, which is one more selector:
quantizer = XNNPACKQuantizer().set_global(config).set_operator_type(torch.ops.aten.cat, None)
other = prepare_pt2e(exported, quantizer)
for batch in batches:
    other(batch)
print(explain(other, batches).why("quiet"))

# ----------------------------------------------------------------------------------------------------------------------
# 6. Keep it. A report is a value: text for people, JSON for scripts (`pt2e-quant explain report.json cat` on a command
#    line), a page for a browser (with the extra `report`), and node data for Google's Model Explorer, which colours the
#    graph of the float model with it: `pip install ai-edge-model-explorer`, `model-explorer model.pt2`, then load the
#    file as node data.
#    What sharing a scale costs stands in the report of step 5, which measured it on the prepared model.

with tempfile.TemporaryDirectory() as folder:
    torch.export.save(exported, Path(folder) / "model.pt2")
    text, data, explorer, page = report.save(Path(folder) / "report")
    print(Report.load(data).why("cat").count("lost"), "costs of cat in the file")  # what was measured is kept
    colours = json.loads(explorer.read_text())["graph"]["results"]
    print(f"{page.name} opens in a browser, {page.stat().st_size / 1e6:.1f} MB")
    print(f"\n{explorer.name}: {len(colours)} nodes, for example sin: {colours['sin']}")

# Next: docstrings of pt2e_quant.report. The same questions about a file that was lowered: program.undelegated.
