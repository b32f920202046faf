"""Site by site: choose the weight of one after the other, each behind what was chosen before, and remember it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..graph.attributes import attribute
from ..graph.module import ExportedModule, finish
from ..progress import counted
from .finished import Finished, model_of
from .input_moments import InputMoments
from .reconstruction import Reconstructed
from .sites import Site, choose_weight, set_parameter, sites_of, working_copy
from .stream import Stream

__all__ = ["Chosen", "choose_site_by_site"]

Chosen = tuple[float, tuple[Tensor, Tensor, Tensor]] | None
"""(gain; scale, zero point and weight) of a site; None where nothing was better than what it had."""


def choose_site_by_site(
    job: object,
    prepared: GraphModule,
    data: Iterable[Any],
    choose: Callable[[Stream, Site, Tensor], Chosen],
    resume: str | Path | None = None,
    consume: bool = False,
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Go through a prepared graph and give each site what `choose` has for it.

    Args:
        job: its text says what is done; up to the first '(' it is the name of the algorithm.
        prepared, data, resume, consume: as `gptq` takes them.
        choose: from the stream that stands before a site, the site, and its weight.
    """
    name = str(job).partition("(")[0]
    gm = working_copy(prepared, f"{name}(prepared, data)")
    sites, reasons = sites_of(gm)
    stream = Stream(gm, data, f"{name}(prepared, data)")
    finished = Finished(resume, f"{job}, {len(sites)} layers, {len(stream.lanes)} batches, {model_of(gm, sites)}")
    done = [Reconstructed(node, (), 1.0, reason) for node, reason in reasons.items()]
    for number, site in enumerate(counted(sites, name)):
        stream.advance_to(site.node)
        reason = InputMoments.why_not(site)
        if reason is None:
            gain, chosen = finished.recall(number, lambda: _outcome(stream, site, choose))  # noqa: B023
            reason = None if chosen else "nothing was better"
            if chosen:
                choose_weight(gm, site, *chosen[site.node.name])
                if consume:
                    set_parameter(prepared, site.weight, torch.empty(0))
        stream.pass_by(site)
        done.append(Reconstructed(site.node.name, (site.node.name,), gain if reason is None else 1.0, reason))
    return finish(gm), done


def _outcome(
    stream: Stream, site: Site, choose: Callable[[Stream, Site, Tensor], Chosen]
) -> tuple[float, dict[str, tuple[Tensor, ...]]]:
    chosen = choose(stream, site, attribute(stream.gm, str(site.weight.target)).detach())
    return (1.0, {}) if chosen is None else (chosen[0], {site.node.name: chosen[1]})
