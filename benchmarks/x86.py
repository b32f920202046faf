"""Speed on x86 with SQNR beside it: our int8 through Inductor, XNNPACK and ONNX; torchao, onnxruntime, OpenVINO.

    python -m benchmarks.x86 [--models resnet18,mlp] [--batches 1,16] [--columns float,ours,aoti] [--threads 2]

One run, all columns on the same weights, calibration data and inputs; medians of runs that take turns. SQNR is against
eager fp32 on inputs that calibration did not see; a speed without one does not count. torchao, onnxruntime and OpenVINO
are needed for their columns alone: without them the column says so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import BenchmarkModel, bert, mlp, mobilenet_v2, mobilenet_v3, resnet18, resnet50, vit
from benchmarks.turns import TIMED, take_turns
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import InductorProgram, lower_to_inductor
from pt2e_quant.lowering.onnx import lower_to_onnx
from pt2e_quant.sqnr import sqnr
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

MODELS: dict[str, Callable[[], BenchmarkModel]] = {
    "resnet18": resnet18, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2, "mobilenet_v3": mobilenet_v3, "mlp": mlp,
    "bert_base": bert, "vit_b_16": vit,
}  # fmt: skip
CALIBRATION_BATCHES = 4
Runnable = Callable[..., Any]


class Skipped(Exception):
    """Why a column has no number."""


@dataclass(frozen=True)
class Task:
    """A model with a batch: inputs to time, and others to calibrate with."""

    model: BenchmarkModel
    inputs: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]

    def export(self, strict: bool = False) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(self.model.module, self.inputs, strict=strict)


def task(model: BenchmarkModel, batch: int) -> Task:
    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn((batch, *x.shape[1:]), generator=generator)
            if x.is_floating_point()
            else torch.randint(0, 30000, (batch, *x.shape[1:]), generator=generator)
            for x in model.inputs
        )

    return Task(model, draw(0), [draw(seed) for seed in range(1, CALIBRATION_BATCHES + 1)])


# Columns: each makes something to call --------------------------------------------------------------------------------


def eager(job: Task) -> Runnable:
    return job.model.module


def inductor_float(job: Task) -> Runnable:
    return lower_to_inductor(job.export())


def quantized(job: Task, quantizer: Any) -> torch.fx.GraphModule:
    prepared = prepare_pt2e(job.export(), quantizer)
    with torch.no_grad():
        for inputs in job.calibration:
            prepared(*inputs)
    return convert_pt2e(prepared)


def ours(job: Task) -> InductorProgram:
    config = get_default_x86_inductor_quantization_config(is_dynamic=job.model.dynamic)
    return lower_to_inductor(quantized(job, X86InductorQuantizer().set_global(config)))


def ours_aoti(job: Task) -> InductorProgram:
    config = get_default_x86_inductor_quantization_config(is_dynamic=job.model.dynamic)
    return lower_to_inductor(quantized(job, X86InductorQuantizer().set_global(config)), mode="aoti")


def ours_tuned(job: Task) -> InductorProgram:
    config = get_default_x86_inductor_quantization_config(is_dynamic=job.model.dynamic)
    return lower_to_inductor(quantized(job, X86InductorQuantizer().set_global(config)), mode="aoti", autotune=True)


def ours_xnnpack(job: Task) -> Runnable:
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=job.model.dynamic)
    program = lower_to_executorch(quantized(job, XNNPACKQuantizer().set_global(config)))
    return lambda *inputs: program.run(*inputs)[0]


def ours_onnx(job: Task) -> Runnable:
    config = get_onnx_runtime_quantization_config(is_dynamic=job.model.dynamic)
    program = lower_to_onnx(quantized(job, OnnxRuntimeQuantizer().set_global(config)))
    return run_onnx(program.model)


def torchao(job: Task) -> Runnable:
    try:
        from torchao.quantization.pt2e import quantize_pt2e as peer
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as xiq
    except ImportError as error:
        raise Skipped(f"not installed ({error})") from error
    config = xiq.get_default_x86_inductor_quantization_config(is_dynamic=job.model.dynamic)
    quantizer = xiq.X86InductorQuantizer().set_global(config)
    prepared = peer.prepare_pt2e(
        job.export(strict=True).module(), quantizer
    )  # it crashes on, or skips, non-strict ones
    with torch.no_grad():
        for inputs in job.calibration:
            prepared(*inputs)
    converted = peer.convert_pt2e(prepared)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(converted)
        compiled(*job.inputs)
    return compiled


def _onnx(job: Task, folder: str) -> Path:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Skipped(f"not installed ({error})") from error
    path = Path(folder) / "model.onnx"
    torch.onnx.export(job.model.module, job.inputs, str(path), dynamo=True, verbose=False)
    return path


def onnxruntime(job: Task) -> Runnable:
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise Skipped(f"not installed ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        path, made = _onnx(job, folder), Path(folder) / "int8.onnx"
        if job.model.dynamic:
            quantize_dynamic(path, made, per_channel=True, weight_type=QuantType.QInt8)
        else:
            onnxruntime_static(path, made, job.calibration)
        return run_onnx(made.read_bytes())


def onnxruntime_static(path: Path, made: Path, calibration: list[tuple[Tensor, ...]]) -> None:
    """onnxruntime's quantize_static from one file to another: QDQ, uint8 activations, int8 weights by channel."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [value.name for value in ort.InferenceSession(str(path)).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            inputs = next(self.left, None)
            return None if inputs is None else dict(zip(names, (x.numpy() for x in inputs), strict=True))

    quantize_static(
        str(path), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def run_onnx(content: bytes) -> Runnable:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(content, options)
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])

    return run


