"""Finished: the blocks that a long algorithm is done with, in a file, so that it can go on after an interruption."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..files import open_file, write_file

__all__ = ["Finished", "Outcome"]

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
