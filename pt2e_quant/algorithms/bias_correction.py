"""Bias correction: give each op a bias that takes away the mean of its error, channel by channel.

Rounding a weight changes W x by (dW) x, whose mean over data is not zero: dW E[x]. Taking that off the bias costs
nothing at run time (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
arXiv:1906.04721, section 4.2). E[x] is measured on data here (its appendix D): in the order of the graph, so that each
op is corrected behind those before it, or each for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import attribute
from ..graph.module import ExportedModule, finish
from ..progress import counted
from ..where import exported_name, module_path
from .sites import Site, give_bias, set_parameter, sites_of, working_copy
from .stream import Lane, Stream

__all__ = ["Corrected", "correct_bias"]


@dataclass(frozen=True)
class Corrected:
    """What became of the bias of one op.

    Args:
        node: name of the op in the exported program.
        module: path of its module; None where export recorded none.
        share: of the power of its error, the part that was the means; 0.0 where nothing was done.
        reason: why nothing was done; None where something was.
    """

    node: str
    module: str | None
    share: float
    reason: str | None = None

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        done = f"the means were {self.share:.0%} of its error" if self.reason is None else f"left alone ({self.reason})"
        return f"{self.node}{where}: {done}"


@checked(CaptureError)
def correct_bias(
    prepared: GraphModule, data: Iterable[Any], *, sequential: bool = True
) -> tuple[ExportedModule, list[Corrected]]:
    """Correct the biases of the linears and convolutions with rounded weights; those without a bias get one.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was.
        data: batches, as `graph.run.batches_of` takes them; a few hundred samples are enough for means.
        sequential: correct each op for all that rounding did up to it; False for its own error on exact inputs alone.

    Returns:
        The prepared graph with other biases, to be converted like the original, and what was done to each op.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers.
        CalibrationError: there is no batch, or the model fails on one.
    """
    gm = working_copy(prepared, "correct_bias(prepared, data)")
    sites, reasons = sites_of(gm)
    biases = give_bias(gm, sites)
    named = {site.node: site for site in sites}
    done: list[Corrected] = []
    stream = Stream(gm, data, "correct_bias(prepared, data)")

    def correct(node: Node) -> None:
        site = named.get(node)
        if site is not None and node.name in biases:
            done.append(_correct(stream, site, biases[node.name], sequential))
        elif node.name in reasons or site is not None:
            done.append(_left(node, reasons.get(node.name, "its bias is computed")))

    stream.advance(counted(list(gm.graph.nodes), "correcting biases"), correct)
    return finish(gm), done


def _left(node: Node, reason: str) -> Corrected:
    return Corrected(exported_name(node), module_path(node), 0.0, reason)


def _correct(stream: Stream, site: Site, bias: Node, sequential: bool) -> Corrected:
    """Take the mean error of each channel off the bias, and off what was computed with the old one."""
    errors = [_by_channel(_error(stream, lane, site, sequential), site) for lane in stream.lanes]
    count = sum(error.shape[1] for error in errors)
    if not count:
        return _left(site.node, "it computed no value")
    mean = sum((error.sum(1, dtype=torch.float64) for error in errors), torch.zeros((), dtype=torch.float64)) / count
    power = sum(float(error.double().square().sum()) for error in errors)
    old = attribute(stream.gm, str(bias.target))
    set_parameter(stream.gm, bias, old - mean.to(old))
    change = (attribute(stream.gm, str(bias.target)) - old).reshape(-1, *[1] * (-1 - site.channels))
    for lane in stream.lanes:
        lane.rounded[site.node] = lane.rounded[site.node] + change
    share = float(mean.square().sum()) * count / power if power else 0.0
    return Corrected(exported_name(site.node), module_path(site.node), share)


def _error(stream: Stream, lane: Lane, site: Site, sequential: bool) -> Tensor:
    exact, found = lane.exact[site.node], lane.rounded[site.node]
    if not sequential:
        found = stream.compute(site.node, _Exact(stream, lane))
    return found - exact  # type: ignore[no-any-return]


def _by_channel(error: Tensor, site: Site) -> Tensor:
    return error.movedim(site.channels, 0).flatten(1)


class _Exact(dict[Node, Any]):
    """Exact values; behind an observer, rounded there and nowhere before."""

    def __init__(self, stream: Stream, lane: Lane) -> None:
        super().__init__()
        self._stream, self._lane = stream, lane

    def __missing__(self, node: Node) -> Any:
        value = self._lane.exact[node]
        return self._stream.round(node, str(node.target), value) if node.op == "call_module" else value
