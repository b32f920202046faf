"""What the numeric debugger costs, and how well its estimate ranks layers.

    python -m benchmarks.debug [cost|memory|ranking|mixed ...]

cost:     seconds of compare() over those of the two forward runs, on a ResNet-18-shaped model; medians, run by turns
memory:   highest memory of compare() over that of one float forward, each in a process of its own, weights included
ranking:  Spearman's rank correlation of sensitivity() with exact_sensitivity(), on the digits network
mixed:    what mixed_precision() finds for the digits network, beside uniform formats and greedy search
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.memory import kilobytes
from benchmarks.models import resnet18
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.debug import compare, exact_sensitivity, sensitivity
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["cost", "memory", "ranking"]

TURNS = 7


def cost() -> dict[str, float]:
    """{'ratio', 'compare', 'forwards'} in seconds."""
    exported, converted, inputs = _resnet()
    exact = exported.module()

    def forwards() -> None:
        with torch.no_grad():
            exact(*inputs)
            converted(*inputs)

    taken: dict[str, list[float]] = {"forwards": [], "compare": []}
    for turn in range(TURNS + 1):
        for name, run in (("forwards", forwards), ("compare", lambda: compare(exported, converted, [inputs]))):
            start = time.process_time()
            run()
            if turn:  # the first one warms up
                taken[name].append(time.process_time() - start)
    found = {name: statistics.median(times) for name, times in taken.items()}
    return {"ratio": found["compare"] / found["forwards"], **found}


def memory() -> dict[str, float]:
    """{'ratio', 'compare', 'forward'}, the last two in units of the float weights."""
    found = {what: _total(what) for what in ("compare", "forward")}
    return {"ratio": found["compare"] / found["forward"], **found}


def _total(what: str) -> float:
    """Memory in units of the float weights, which are part of it, in a new process."""
    code = f"from benchmarks.debug import _here; _here({what!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _here(what: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    exported, converted, inputs = _resnet()
    exact = exported.module()
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: exact(*inputs),
        "compare": lambda: compare(exact, converted, [inputs]),
    }
    weights = sum(value.numel() * value.element_size() for value in exact.state_dict().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = kilobytes("VmRSS")
    with torch.no_grad():
        runs[what]()
    print(json.dumps(1 + (kilobytes("VmHWM") - before) * 1024 / weights))


def _resnet() -> tuple[ExportedProgram, GraphModule, tuple[Any, ...]]:
    made = resnet18()
    exported = made.export()
    return exported, _quantized(exported, made.inputs), made.inputs


def _quantized(exported: ExportedProgram, inputs: tuple[Any, ...]) -> GraphModule:
    quantizer = XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        prepared(*inputs)
    return convert_pt2e(prepared)


def ranking() -> float:
    """Spearman's rank correlation of the estimate with the measurement, over the layers of the digits network."""
    exported, images = _digits()
    converted = _quantized(exported, (images[:512],))
    data = [images[:256]]
    one = sensitivity(exported, converted, data).values()
    other = exact_sensitivity(exported, converted, data).values()
    stacked = torch.stack([_ranks([values[name] for name in one]) for values in (one, other)])
    return float(torch.corrcoef(stacked)[0, 1])


def _ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def _digits() -> tuple[ExportedProgram, torch.Tensor]:
    from demo.model import DigitsNet, load_images, train

    torch.manual_seed(0)
    learn, _ = load_images()
    model = DigitsNet(width=64)
    train(model, learn, epochs=4)
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(model, (learn.x[:8],), dynamic_shapes=({0: batch},)), learn.x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["cost", "memory", "ranking"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in parser.parse_args().what:
        print(name, {"cost": cost, "memory": memory, "ranking": ranking}[name]())


if __name__ == "__main__":
    main()
