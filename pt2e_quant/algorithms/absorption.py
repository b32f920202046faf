"""High-bias absorption: what a channel always has at least moves into the biases of the next layers: ranges shrink.

relu(y) = relu(y - c) + c wherever y >= c. With c = max(0, mean - 3 deviations) of y in a channel that holds for nearly
all values; c goes off the bias of the layer that makes y, and W c is added to those of the layers that read it (Nagel
et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, arXiv:1906.04721, section
4.1.3). Comes after `equalize`, which makes such biases, and before prepare. Mean and deviation are measured on data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..checks import checked
from ..errors import CaptureError
from ..graph.module import ExportedModule, finish
from ..graph.run import Watcher, batches_of
from ..ops import LINEAR, RELU, factors, fills_zeros, is_conv, is_value_preserving
from .folds import channels_of
from .layer_pairs import Pair, pairs_of, ready, spread_over

__all__ = ["Absorbed", "absorb_biases"]


@dataclass(frozen=True)
class Absorbed:
    """What became of the bias of a layer.

    Args:
        producer: name of the layer.
        readers: names of the layers that read what it makes.
        channels: how many channels gave something.
        largest: the most that one gave, in units of the tensor.
        reason: why nothing was done; None where something was.
    """

    producer: str
    readers: tuple[str, ...]
    channels: int
    largest: float
    reason: str | None = None

    def __str__(self) -> str:
        done = f"{self.channels} channels gave up to {self.largest:.3g}"
        pair = f"{self.producer} to {', '.join(self.readers)}"
        return f"{pair}: {done if self.reason is None else f'left alone ({self.reason})'}"


@checked(CaptureError)
def absorb_biases(model: ExportedProgram | GraphModule, data: Iterable[Any]) -> tuple[ExportedModule, list[Absorbed]]:
    """Absorb high biases between convolutions and linears with a relu between them, and no pad of zeros.

    Args:
        model: an exported float model in evaluation mode; it stays as it was. Batch norms are folded.
        data: batches, as `graph.run.batches_of` takes them; a few are enough.

    Returns:
        The graph, to be prepared like the original; its outputs move where a value lies below its c. And what was done.

    Raises:
        CaptureError: `model` is no exported model.
        CalibrationError: there is no batch, or the model fails on one.
    """
    gm = ready(model)
    pairs, _ = pairs_of(gm)
    able = {pair: _why_not(pair) for pair in pairs}
    statistics = _measured(finish(gm), {pair.producer for pair in pairs if able[pair] is None}, data)
    done = []
    for pair, reason in able.items():
        amounts = None if reason else _amounts(*statistics[pair.producer])
        if amounts is not None and bool(amounts.any()):
            _absorb(pair, amounts)
            pair.write(gm)
        elif reason is None:
            reason = "no channel is always above 0"
        done.append(_told(pair, amounts, reason))
    return finish(gm), done


def _told(pair: Pair, amounts: Tensor | None, reason: str | None) -> Absorbed:
    count = 0 if amounts is None else int((amounts > 0).sum())
    largest = 0.0 if amounts is None else float(amounts.amax())
    return Absorbed(pair.producer.name, tuple(node.name for node in pair.readers), count, largest, reason)


def _why_not(pair: Pair) -> str | None:
    between = pair.path[1:]
    if not any(node.target in RELU for node in between):
        return "there is no relu between them"
    others = [node for node in between if node.target not in RELU and not is_value_preserving(node)]
    if others or any(map(fills_zeros, between)):
        return f"a constant does not pass through {(others or list(between))[0].name}"
    if any(factors(node)[2] is None for node in (pair.producer, *pair.readers)):
        return "a layer has no bias"
    padded = next((node.name for node in pair.readers if _pads(node)), None)
    return f"{padded} pads with zeros" if padded else None


def _pads(node: Node) -> bool:
    if node.target in LINEAR:
        return False
    padding: Any = bind(node)["padding"]
    return not is_conv(node) or (padding not in ("valid", 0) and any(padding))


Sums = tuple[int, Tensor, Tensor]


def _measured(gm: ExportedModule, nodes: set[Node], data: Iterable[Any]) -> dict[Node, Sums]:
    """Of each node: how many values a channel had; their sums, and those of their squares."""
    found: dict[Node, Sums] = {}

    def see(node: Node, value: Any) -> None:
        if node in nodes:
            flat = value.detach().movedim(channels_of(node), 0).flatten(1).double()
            count, sums, squares = found.get(node, (0, torch.zeros(()), torch.zeros(())))
            found[node] = (count + flat.shape[1], sums + flat.sum(1), squares + flat.square().sum(1))

    for batch in batches_of(data, "absorb_biases(model, data)"):
        Watcher(gm, see).run_batch(batch)
    return found


def _amounts(count: int, sums: Tensor, squares: Tensor) -> Tensor:
    mean = sums / max(count, 1)
    deviation = (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    return (mean - 3 * deviation).clamp_min(0).float()


def _absorb(pair: Pair, amounts: Tensor) -> None:
    bias = factors(pair.producer)[2]
    pair.values[bias] = pair.values[bias] - amounts.to(pair.values[bias])
    for node in pair.readers:
        weight, read = factors(node)[1:]
        added = spread_over(pair.values[weight], amounts[pair.rows].to(pair.values[weight]), node)
        pair.values[read] = pair.values[read] + added
