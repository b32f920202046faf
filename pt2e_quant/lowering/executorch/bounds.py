"""Dynamic sizes: ExecuTorch plans memory for the largest of each, so there must be one, and it must stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.export import ExportedProgram

from ...errors import LoweringError
from ...where import locate
from ..common.dynamic_shapes import span_of, symbolic_sizes

__all__ = ["check_bounds", "keeping_bounds"]


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


@contextmanager
def keeping_bounds(programs: Iterable[ExportedProgram]) -> Iterator[None]:
    """Around a compiler that runs graphs on fake tensors: ranges of sizes are afterwards what they were before.

    Where torch chooses a kernel for a convolution it asks whether the batch is smaller than 16. The example has to
    answer, and from then on the batch counts as below 16, or not, in memory planning too.
    """
    sizes = [
        size
        for program in programs
        for node in program.graph.find_nodes(op="placeholder")
        for size in symbolic_sizes(node).values()
    ]
    ranges = {id(size.node.shape_env): (size.node.shape_env, dict(size.node.shape_env.var_to_range)) for size in sizes}
    yield
    for environment, before in ranges.values():
        environment.var_to_range.update(before)
