"""Input moments: what a site's inputs look like to its weight, as sums of products of two inputs, X X^T.

The error of a linear or convolution whose weight is off by D is tr(D X X^T D^T): all that an algorithm must know of the
data to choose a weight. A convolution is seen as the matrix product that it is, each kernel as one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import indent

import torch
from torch import Tensor

from ..arguments import bind
from ..errors import CalibrationError
from ..ops import LINEAR, factors, is_conv
from ..where import locate
from .sites import Site
from .stream import Stream

__all__ = ["InputMoments", "damped"]


class InputMoments:
    """X X^T of one site over all batches, with inputs as the graph at work rounds them.

    Args:
        stream: stands just before the site.
        site: a linear, or a convolution that is not transposed.

    `values` has shape (groups of the convolution, columns, columns), in float64.

    Raises:
        CalibrationError: inputs are not finite.
    """

    @staticmethod
    def why_not(site: Site) -> str | None:
        """Why there are none of this site."""
        return None if site.node.target in LINEAR or is_conv(site.node) else "it is a transposed convolution"

    def __init__(self, stream: Stream, site: Site) -> None:
        self._site = site
        self._groups = int(bind(site.node).get("groups", 1))
        self._stream, self._source = stream, factors(site.node)[0]
        parts = (part for lane in stream.lanes for part in self._rows(lane.rounded[self._source]))
        with torch.no_grad():
            self.values = sum(((part.mT @ part).double() for part in parts), torch.zeros(()))
        if not bool(self.values.isfinite().all()):
            raise CalibrationError(
                f"inputs are NaN or infinite in the prepared graph\n{indent(locate(site.node), '  ')}"
            )

    def matrix(self, like_weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, rows, columns)."""
        return like_weight.reshape(self._groups, like_weight.shape[0] // self._groups, -1)

    def power(self, error: Tensor) -> float:
        """Power of the site's error on the data when its weight is off by `error`, which has the weight's shape."""
        rows = self.matrix(error).double()
        return float(((rows @ self.values) * rows).sum())

    def spread(self, error: Tensor, group_size: int | None) -> Tensor:
        """Parts of `power` by value of the weight, in float32; of each group as if it were the only one.

        Args:
            error: as `power` takes it.
            group_size: neighbours in a row that count together; None for whole rows.
        """
        rows = self.matrix(error).float().unflatten(2, (-1, group_size or self.values.shape[2]))
        count, size = rows.shape[2:]
        blocks = self.values.float().unflatten(2, (count, size)).unflatten(1, (count, size))
        own = blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)
        parts: Tensor = (torch.einsum("grni,gnij->grnj", rows, own) * rows).reshape(error.shape)
        return parts

    def aimed(self, weight: Tensor, damp: float) -> Tensor:
        """The weight, in float32, that makes of the rounded inputs nearly what `weight` makes of exact ones.

        W + W (X X~^T - X~ X~^T) (X~ X~^T + damp)^-1, the least squares of W' X~ - W X held near W.
        """
        crossed = torch.zeros_like(self.values)
        with torch.no_grad():
            for lane in self._stream.lanes:
                pairs = zip(*(self._rows(values[self._source]) for values in (lane.exact, lane.rounded)), strict=True)
                for exact, found in pairs:
                    crossed += exact.mT @ found
        rows = self.matrix(weight).double()
        change: Tensor = torch.linalg.solve(damped(self.values, damp), rows @ (crossed - self.values), left=False)
        return (rows + change).float().reshape(weight.shape)

    def _rows(self, x: Tensor) -> Iterator[Tensor]:
        """(groups, positions, columns) in float32, image by image."""
        if self._site.node.target in LINEAR:
            yield x.float().reshape(1, -1, x.shape[-1])
            return
        shape = self._site.weight.meta["val"].shape
        images = x.reshape(-1, *x.shape[self._site.channels :])
        kernels = _one_hot(shape[1:], images).repeat(self._groups, *[1] * (len(shape) - 1))
        arguments = {**bind(self._site.node), "weight": kernels, "bias": None}
        for image in images.split(1):
            columns = self._site.node.target(**{**arguments, "input": image.float()})  # type: ignore[operator]
            yield columns.reshape(self._groups, kernels.shape[0] // self._groups, -1).mT


def _one_hot(shape: torch.Size, like: Tensor) -> Tensor:
    """A kernel for each value of a window, which gives that value."""
    count = shape.numel()
    return torch.eye(count, device=like.device).reshape(count, *shape)


def damped(moments: Tensor, damp: float) -> Tensor:
    """With this part of the mean of the diagonal added to it: an input that is always zero counts a little."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    return moments + torch.diag_embed((damp * mean)[:, None].expand(moments.shape[:2]))
