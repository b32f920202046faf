"""Taps: tensors inside a program that ExecuTorch's runtime can show, through its event dump (ETDump).

The runtime writes down what its own instructions return: operators in portable kernels, and whole delegates. XNNPACK's
delegate writes down the time of its kernels and no tensors, so what lies inside of one is not seen.
"""

from __future__ import annotations

import math
import operator
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..common.entry import by_origin, origin, quietly

__all__ = ["Tap", "find_taps", "read_taps"]

_ROOM = 1 << 20


@dataclass(frozen=True)
class Tap:
    """One tensor that an instruction returns.

    instruction: its index in the method
    place:       among the tensors that the runtime writes down for it, from the end
    node:        of the converted graph
    size:        bytes
    """

    instruction: int
    place: int
    node: str
    size: int


def find_taps(program: Any, method: str, gm: GraphModule) -> tuple[Tap, ...]:
    """Those of a method.

    Args:
        program: ExecuTorch's, with its graphs; the emitter has left the index of the instruction on each node.
        method: its name.
        gm: the converted graph, as it was exported for ExecuTorch.
    """
    known = by_origin(gm)
    lowered: GraphModule = program.exported_program(method).graph_module
    calls = [node for node in lowered.graph.nodes if _is_instruction(node)]
    return tuple(tap for node in calls for tap in _taps(node) if tap.node in known)


def _is_instruction(node: Node) -> bool:
    called = node.op == "call_function" and node.target is not operator.getitem
    return called and isinstance(node.meta.get("debug_handle"), int)


def _taps(node: Node) -> Iterator[Tap]:
    """Of the results of an instruction, which come last among the tensors that are written down for it."""
    parts = [user for user in node.users if user.target is operator.getitem]
    for part in parts or [node]:
        value = part.meta.get("val")
        if isinstance(value, Tensor):
            place = int(part.args[1]) - len(parts) if parts else -1  # type: ignore[arg-type]  # getitem takes an index
            yield Tap(node.meta["debug_handle"], place, origin(part), _size(value))


def _size(value: Tensor) -> int:
    """Bytes; of a free size, those of the example."""
    shape = [size if isinstance(size, int) else size.node.hint or 1 for size in value.shape]
    return math.prod(shape) * value.element_size()


def read_taps(buffer: bytes, method: str, inputs: Sequence[Any], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
    """Run a method once, on flat inputs, and read what the runtime wrote down; {} where it writes down nothing."""
    from executorch.devtools import Inspector

    from .runtime import runtime

    wanted: dict[int, list[Tap]] = {}
    for tap in taps:
        wanted.setdefault(tap.instruction, []).append(tap)
    inputs_size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    room = _ROOM + 4 * (inputs_size + sum(tap.size for tap in taps))
    with tempfile.TemporaryDirectory(prefix="pt2e_quant") as folder, quietly():
        dump, tensors = Path(folder) / "events", Path(folder) / "tensors"
        program = runtime().load_program(buffer, enable_etdump=True, debug_buffer_size=room)
        program.load_method(method).execute(list(inputs))
        program.write_etdump_result_to_file(str(dump), str(tensors))
        blocks = Inspector(str(dump), debug_buffer_path=str(tensors)).event_blocks
        events = [event for block in blocks for event in block.events]
    return dict(_read(events, wanted))


def _read(events: Iterable[Any], wanted: dict[int, list[Tap]]) -> Iterator[tuple[Tap, Tensor]]:
    for event in events:
        if event.name in ("OPERATOR_CALL", "DELEGATE_CALL") and event.debug_data:
            for tap in wanted.get(event._instruction_id, ()):
                value = event.debug_data[tap.place]
                if isinstance(value, Tensor):
                    yield tap, value
