"""Modules with a weight become reference modules: float layers whose weight lies on the grid of its qconfig."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..backend_config import BackendConfig, BackendPatternConfig
from ..graph.attributes import attribute, free_name, set_attribute
from ..nn.observed import weight_grid
from ..pt2e.record import Record
from ..qconfig import QConfig
from .matching import Patterns

__all__ = ["to_reference_modules"]


def to_reference_modules(gm: GraphModule, record: Record, backend_config: BackendConfig) -> GraphModule:
    """Put a reference module in the place of each quantized one; what is called in float too stays there, for that."""
    patterns = Patterns(one for one in backend_config.configs if len(one.sequence) == 1)
    quantized = {decision.node for decision in record.quantized}
    calls: dict[str, list[Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_module"):
        calls[str(node.target)].append(node)
    for path, nodes in calls.items():
        inside = [node for node in nodes if node.name in quantized]
        match = next(patterns.ending_at(gm, inside[0]), None) if inside else None
        made = None if match is None else _reference(attribute(gm, path), match.config)
        if made is None:
            continue
        target = path if len(inside) == len(nodes) else next(free_name(gm, f"{path.replace('.', '_')}_"))
        set_attribute(gm, target, made)
        for node in inside:
            node.target = target
    return gm


def _reference(module: Any, config: BackendPatternConfig) -> nn.Module | None:
    """The reference form of a module; None where it has none, or its weight stays float."""
    make, qconfig = config.reference_quantized_module, getattr(module, "qconfig", None)
    if make is None or qconfig is None:
        return None
    trained = getattr(module, "weight_fake_quant", None)
    plain = module.to_float() if trained is not None else module
    root = plain[0] if isinstance(plain, nn.Sequential) else plain
    if config.root_module is not None and not isinstance(root, config.root_module):
        return None
    made = _rounded(root, make, trained, qconfig)
    if made is None or root is plain:
        return made
    held: nn.Module = copy.copy(plain)  # a container shares what follows the product
    held._modules = {**plain._modules, "0": made}
    return held


def _rounded(root: nn.Module, make: Any, trained: Any, qconfig: QConfig) -> nn.Module | None:
    names = [name for name, _ in root.named_parameters() if name.startswith("weight")]
    observers = {name: copy.deepcopy(trained) if trained is not None else qconfig.weight() for name in names}
    if any(getattr(one, "dtype", torch.float) is torch.float for one in observers.values()):
        return None
    grids = {name: weight_grid(getattr(root, name).detach(), one) for name, one in observers.items()}
    made: nn.Module = make.from_float(root, grids if isinstance(root, nn.RNNBase | nn.RNNCellBase) else grids["weight"])
    return made.train(root.training)
