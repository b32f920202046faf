"""GPTQ: round a weight column by column, and let the columns that are still to come make up for each error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023,
arXiv:2210.17323, algorithm 1, with its order by activations (columns with the largest inputs first). With H = X X^T of
the inputs and U the upper Cholesky factor of its inverse, a column that is rounded by e = (w - q) / U_jj takes e U_j
off the columns behind it. Grids are those of the quantizer, per tensor, channel or group, settled on the weight before
the first column is rounded, so that any order of columns works in groups too. The goal is what the float model returns,
on inputs of its own, as in Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, ICML
2025, arXiv:2504.02692; here by least squares before the first column, not column by column.
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
from ..graph.module import ExportedModule
from ..pt2e.observed import QParams
from .by_site import Chosen, choose_site_by_site
from .input_moments import InputMoments, damped
from .reconstruction import Reconstructed
from .rounding import along, rounded
from .sites import Site, static_grid
from .soft_rounding import clipped
from .stream import Stream

__all__ = ["gptq"]

_COLUMNS = 128
"""Columns between two updates of all that follow (the paper's B)."""
_ROWS = 4096
"""Rows at a time, so that an output layer of a hundred thousand takes no more than others."""
_LEAST_DAMP = 1e-3
"""H is summed in float32; less could leave it without an inverse where one of thousands of inputs has all the power."""


@checked(CaptureError)
def gptq(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    asymmetric: bool = True,
    act_order: bool = True,
    damp: float = 0.01,
    resume: str | Path | None = None,
    consume: bool = False,
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Round the weights of each linear and convolution so that what it returns stays as it was, in closed form.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was, unless it is consumed.
        data: batches, as `graph.run.batches_of` takes them. A site has its inputs behind all that was rounded before
            it; a few thousand of them (tokens, positions of images) for each input channel are plenty.
        asymmetric: aim at what the site returns in the float model, and so make up for what was rounded before it, too;
            False aims at its own weight, as the paper does.
        act_order: round the columns with the largest inputs first; False goes from left to right.
        damp: part of the mean of H's diagonal that is added to it. More holds the weights nearer to what they were.
        resume: a folder for what is done, a file for each layer; a second call goes on from there, after a crash too.
        consume: take each weight out of `prepared` when its place is taken, so that the model is not held twice. It is
            of no use afterwards. What else holds the float weights, the exported program too, has to let go of them.

    Returns:
        The prepared graph with weights on their grids, to be converted like the original, and what was done. Gains are
        of what a weight can change of the error. What is no better than rounding to the nearest is left as it was.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers; or damp is not in [0.001, 1].
        CalibrationError: there is no batch, the model fails on one, or inputs of a site are not finite.
        FileError: the file cannot be written, or is of another job.
    """
    if not _LEAST_DAMP <= damp <= 1:
        raise CaptureError(f"gptq: damp must be in [{_LEAST_DAMP}, 1], got {damp}")
    job = _Job(asymmetric, act_order, damp)
    return choose_site_by_site(f"gptq({job})", prepared, data, job.choose, resume, consume)


@dataclass(frozen=True)
class _Job:
    asymmetric: bool
    act_order: bool
    damp: float

    def choose(self, stream: Stream, site: Site, weight: Tensor) -> Chosen:
        """The better of two grids, where it is better than rounding to the nearest."""
        moments = InputMoments(stream, site)
        goal = moments.aimed(weight, self.damp) if self.asymmetric else weight
        grid = static_grid(stream.gm, site, weight)
        order = self._order(moments.values)
        factor = _inverse_factor(moments.values, order, self.damp)
        tried = [(one, _rounded(goal, one, moments, order, factor)) for one in (grid, clipped(weight, grid))]
        before = moments.power(rounded(weight, grid) - goal)
        after, (best, new) = min(((moments.power(one[1] - goal), one) for one in tried), key=lambda pair: pair[0])
        if best.scale is None or best.zero_point is None or not after < before:
            return None
        return before / max(after, 1e-30), (best.scale, best.zero_point, new.to(weight.dtype))

    def _order(self, moments: Tensor) -> Tensor:
        """Of the columns, (groups, columns)."""
        size = moments.diagonal(dim1=1, dim2=2)
        if self.act_order:
            return size.argsort(dim=1, descending=True, stable=True)
        return torch.arange(size.shape[1], device=size.device).expand_as(size)


def _rounded(weight: Tensor, grid: QParams, moments: InputMoments, order: Tensor, factor: Tensor) -> Tensor:
    """The weight on its grid, in float32; columns in this order, with the inverse's factor in it."""
    bounds, done = (grid.quant_min, grid.quant_max), []
    each = (moments.matrix(one.expand_as(weight)).split(_ROWS, 1) for one in (weight, *along(weight, grid)))
    for parts in zip(*each, strict=True):
        ours, steps, zeros = (_taken(part.float(), order) for part in parts)
        columns = _Columns(ours, steps, zeros, bounds)
        columns.round(factor)
        done.append(_taken(columns.values, order.argsort(1)))
    return torch.cat(done, 1).reshape(weight.shape)


def _taken(matrix: Tensor, order: Tensor) -> Tensor:
    """The columns of (groups, rows, columns) in this order, (groups, columns)."""
    return matrix.gather(2, order[:, None].expand_as(matrix))


def _inverse_factor(moments: Tensor, order: Tensor, damp: float) -> Tensor:
    """U of the inverse, U^T U, in this order; an input that is always zero counts as a small one."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(_taken(_taken(moments, order).mT, order), damp)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


class _Columns:
    """A weight (groups, rows, columns) on its way to its grid; `values` are on it when `round` is done.

    Held by columns, (groups, columns, rows): one of them is read and written in one piece.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> None:
        self._held, self._scale, self._zero_point = (one.mT.contiguous() for one in (weight, scale, zero_point))
        self._bounds = bounds

    @property
    def values(self) -> Tensor:
        return self._held.mT

    def round(self, factor: Tensor) -> None:
        for start in range(0, self._held.shape[1], _COLUMNS):
            end = min(start + _COLUMNS, self._held.shape[1])
            errors = [self._one(at, end, factor) for at in range(start, end)]
            self._held[:, end:] -= factor[:, start:end, end:].mT @ torch.stack(errors, 1)

    def _one(self, at: int, end: int, factor: Tensor) -> Tensor:
        """Round a column and let those before `end` make up for it; its error, (groups, rows)."""
        scale, zero_point, old = self._scale[:, at], self._zero_point[:, at], self._held[:, at].clone()
        codes = (old / scale + zero_point).round().clamp(*self._bounds)
        new = (codes - zero_point) * scale
        error = (old - new) / factor[:, at, at, None]
        self._held[:, at:end] -= factor[:, at, at:end, None] * error[:, None]
        self._held[:, at] = new
        return error
