"""Where the patterns of a BackendConfig stand in a graph of modules, functions and methods, or of ATen operators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..backend_config import BackendPatternConfig
from ..graph.attributes import attribute

__all__ = ["Match", "Patterns", "keys_of", "module_of"]


@dataclass(frozen=True)
class Match:
    """The operators of a pattern, in the order in which they run."""

    nodes: tuple[Node, ...]
    config: BackendPatternConfig

    @property
    def rule(self) -> str:
        """The pattern in words: 'conv2d + relu'."""
        return " + ".join(str(getattr(one, "__name__", one)) for one in self.config.sequence)


class Patterns:
    """The patterns, by the operator that runs last.

    Args:
        configs: of two that fit a node, the longer one is taken, then the one set first.
    """

    def __init__(self, configs: Iterable[BackendPatternConfig]) -> None:
        self._by_last: dict[Hashable, list[BackendPatternConfig]] = defaultdict(list)
        for config in sorted(configs, key=lambda one: -len(one.sequence)):
            for key in _names(config.sequence[-1]):
                self._by_last[key].append(config)

    def find(self, gm: GraphModule) -> list[Match]:
        """All matches, in the order of the graph. A node belongs to one at most."""
        found: list[Match] = []
        taken: set[Node] = set()
        for node in reversed(gm.graph.nodes):
            match = None if node in taken else next(self.ending_at(gm, node, taken), None)
            if match is not None:
                taken.update(match.nodes)
                found.append(match)
        return found[::-1]

    def ending_at(self, gm: GraphModule, node: Node, taken: Iterable[Node] = ()) -> Any:
        """The matches whose last operator is this node, the best first."""
        seen: set[int] = set()
        for key in keys_of(gm, node):
            for config in self._by_last.get(key, ()):
                nodes = _chain(gm, node, config.sequence)
                if nodes and id(config) not in seen and not any(one in taken for one in nodes):
                    seen.add(id(config))
                    yield Match(nodes, config)


def module_of(gm: GraphModule, node: Node) -> nn.Module | None:
    """The module that a node calls."""
    return attribute(gm, str(node.target)) if node.op == "call_module" else None


def keys_of(gm: GraphModule, node: Node) -> tuple[Hashable, ...]:
    """What a pattern can call a node: the classes whose forward its module has, its function, its method.

    An ATen operator answers to its name; see `_names`.
    """
    if node.op == "call_module":
        kind: Any = type(module_of(gm, node))
        return tuple(one for one in kind.__mro__[:-2] if getattr(one, "forward", None) is kind.forward)
    if isinstance(node.target, OpOverload):
        return (f"aten.{node.target._schema.name.partition('::')[2].rstrip('_')}",)
    return (node.target,) if node.op in ("call_function", "call_method") else ()


def _names(element: Any) -> tuple[Hashable, ...]:
    """A function, method or class of modules itself, and the ATen operator of that name: nn.MaxPool2d, max_pool2d."""
    name = element if isinstance(element, str) else getattr(element, "__name__", "")
    if isinstance(element, type):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return element, f"aten.{name.rstrip('_')}"


def _chain(gm: GraphModule, last: Node, sequence: tuple[Any, ...]) -> tuple[Node, ...]:
    """The nodes of a sequence that ends in `last`; () where it does not stand there."""
    nodes = [last]
    for element in reversed(sequence[:-1]):
        before = nodes[0].args[0] if nodes[0].args else None
        if not isinstance(before, Node) or len(before.users) != 1:
            return ()
        if set(keys_of(gm, before)).isdisjoint(_names(element)):
            return ()
        nodes.insert(0, before)
    return tuple(nodes)
