"""Several methods in one program: their arguments by name, and the buffers that they share.

ExecuTorch gives buffers of one name one place in memory, whatever methods make of them. Here they must agree on what
the bytes mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from ...errors import LoweringError
from ...graph.attributes import attribute, written_attributes
from ...pt2e.record import record_of

__all__ = ["by_method", "shared_buffers"]


def by_method(methods: Mapping[str, Any], **arguments: Any) -> dict[str, tuple[Any, ...]]:
    """For each method its value of each argument, None where it has none.

    Raises:
        LoweringError: there is no method, a name cannot be that of one, or an argument is no dict of methods.
    """
    if not methods:
        raise LoweringError("there are no methods to lower: the dict is empty")
    wrong = [name for name in methods if not (isinstance(name, str) and name.isidentifier())]
    if wrong:
        raise LoweringError(f"names of methods are identifiers such as 'prefill', got {wrong[0]!r}")
    for argument, value in arguments.items():
        if value is not None and not isinstance(value, Mapping):
            raise LoweringError(
                f"with several methods, {argument} is a dict by method name ({', '.join(methods)}), "
                f"got {type(value).__name__}"
            )
        unknown = [name for name in value or () if name not in methods]
        if unknown:
            raise LoweringError(f"{argument} has {unknown[0]!r}, the methods are {', '.join(methods)}")
    return {name: tuple((value or {}).get(name) for value in arguments.values()) for name in methods}


def shared_buffers(methods: dict[str, GraphModule]) -> tuple[str, ...]:
    """Names of the buffers that several methods write to.

    Raises:
        LoweringError: methods disagree on shape, dtype, qparams or first values of a buffer that one of them writes to,
            or one only reads it: ExecuTorch would then give that method a constant of its own.
    """
    written = {name: written_attributes(gm) for name, gm in methods.items()}
    shared = []
    for buffer in dict.fromkeys(one for found in written.values() for one in found):
        users = {name: gm for name, gm in methods.items() if gm.graph.find_nodes(op="get_attr", target=buffer)}
        readers = [name for name in users if buffer not in written[name]]
        if readers:
            writers = [name for name in users if buffer in written[name]]
            raise LoweringError(
                f"{_all(writers)} to buffer {buffer!r}, and {readers[0]!r} only reads it, so that it would be a "
                f"constant there. Let {readers[0]!r} write to it too, or take what it needs as an input."
            )
        first, *others = users
        for other in others:
            difference = _difference(users[first], users[other], buffer)
            if difference:
                raise LoweringError(
                    f"{first!r} and {other!r} share buffer {buffer!r} and disagree on its {difference}. "
                    "Lower both from one converted graph with a dynamic length, for the sizes of each: "
                    f"lower_to_executorch({{{first!r}: graph, {other!r}: graph}}, {{{first!r}: (...), ...}})."
                )
        shared += [buffer] if others else []
    return tuple(shared)


def _all(writers: list[str]) -> str:
    return f"{writers[0]!r} writes" if len(writers) == 1 else f"{', '.join(map(repr, writers))} write"


def _difference(gm: GraphModule, other: GraphModule, buffer: str) -> str | None:
    one, two = attribute(gm, buffer), attribute(other, buffer)
    if one.dtype is not two.dtype:
        return f"dtype: {one.dtype} and {two.dtype}"
    if one.shape != two.shape:
        return f"shape: {tuple(one.shape)} and {tuple(two.shape)}"
    grids = [record.buffers.get(buffer) if (record := record_of(part)) else None for part in (gm, other)]
    if grids[0] != grids[1]:
        return f"qparams: {' and '.join(str(grid) for grid in grids)}"
    return None if torch.equal(one, two) else "first values"
