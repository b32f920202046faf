"""FX mode beside torch.ao's: CPU time to prepare and convert a ResNet-18 of torch.nn, and to run the result.

python -m benchmarks.fx

Medians of several rounds in which both take turns, one thread; a checkpoint of torch.ao's is loaded, so that the
results are compared step by step.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as torch_ao
from torch.ao.quantization import quantize_fx as torch_fx

from pt2e_quant.qconfig_mapping import get_default_qconfig_mapping
from pt2e_quant.quantize_fx import convert_fx, prepare_fx

__all__ = ["main"]

ROUNDS = 5


def conv_bn(into: int, out: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out))


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a short cut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second, self.relu = conv_bn(into, out, 3, stride), conv_bn(out, out, 3, 1), nn.ReLU()
        self.short = conv_bn(into, out, 1, stride) if stride > 1 or into != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.first(x)))
        return self.relu(y + (x if self.short is None else self.short(x)))


class ResNet18(nn.Module):
    """ResNet-18 in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.pool = conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        widths, strides = [64, 64, 64, 128, 128, 256, 256, 512, 512], [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nn.Sequential(*map(Block, widths, widths[1:], strides))
        self.mean, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mean(self.blocks(self.pool(self.relu(self.stem(x)))))
        return self.last(torch.flatten(x, 1))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what a call returns, its CPU time in milliseconds)."""
    start = time.process_time()
    made = call()
    return made, (time.process_time() - start) * 1e3


def sides(model: nn.Module) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]]:
    """How each prepares and converts; both get a copy, as torch.ao changes what it is given."""
    mappings = torch_ao.get_default_qconfig_mapping("x86"), get_default_qconfig_mapping("x86")
    return {
        "torch.ao": (lambda x: torch_fx.prepare_fx(copy.deepcopy(model), mappings[0], (x,)), torch_fx.convert_fx),
        "ours": (lambda x: prepare_fx(model, mappings[1], (x,)), convert_fx),
    }


def main() -> None:
    warnings.simplefilter("ignore")  # torch's FX mode is deprecated
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "x86"
    torch.manual_seed(0)
    model, image = ResNet18().eval(), torch.randn(1, 3, 224, 224)
    times: dict[str, list[list[float]]] = {"torch.ao": [], "ours": []}
    converted = {}
    for _ in range(ROUNDS):
        for side, (prepare, convert) in sides(model).items():
            prepared, preparing = timed(lambda prepare=prepare: prepare(image))
            prepared(image)
            converted[side], converting = timed(lambda convert=convert, prepared=prepared: convert(prepared))
            times[side].append([preparing, converting])
    converted["ours"].load_state_dict(converted["torch.ao"].state_dict())
    with torch.no_grad():
        running = {
            side: [timed(lambda one=one: one(image))[1] for _ in range(4 * ROUNDS)] for side, one in converted.items()
        }
        apart = (converted["ours"](image) - converted["torch.ao"](image)).abs().max()
    print("| what | torch.ao, ms | ours, ms | ratio |\n|---|---|---|---|")
    rows = {name: [[one[n] for one in times[side]] for side in times] for n, name in enumerate(("prepare", "convert"))}
    rows["run"] = [running[side] for side in times]
    for name, (theirs, ours) in rows.items():
        medians = statistics.median(theirs), statistics.median(ours)
        print(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {medians[1] / medians[0]:.2f} |")
    print(f"\nlargest difference with one checkpoint: {apart:.3g}")


if __name__ == "__main__":
    main()
