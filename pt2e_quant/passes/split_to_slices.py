"""The parts of a split, chunk or unbind become ops with one output, which a rule on slices takes."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from ..arguments import bind
from ..checks import checked
from ..errors import CaptureError
from ..graph.module import tidy
from ..graph.write import Writer, function
from ..ops import SPLIT, UNBIND, functional

__all__ = ["split_to_slices"]

select = function(torch.ops.aten.select.int)


@checked(CaptureError)
def split_to_slices(gm: GraphModule) -> GraphModule:
    """Turn each part of a split or chunk into a slice, each part of an unbind into a select.

    Only where the sizes along the dimension that is split are known.
    """
    write = Writer(gm, "split_to_slices")
    found = [
        node for node in gm.graph.nodes if node.target in (*SPLIT, *UNBIND) and functional(node.target) is node.target
    ]
    for node in found:
        x, dim = write(node.args[0]), int(bind(node).get("dim", 0))
        sizes = [1 if node.target in UNBIND else part.shape[dim] for part in node.meta.get("val", ())]
        parts = [user for user in node.users if user.target is operator.getitem]
        if len(parts) != len(node.users) or not all(isinstance(size, int) for size in sizes):
            continue
        for part in parts:
            index = int(part.args[1]) % len(sizes)
            start = sum(sizes[:index])
            with write.before(part):
                picked = node.target in UNBIND
                write.replace(part, select(x, dim, index) if picked else x.slice(dim, start, start + sizes[index]))
    return tidy(gm) if found else gm
