"""Refuses inputs of unbounded size: ExecuTorch plans memory for the largest size of each dimension."""

from __future__ import annotations

from torch.export import ExportedProgram

from ...errors import LoweringError
from ...where import locate
from ..common.dynamic_shapes import span_of, symbolic_sizes

__all__ = ["check_bounds"]


def check_bounds(program: ExportedProgram) -> None:
    """Raise for dynamic dimensions without an upper bound.

    Raises:
        LoweringError: names every such input and dimension.
    """
    unbounded = [
        f"{locate(node)}, dimension {index}"
        for node in program.graph.find_nodes(op="placeholder")
        for index, size in symbolic_sizes(node).items()
        if span_of(size)[1] is None
    ]
    if unbounded:
        listing = "\n  ".join(unbounded)
        raise LoweringError(
            "ExecuTorch plans memory ahead and needs an upper bound for every dynamic dimension; there is none for\n"
            f'  {listing}\n  Export with Dim("name", min=..., max=...), or pass dynamic_shapes to lower_to_executorch.'
        )
