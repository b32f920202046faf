"""Hashes of models and of data: equal where what they are made of is equal, bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .nested import graphs

__all__ = ["Fingerprint", "of_graph", "of_model"]


class Fingerprint:
    """SHA-256 of values that are added one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, values: Any) -> None:
        """Tensors by dtype, shape and bytes, all else by its text; containers by what they hold."""
        leaves, tree = pytree.tree_flatten(values)
        self._hash.update(str(tree).encode())
        for leaf in leaves:
            self._hash.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def of_model(exported: ExportedProgram) -> str:
    """Of the graph, its parameters, buffers and constants."""
    found = Fingerprint()
    found.add([str(exported.graph), dict(sorted(exported.state_dict.items()))])
    found.add({name: value for name, value in sorted(exported.constants.items()) if isinstance(value, Tensor)})
    return str(found)


def of_graph(converted: GraphModule) -> str:
    """Of a converted graph and all tensors in it."""
    found = Fingerprint()
    found.add([str(part.graph) for _, part in graphs(converted)])
    found.add(dict(sorted(converted.state_dict().items())))
    return str(found)


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    flat = plain.reshape(-1).view(torch.uint8) if plain.numel() else plain.new_empty(0, dtype=torch.uint8)
    return f"{plain.dtype}{list(plain.shape)}".encode() + bytes(flat.numpy().tobytes())
