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

_ROWS = 4096
"""Rows of a weight at a time: in float64, all of an output layer would take more than the model."""
_SAMPLE = 512
"""Rows that show how far a weight should follow."""
_MORE = (1.0, 30.0, 1000.0)
"""Times the damping that was asked for."""


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
        with torch.no_grad():
            self.values = self._moments(0) + self._moments(1)
        if not bool(self.values.isfinite().all()):
            raise CalibrationError(
                f"inputs are NaN or infinite in the prepared graph\n{indent(locate(site.node), '  ')}"
            )

    def matrix(self, like_weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, rows, columns)."""
        return like_weight.reshape(self._groups, like_weight.shape[0] // self._groups, -1)

    def power(self, error: Tensor) -> float:
        """Power of the site's error on the data when its weight is off by `error`, which has the weight's shape."""
        parts = (part.double() for part in self.matrix(error).split(_ROWS, 1))
        return sum(float(((part @ self.values) * part).sum()) for part in parts)

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

        W + W (X X~^T - X~ X~^T) (X~ X~^T + damp)^-1, the least squares of W' X~ - W X held near W. How near is found
        out: of `damp`, more of it, and not moving at all, what serves one half of the data when it follows from the
        other. With fewer inputs than a few for each column, least squares would learn the rounding of these by heart.
        """
        rows = self.matrix(weight)
        with torch.no_grad():
            enough = self._enough(rows[:, :: -(-rows.shape[1] // _SAMPLE)], damp)
            if enough is None:
                return weight.float()
            factor = torch.linalg.cholesky(damped(self.values, enough))
            parts = [part + _solved(self._pull(part, 0) + self._pull(part, 1), factor) for part in rows.split(_ROWS, 1)]
        return torch.cat(parts, 1).float().reshape(weight.shape)

    def _enough(self, rows: Tensor, damp: float) -> float | None:
        """The damping, from `damp` up, with which changes serve the other half best; None where no change does."""
        costs = dict.fromkeys((damp * more for more in _MORE), 0.0)
        for half in range(2):
            moments, pull = self._moments(half), self._pull(rows, half)
            for one in costs:
                change = _solved(pull, torch.linalg.cholesky(damped(moments, one)))
                costs[one] += self._cost(change, rows, 1 - half)
        best = min(costs, key=costs.__getitem__)
        return best if costs[best] < 0 else None

    def _cost(self, change: Tensor, rows: Tensor, half: int) -> float:
        """Power of the error of W + D less that of W, |D X~|^2 - 2 D X~ W (X - X~)."""
        cost = 0.0
        for exact, found in self._parts(half, "exact", "rounded"):
            made, wanted = found.double() @ change.mT, (exact - found).double() @ rows.mT.double()
            cost += float(((made - 2 * wanted) * made).sum())
        return cost

    def _pull(self, rows: Tensor, half: int) -> Tensor:
        """W (X - X~) X~^T of one half of the data, in float64."""
        pairs = self._parts(half, "exact", "rounded")
        products = (((exact - found) @ rows.float().mT).mT @ found for exact, found in pairs)
        return sum((product.double() for product in products), torch.zeros(()))

    def _moments(self, half: int) -> Tensor:
        """X~ X~^T of one half of the data, in float64."""
        return sum(((part.mT @ part).double() for (part,) in self._parts(half, "rounded")), torch.zeros(()))

    def _parts(self, half: int, *kinds: str) -> Iterator[tuple[Tensor, ...]]:
        """Inputs of every other batch, or every other row of the only one, image by image; of all kinds."""
        lanes = self._stream.lanes
        for lane in lanes[half::2] if len(lanes) > 1 else lanes:
            values = [self._rows(getattr(lane, kind)[self._source]) for kind in kinds]
            for parts in zip(*values, strict=True):
                yield parts if len(lanes) > 1 else tuple(part[:, half::2] for part in parts)

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


def _solved(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows times the inverse of what has this Cholesky factor."""
    return torch.cholesky_solve(rows.mT, factor).mT


def damped(moments: Tensor, damp: float) -> Tensor:
    """With this part of the mean of the diagonal added to it: an input that is always zero counts a little."""
    result = moments.clone()
    diagonal = result.diagonal(dim1=1, dim2=2)
    diagonal += damp * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    return result
