"""Processes that work together, for the tests: forked, so that none of them has to import torch again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pt2e_quant.errors import QuantizationError

__all__ = ["one_process", "outcome", "run_ranks"]


def run_ranks(worker: Callable[..., Any], folder: Path, *args: Any, count: int = 2) -> list[Any]:
    """What `worker(*args)` returns in each of `count` processes of one group of gloo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        mp.start_processes(_start, (worker, folder, count, args), nprocs=count, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


@contextmanager
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _start(rank: int, worker: Callable[..., Any], folder: Path, count: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    torch.save(worker(*args), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def outcome(function: Callable[[], Any]) -> tuple[str, str]:
    """Class and text of our error that a call raises; ('', '') where it raises none."""
    try:
        function()
    except QuantizationError as error:
        return type(error).__name__, str(error)
    return "", ""
