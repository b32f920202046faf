"""The main job, end to end: train a small net on handwritten digits, quantize it, lower both the float and the integer
net to ExecuTorch, run both files on images that neither training nor calibration has seen, and compare.

Prints one table, the report of what was quantized and how, and whether each promise (`PROMISES`) was kept. Writes both
files, the table's numbers and the report into out/demo. Ends with a non-zero exit status when a promise is broken, so
that it serves as a test.

    make demo        or        python -m demo.digits --out out/demo --epochs 12
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule

from demo.model import DigitsNet, Images, load_images, train
from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.debug import compare
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["PROMISES", "Measured", "broken_promises", "main"]

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on the held-back images. Accuracies and shares lie in [0, 1], latencies are medians."""

    images: int
    accuracy_fp32: float
    accuracy_fp32_pte: float
    accuracy_converted: float
    accuracy_pte: float
    bytes_fp32_pte: int
    bytes_int8_pte: int
    microseconds_fp32_pte: float
    microseconds_int8_pte: float
    outputs_within_1_lsb: float
    largest_difference_lsb: int
    delegates: int
    undelegated: int

    @property
    def size_ratio(self) -> float:
        return self.bytes_int8_pte / self.bytes_fp32_pte


PROMISES: dict[str, Callable[[Measured], bool]] = {
    "the accuracy of the int8 .pte is within 0.5 points of fp32": lambda m: m.accuracy_pte >= m.accuracy_fp32 - 0.005,
    "the int8 .pte is at most 0.35 of the fp32 .pte": lambda m: m.size_ratio <= 0.35,
    "XNNPACK runs everything, in one delegate": lambda m: m.delegates == 1 and m.undelegated == 0,
    "99.9 % of outputs are within 1 LSB (one integer step) of the quantized graph": lambda m: (
        m.outputs_within_1_lsb >= 0.999
    ),
}


def broken_promises(measured: Measured) -> list[str]:
    """The promises that these measurements break; an empty list is what everyone hopes for."""
    return [promise for promise, holds in PROMISES.items() if not holds(measured)]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 when every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # layers this small lose more by sharing the work than they gain
    learn, held_back = load_images()
    console.print(f"Training a small convolutional net on {len(learn.y)} images of handwritten digits")
    model = DigitsNet()
    train(model, learn, options.epochs, track=lambda epochs: track(epochs, "Training", console=console))
    converted, measured = quantize_and_measure(model, learn, held_back, options.out, console)

    report = explain(converted)
    numbers = asdict(measured) | {"size_ratio": measured.size_ratio}
    (options.out / "measured.json").write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(as_table(measured))
    console.print("\nWhat was quantized, and how; the same as report.txt:\n")
    console.print(report.text(), highlight=False, markup=False, soft_wrap=True)
    files = ", ".join(sorted(path.name for path in options.out.iterdir()))
    console.print(f"\nWritten to {options.out}: {files}", soft_wrap=True)

    console.print("\nPromises:")
    broken = broken_promises(measured)
    for promise in PROMISES:
        console.print(f"  [red]BROKEN[/] {promise}" if promise in broken else f"  [green]kept[/]   {promise}")
    return 1 if broken else 0


def quantize_and_measure(
    model: nn.Module, learn: Images, held_back: Images, out: Path, console: Console
) -> tuple[GraphModule, Measured]:
    """The path that every user walks (first half), then both files against the graphs they came from."""
    exported = torch.export.export(model, (learn.x[:1],))  # one image at a time, as on a phone

    console.print("Quantizing it: 256 training images show the observers which values occur")
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for image in track(learn.x[:256].split(1), "Calibrating", console=console):
            prepared(image)
    converted = convert_pt2e(prepared)

    console.print("Lowering the float net and the int8 net to ExecuTorch, then running both files on held-back images")
    float_program = lower_to_executorch(exported)
    program = lower_to_executorch(converted)
    float_program.save(out / "digits_fp32.pte")
    program.save(out / "digits_int8.pte")
    comparison = compare(exported, converted, list(learn.x[:64].split(1)))
    explain(converted).save(out / "report", comparison=comparison, program=program)

    outputs, reference = outputs_of(lambda x: program.run(x)[0], held_back), outputs_of(converted, held_back)
    lsb = ((outputs - reference) / output_scale(converted)).round().abs()
    float_us, int8_us = latencies([lambda x: float_program.run(x)[0], lambda x: program.run(x)[0]], held_back)
    return converted, Measured(
        images=len(held_back.y),
        accuracy_fp32=accuracy(outputs_of(model, held_back), held_back),
        accuracy_fp32_pte=accuracy(outputs_of(lambda x: float_program.run(x)[0], held_back), held_back),
        accuracy_converted=accuracy(reference, held_back),
        accuracy_pte=accuracy(outputs, held_back),
        bytes_fp32_pte=len(float_program.buffer),
        bytes_int8_pte=len(program.buffer),
        microseconds_fp32_pte=float_us,
        microseconds_int8_pte=int8_us,
        outputs_within_1_lsb=(lsb <= 1).double().mean().item(),
        largest_difference_lsb=int(lsb.max()),
        delegates=program.delegates,
        undelegated=len(program.undelegated),
    )


@torch.no_grad()
def outputs_of(run: Run, images: Images) -> Tensor:
    """What a model says of each image, given one at a time."""
    return torch.cat([run(image).clone() for image in images.x.split(1)])


def accuracy(outputs: Tensor, images: Images) -> float:
    return (outputs.argmax(1) == images.y).double().mean().item()


def output_scale(converted: GraphModule) -> float:
    """Size of one integer step (LSB) of the graph's output: the scale of the dequantize that produces it."""
    (output,) = converted.graph.find_nodes(op="output")
    (last,) = output.all_input_nodes
    if last.target is not torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        raise SystemExit(f"the output of the converted graph is {last.target}, not a dequantize")
    return float(last.args[1])


def latencies(runs: list[Run], images: Images, rounds: int = 5) -> list[float]:
    """Median microseconds for one image. The models take turns, so that a busy moment hurts them alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, seconds, strict=True):
            for image in images.x[:200].split(1):
                start = time.perf_counter()
                run(image)
                taken.append(time.perf_counter() - start)
    return [median(taken) * 1e6 for taken in seconds]


def as_table(measured: Measured) -> Table:
    """Everything that was measured, float beside integer."""
    m = measured
    table = Table(title=f"Handwritten digits, {m.images} held-back images")
    for heading in ("", "fp32", "int8", "int8 / fp32"):
        table.add_column(heading, justify="right" if heading else "left")
    kib, ratio = 1024, m.microseconds_int8_pte / m.microseconds_fp32_pte
    table.add_row("accuracy, PyTorch graph", f"{m.accuracy_fp32:.2%}", f"{m.accuracy_converted:.2%}", "")
    table.add_row("accuracy, .pte", f"{m.accuracy_fp32_pte:.2%}", f"{m.accuracy_pte:.2%}", "")
    size = (f"{m.bytes_fp32_pte / kib:.1f} KiB", f"{m.bytes_int8_pte / kib:.1f} KiB")
    table.add_row("size of the .pte", *size, f"{m.size_ratio:.3f}")
    speed = (f"{m.microseconds_fp32_pte:.1f} us", f"{m.microseconds_int8_pte:.1f} us")
    table.add_row("median latency, one image", *speed, f"{ratio:.3f}")
    table.add_row("outputs within 1 LSB of the graph", "", f"{m.outputs_within_1_lsb:.2%}", "")
    table.add_row("delegates (parts that XNNPACK runs) / operators outside", "", f"{m.delegates} / {m.undelegated}", "")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
