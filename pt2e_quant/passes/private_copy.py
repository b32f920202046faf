"""A copy of the caller's graph to work on, where each reader of a tensor names what it reads."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..graph.module import ExportedModule, clone, tidy
from .follow_in_place import follow_in_place
from .runner import run_everywhere

__all__ = ["private_copy"]


def private_copy(model: ExportedProgram | GraphModule) -> ExportedModule:
    """A draft of the caller's graph; readers of a tensor that was written to in place read the result of that."""
    gm = run_everywhere(follow_in_place, clone(model.module() if isinstance(model, ExportedProgram) else model))
    tidy(gm)
    return gm
