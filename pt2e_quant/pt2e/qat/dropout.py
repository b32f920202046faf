"""Dropout in training: what it makes larger stays out of the ranges.

A backend lets a dropout share the range of its input, since in evaluation it is nothing. In training it divides what it
keeps by 1 - p, and the shared range would grow with it. Rounding before it is enough: in evaluation the same values
come out of it. So in training there is one observer call less, which convert puts back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ...graph.values import copy_value
from ...meta import DROPOUTS_KEY
from ...ops import DROPOUT
from ...where import copy_origin
from ..present import check_present

__all__ = ["PassedOver", "observe_dropouts", "pass_over_dropouts"]


@dataclass(frozen=True)
class PassedOver:
    """An observer call that is left out in training: its name, that of its observer, and that of the dropout."""

    call: str
    observer: str
    dropout: str


def pass_over_dropouts(gm: GraphModule) -> None:
    """Leave out the calls on dropouts whose input the same observer rounds; `gm.meta[DROPOUTS_KEY]` lists them."""
    found = []
    for call in [node for node in gm.graph.nodes if node.op == "call_module" and _repeats(node)]:
        found.append(PassedOver(call.name, str(call.target), call.args[0].name))
        call.replace_all_uses_with(call.args[0])
        gm.graph.erase_node(call)
    gm.meta[DROPOUTS_KEY] = found


def _repeats(call: Node) -> bool:
    dropout = call.args[0] if call.args else None
    if not isinstance(dropout, Node) or dropout.target not in DROPOUT or len(dropout.users) != 1:
        return False
    before = dropout.args[0]
    return isinstance(before, Node) and before.op == "call_module" and before.target == call.target


def observe_dropouts(gm: GraphModule) -> GraphModule:
    """Put back the calls that `pass_over_dropouts` left out.

    Raises:
        ConversionError: a node is gone.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    for passed in gm.meta.pop(DROPOUTS_KEY, ()):
        check_present((passed.dropout,), nodes)
        dropout = nodes[passed.dropout]
        with gm.graph.inserting_after(dropout):
            call = gm.graph.call_module(passed.observer)
        copy_value(copy_origin(call, dropout, "convert_pt2e"), dropout)
        dropout.replace_all_uses_with(call)
        call.args = (dropout,)
        call.name = passed.call
    return gm
