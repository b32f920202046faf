"""Which delegable operators share a delegate: as few delegates as the operators outside allow, in linear time.

ExecuTorch merges its partitions pair by pair, in one order, and gives a pair up when it is not mergeable yet; where
several operators share a quantized input, as query, key and value do, it ends with one delegate for each layer. Here
each operator gets a level: how often a path to it has left a delegate. Those of one level form one delegate, since
whatever path leaves it comes back on a higher level.
"""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from collections.abc import Iterable

from torch.fx import Graph, Node

__all__ = ["by_level"]


def by_level(graph: Graph, groups: Iterable[Iterable[Node]]) -> list[list[Node]] | None:
    """Merge groups of delegable nodes, which must each stay together, into as few sets as there can be.

    Returns the sets, each in graph order; None when a group depends on itself through nodes outside.
    """
    group_of: dict[Node, int] = {}
    members: dict[int, list[Node]] = {}
    for number, group in enumerate(groups):
        members[number] = list(group)
        group_of.update(dict.fromkeys(members[number], number))
    delegable = len(members)
    for node in graph.nodes:
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        if node not in group_of and node.target is operator.getitem and group_of.get(first, delegable) < delegable:  # type: ignore[arg-type]
            group_of[node] = group_of[first]  # type: ignore[index]
            members[group_of[node]].append(node)
        elif node not in group_of:
            group_of[node] = len(members)
            members[group_of[node]] = [node]
    levels = _levels(members, group_of, delegable)
    if levels is None:
        return None
    parts: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if group_of[node] < delegable:
            parts[levels[group_of[node]]].append(node)
    return [parts[level] for level in sorted(parts)]


def _levels(members: dict[int, list[Node]], group_of: dict[Node, int], delegable: int) -> dict[int, int] | None:
    """The level of each group, in topological order; None for a cycle. Groups below `delegable` can be delegated."""
    users = {
        number: {group_of[user] for node in nodes for user in node.users} - {number}
        for number, nodes in members.items()
    }
    waiting: dict[int, int] = defaultdict(int)
    for targets in users.values():
        for target in targets:
            waiting[target] += 1
    ready = deque(number for number in members if not waiting[number])
    levels = dict.fromkeys(members, 0)
    done = 0
    while ready:
        number = ready.popleft()
        done += 1
        for user in users[number]:
            leaves = number < delegable <= user
            levels[user] = max(levels[user], levels[number] + leaves)
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return levels if done == len(members) else None
