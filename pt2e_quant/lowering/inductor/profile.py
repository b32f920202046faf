"""Calls a compiled program under torch's profiler, which sees each kernel that Inductor calls or generates."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from ...errors import LoweringError
from ...latency import Profile, Sample, profile_of

if TYPE_CHECKING:
    from .program import InductorKernel

__all__ = ["take_profile"]

_LIBRARY, _GENERATED = "aoti_torch_cpu_", "cpp_fused_"
_WARM = 3


def take_profile(run: Callable[[], Any], runs: int, kernels: Iterable[InductorKernel]) -> Profile:
    """Call `run` so many times under torch's profiler.

    A kernel is an operator of oneDNN or ATen, with what ATen does around it, or 'loop: ' and the operators that
    Inductor fused into a loop of its own.

    Args:
        run: the program, with its arguments.
        runs: how often to measure it.
        kernels: of the program's account; all nodes that became a kernel of one name share its row.

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
            walls.append((time.perf_counter() - start) * 1e6)
    samples = list(_samples(recorded.events(), kernels))
    if not samples:
        raise LoweringError("this program was compiled without the names of its kernels: lower it with profile=True")
    return profile_of(walls, samples)


def _samples(events: Iterable[Any], kernels: Iterable[InductorKernel]) -> Iterator[Sample]:
    nodes: dict[str, list[str]] = defaultdict(list)
    for kernel in kernels:
        nodes[kernel.kernel.rpartition(".")[2].strip("_")].append(kernel.node)
    for event in events:
        name = _kernel(event.name)
        if name is not None:
            yield name, tuple(nodes.get(name, ())), event.cpu_time_total


def _kernel(name: str) -> str | None:
    if _GENERATED in name:
        operators = name.split(_GENERATED, 1)[1].rpartition("_")[0]
        return f"loop: {operators}"
    return name.removeprefix(_LIBRARY).removesuffix("_tensor").strip("_") if name.startswith(_LIBRARY) else None
