"""What 4 and 3 bits cost a small decoder, plainly and with algorithms: the table in docs/accuracy.md.

    python -m benchmarks.decoder_accuracy [--steps 1200]

The tiny Llama of `benchmarks.tiny_llama`, trained with a seed and kept for the next run. Algorithms see pages that it
was trained on; perplexity is of pages that neither it nor an algorithm ever saw. Graphs are exported without the cache.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.tiny_llama import Config, TinyLlama, pages, train
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import awq, clip_weights, gptq, rotate, smooth_quant
from pt2e_quant.quantizer import QuantizationConfig, Quantizer
from quantizers.decoder import get_decoder_quantizer
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config

__all__ = ["main"]

KEPT = Path("out/accuracy")
Data = list[tuple[Tensor]]
Algorithm = Callable[[ExportedProgram, Quantizer, Data], GraphModule]


def _clip_and_gptq(program: ExportedProgram, quantizer: Quantizer, data: Data) -> GraphModule:
    return gptq(clip_weights(prepare_pt2e(program, quantizer), data)[0], data)[0]


ALGORITHMS: dict[str, Algorithm] = {
    "nearest": lambda program, quantizer, data: prepare_pt2e(program, quantizer),
    "gptq": lambda program, quantizer, data: gptq(prepare_pt2e(program, quantizer), data)[0],
    "gptq, own weights": lambda program, quantizer, data: gptq(
        prepare_pt2e(program, quantizer), data, asymmetric=False
    )[0],
    "clip_weights": lambda program, quantizer, data: clip_weights(prepare_pt2e(program, quantizer), data)[0],
    "awq": lambda program, quantizer, data: prepare_pt2e(awq(program, quantizer, data)[0], quantizer),
    "clip_weights, gptq": _clip_and_gptq,
}
ON_FLOAT: dict[str, Callable[[ExportedProgram, Data], ExportedProgram | GraphModule]] = {
    "plain": lambda program, data: program,
    "smooth_quant": lambda program, data: smooth_quant(program, data)[0],
    "rotate": lambda program, data: rotate(program)[0],
    "rotate, online": lambda program, data: rotate(program, online=True)[0],
}
PLANTED = 30.0
"""How much larger than others three channels of each norm are made: large decoders have such, a tiny one does not."""


def trained(steps: int) -> TinyLlama:
    """The model with the weights of an earlier run, or trained now."""
    torch.manual_seed(0)
    model, path = TinyLlama(Config()), KEPT / f"tiny_llama_{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, pages()[0], steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def windows(text: Tensor, count: int, length: int, rows: int = 8) -> Data:
    """Batches of windows at equal distances."""
    starts = torch.arange(count * rows) * (len(text) // (count * rows))
    return [(text[chunk[:, None] + torch.arange(length)],) for chunk in starts.split(rows)]


@torch.no_grad()
def perplexity(model: GraphModule, data: Data) -> float:
    """exp of the mean negative log-likelihood of the bytes after the first one of each window."""
    losses = [F.cross_entropy(model(*one)[:, :-1].flatten(0, 1), one[0][:, 1:].flatten()) for one in data]
    return math.exp(float(torch.stack(losses).mean()))


def _of_bits(config: QuantizationConfig, bits: int) -> QuantizationConfig:
    return replace(config, weight=replace(config.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1))


def quantizers() -> Iterator[tuple[str, Quantizer]]:
    for size in (32, 128):
        yield f"4 bits, groups of {size}", XNNPACKQuantizer().set_global(get_8da4w_config(size))
        yield f"the same, table too ({size})", get_decoder_quantizer(size)
    yield "3 bits, groups of 32", XNNPACKQuantizer().set_global(_of_bits(get_8da4w_config(32), 3))


def activation_quantizers() -> Iterator[tuple[str, Quantizer]]:
    """Weights of 4 bits; activations of 8 and of 4."""
    four = {"weight_qmin": -7, "weight_qmax": 7}
    yield "W4A8, a scale a token", XNNPACKQuantizer().set_global(get_8da4w_config(32))
    for bits, low, high in ((8, -128, 127), (4, -8, 7)):
        for dynamic in (True, False):
            config = get_symmetric_quantization_config(True, dynamic, act_qmin=low, act_qmax=high, **four)
            name = "one scale at run time" if dynamic else "static"
            yield f"W4A{bits}, {name}", XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)


@torch.no_grad()
def with_planted(model: TinyLlama) -> TinyLlama:
    """The same function with outliers: three channels of each norm are large, and small in what reads them."""
    for block in model.blocks:
        attention = block.attention
        for norm, linears in (
            (block.before_attention, (attention.query, attention.key, attention.value)),
            (block.before_mlp, (block.gate, block.up)),
        ):
            norm.weight[[1, 17, 50]] *= PLANTED
            for linear in linears:
                linear.weight[:, [1, 17, 50]] /= PLANTED
    return model


def rotations(model: TinyLlama, data: Data, held_back: Data) -> None:
    """What float algorithms do for activations of few bits, without and with outliers."""
    for outliers in (False, True):
        program = _exported(with_planted(model) if outliers else model, data[0])
        exact = perplexity(program.module(), held_back)
        for name, quantizer in activation_quantizers():
            for algorithm, run in ON_FLOAT.items():
                prepared = prepare_pt2e(run(program, data), quantizer)
                with torch.no_grad():
                    for one in data:
                        prepared(*one)
                value = perplexity(convert_pt2e(prepared), held_back)
                where = "planted outliers" if outliers else "as trained"
                print(f"{where:17} {name:28} {algorithm:15} {value / exact - 1:+.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", nargs="*", choices=(*ALGORITHMS, "rotations"), help="these algorithms")
    arguments = parser.parse_args()
    model = trained(arguments.steps)
    training, test = pages()
    length = model.config.length
    data, held_back = windows(training, 16, length), windows(test, 12, length)
    program = _exported(model, data[0])
    exact = perplexity(program.module(), held_back)
    print(f"float, {arguments.steps} steps: perplexity {exact:.4f} on {len(held_back) * 8} windows")
    for name, quantizer in quantizers():
        for algorithm, run in ALGORITHMS.items():
            if arguments.only and algorithm not in arguments.only:
                continue
            start = time.perf_counter()
            found = run(program, quantizer, data)
            seconds = time.perf_counter() - start
            value = perplexity(convert_pt2e(found), held_back)
            print(f"{name:32} {algorithm:20} {value / exact - 1:+.2%}  {seconds:5.1f} s", flush=True)
    if not arguments.only or "rotations" in arguments.only:
        rotations(model, data, held_back)


def _exported(model: TinyLlama, example: tuple[Tensor]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, example)


if __name__ == "__main__":
    main()
