"""`pt2e-quant bench`: artefacts side by side with the float model: bytes, time, and agreement on one batch.

Runs take turns, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import FileError, LoweringError, QuantizationError
from ..files import open_file
from ..graph.run import Arguments, arguments_of
from ..recipes.images import Images
from ..sqnr import sqnr
from .output import tell
from .sources import load_data, load_model

__all__ = ["bench_files"]

_METHOD = "forward"
_MS = 1e3


@dataclass(frozen=True)
class _Row:
    """What was measured of one artefact. `ms`: median; `speed`: of the float model's time to its own; `sqnr`: in dB."""

    name: str
    bytes: int | None
    ms: float
    speed: float
    sqnr: float


def bench_files(model: str, files: list[Path], data: str, runs: int, images: Images | None, as_json: bool) -> None:
    """Print a row for the float model, in torch without a compiler, and for each file."""
    exported = load_model(model)
    batch = arguments_of(load_data(data, exported, images)[0])
    programs: dict[str, Callable[[], Any]] = {model: _eager(exported, batch)}
    programs |= {str(file): _program(file, batch) for file in files}
    with torch.no_grad():
        exact = _tensors(programs[model]())
        agreement = {name: _agreement(name, exact, run) for name, run in programs.items()}
        times = _times(programs, runs)
    rows = [
        _Row(name, _bytes(name), times[name] * _MS, times[model] / times[name], agreement[name]) for name in programs
    ]
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {'' if row.bytes is None else f'{row.bytes / 1024:.1f}':>10} KiB  {row.ms:9.3f} ms  "
        f"{row.speed:6.2f} x  {row.sqnr:6.1f} dB"
        for row in rows
    ]
    tell([asdict(row) for row in rows], "\n".join(lines), as_json)


def _eager(exported: ExportedProgram, batch: Arguments) -> Callable[[], Any]:
    module = exported.module()
    return lambda: module(*batch.args, **batch.kwargs)


def _program(path: Path, batch: Arguments) -> Callable[[], Any]:
    makers = {".onnx": _onnx, ".pte": _executorch, ".pt2": _package}
    if path.suffix not in makers:
        raise FileError(f"{path}: a program is an .onnx, .pte or .pt2 file")
    with open_file(path) as file:
        content = file.read()
    try:
        return makers[path.suffix](path, content, batch)
    except QuantizationError:
        raise
    except Exception as error:
        raise LoweringError(f"{path}: this file is damaged: {str(error).partition(chr(10))[0]}") from error


def _onnx(path: Path, content: bytes, batch: Arguments) -> Callable[[], Any]:
    from ..lowering.onnx.runtime import open_session, require

    require()
    session = open_session(content)
    tensors = [value for value in pytree.tree_leaves(batch) if isinstance(value, Tensor)]
    feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: [torch.from_numpy(one) for one in session.run(None, feed)]


def _executorch(path: Path, content: bytes, batch: Arguments) -> Callable[[], Any]:
    from ..lowering.executorch.program import Loaded

    method = Loaded(content, (_METHOD,)).method(_METHOD)
    values = pytree.tree_leaves(batch)
    return lambda: method.execute(values)


def _package(path: Path, content: bytes, batch: Arguments) -> Callable[[], Any]:
    with zipfile.ZipFile(path) as archive:
        compiled = any("aotinductor" in name for name in archive.namelist())
    if not compiled:
        return _eager(load_model(str(path)), batch)
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda: loaded(*batch.args, **batch.kwargs)


def _agreement(name: str, exact: list[Tensor], run: Callable[[], Any]) -> float:
    found = _tensors(run())
    if [one.shape for one in found] != [one.shape for one in exact]:
        raise LoweringError(f"{name} returns other outputs than the float model")
    return sqnr(exact, found)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _times(programs: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Medians, in seconds."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(held) for name, held in taken.items()}


def _bytes(name: str) -> int | None:
    path = Path(name)
    return path.stat().st_size if path.exists() else None
