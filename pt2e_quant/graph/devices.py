"""Where a graph computes: an exported graph follows when its module moves to another device.

torch.export writes the device of the day into the graph (zeros(device=cpu), .to("cpu"), checks of metadata). When
`ExportedModule` moves, `move_graph` lets those literals, and the recorded values, follow.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

__all__ = ["device_of", "move_graph", "recorded_device"]


def device_of(module: nn.Module) -> torch.device | None:
    """The one device that all parameters and buffers are on; None when there are none, or several."""
    devices = {tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())}
    return devices.pop() if len(devices) == 1 else None


def recorded_device(graph: Graph) -> torch.device | None:
    """The device that the parameters were on when the graph was made; None where it does not say."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="get_attr"))
    return next((value.device for value in values if isinstance(value, Tensor)), None)


def move_graph(gm: GraphModule, device: torch.device) -> None:
    """Write `device` in the place of every device that the graph, or a graph nested in it, names."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), moved)
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(lambda value: _recorded_on(value, device), node.meta["val"])
        module.recompile()


def _recorded_on(value: Any, device: torch.device) -> Any:
    mode = getattr(value, "fake_mode", None)
    if mode is None or not isinstance(value, Tensor):
        return value
    with mode:
        return value.to(device)
