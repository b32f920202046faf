"""Finished: the blocks that a long algorithm is done with, in a folder, so that it can go on after an interruption."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..debug.pairs import observes
from ..errors import FileError
from ..files import make_folder, open_file, write_file
from ..graph.attributes import attribute
from ..graph.fingerprint import Fingerprint
from .sites import Site, grid_of

__all__ = ["Finished", "Outcome", "model_of"]

Outcome = tuple[float, dict[str, tuple[Tensor, ...]]]
"""Of one block: the gain, and the tensors that were chosen, by the name of the op."""


class Finished:
    """Outcomes by the number of their block, in a folder where there is one: a file for each, read when it is needed.

    What was read stays on disk, mapped into memory: the system may drop it and read it again.

    Args:
        path: of the folder, which is made if it is not there; None keeps nothing.
        job: what is being done, in words.

    Raises:
        FileError: the folder cannot be made or read, or is of another job.
    """

    def __init__(self, path: str | Path | None, job: str) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None:
            _claim(self._path, job)

    def recall(self, number: int, compute: Callable[[], Outcome]) -> Outcome:
        """The outcome of this block, computed where it is not known yet."""
        if self._path is None:
            return compute()
        path = self._path / f"{number:05}.pt"
        if path.exists():
            return _read(path)
        content = io.BytesIO()
        torch.save(compute(), content)
        write_file(path, content.getvalue())
        return _read(path)


def _claim(folder: Path, job: str) -> None:
    """Say whose the folder is, or see that it is of this job."""
    name = folder / "job.txt"
    if folder.is_dir() and name.exists():
        with open_file(name) as file:
            found = file.read().decode(errors="replace")
        if found != job:
            raise FileError(f"{folder} is of another job ({found}), not of this one ({job}). Give another name")
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileError(f"{folder} holds no finished blocks, but other files. Give another name")
    else:
        make_folder(folder)
        write_file(name, job.encode())


def _read(path: Path) -> Outcome:
    with open_file(path):
        pass  # the errors of the disk
    try:
        gain, chosen = torch.load(path, weights_only=True, mmap=True)
        return float(gain), {str(name): tuple(tensors) for name, tensors in chosen.items()}
    except Exception as error:  # of whatever a file that is no such file makes
        raise FileError(f"{path} holds no finished block: {type(error).__name__}. Delete it") from error


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
