"""Fuse modules of a symbolic graph that one module stands for: a convolution, its batch norm, its relu."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ..backend_config import BackendConfig
from ..graph.attributes import set_attribute
from ..graph.module import tidy
from ..meta import FOLDED_KEY
from ..reasons import Folded
from ..where import source_line, type_name
from .matching import Match, Patterns, module_of

__all__ = ["fuse"]


def fuse(gm: GraphModule, backend_config: BackendConfig, *, is_qat: bool) -> GraphModule:
    """Fuse what the patterns with a fuser method name, in place; a module that is called twice stays.

    Raises:
        ConversionError: a batch norm is to be folded in training mode.
    """
    patterns = Patterns(config for config in backend_config.configs if config.fuser_method is not None)
    calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    gone: set[Node] = set()
    for node in list(reversed(gm.graph.nodes)):
        for match in () if node in gone else patterns.ending_at(gm, node, gone):
            if any(calls[str(one.target)] > 1 for one in match.nodes[:-1]) or not _fuse(gm, match, is_qat):
                continue
            gone.update(match.nodes)
            break
    return tidy(gm)


def _fuse(gm: GraphModule, match: Match, is_qat: bool) -> bool:
    first, last = match.nodes[0], match.nodes[-1]
    modules = [_module(gm, node, first) for node in match.nodes]
    made = match.config.fuser_method(is_qat, *modules)  # type: ignore[misc]
    if made is None:
        return False
    folded = [_folded(gm, node, first) for node in match.nodes[1:] if _is_norm(gm, node)]
    gm.meta.setdefault(FOLDED_KEY, []).extend([] if is_qat else folded)
    set_attribute(gm, str(first.target), made)
    last.replace_all_uses_with(first)
    for node in reversed(match.nodes[1:]):
        gm.graph.erase_node(node)
    return True


def _module(gm: GraphModule, node: Node, first: Node) -> Any:
    """The module of a node; a function in a row of modules is a relu."""
    called = module_of(gm, node)
    if called is not None:
        return called
    return nn.ReLU().train(module_of(gm, first).training)  # type: ignore[union-attr]


def _is_norm(gm: GraphModule, node: Node) -> bool:
    return isinstance(module_of(gm, node), nn.modules.batchnorm._BatchNorm)


def _folded(gm: GraphModule, norm: Node, product: Node) -> Folded:
    kind = type_name(type(module_of(gm, norm)))
    return Folded(norm.name, product.name, str(norm.target), kind, str(product.target), source_line(norm))
