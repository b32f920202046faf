"""What a report costs beside prepare: explain, its text, JSON and node data, and `why` for every op.

    python -m benchmarks.report [--repeat 5] [--models resnet18,mobilenet_v2,bert_base] [--length 2000]

CPU seconds of one process, medians of `repeat` runs, each in turn with a prepare; the ratio is that of the medians and
must stay below 1. Measuring what sharing costs, `explain(prepared, data)`, is shown beside one calibration batch, since
it runs the model. The chain is `length` ops that share one scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks.engine import our_quantizer
from benchmarks.models import MODELS, chain
from pt2e_quant import explain, prepare_pt2e


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measure(name: str, module: GraphModule, inputs: tuple[Any, ...], dynamic: bool, repeat: int) -> None:
    """One line for each rendering: its time, and that as a share of prepare's."""
    runs: dict[str, list[float]] = {}
    for _ in range(repeat + 1):
        elapsed, prepared = cpu_seconds(lambda: prepare_pt2e(module, our_quantizer(dynamic)))
        report = explain(prepared)
        renderings: dict[str, Callable[[], Any]] = {
            "explain": lambda p=prepared: explain(p),
            "text": report.text,
            "json": report.to_json,
            "node data": report.to_model_explorer,
            "why, one op": lambda r=report: r.why(r.record.decisions[-1].node),
        }
        runs.setdefault("prepare", []).append(elapsed)
        for what, render in renderings.items():
            runs.setdefault(what, []).append(cpu_seconds(render)[0])
        with torch.no_grad():
            runs.setdefault("calibration batch", []).append(cpu_seconds(lambda p=prepared: p(*inputs))[0])
            data = [inputs]
            runs.setdefault("explain with data", []).append(cpu_seconds(lambda p=prepared, d=data: explain(p, d))[0])
    medians = {what: statistics.median(values[1:]) for what, values in runs.items()}  # the first is a warm-up
    print(f"\n{name}: {len(module.graph.nodes)} nodes; medians of {repeat}, CPU ms and share of prepare")
    for what, value in medians.items():
        print(f"  {what:18}{value * 1e3:10.2f}{value / medians['prepare']:8.2f}")
    together = sum(medians[what] for what in ("explain", "text", "json", "node data", "why, one op"))
    verdict = "below" if together < medians["prepare"] else "NOT below"
    print(f"  all renderings together are {verdict} prepare: {together / medians['prepare']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--length", type=int, default=2000)
    arguments = parser.parse_known_args()[0]  # python -m benchmarks hands the same arguments to all
    for name in filter(None, arguments.models.split(",")):
        model = MODELS[name]()
        measure(name, model.export().module(), model.inputs, model.dynamic, arguments.repeat)
    module, inputs = chain(arguments.length)
    measure("chain", module, inputs, False, arguments.repeat)


if __name__ == "__main__":
    main()
