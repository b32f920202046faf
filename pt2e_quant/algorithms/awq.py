"""AWQ: larger steps for the weights of channels that carry little, smaller ones for those that carry much.

Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration, MLSys 2024,
arXiv:2306.00978, equations 4 and 5: x W^T = (x / s) (W s)^T with s = mean|x|^alpha, the alpha with the smallest error
of the rounded weights. Its clipping is `clip_weights`, after prepare. The division is folded as SmoothQuant's is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError
from ..graph.module import ExportedModule
from ..pt2e import prepare_pt2e
from ..quantizer.base import Quantizer
from ..where import exported_name
from .calibrated import Batches
from .rounding import rounded
from .sites import Site, sites_of, static_grid
from .smooth_quant import Choice, Inputs, Smoothed, fold_factors, largest_of_equals

__all__ = ["awq"]

_ALPHAS = tuple(step / 10 for step in range(1, 10))
_ENOUGH = 1.02
"""Gain from which on factors are worth it: what is smaller may be of the sample alone."""


@checked(CaptureError, but=("quantizer",))
def awq(
    model: ExportedProgram, quantizer: Quantizer, batches: Batches, *, alphas: Sequence[float] = _ALPHAS
) -> tuple[ExportedModule, list[Smoothed]]:
    """Scale the input channels of linears so that rounding their weights costs least.

    Args:
        model: the float model, exported; it stays as it was.
        quantizer: whose grids the weights will have, as `prepare_pt2e` takes it.
        batches: calibration data, tuples of positional arguments.
        alphas: candidates for each group of linears that read one tensor.

    Returns:
        The scaled float graph, to be prepared with the same quantizer, and what was done to each group. A group whose
        division nothing can take is left alone.

    Raises:
        CalibrationError: there is no batch.
        QuantizationError: `prepare_pt2e` refuses the model.
    """
    job = _Job(prepare_pt2e(model, quantizer), alphas)
    return fold_factors(model, batches, job.choose, products=False)


class _Job:
    def __init__(self, prepared: GraphModule, alphas: Sequence[float]) -> None:
        self._prepared, self._alphas = prepared, alphas
        self._sites = {exported_name(site.node): site for site in sites_of(prepared)[0]}

    def choose(self, linears: list[Node], inputs: Inputs, weights: list[Tensor], sharing: Tensor | None) -> Choice:
        """The alpha with the smallest error of what the linears return."""
        sites = [self._sites.get(exported_name(linear)) for linear in linears]
        pairs = [(site, weight) for site, weight in zip(sites, weights, strict=True) if site is not None]
        size = inputs.rows.float().abs().mean(0).clamp_min(1e-5)
        if sharing is not None:
            size = largest_of_equals(size, sharing)
        base = self._error(pairs, inputs.rows, torch.ones_like(size))
        best: Choice = (0.0, 1.0, None)
        for alpha in self._alphas:
            factor = size**alpha
            factor = (factor / factor.log().mean().exp()).clamp(1e-3, 1e3)
            gain = base / max(self._error(pairs, inputs.rows, factor), 1e-30)
            if gain > max(best[1], _ENOUGH):
                best = alpha, gain, factor
        return best

    def _error(self, pairs: list[tuple[Site, Tensor]], rows: Tensor, factor: Tensor) -> float:
        total = 0.0
        for site, weight in pairs:
            scaled = (weight * factor).to(weight.dtype)
            off = rounded(scaled, static_grid(self._prepared, site, scaled)) / factor - weight
            total += float((rows.float() @ off.float().mT).square().sum())
        return total
