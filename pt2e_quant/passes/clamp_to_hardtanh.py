"""Clamps get the names of what backends fuse."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ..arguments import bind
from ..checks import checked
from ..errors import CaptureError
from ..graph.module import tidy
from ..graph.values import is_float_tensor
from ..graph.write import Writer, function

__all__ = ["clamp_to_hardtanh"]

aten = torch.ops.aten
hardtanh, relu = function(aten.hardtanh.default), function(aten.relu.default)


@checked(CaptureError)
def clamp_to_hardtanh(gm: GraphModule) -> GraphModule:
    """clamp(x, a, b) is hardtanh(x, a, b), clamp(x, min=0) is relu(x)."""
    write = Writer(gm, "clamp_to_hardtanh")
    forms = (aten.clamp.default, aten.clip.default, aten.clamp_min.default)
    found = [node for node in gm.graph.nodes if node.target in forms]
    for node in found:
        bounds = bind(node)
        low, high = bounds["min"], bounds.get("max")
        if not is_float_tensor(node) or any(not isinstance(bound, (int, float, type(None))) for bound in (low, high)):
            continue
        with write.before(node):
            x = write(node.args[0])
            if low is not None and high is not None:
                write.replace(node, hardtanh(x, float(low), float(high)))
            elif low == 0 and high is None:
                write.replace(node, relu(x))
    return tidy(gm) if found else gm