def openvino(job: Task) -> Runnable:
    try:
        import nncf
        import openvino as ov
    except ImportError as error:
        raise Skipped(f"not installed ({error})") from error
    converted = ov.convert_model(job.model.module, example_input=job.inputs[0] if len(job.inputs) == 1 else job.inputs)
    data = nncf.Dataset(job.calibration, lambda inputs: inputs[0].numpy() if len(inputs) == 1 else inputs)
    kind = nncf.ModelType.TRANSFORMER if job.model.dynamic else None
    small = nncf.quantize(converted, data, model_type=kind, subset_size=CALIBRATION_BATCHES)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = ov.compile_model(small, "CPU", options)
    return lambda *inputs: torch.from_numpy(request([x.numpy() for x in inputs])[0])


COLUMNS: dict[str, Callable[[Task], Runnable]] = {
    "eager": eager, "float": inductor_float, "ours": ours, "aoti": ours_aoti, "tuned": ours_tuned,
    "xnnpack": ours_xnnpack, "onnx": ours_onnx, "torchao": torchao, "onnxruntime": onnxruntime, "openvino": openvino,
}  # fmt: skip


# Measuring ------------------------------------------------------------------------------------------------------------


def build(job: Task, columns: list[str]) -> dict[str, Runnable]:
    """What to time; a column that cannot be made says why."""
    made: dict[str, Runnable] = {}
    for name in columns:
        try:
            with torch.no_grad():
                made[name] = COLUMNS[name](job)
        except Skipped as reason:
            print(f"  {name:12} {reason}")
        except Exception as error:  # noqa: BLE001  a peer that fails is a result
            print(f"  {name:12} failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    return made


def measure(job: Task, made: dict[str, Runnable], rounds: int) -> None:
    """A row for each column: wall and CPU milliseconds, relative speed, SQNR, and what became of the model.

    On a machine that others use too, the CPU time of all threads says more than the wall time.
    """
    with torch.no_grad():
        wanted = job.model.module(*job.inputs)
    timings = take_turns(made, [job.inputs] * rounds)
    for name, timing in timings.items():
        wall, cpu = timing.milliseconds()
        relative = f"{timings['float'].milliseconds()[0] / wall:6.2f}x" if "float" in timings else " " * 7
        program = made[name]
        remark = str(program) if isinstance(program, InductorProgram) and name != "float" else ""
        noise = sqnr(wanted, timing.answers[-1])
        print(f"  {name:12} {wall:9.2f} ms, {cpu:9.2f} ms of CPU {relative} {noise:7.1f} dB  {remark}")


# Quantizing -----------------------------------------------------------------------------------------------------------


def time_quantizing(job: Task, repeat: int) -> None:
    """Seconds of prepare and convert, ours beside torchao's, on the same strict export; data are not timed."""
    try:
        from torchao.quantization.pt2e import quantize_pt2e as peer
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as xiq
    except ImportError as error:
        print(f"  prepare and convert: torchao is not installed ({error})")
        return
    dynamic = job.model.dynamic
    exported = job.export(strict=True)
    ours_config = get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    peer_config = xiq.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    seconds: dict[str, list[float]] = {"ours": [], "torchao": []}
    for name in itertools.islice(itertools.cycle(seconds), 2 * repeat + 2):
        module = exported.module()
        start = time.perf_counter()
        prepared = (
            prepare_pt2e(module, X86InductorQuantizer().set_global(ours_config))
            if name == "ours"
            else peer.prepare_pt2e(module, xiq.X86InductorQuantizer().set_global(peer_config))
        )
        seconds[name].append(time.perf_counter() - start)
        with torch.no_grad():
            prepared(*job.calibration[0])
        start = time.perf_counter()
        _ = convert_pt2e(prepared) if name == "ours" else peer.convert_pt2e(prepared)
        seconds[name][-1] += time.perf_counter() - start
    mine, theirs = (statistics.median(values[1:]) * 1e3 for values in seconds.values())  # the first warms up
    print(f"  prepare and convert: {mine:.0f} ms, torchao {theirs:.0f} ms: {mine / theirs:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quantize", type=int, default=3, help="runs of prepare and convert")
    parser.add_argument("--threads", type=int, default=2)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # those of the peers
    print(f"x86: torch {torch.__version__}, {torch.get_num_threads()} threads; speed relative to 'float'")
    for name in arguments.models.split(","):
        model = MODELS[name]()
        for batch in map(int, arguments.batches.split(",")):
            print(f"\n{name}, batch {batch}: medians of {arguments.rounds} turns of {TIMED} runs")
            job = task(model, batch)
            measure(job, build(job, arguments.columns.split(",")), arguments.rounds)
        time_quantizing(task(model, 1), arguments.quantize)


if __name__ == "__main__":
    main()
