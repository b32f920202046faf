"""python -m benchmarks.eager: eager mode of ours beside torch.ao's (engine x86), one thread, CPU time, in turns."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import take_turns
from pt2e_quant import eager, qconfig
from pt2e_quant.nn.quantized import FloatFunctional
from pt2e_quant.sqnr import sqnr
from tests.eager.zoo import make

__all__ = ["main"]

ROUNDS = 5


class Layer(nn.Module):
    """Of BERT-base (arXiv:1810.04805): width 768, 12 heads, 3072 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(768, 768) for _ in range(4))
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)
        self.first, self.second = nn.LayerNorm(768), nn.LayerNorm(768)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (12, 64)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(y))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(512, 512, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


DYNAMIC: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "4 layers of BERT-base, 1 x 128": (lambda: nn.Sequential(*(Layer() for _ in range(4))), (1, 128, 768)),
    "LSTM 512, 1 x 20": (Recurrent, (1, 20, 512)),
}


def dynamic(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> str:
    """One row: milliseconds of both, their ratio, and how near each is to the float model."""
    import torch.ao.quantization as peer

    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    programs = {"theirs": peer.quantize_dynamic(model), "ours": eager.quantize_dynamic(model)}
    timings = take_turns(programs, [(x,)] * ROUNDS)
    with torch.no_grad():
        wanted = model(x)
    near = [sqnr(wanted, timings[side].answers[-1]) for side in programs]
    return row([timings[side].milliseconds()[1] for side in programs], f"{near[0]:.1f} / {near[1]:.1f}")


def steps() -> dict[str, list[float]]:
    """Milliseconds of prepare, of the first and of the second calibration run, and of convert, of both sides."""
    import torch.ao.quantization as peer

    functional = torch.ao.nn.quantized.FloatFunctional
    theirs: Any = make("resnet18", peer.QuantStub, peer.DeQuantStub, functional).eval()
    ours: Any = make("resnet18", eager.QuantStub, eager.DeQuantStub, FloatFunctional).eval()
    theirs.qconfig, ours.qconfig = peer.get_default_qconfig("x86"), qconfig.get_default_qconfig("x86")
    return {"theirs": timed(theirs, peer), "ours": timed(ours, eager)}


def timed(model: nn.Module, package: Any) -> list[float]:
    marks, x = [time.process_time()], torch.randn(4, 3, 32, 32)
    prepared = package.prepare(model)
    marks.append(time.process_time())
    for _ in range(2):
        prepared(x)
        marks.append(time.process_time())
    package.convert(prepared)
    marks.append(time.process_time())
    return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]


def row(times: list[float], note: str) -> str:
    return f"{times[0]:.1f} | {times[1]:.1f} | {times[1] / times[0]:.2f} | {note} |"


def main() -> None:
    warnings.simplefilter("ignore")  # torch's modules and types are deprecated
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "x86"
    print("| case | torch.ao, ms | ours, ms | ratio | dB from float, theirs / ours |\n|---|---|---|---|---|")
    for name, (build, shape) in DYNAMIC.items():
        print(f"| quantize_dynamic, {name} | {dynamic(build, shape)}", flush=True)
    steps()  # imports, and what else happens once
    both = steps()
    for at, name in enumerate(("prepare", "first calibration run", "second calibration run", "convert")):
        print(f"| small ResNet-18, {name} | {row([both[side][at] for side in ('theirs', 'ours')], '')}", flush=True)


if __name__ == "__main__":
    main()
