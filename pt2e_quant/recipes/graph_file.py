"""A converted graph as a file: what is saved for a quantizer whose programs no lowering of this package makes."""

from __future__ import annotations

import io

import torch
from torch.fx import GraphModule

from ..lowering.common.dynamic_shapes import derive_dynamic_shapes
from ..lowering.common.entry import explaining, quietly, take

__all__ = ["SUFFIX", "file_of_graph"]

SUFFIX = ".pt2"


def file_of_graph(converted: GraphModule) -> bytes:
    """What torch.export.load reads, with the dynamic dimensions that the graph has.

    Raises:
        LoweringError: torch cannot export the graph again.
    """
    gm, (args, kwargs) = take(converted, None, None, "Quantized.save")
    shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    with torch.no_grad(), quietly(), explaining("torch.export cannot export the converted graph again"):
        exported = torch.export.export(gm, args, kwargs, dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(exported, file)
    return file.getvalue()
