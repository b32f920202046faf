"""How well calibration covers: held-back data runs through a calibrated model, and every site counts what it clips."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..graph.module import clone, finish
from ..graph.run import batches_of, run_batch
from ..pt2e.observed import read_observer, read_qparams
from .watched import watched

__all__ = ["CalibrationReport", "SiteCoverage", "calibration_report"]


@dataclass(frozen=True)
class SiteCoverage:
    """One observer on held-back data.

    observer, location: its name, and the node it watches
    calibrated: it saw calibration data
    calls, values: how often held-back data reached it (a shared observer several times a batch), and how many values
    saturated: how many of them lie outside of what its qparams can represent; None without calibration data
    """

    observer: str
    location: str
    calibrated: bool
    calls: int
    values: int
    saturated: int | None

    @property
    def share(self) -> float:
        """Share of saturated values, 0 to 1."""
        return (self.saturated or 0) / max(self.values, 1)


@dataclass(frozen=True)
class CalibrationReport:
    """Coverage of all sites, those with the largest share of saturated values first."""

    sites: tuple[SiteCoverage, ...]

    @property
    def never_calibrated(self) -> tuple[SiteCoverage, ...]:
        """Sites that no calibration data reached; `convert_pt2e` will refuse them."""
        return tuple(site for site in self.sites if not site.calibrated)

    @property
    def never_reached(self) -> tuple[SiteCoverage, ...]:
        """Sites that no held-back data reached: nothing is known of their coverage."""
        return tuple(site for site in self.sites if not site.calls)

    def text(self) -> str:
        """A table in plain text, one line a site."""
        lines = [
            f"{len(self.sites)} sites, {len(self.never_calibrated)} without calibration data, "
            f"{len(self.never_reached)} not reached by held-back data",
            f"{'saturated':>10}  {'values':>10}  site",
        ]
        for site in self.sites:
            share = f"{site.share:10.4%}" if site.calibrated else "   no range"
            lines.append(f"{share}  {site.values:10}  {site.observer}: " + site.location.partition("\n")[0])
        return "\n".join(lines)


class _Counter(nn.Module):
    """Stands in for an observer and counts values that its qparams cannot represent."""

    def __init__(self, observer: nn.Module) -> None:
        super().__init__()
        self.calls = self.values = self.saturated = 0
        reading = read_observer(observer)
        self.calibrated = reading.has_data
        self.axis: int | None = None
        if self.calibrated:
            qparams = read_qparams(reading)
            scale, zero_point = torch.as_tensor(qparams.scale), torch.as_tensor(qparams.zero_point)
            self.axis = qparams.axis
            # Half a step beyond the last value still rounds to it.
            self.low = (qparams.quant_min - 0.5 - zero_point) * scale
            self.high = (qparams.quant_max + 0.5 - zero_point) * scale

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.values += x.numel()
        if self.calibrated:
            low, high = self.low.to(x.device), self.high.to(x.device)
            if self.axis is not None:
                shape = [-1 if dim == self.axis % x.dim() else 1 for dim in range(x.dim())]
                low, high = low.reshape(shape), high.reshape(shape)
            self.saturated += int(((x < low) | (x > high)).sum())
        return x


def calibration_report(prepared: GraphModule, data: Iterable[Any]) -> CalibrationReport:
    """Run held-back data through a calibrated model, and count at every site what its range cannot represent.

    Args:
        prepared: a prepared, calibrated model. It stays as it was; this data does not calibrate it.
        data: batches: a tensor, a tuple of positional arguments or a dict of keyword arguments each.

    Raises:
        CalibrationError: `prepared` is not what `prepare_pt2e` returned, or there is no batch in `data`.
    """
    counters = [(site, _Counter(site.observer)) for site in watched(prepared)]
    gm = clone(prepared)
    for site, counter in counters:
        gm.set_submodule(site.name, counter)
    gm = finish(gm)
    for batch in batches_of(data, "calibration_report(prepared, data)"):
        run_batch(gm, batch)
    sites = [
        SiteCoverage(
            site.name,
            site.location,
            one.calibrated,
            one.calls,
            one.values,
            one.saturated if one.calibrated else None,
        )
        for site, one in counters
    ]
    return CalibrationReport(tuple(sorted(sites, key=lambda site: (site.calibrated, -site.share))))
