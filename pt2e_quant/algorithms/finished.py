"""Finished: the blocks that a long algorithm is done with, in a file, so that it can go on after an interruption."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..debug.pairs import observes
from ..errors import FileError
from ..files import open_file, write_file
from ..graph.attributes import attribute
from ..graph.fingerprint import Fingerprint
from .sites import Site, grid_of

__all__ = ["Finished", "Outcome", "model_of"]

Outcome = tuple[float, dict[str, tuple[Tensor, ...]]]
"""Of one block: the gain, and the tensors that were chosen, by the name of the op."""


class Finished:
    """Outcomes by the number of their block, in a file where there is one.

    Args:
        path: of the file, which is written after each block; None keeps nothing.
        job: what is being done, in words.

    Raises:
        FileError: the file cannot be read, or is of another job.
    """

    def __init__(self, path: str | Path | None, job: str) -> None:
        self._path, self._job = None if path is None else Path(path), job
        self._known: dict[int, Outcome] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def recall(self, number: int, compute: Callable[[], Outcome]) -> Outcome:
        """The outcome of this block, computed where it is not known yet."""
        if self._path is None:
            return compute()
        if number not in self._known:
            self._known[number] = compute()
            content = io.BytesIO()
            torch.save({"job": self._job, "known": self._known}, content)
            write_file(self._path, content.getvalue())
        return self._known[number]

    def _read(self, path: Path) -> None:
        with open_file(path) as file:
            content = file.read()
        try:
            held = torch.load(io.BytesIO(content), weights_only=True)
            job, self._known = held["job"], held["known"]
        except Exception as error:  # of whatever a file that is no such file makes
            raise FileError(f"{path} holds no finished blocks: {type(error).__name__}. Give another name") from error
        if job != self._job:
            raise FileError(f"{path} is of another job ({job}), not of this one ({self._job}). Give another name")


def model_of(gm: GraphModule, sites: Iterable[Site]) -> str:
    """What tells a prepared model from others in a job: parameters, grids of weights, bounds of activations.

    Not the ranges of activations, which another run can find different in a last bit.
    """
    found = Fingerprint()
    for name, value in gm.named_parameters():
        found.add([name, value])
    for site in sites:
        grid = grid_of(gm, site.observer, attribute(gm, str(site.weight.target)).detach())
        found.add([site.node.name, vars(grid) if grid else None])
    for node in gm.graph.find_nodes(op="call_module"):
        grid = grid_of(gm, str(node.target)) if observes(gm, node) else None
        found.add([node.name, *((grid.dtype, grid.quant_min, grid.quant_max) if grid else ())])
    return f"model {str(found)[:16]}"
