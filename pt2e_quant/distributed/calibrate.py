"""merge_ranks: observers of a model that several processes calibrated, each with data of its own.

Before this: each process ran its part of the data. After it: each holds the same state, that of one process which saw
all of it (see "What merges with what" in docs/calibration.md), and one of them saves or converts.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ..calibration.entry import Entry
from ..calibration.files import entries_of, teach
from ..calibration.watched import watched
from ..checks import checked
from ..errors import CalibrationError, DistributedError
from ..meta import RANKS_KEY
from .ranks import Ranks

__all__ = ["merge_ranks"]

_PURPOSE = "to merge their calibration"


@checked(DistributedError, but=("group",))
def merge_ranks(prepared: GraphModule, *, group: Any = None, timeout: float = 300.0) -> None:
    """Give the observers of every process what those of all processes saw. Each process calls it, once.

    Args:
        prepared: what `prepare_pt2e` returned, in each process for the same exported model and quantizer; each has
            run its own part of the data.
        group: process group of torch.distributed; None for all processes.
        timeout: longest wait for the others, in seconds.

    Raises:
        CalibrationError: as in `save_calibration`, on every process where it is so on one; or an observer's class
            cannot merge.
        DistributedError: a process died, is late, saw no data, or prepared another model. All others raise as well,
            and no observer has changed.
    """
    ranks = Ranks.of(group, timeout)
    mine = _part_of(prepared)
    ranks.meet(_PURPOSE)
    parts: list[_Part] = [pickle.loads(part) for part in ranks.gather(pickle.dumps(mine), _PURPOSE)]
    _check_problems(parts)
    _check_alike(parts)
    _check_data(parts)
    teach(watched(prepared), [part.entries for part in parts])
    prepared.meta[RANKS_KEY] = True


@dataclass(frozen=True)
class _Part:
    """What one rank has to say.

    seen:    whether each observer saw data
    problem: why there is nothing to merge, None where there is
    """

    entries: list[Entry]
    seen: list[bool]
    problem: str | None


def _part_of(prepared: GraphModule) -> _Part:
    """A rank with a problem comes to the meeting too, or the others would wait for it in vain."""
    try:
        sites = watched(prepared)
        if RANKS_KEY in prepared.meta:
            raise CalibrationError(
                "the calibration of this model is merged already; once more would count all data once for each rank. "
                "Prepare it anew to calibrate with more data."
            )
        seen = [bool(getattr(site.observer, "has_data", True)) for site in sites]
        return _Part(entries_of(sites), seen, None)
    except CalibrationError as error:
        return _Part([], [], str(error))


def _check_problems(parts: list[_Part]) -> None:
    for rank, part in enumerate(parts):
        if part.problem is not None:
            raise CalibrationError(f"rank {rank}: {part.problem}")


def _check_alike(parts: list[_Part]) -> None:
    first, *others = ([(one.name, one.tensors, one.kind) for one in part.entries] for part in parts)
    for rank, other in enumerate(others, 1):
        if other != first:
            different = sorted({str(one[0]) for one in (*first, *other) if one not in first or one not in other})
            raise DistributedError(
                f"ranks 0 and {rank} hold different models, or prepared them in different ways: the observers "
                f"{', '.join(different[:5])} are not the same. Prepare one exported program with one configuration."
            )


def _check_data(parts: list[_Part]) -> None:
    without = [rank for rank, part in enumerate(parts) if part.seen and not any(part.seen)]
    if without:
        raise DistributedError(
            f"rank{'s' * (len(without) > 1)} {', '.join(map(str, without))} of {len(parts)} saw no data, so there is "
            "nothing to merge from there. Give each process its part of the data: start fewer processes, or pass "
            "drop_last=False to the sampler."
        )
