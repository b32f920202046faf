"""GPTQ: round a weight column by column, and let the columns that are still to come make up for each error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023,
arXiv:2210.17323, algorithm 1, with its order by activations (columns with the largest inputs first). With H = X X^T of
the inputs and U the upper Cholesky factor of its inverse, a column that is rounded by e = (w - q) / U_jj takes e U_j
off the columns behind it. Grids are those of the quantizer, per tensor, channel or group, settled on the weight before
the first column is rounded, so that any order of columns works in groups too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import attribute
from ..graph.module import ExportedModule, finish
from ..progress import counted
from ..pt2e.observed import QParams
from .finished import Finished, Outcome
from .input_moments import InputMoments
from .reconstruction import Reconstructed
from .rounding import along, rounded
from .sites import Site, choose_weight, sites_of, static_grid, working_copy
from .soft_rounding import clipped
from .stream import Stream

__all__ = ["gptq"]

_COLUMNS = 128
"""Columns between two updates of all that follow (the paper's B)."""
_LEAST_DAMP = 1e-3
"""H is summed in float32; less could leave it without an inverse where one of thousands of inputs has all the power."""


@checked(CaptureError)
def gptq(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    act_order: bool = True,
    damp: float = 0.01,
    resume: str | Path | None = None,
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Round the weights of each linear and convolution so that what it returns stays as it was, in closed form.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was.
        data: batches, as `graph.run.batches_of` takes them. A site has its inputs behind all that was rounded before
            it; a few thousand of them (tokens, positions of images) for each input channel are plenty.
        act_order: round the columns with the largest inputs first; False goes from left to right.
        damp: part of the mean of H's diagonal that is added to it. More holds the weights nearer to what they were.
        resume: a file that holds the layers that are done, written after each; a second call goes on from there.

    Returns:
        The prepared graph with weights on their grids, to be converted like the original, and what was done. What is no
        better on the data than rounding to the nearest is left as it was.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers; or damp is not in [0.001, 1].
        CalibrationError: there is no batch, the model fails on one, or inputs of a site are not finite.
        FileError: the file cannot be written, or is of another job.
    """
    if not _LEAST_DAMP <= damp <= 1:
        raise CaptureError(f"gptq: damp must be in [{_LEAST_DAMP}, 1], got {damp}")
    gm = working_copy(prepared, "gptq(prepared, data)")
    sites, reasons = sites_of(gm)
    stream = Stream(gm, data, "gptq(prepared, data)")
    job = _Job(act_order, damp)
    finished = Finished(resume, f"{job}, {len(sites)} layers, {len(stream.lanes)} batches")
    done = [Reconstructed(name, (), 1.0, reason) for name, reason in reasons.items()]
    for number, site in enumerate(counted(sites, "gptq")):
        stream.advance_to(site.node)
        gain, chosen = finished.recall(number, lambda: job.solve(stream, site))  # noqa: B023
        reason = None
        if chosen:
            choose_weight(gm, site, *chosen[site.node.name])
        else:
            reason = InputMoments.why_not(site) or "nothing was better"
        done.append(Reconstructed(site.node.name, (site.node.name,), gain, reason))
    return finish(gm), done


@dataclass(frozen=True)
class _Job:
    act_order: bool
    damp: float

    def solve(self, stream: Stream, site: Site) -> Outcome:
        """The gain; scale, zero point and weight, where it is above 1."""
        if InputMoments.why_not(site) is not None:
            return 1.0, {}
        weight: Tensor = attribute(stream.gm, str(site.weight.target)).detach()
        grid, moments = static_grid(stream.gm, site, weight), InputMoments(stream, site)
        before = moments.power(rounded(weight, grid) - weight)
        tried = [(one, self._rounded(weight, one, moments)) for one in (grid, clipped(weight, grid))]
        after, (best, new) = min(((moments.power(one[1] - weight), one) for one in tried), key=lambda pair: pair[0])
        if not after < before:
            return 1.0, {}
        return before / max(after, 1e-30), {site.node.name: (best.scale, best.zero_point, new)}  # type: ignore[dict-item]

    def _rounded(self, weight: Tensor, grid: QParams, moments: InputMoments) -> Tensor:
        """The weight in float, on its grid."""
        size = moments.values.diagonal(dim1=1, dim2=2)
        order = size.argsort(dim=1, descending=True, stable=True)
        if not self.act_order:
            order = torch.arange(size.shape[1], device=size.device).expand_as(size)
        scale, zero_point = along(weight, grid)
        ours, steps, zeros = (
            _taken(moments.matrix(one.expand_as(weight).float()), order) for one in (weight, scale, zero_point)
        )
        columns = _Columns(ours, steps, zeros, (grid.quant_min, grid.quant_max))
        both = _taken(_taken(moments.values, order).mT, order)
        columns.round(_inverse_factor(both, self.damp))
        return _taken(columns.values, order.argsort(1)).reshape(weight.shape).to(weight.dtype)


def _taken(matrix: Tensor, order: Tensor) -> Tensor:
    """The columns of (groups, rows, columns) in this order, (groups, columns)."""
    return matrix.gather(2, order[:, None].expand_as(matrix))


def _inverse_factor(moments: Tensor, damp: float) -> Tensor:
    """U of the inverse, U^T U; an input that is always zero counts as a small one."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = moments + torch.diag_embed((damp * mean)[:, None].expand(moments.shape[:2]))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


class _Columns:
    """A weight (groups, rows, columns) on its way to its grid; `values` are on it when `round` is done."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> None:
        self.values, self._scale, self._zero_point, self._bounds = weight.clone(), scale, zero_point, bounds

    def round(self, factor: Tensor) -> None:
        for start in range(0, self.values.shape[2], _COLUMNS):
            end = min(start + _COLUMNS, self.values.shape[2])
            errors = [self._one(at, end, factor) for at in range(start, end)]
            self.values[:, :, end:] -= torch.stack(errors, 2) @ factor[:, start:end, end:]

    def _one(self, at: int, end: int, factor: Tensor) -> Tensor:
        """Round a column and let those before `end` make up for it; its error, (groups, rows)."""
        scale, zero_point, old = self._scale[:, :, at], self._zero_point[:, :, at], self.values[:, :, at].clone()
        codes = (old / scale + zero_point).round().clamp(*self._bounds)
        new = (codes - zero_point) * scale
        error = (old - new) / factor[:, at, at, None]
        self.values[:, :, at:end] -= error[:, :, None] * factor[:, None, at, at:end]
        self.values[:, :, at] = new
        return error
