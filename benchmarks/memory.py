"""CPU seconds and memory that prepare and convert take, each case in a process of its own, on one core.

    python -m benchmarks.memory [--models bert_base,vit_b_16]

Memory is the highest resident set while they run, over that just before: torch, the model and its exported program are
there already. In units of the float weights, which are part of the total: 1.3x means 0.3x on top of the model. Linux
only: the high-water mark of a process is reset through /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import bert, resnet18, vit
from pt2e_quant import convert_pt2e, prepare_pt2e
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["MODELS", "QUANTIZERS", "kilobytes", "measure"]

MODELS = {"bert_base": bert, "vit_b_16": vit, "resnet18": resnet18}
QUANTIZERS: dict[str, Any] = {
    "xnnpack": lambda dynamic: XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    ),
    "x86": lambda dynamic: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    ),
}


def measure(model: str, backend: str, recipe: str) -> dict[str, float]:
    """{'seconds': of prepare and convert, 'total': highest memory in units of the float weights}, in a new process."""
    code = f"from benchmarks.memory import _here; _here({model!r}, {backend!r}, {recipe!r})"
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _here(model: str, backend: str, recipe: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = MODELS[model]()
    exported = made.export()
    weights = sum(value.numel() * value.element_size() for value in made.module.state_dict().values())
    quantizer = QUANTIZERS[backend](recipe == "dynamic")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = kilobytes("VmRSS")
    start = time.process_time()
    prepared = prepare_pt2e(exported, quantizer)
    seconds = time.process_time() - start
    if recipe == "static":
        with torch.no_grad():
            prepared(*made.inputs)
    start = time.process_time()
    convert_pt2e(prepared)
    seconds += time.process_time() - start
    print(json.dumps({"seconds": seconds, "total": 1 + (kilobytes("VmHWM") - before) * 1024 / weights}))


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    for model in parser.parse_args().models.split(","):
        for backend in QUANTIZERS:
            for recipe in ("dynamic", "static"):
                if recipe == "dynamic" and model == "resnet18":
                    continue  # it has one linear
                found = measure(model, backend, recipe)
                print(f"{model:10} {backend:8} {recipe:8} {found['seconds']:5.2f} s  {found['total']:.2f}x the weights")


if __name__ == "__main__":
    main()
