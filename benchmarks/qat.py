"""What training with rounding costs: against torchao with ExecuTorch's XNNPACKQuantizer, and against training in float.

    python -m benchmarks.qat [--models resnet18,mobilenet_v2] [--batch 16] [--repeat 5] [--skip-compile]

Prepare and convert: seconds of `prepare_qat_pt2e` and `convert_pt2e`, of a model exported in training mode. Step:
forward, backward and SGD with momentum, of the exported module in float, of ours and of the peer's, taken in turns;
medians. Both in CPU time. Memory: the highest resident set while steps run, weights included, in a process of its own
for each; Linux only. Compile: all three through torch.compile, with the graphs that it makes, and a step beside eager.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import kilobytes
from benchmarks.models import BenchmarkModel, mobilenet_v2, resnet18
from pt2e_quant import convert_pt2e, prepare_qat_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["MODELS", "PREPARE", "compare", "compiled", "memory"]

MODELS = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}


def ours(exported: Any) -> nn.Module:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    return prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))


def peers(exported: Any) -> nn.Module:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer
    from torchao.quantization.pt2e import quantize_pt2e

    config = peer.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    return quantize_pt2e.prepare_qat_pt2e(exported.module(), peer.XNNPACKQuantizer().set_global(config))


def peers_convert(prepared: Any) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval, quantize_pt2e

    return quantize_pt2e.convert_pt2e(move_exported_model_to_eval(prepared))


PREPARE: dict[str, Callable[[Any], nn.Module]] = {"float": lambda e: e.module(), "ours": ours, "peer": peers}
CONVERT: dict[str, Callable[[Any], nn.Module]] = {"ours": convert_pt2e, "peer": peers_convert}


def trained(name: str, batch: int) -> BenchmarkModel:
    model = MODELS[name]()
    shape = (batch, *model.inputs[0].shape[1:])
    return replace(model, module=model.module.train(), inputs=(torch.randn(shape),))


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Of CPU: others use this machine too."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


class Loop:
    """Steps of SGD towards an output of ones."""

    def __init__(self, model: nn.Module, compiled: bool = False) -> None:
        self.model = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (self.model(x) - 1).square().mean().backward()
        self.optimizer.step()


def medians(loops: dict[str, Loop], x: Tensor, repeat: int) -> dict[str, float]:
    """Seconds of a step of each, in turns; two steps each come before."""
    runs: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeat + 2):
        for name, loop in loops.items():
            runs[name].append(seconds(lambda loop=loop: loop.step(x))[0])
    return {name: statistics.median(values[2:]) for name, values in runs.items()}


def compare(name: str, batch: int, repeat: int) -> dict[str, float]:
    """Ratios: 'engine' of prepare and convert to the peer's, 'step' and 'peer step' to a step in float."""
    model = trained(name, batch)
    exported = torch.export.export(model.module, model.inputs)
    engine: dict[str, tuple[float, float]] = {}
    loops = {"float": Loop(PREPARE["float"](exported))}
    for who, convert in CONVERT.items():
        for _ in range(2 if who == "ours" else 1):  # the first is a warm-up, and the peer's takes long without
            prepare, prepared = seconds(lambda who=who: PREPARE[who](exported))
            loops[who] = Loop(prepared)
            loops[who].step(*model.inputs)
            engine[who] = prepare, seconds(lambda c=convert, p=prepared: c(p))[0]
        if who == "peer":  # it converts in place
            loops[who] = Loop(PREPARE[who](exported))
    print(f"\n{name}, batch of {batch}: {len(exported.graph.nodes)} nodes")
    for who, (prepare, convert) in engine.items():
        print(f"  {who:6} prepare {prepare * 1e3:9.1f} ms   convert {convert * 1e3:9.1f} ms")
    steps = medians(loops, model.inputs[0], repeat)
    for who, value in steps.items():
        print(f"  {who:6} step {value * 1e3:9.1f} ms   {value / steps['float']:.2f}x of float")
    ratio = sum(engine["ours"]) / sum(engine["peer"])
    print(f"  prepare and convert: {ratio:.4f}x of the peer's")
    return {"engine": ratio, "step": steps["ours"] / steps["float"], "peer step": steps["peer"] / steps["float"]}


def memory(name: str, batch: int) -> dict[str, float]:
    """Highest memory of training steps in megabytes, weights included: of 'float', 'ours' and 'peer'."""
    found = {}
    for who in PREPARE:
        code = f"from benchmarks.qat import _here; _here({name!r}, {who!r}, {batch})"
        folder = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
        found[who] = float(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {who:6} memory of a step {found[who]:7.0f} MB   {found[who] / found['float']:.2f}x of float")
    return found


def _here(name: str, who: str, batch: int) -> None:
    warnings.simplefilter("ignore")
    model = trained(name, batch)
    loop = Loop(PREPARE[who](torch.export.export(model.module, model.inputs)))
    weights = sum(value.numel() * value.element_size() for value in loop.model.state_dict().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = kilobytes("VmRSS")
    for _ in range(3):
        loop.step(*model.inputs)
    print(json.dumps((weights + (kilobytes("VmHWM") - before) * 1024) / 1e6))


def compiled(name: str, batch: int, repeat: int) -> dict[str, dict[str, float]]:
    """Of 'float', 'ours' and 'peer', where they compile: 'graphs' and 'breaks' of torch.compile, 'step' beside eager,
    and how many graphs came 'later' than the second step."""
    model = trained(name, batch)
    exported = torch.export.export(model.module, model.inputs)
    found = {}
    for who in PREPARE:
        try:
            found[who] = _compiled(who, exported, model.inputs[0], repeat)
        except AssertionError as failure:  # the peer's: its fused operator has another size on fake tensors
            print(f"  {who:6} does not compile: {str(failure).partition(chr(10))[0]}")
    return found


def _compiled(who: str, exported: Any, x: Tensor, repeat: int) -> dict[str, float]:
    from torch._dynamo.utils import counters

    loops = {"eager": Loop(PREPARE[who](exported)), "compiled": Loop(PREPARE[who](exported), compiled=True)}
    counters.clear()
    for _ in range(2):
        loops["compiled"].step(x)
    early = counters["stats"]["unique_graphs"]
    steps = medians(loops, x, repeat)
    later = counters["stats"]["unique_graphs"] - early
    breaks = sum(counters["graph_break"].values())
    ratio = steps["compiled"] / steps["eager"]
    print(f"  {who:6} compiled: {early} graphs, {breaks} breaks, {later} more from step 3 on; {ratio:.2f}x of eager")
    return {"graphs": early, "breaks": breaks, "later": later, "step": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--skip-compile", action="store_true")
    arguments = parser.parse_known_args()[0]  # python -m benchmarks hands the same arguments to all
    warnings.simplefilter("ignore")  # those of the peer
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in filter(MODELS.__contains__, arguments.models.split(",")):
        compare(name, arguments.batch, arguments.repeat)
        memory(name, arguments.batch)
        if not arguments.skip_compile:
            compiled(name, arguments.batch, arguments.repeat)


if __name__ == "__main__":
    main()
