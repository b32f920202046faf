"""Where the time of a compiled program goes: for each kernel, how often it is called and how long it takes."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from ...errors import LoweringError
from ..common.program import section

__all__ = ["KernelTime", "Profile", "take_profile"]

_LIBRARY, _GENERATED = "aoti_torch_cpu_", "cpp_fused_"
_WARM = 3


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel in one run.

    Args:
        kernel: an operator of oneDNN or ATen, or 'loop: ' and the operators that Inductor fused into a loop of its own.
        calls: how often one run calls it.
        microseconds: median over runs of the time of these calls together, with what ATen does around oneDNN.
    """

    kernel: str
    calls: int
    microseconds: float

    def __str__(self) -> str:
        return f"{self.microseconds:9.0f} us  {self.calls:4} x  {self.kernel}"


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes, while torch's profiler watches: some microseconds a kernel more than without.

    Args:
        microseconds: median time of a run.
        kernels: the slowest first.
    """

    microseconds: float
    kernels: tuple[KernelTime, ...]

    @property
    def elsewhere(self) -> float:
        """Microseconds outside of all kernels: arguments, memory, calls, and what measuring costs."""
        return self.microseconds - sum(kernel.microseconds for kernel in self.kernels)

    def text(self) -> str:
        """A table for people."""
        return section(str(self), (*self.kernels, f"{self.elsewhere:9.0f} us          outside of kernels"))

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return f"{self.microseconds:.0f} us a run in {sum(kernel.calls for kernel in self.kernels)} kernels"


def take_profile(run: Callable[[], Any], runs: int) -> Profile:
    """Call `run` so many times under torch's profiler.

    Raises:
        LoweringError: the profiler sees no kernels, since the program was compiled without their names.
    """
    for _ in range(_WARM):
        run()
    walls = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(runs):
            start = time.perf_counter()
            run()
            walls.append(time.perf_counter() - start)
    times: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        if (name := _kernel(event)) is not None:
            times[name].append(event.cpu_time_total)
    if not times:
        raise LoweringError("this program was compiled without the names of its kernels: lower it with profile=True")
    kernels = [KernelTime(name, len(values) // runs, _of_a_run(values, runs)) for name, values in times.items()]
    kernels.sort(key=lambda kernel: kernel.microseconds, reverse=True)
    return Profile(statistics.median(walls) * 1e6, tuple(kernels))


def _of_a_run(values: list[float], runs: int) -> float:
    calls = len(values) // runs
    return statistics.median(sum(values[index * calls : (index + 1) * calls]) for index in range(runs))


def _kernel(event: FunctionEvent) -> str | None:
    name: str = event.name
    if _GENERATED in name:
        operators = name.split(_GENERATED, 1)[1].rpartition("_")[0]
        return f"loop: {operators}"
    return name.removeprefix(_LIBRARY).removesuffix("_tensor").strip("_") if name.startswith(_LIBRARY) else None
