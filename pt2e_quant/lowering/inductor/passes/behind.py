"""Write right after a node what all its readers shall read instead."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ....graph.write import Symbol, Writer

__all__ = ["behind"]


def behind(write: Writer, node: Node, compute: Callable[[Symbol], Symbol]) -> None:
    """Let the users of a node read what `compute` makes of it."""
    users = list(node.users)
    with write.after(node):
        made = compute(write(node)).node
    for user in users:
        user.replace_input_with(node, made)
