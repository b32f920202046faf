"""What calibration costs: observers against the plain forward of the exported module, torchao's histogram beside them.

    python -m benchmarks.observers [--repeat 9] [--models resnet18,bert_base] [--batches 1000]

Ratios are those of medians of CPU time, every variant run in turn in one process and one thread. The search is that of
all sites of ResNet-18, once with what they saw and once with one spike in each. Memory is the peak of a process that
runs 1,000 batches through every observer, against one that runs 10.
"""

from __future__ import annotations

import argparse
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

from benchmarks.models import MODELS, BenchmarkModel
from pt2e_quant import observer as observers
from pt2e_quant import prepare_pt2e
from pt2e_quant.observer import DistributionObserver, HistogramObserver, MinMaxObserver, MSEObserver
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

LIMITS = {"MinMaxObserver": 1.10, "MSEObserver": 1.35}
SEARCH_LIMIT = 0.05  # seconds
MEMORY_LIMIT = 1.05

STREAMING = (
    "MinMaxObserver", "MovingAverageMinMaxObserver", "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver", "HistogramObserver", "MSEObserver", "LpNormObserver", "PercentileObserver",
    "EntropyObserver",
)  # fmt: skip


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def with_observer(constructor: Any) -> XNNPACKQuantizer:
    config = get_symmetric_quantization_config(is_per_channel=True)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=constructor.with_args(eps=2**-12))
    return XNNPACKQuantizer().set_global(replace(config, input_activation=activation, output_activation=activation))


def torchaos_histogram() -> Any:
    from torchao.quantization.pt2e.observer import HistogramObserver as Peer

    return Peer


def calibration(model: BenchmarkModel, repeat: int) -> dict[str, Any]:
    """Prints the ratio of each observer; returns the prepared models."""
    exported = model.export()
    constructors = {kind.__name__: kind for kind in (MinMaxObserver, MSEObserver, HistogramObserver)}
    constructors["torchao's HistogramObserver"] = torchaos_histogram()
    prepared = {name: prepare_pt2e(exported, with_observer(kind)) for name, kind in constructors.items()}
    runs: dict[str, Any] = {"plain": exported.module(), **prepared}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(repeat + 2):  # the first two fill caches
            for name, module in runs.items():
                times[name].append(cpu_seconds(lambda m=module: m(*model.inputs)))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(f"\n{model.name}: plain forward {medians['plain'] * 1e3:.1f} ms of CPU, medians of {repeat}")
    for name in prepared:
        ratio, limit = medians[name] / medians["plain"], LIMITS.get(name)
        verdict = "" if limit is None else f"   limit {limit:.2f}: {'holds' if ratio <= limit else 'MISSED'}"
        print(f"  {name:28} {ratio:6.3f}x{verdict}")
    return prepared


def search(prepared: Any) -> None:
    """CPU time of the qparams of all sites of a calibrated model."""
    sites = [one for one in prepared.modules() if isinstance(one, DistributionObserver) and one.has_data]
    for kind in ("as seen", "with a spike of 1,000 times the range in each"):
        if kind != "as seen":
            for one in sites:
                one(torch.tensor([1000.0 * one.max_val.item()]))
        best = min(cpu_seconds(lambda: [one.calculate_qparams() for one in sites]) for _ in range(5))
        verdict = "holds" if best <= SEARCH_LIMIT else "MISSED"
        print(
            f"  search of {len(sites)} sites, {kind}: {best * 1e3:.1f} ms   limit {SEARCH_LIMIT * 1e3:.0f}: {verdict}"
        )


def watch(batches: int) -> None:
    """Run batches of changing range and size through every observer; prints the peak of memory in KiB (Linux)."""
    kinds = [getattr(observers, name)(dtype=torch.int8) for name in STREAMING]
    torch.manual_seed(0)
    data = [torch.randn(8, 4096 + 512 * (number % 5)) * (1 + number % 3) for number in range(10)]
    for number in range(batches):
        for one in kinds:
            one(data[number % 10])
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss counts what the parent took, too
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def memory(batches: int) -> None:
    def peak(count: int) -> int:
        command = [sys.executable, "-c", f"from benchmarks.observers import watch; watch({count})"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    few, many = peak(10), peak(batches)
    verdict = "holds" if many / few <= MEMORY_LIMIT else "MISSED"
    print(
        f"\nmemory: peak over {batches} batches {many / 1024:.1f} MiB, over 10 {few / 1024:.1f} MiB, ratio "
        f"{many / few:.3f}   limit {MEMORY_LIMIT}: {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--models", default="resnet18,bert_base")
    parser.add_argument("--batches", type=int, default=1000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # those of the peer
    torch.set_num_threads(1)
    for name in arguments.models.split(","):
        prepared = calibration(MODELS[name](), arguments.repeat)
        if name == "resnet18":
            search(prepared["MSEObserver"])
    memory(arguments.batches)


if __name__ == "__main__":
    main()
