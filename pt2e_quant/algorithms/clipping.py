"""Weight clipping: steps of each channel or group of a weight as small as is best for what its site returns.

Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration, MLSys 2024,
arXiv:2306.00978, whose code searches the largest magnitude of each group so, after its scales. The error is that of the
group's own part of the product, on the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from ..checks import checked
from ..errors import CaptureError
from ..graph.module import ExportedModule
from .by_site import Chosen, choose_site_by_site
from .input_moments import InputMoments
from .reconstruction import Reconstructed
from .rounding import rounded
from .sites import Site, static_grid
from .soft_rounding import clipped
from .stream import Stream

__all__ = ["clip_weights"]


@checked(CaptureError)
def clip_weights(
    prepared: GraphModule, data: Iterable[Any], *, resume: str | Path | None = None
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Choose the steps of the weights of each linear and convolution; the weights stay in float.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was.
        data: batches, as `graph.run.batches_of` takes them.
        resume: a folder for what is done, a file for each layer; a second call goes on from there, after a crash too.

    Returns:
        The prepared graph with settled grids of weights, to be converted like the original or given to `gptq`, and what
        was done. Scales shrink to half of theirs at most.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers.
        CalibrationError: there is no batch, the model fails on one, or inputs of a site are not finite.
        FileError: the file cannot be written, or is of another job.
    """
    return choose_site_by_site("clip_weights()", prepared, data, _clip, resume)


def _clip(stream: Stream, site: Site, weight: Tensor) -> Chosen:
    moments, old = InputMoments(stream, site), static_grid(stream.gm, site, weight)
    new = clipped(weight, old, moments.spread)
    before, after = (moments.power(rounded(weight, one) - weight) for one in (old, new))
    if new.scale is None or new.zero_point is None or not after < before:
        return None
    return before / max(after, 1e-30), (new.scale, new.zero_point, weight)
