"""Runs a program in ExecuTorch's runtime with its event dump (ETDump), and reads the time of each kernel.

XNNPACK names its kernels and not the nodes of the graph. It computes products in the order of the graph, so its k-th
convolution or matrix product is that of the k-th such node of the delegates.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LoweringError
from ...latency import Profile, Sample, profile_of
from ...ops import MATMUL, PRODUCTS
from ..common.entry import quietly
from .taps import Tap

if TYPE_CHECKING:
    from .program import ExecutorchKernel

__all__ = ["take_profile"]

_WARM = 3
_OUTSIDE = "OPERATOR_CALL"
_US = 1e3  # in a ms, as the dump counts
_PRODUCT_OPS = frozenset(map(str, PRODUCTS.union(MATMUL)))
_PRODUCT = re.compile(r"(Convolution|Deconvolution|Fully Connected|Batch Matrix Multiply)\b")
_COUNTED = re.compile(r" #\d+$")


def take_profile(
    buffer: bytes,
    method: str,
    inputs: Sequence[Any],
    runs: int,
    kernels: Sequence[ExecutorchKernel],
    taps: Sequence[Tap],
) -> Profile:
    """Execute a method so many times; the runs that warm it up are counted, which medians forgive.

    Args:
        buffer: the program.
        method: its name.
        inputs: flat.
        runs: how often.
        kernels: what the delegates hold, in the order of the graph.
        taps: by whose instructions the operators outside of delegates are known.

    Raises:
        LoweringError: this build of the runtime writes no events down.
    """
    events = _events(buffer, method, inputs, _WARM + runs)
    whole = next((event for event in events if event.name == "Method::execute"), None)
    if whole is None:
        raise LoweringError("ExecuTorch's runtime wrote no events down: it was built without its event tracer")
    walls = [taken * _US for taken in whole.perf_data.raw]
    return profile_of(walls, _samples(events, kernels, taps, len(walls)))


def _events(buffer: bytes, method: str, inputs: Sequence[Any], runs: int) -> list[Any]:
    from executorch.devtools import Inspector

    from .runtime import runtime

    with tempfile.TemporaryDirectory(prefix="pt2e_quant") as folder, quietly():
        dump = Path(folder) / "events"
        program = runtime().load_program(buffer, enable_etdump=True, debug_buffer_size=0)
        loaded = program.load_method(method)
        for _ in range(runs):
            loaded.execute(list(inputs))
        program.write_etdump_result_to_file(str(dump), str(Path(folder) / "tensors"))
        blocks = Inspector(str(dump)).event_blocks
    return [event for block in blocks if block.name == "Execute" for event in block.events]


def _samples(
    events: Sequence[Any], kernels: Iterable[ExecutorchKernel], taps: Iterable[Tap], runs: int
) -> Iterator[Sample]:
    products, outside = _nodes_of_products(events, kernels), {tap.instruction: tap.node for tap in taps}
    rows: list[tuple[str, str | None, Sequence[float]]] = []
    for index, event in enumerate(events):
        if event.is_delegated_op:
            rows.append((_COUNTED.sub("", event.name), products.get(index), event.perf_data.raw))
        elif event.name == _OUTSIDE:
            rows.append(("portable", outside.get(event._instruction_id), event.perf_data.raw))
    for run in range(runs):
        yield from ((name, (node,) if node else (), times[run] * _US) for name, node, times in rows)


def _nodes_of_products(events: Sequence[Any], kernels: Iterable[ExecutorchKernel]) -> dict[int, str]:
    """Nodes of products by the index of the event; {} where there are not as many of both."""
    found = [index for index, event in enumerate(events) if event.is_delegated_op and _PRODUCT.match(event.name)]
    nodes = [kernel.node for kernel in kernels if kernel.op in _PRODUCT_OPS]
    return dict(zip(found, nodes, strict=True)) if len(found) == len(nodes) else {}
