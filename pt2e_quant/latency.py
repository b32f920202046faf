"""Where the time of a program goes, kernel by kernel; what programs of all backends tell, and reports show."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

__all__ = ["KernelTime", "Profile", "Sample", "profile_of"]

Sample = tuple[str, tuple[str, ...], float]
"""One call: the kernel, the nodes of the converted graph that it may compute, microseconds."""


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel in one run.

    Args:
        kernel: what the backend calls it.
        calls: how often one run calls it.
        microseconds: median over runs of the time of these calls together.
        nodes: the nodes of the converted graph that it computes; () where the backend does not tell.
    """

    kernel: str
    calls: int
    microseconds: float
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = f"  of {', '.join(self.nodes)}" if self.nodes else ""
        return f"{self.microseconds:9.0f} us  {self.calls:4} x  {self.kernel}{of}"


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes, while a profiler watches: some microseconds a kernel more than without.

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

    def of_nodes(self) -> dict[str, float]:
        """Microseconds by node, of the kernels that compute one node each."""
        found: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            if len(kernel.nodes) == 1:
                found[kernel.nodes[0]] += kernel.microseconds
        return dict(found)

    def text(self) -> str:
        """A table for people."""
        rows = (*map(str, self.kernels), f"{self.elsewhere:9.0f} us          outside of kernels")
        return "\n".join([f"{self}:", *(f"  {row}" for row in rows)])

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return f"{self.microseconds:.0f} us a run in {sum(kernel.calls for kernel in self.kernels)} kernels"


def profile_of(walls: Iterable[float], samples: Iterable[Sample]) -> Profile:
    """The profile of several runs that call the same kernels in the same order.

    Args:
        walls: microseconds of each run.
        samples: the calls of all runs, those of the first run first.
    """
    taken = list(walls)
    times: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
    for kernel, nodes, microseconds in samples:
        times[kernel, nodes].append(microseconds)
    kernels = [
        KernelTime(kernel, len(values) // len(taken), _of_a_run(values, len(taken)), nodes)
        for (kernel, nodes), values in times.items()
    ]
    kernels.sort(key=lambda kernel: kernel.microseconds, reverse=True)
    return Profile(statistics.median(taken), tuple(kernels))


def _of_a_run(values: list[float], runs: int) -> float:
    calls = len(values) // runs
    return statistics.median(sum(values[index * calls : (index + 1) * calls]) for index in range(runs))
