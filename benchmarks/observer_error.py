"""Writes docs/observers.md: the error of every way to choose a range, on data of several kinds, at several widths.

    python -m benchmarks.observer_error            write the table
    python -m benchmarks.observer_error --check    exit with 1 when the file is not what would be written

Seeded, on the CPU, in float32. The error is 10 log10(mean square of the data / mean square of the error), in dB: 6 dB
are one bit. `best` is an exhaustive search over ranges.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pt2e_quant import observer as observers
from pt2e_quant.qparams import affine_qparams, fake_quantize

FILE = Path(__file__).parents[1] / "docs" / "observers.md"
VALUES = 200_000

DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "Gaussian": lambda: torch.randn(VALUES),
    "Laplace": lambda: torch.empty(VALUES).exponential_() * torch.randn(VALUES).sign(),
    "ReLU of a Gaussian": lambda: torch.randn(VALUES).relu(),
    "Gaussian, 1e-4 at 100 sigma": lambda: torch.where(
        torch.rand(VALUES) < 1e-4, torch.randn(VALUES).sign() * 100, torch.randn(VALUES)
    ),
    "bimodal": lambda: torch.randn(VALUES) * 0.5 + torch.randn(VALUES).sign() * 3,
}
BITS = {8: (-128, 127), 4: (-8, 7), 2: (-2, 1)}
OBSERVERS = (
    "MinMaxObserver", "MovingAverageMinMaxObserver", "HistogramObserver", "MSEObserver", "LpNormObserver",
    "PercentileObserver", "EntropyObserver",
)  # fmt: skip

HEAD = """# Which observer

Written by `python -m benchmarks.observer_error`; do not edit by hand.

Signal to error in dB (larger is better, 6 dB are one bit) of 200,000 values in 20 batches, quantized per tensor with
the asymmetric range that each observer chooses. `best` is an exhaustive search over ranges.

- **MinMaxObserver** clips nothing. Right for weights, and where outliers matter.
- **MSEObserver**, which the default recipe of XNNPACK uses, has the smallest squared error: it clips a tail exactly as
  far as that pays at the given number of bits.
- **LpNormObserver** (p = 2.4) leans a little to the outliers; p = 2 is MSEObserver.
- **PercentileObserver** (99.99 %) and **EntropyObserver** clip whatever it costs: good where large values are noise,
  bad where they carry the signal, as in the column with outliers.
- **HistogramObserver** is the reference's, with its faults: it searches with all levels of the dtype whatever the
  bounds are, and takes its first clip unseen.
- **MovingAverageMinMaxObserver** is meant for training, where ranges move.

All of these watch per tensor; weights take PerChannelMinMaxObserver or, for blocks, AffineQuantizedMinMaxObserver with
a granularity (PerAxis, PerRow, PerGroup, PerBlock, PerToken).

## What observers make of odd data

- NaN is a CalibrationError that names the node, the module and the line; nothing of the batch is recorded there.
- Infinity, and the largest number of the tensor's type, of either sign, are masks or overflows: they are left out of
  the range, with one CalibrationWarning per observer that names the place, and saturate in the quantized model.
- Empty tensors, and tensors of nothing but masks, are no data. `convert_pt2e` names observers without data.

Calibration in parts, as a file, for several configurations: [calibration.md](calibration.md).

A file is written as a whole or not at all, has a version and a checksum, and is not believed without looking: what no
data can have led to (negative counts, a range that the counts do not have, NaN) is a CalibrationError, like any damage.

"""


def error_db(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> float:
    error = (fake_quantize(x, scale, zero_point, *bounds) - x).square().mean().item()
    return 10 * math.log10(x.square().mean().item() / error)


def best(x: Tensor, bounds: tuple[int, int]) -> float:
    """An exhaustive search: both ends on a grid from the whole range down to a 100th, then finely around the best."""
    low, high = min(x.min().item(), 0.0), x.max().item()

    def searched(lows: list[float], highs: list[float]) -> list[tuple[float, float, float]]:
        pairs = [(one, other) for one in (lows if low < 0.0 else [0.0]) for other in highs]
        errors = [error_db(x, *affine_qparams(*ends, *bounds, dtype=torch.int8), bounds) for ends in pairs]
        return sorted(((error, *ends) for error, ends in zip(errors, pairs, strict=True)), reverse=True)

    shares = [0.82**power for power in range(24)]
    coarse = searched([share * low for share in shares], [share * high for share in shares])
    close = [0.90 + 0.02 * step for step in range(11)]
    fine = [searched([share * a for share in close], [share * b for share in close])[0] for _, a, b in coarse[:5]]
    return max(fine)[0]


def chosen(name: str, x: Tensor, bounds: tuple[int, int]) -> float:
    one = getattr(observers, name)(dtype=torch.int8, quant_min=bounds[0], quant_max=bounds[1])
    for batch in x.split(VALUES // 20):
        one(batch)
    return error_db(x, *one.calculate_qparams(), bounds)


def text() -> str:
    lines = [HEAD]
    data = {}
    for seed, (name, draw) in enumerate(DISTRIBUTIONS.items()):
        torch.manual_seed(seed)
        data[name] = draw()
    for bits, bounds in BITS.items():
        lines.append(f"## {bits} bits\n\n| observer | " + " | ".join(data) + " |\n|---|" + "---:|" * len(data) + "\n")
        for name in OBSERVERS:
            lines.append(f"| {name} | " + " | ".join(f"{chosen(name, x, bounds):.1f}" for x in data.values()) + " |\n")
        lines.append("| best | " + " | ".join(f"{best(x, bounds):.1f}" for x in data.values()) + " |\n\n")
    return "".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    written = text()
    if arguments.check:
        sys.exit(0 if FILE.is_file() and FILE.read_text(encoding="utf-8") == written else f"{FILE.name} is out of date")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
