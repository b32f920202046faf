"""What algorithms bring on nets for handwritten digits, beside plain quantization and training with rounding.

    python -m benchmarks.accuracy [--nets plain,depthwise,vit] [--formats W8A8,W4A8,W4A4] [--seeds 3] [--qat-epochs 10]

For each net and seed (`accuracy_nets` trains them once) the float net is quantized by XNNPACK's rules with one scale a
channel, calibrated on 8 batches of 32 images, and each algorithm runs alone on what came out. Numbers are percent of
597 held-back images, one of which is 0.17 points, of the converted graph. "recovered" is the part of what plain
quantization (PTQ) loses over all seeds that a column takes back. QAT is the recipe that docs/qat.md recommends.

Exits with 1 when the advisor recovers less than 70 % at W4A8. `benchmarks.accuracy_peers` has other projects beside
ours.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.accuracy_nets import NETS, trained
from benchmarks.qat_accuracy import RECIPES, RECOMMENDED, accuracy
from demo.model import Images, load_images, steps_of, train
from pt2e_quant import QATSchedule, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.algorithms import (
    adaround,
    choose_ranges,
    correct_bias,
    equalize,
    reconstruct_blocks,
    smooth_quant,
    suggest,
)
from pt2e_quant.quantizer import QuantizationConfig
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
Data = list[tuple[Tensor]]
Model = ExportedProgram | GraphModule

ON_FLOAT: dict[str, Callable[[ExportedProgram, Data], GraphModule]] = {
    "equalize": lambda program, data: equalize(program)[0],
    "smooth_quant": lambda program, data: smooth_quant(program, data)[0],
}
ON_PREPARED: dict[str, Callable[[GraphModule, Data], GraphModule]] = {
    "bias": lambda prepared, data: correct_bias(prepared, data)[0],
    "ranges": lambda prepared, data: choose_ranges(prepared, data)[0],
    "adaround": lambda prepared, data: adaround(prepared, data)[0],
    "BRECQ": lambda prepared, data: reconstruct_blocks(prepared, data, drop=0.0)[0],
    "QDrop": lambda prepared, data: reconstruct_blocks(prepared, data)[0],
}
COLUMNS = ("float", "PTQ", *ON_FLOAT, *ON_PREPARED, "advisor", "QAT")


def config(weight_bits: int, bits: int) -> QuantizationConfig:
    """XNNPACK's, with one weight scale a channel, in the integers of so many bits."""
    half, weight_half = 2 ** (bits - 1), 2 ** (weight_bits - 1)
    bounds = {"act_qmin": -half, "act_qmax": half - 1, "weight_qmin": 1 - weight_half, "weight_qmax": weight_half - 1}
    return get_symmetric_quantization_config(is_per_channel=True, **bounds)


def calibrated(model: Model, quantizer: object, data: Data) -> GraphModule:
    """The model prepared, with the ranges of the data."""
    prepared = prepare_pt2e(model, quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(*batch)
    return prepared


def trained_on(program: ExportedProgram, form: tuple[int, int], start: GraphModule, epochs: int) -> GraphModule:
    """The prepared model after training with rounding; half-way, batch norms keep their statistics."""
    learn, _ = load_images()
    quantizer = XNNPACKQuantizer().set_global(RECIPES[RECOMMENDED].configure(config(*form)))
    prepared = prepare_qat_pt2e(program, quantizer, calibration=start)
    steps = steps_of(learn, epochs)
    has_norms = any("batch_norm" in str(node.target) for node in prepared.graph.nodes)
    schedule = QATSchedule(
        prepared, freeze_norms_at=steps // 2 if has_norms else None, freeze_ranges_at=steps * 9 // 10
    )
    train(prepared.train(), learn, epochs, lr=3e-4, after_step=schedule.step)
    return prepared


def row(net: str, seed: int, form: tuple[int, int], epochs: int, data: Data, held: Images) -> dict[str, float]:
    """Percent of the held-back images, by column."""
    model, program = trained(net, seed)
    quantizer = XNNPACKQuantizer().set_global(config(*form))
    plain = calibrated(program, quantizer, data)
    made: dict[str, Callable[[], GraphModule]] = {"PTQ": lambda: plain}
    for name, change in ON_FLOAT.items():
        made[name] = lambda change=change: calibrated(change(program, data), quantizer, data)
    for name, improve in ON_PREPARED.items():
        made[name] = partial(improve, plain, data)
    made["advisor"] = lambda: suggest(program, quantizer, data).apply(seconds=600).prepared
    made["QAT"] = lambda: trained_on(program, form, plain, epochs)
    torch.manual_seed(seed)
    return {
        "float": accuracy(model, held),
        **{name: accuracy(convert_pt2e(make()), held) for name, make in made.items()},
    }


def recovered(rows: list[dict[str, float]], column: str) -> float:
    """Part of what PTQ loses, over all seeds, that a column takes back; NaN where PTQ loses nothing."""
    lost = mean(one["float"] - one["PTQ"] for one in rows)
    return mean(one[column] - one["PTQ"] for one in rows) / lost if lost > 0 else float("nan")


def line(*cells: object) -> str:
    return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def main() -> int:
    """Print the tables; 1 when the advisor recovers too little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--formats", default=",".join(BITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--qat-epochs", type=int, default=10)
    options = parser.parse_known_args()[0]  # python -m benchmarks hands the same arguments to all
    torch.set_num_threads(1)  # layers this small lose more by sharing the work than they gain
    learn, held = load_images()
    data: Data = [(batch,) for batch in learn.x[:256].split(32)]
    nets = options.nets.split(",")
    print(line("net", "format", "seed", *COLUMNS), f"|---|---|---:|{'---:|' * len(COLUMNS)}", sep="\n", flush=True)
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for net in nets:
        for form in options.formats.split(","):
            for seed in range(options.seeds):
                one = row(net, seed, BITS[form], options.qat_epochs, data, held)
                found[net, form].append(one)
                print(line(net, form, seed, *one.values()), flush=True)
            shares = [recovered(found[net, form], column) for column in COLUMNS[2:]]
            print(line(net, form, "recovered", "", "", *(f"{share:.0%}" for share in shares)), flush=True)
    short = [net for (net, form), rows in found.items() if form == "W4A8" and recovered(rows, "advisor") < 0.7]
    print(*(f"{net}: the advisor recovers less than 70 % at W4A8" for net in short), sep="\n")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
