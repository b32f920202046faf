"""The processes of a group, and the three things that they do together here. No wait is longer than its timeout.

Before this: torch.distributed.init_process_group. After it: `calibrate` and `train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DistributedError, SpecError

__all__ = ["Ranks"]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a group, seen from one of them.

    group:   of torch.distributed; None for all processes
    timeout: longest wait for the others
    """

    group: Any
    timeout: timedelta

    @classmethod
    def of(cls, group: Any, seconds: float) -> Ranks:
        """
        Raises:
            DistributedError: there is no group, or this process is not in it.
            SpecError: seconds are not positive.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "this process belongs to no group; start it with torchrun, and call "
                'torch.distributed.init_process_group("gloo"), or "nccl", first'
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise DistributedError(
                f"group is a process group that this process is in, or None for all of them; got {group!r}"
            )
        if not 0 < seconds < timedelta.max.total_seconds():
            raise SpecError(f"timeout is a number of seconds > 0, got {seconds}")
        return cls(group, timedelta(seconds=seconds))

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def meet(self, purpose: str) -> None:
        """Wait for the others, and say which did not come, where the backend can."""
        if dist.get_backend(self.group) == dist.Backend.GLOO:
            try:
                dist.monitored_barrier(self.group, self.timeout, wait_all_ranks=True)
            except RuntimeError as error:
                raise DistributedError(self._missing(purpose, error)) from error

    def gather(self, payload: bytes, purpose: str) -> list[bytes]:
        """What each rank passed, in the order of ranks."""
        sizes = self._all(torch.tensor([len(payload)]), purpose)
        longest = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8)
        parts = self._all(padded, purpose)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def largest(self, values: Tensor, purpose: str) -> Tensor:
        """The largest of the numbers that the ranks have at each place; on the device of `values`."""
        return self._reduced(values, dist.ReduceOp.MAX, purpose)

    def mean(self, values: Tensor, purpose: str) -> Tensor:
        """The mean of the numbers that the ranks have at each place; on the device of `values`."""
        return self._reduced(values, dist.ReduceOp.SUM, purpose) / self.count

    def _reduced(self, values: Tensor, operation: Any, purpose: str) -> Tensor:
        there = values.to(self._device, copy=True)
        self._wait(lambda: dist.all_reduce(there, operation, self.group, async_op=True), purpose)
        return there.to(values.device)

    def _all(self, values: Tensor, purpose: str) -> list[Tensor]:
        there = values.to(self._device)
        parts = [torch.empty_like(there) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(parts, there, self.group, async_op=True), purpose)
        return [part.cpu() for part in parts]

    def _wait(self, start: Any, purpose: str) -> None:
        try:
            start().wait(self.timeout)
        except RuntimeError as error:  # torch: a timeout, or a connection that the other end closed
            raise DistributedError(self._missing(purpose, error)) from error

    @property
    def _device(self) -> torch.device:
        """Where the backend of the group takes tensors from."""
        if "nccl" in str(dist.get_backend(self.group)) and torch.accelerator.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _missing(self, purpose: str, error: Exception) -> str:
        return (
            f"rank {self.rank} of {self.count} waited for the others {purpose}, and they did not all come within "
            f"{self.timeout.total_seconds():g} s: {str(error).splitlines()[0]}\n"
            "  See what the other processes printed: one died, is still at work (pass a longer timeout), or took "
            "another way through the program, such as an evaluation on one rank with observers on."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self
