"""What prepare, one calibration batch and convert cost, against torchao with ExecuTorch's XNNPACKQuantizer in one run.

    python -m benchmarks.engine [--repeat 5] [--models resnet18,mobilenet_v2,bert_base] [--skip-growth]

Medians of `repeat` runs, ours and the peer's taken in turn; the ratio is that of the medians. Exporting is not timed.
Calibration is timed with min-max observers, against the plain exported module. Growth: time per node of prepare and of
convert on chains of ops that share one scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import MODELS, BenchmarkModel, chain
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.observer import MinMaxObserver
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def our_quantizer(dynamic: bool, min_max: bool = False) -> XNNPACKQuantizer:
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    if min_max and not dynamic:
        observer = MinMaxObserver.with_args(eps=2**-12)
        activation = replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = replace(config, input_activation=activation, output_activation=activation)
    return XNNPACKQuantizer().set_global(config)


def peer_quantizer(dynamic: bool) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer

    return peer.XNNPACKQuantizer().set_global(
        peer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    )


def ours(model: BenchmarkModel, exported: Any) -> tuple[float, float, float]:
    """Seconds of prepare, of the first calibration batch, and of convert."""
    module = exported.module()
    prepare, prepared = seconds(lambda: prepare_pt2e(module, our_quantizer(model.dynamic)))
    with torch.no_grad():
        calibrate, _ = seconds(lambda: prepared(*model.inputs))
    convert, _ = seconds(lambda: convert_pt2e(prepared))
    return prepare, calibrate, convert


def peers(model: BenchmarkModel, exported: Any) -> tuple[float, float, float]:
    from torchao.quantization.pt2e import quantize_pt2e as peer

    module = exported.module()
    prepare, prepared = seconds(lambda: peer.prepare_pt2e(module, peer_quantizer(model.dynamic)))
    with torch.no_grad():
        calibrate, _ = seconds(lambda: prepared(*model.inputs))
    convert, _ = seconds(lambda: peer.convert_pt2e(prepared))
    return prepare, calibrate, convert


def compare(model: BenchmarkModel, repeat: int) -> None:
    """Rows: ours, the peer's, ratio; columns: prepare, first calibration batch, convert."""
    exported = model.export()
    rows: dict[str, list[tuple[float, ...]]] = {"ours": [], "peer": []}
    for _ in range(repeat + 1):  # the first of each is a warm-up
        rows["ours"].append(ours(model, exported))
        rows["peer"].append(peers(model, exported))
    medians = {who: [statistics.median(column) for column in zip(*runs[1:], strict=True)] for who, runs in rows.items()}
    print(f"\n{model.name}: {len(exported.graph.nodes)} nodes; medians of {repeat}, ms")
    print(f"  {'':10}{'prepare':>12}{'1st batch':>12}{'convert':>12}")
    for who, values in medians.items():
        print(f"  {who:10}" + "".join(f"{value * 1e3:12.1f}" for value in values))
    ratios = [mine / theirs for mine, theirs in zip(medians["ours"], medians["peer"], strict=True)]
    print(f"  {'ratio':10}" + "".join(f"{ratio:12.2f}" for ratio in ratios))


def calibration(model: BenchmarkModel, repeat: int) -> None:
    """One steady-state batch of the prepared model with min-max observers, as a ratio to the plain exported module."""
    plain = model.export().module()
    prepared = prepare_pt2e(model.export(), our_quantizer(model.dynamic, min_max=True))
    times: dict[str, list[float]] = {"plain": [], "prepared": []}
    with torch.no_grad():
        for _ in range(5 * repeat):
            times["plain"].append(seconds(lambda: plain(*model.inputs))[0])
            times["prepared"].append(seconds(lambda: prepared(*model.inputs))[0])
    first, second = (statistics.median(times[name][repeat:]) for name in ("plain", "prepared"))
    print(
        f"{model.name}: calibration batch {second * 1e3:.1f} ms, plain {first * 1e3:.1f} ms, ratio {second / first:.3f}"
    )


def growth(repeat: int, lengths: tuple[int, ...] = (200, 2000, 20_000)) -> None:
    """Time per node of prepare and convert as the graph grows."""
    print(f"\ngrowth on chains of value-preserving ops; medians of {repeat}")
    per_node: dict[str, list[float]] = {"prepare": [], "convert": []}
    for length in lengths:
        module, inputs = chain(length)
        runs: dict[str, list[float]] = {"prepare": [], "convert": []}
        for _ in range(repeat):
            elapsed, prepared = seconds(lambda m=module: prepare_pt2e(m, our_quantizer(dynamic=False)))
            runs["prepare"].append(elapsed)
            prepared(*inputs)
            runs["convert"].append(seconds(lambda p=prepared: convert_pt2e(p))[0])
        for phase, values in runs.items():
            per_node[phase].append(statistics.median(values) / length)
        print(
            f"  {length:6} ops" + "".join(f"   {phase} {v[-1] * 1e6:8.1f} us per op" for phase, v in per_node.items())
        )
    for phase, values in per_node.items():
        print(f"  {phase}: time per op at {lengths[-1]} is {values[-1] / values[0]:.2f}x of that at {lengths[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--skip-growth", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # those of the peer
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.models.split(","):
        model = MODELS[name]()
        compare(model, arguments.repeat)
        calibration(model, arguments.repeat)
    if not arguments.skip_growth:
        growth(arguments.repeat)


if __name__ == "__main__":
    main()
