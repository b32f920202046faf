"""Which entries of calibration files teach an observer, and one observer taught by several of them.

What depends on the data alone (`ObserverBase.facts`: a range, exact counts) fits any observer that wants the same
facts of the same tensors, whatever its dtype, bounds or scheme: calibrate once with MSEObserver, and load into models
prepared for int8 and int4, MinMaxObserver or PercentileObserver. All else fits the same class and arguments only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from textwrap import indent

from torch import Tensor, nn

from ..errors import CalibrationError
from ..observer import ObserverBase
from ..pt2e.observed import read_observer
from .counts import unpack
from .entry import Entry, kind_of, state_of
from .plausible import implausible, misshapen
from .watched import Watched

__all__ = ["merged"]


def merged(site: Watched, parts: Iterable[list[Entry]]) -> nn.Module:
    """A copy of an observer that knows what all files know of its tensors, and nothing else.

    Raises:
        CalibrationError: a file has nothing for it, or what no data can have led to; or its class cannot merge.
    """
    first, *others = [_taught(site, entry) for part in parts for entry in _covering(site, part)]
    for other in others:
        if not isinstance(first, ObserverBase):
            raise CalibrationError(
                f"{site.name} is a {type(first).__name__}, which cannot merge parts of a calibration:\n{site.location}"
            )
        first.merge(other)  # type: ignore[arg-type]  # both are copies of one observer
    return first


def _covering(site: Watched, part: list[Entry]) -> list[Entry]:
    """Entries that together watched exactly the tensors of the site, and know what its observer needs."""
    kind, wanted = kind_of(site.observer), site.tensors
    same = [one for one in part if kind.same(one.kind)]
    usable = same + [one for one in part if kind.facts and kind.facts <= one.kind.facts and not kind.same(one.kind)]
    missing, chosen = set(wanted), []
    for one in sorted(usable, key=lambda entry: -len(entry.tensors & wanted)):
        if one.tensors and one.tensors <= missing:
            missing -= one.tensors
            chosen.append(one)
    if not missing:
        return chosen
    there = sorted(
        f"{one.kind.name.rpartition('.')[2]} on {', '.join(sorted(one.tensors))}"
        for one in part
        if one.tensors & missing
    )
    raise CalibrationError(
        f"the calibration has nothing for {type(site.observer).__name__} on {', '.join(sorted(missing))}:\n"
        f"{indent(site.location, '  ')}\n"
        f"  It has {'; '.join(dict.fromkeys(there)) or 'no observer there'}. Facts of the data (MinMaxObserver: a "
        "range; MSEObserver and its kin: counts) serve every observer that needs no more; all else serves the same "
        "class and arguments only. Tensors that shared an observer cannot be told apart."
    )


def _taught(site: Watched, entry: Entry) -> nn.Module:
    """A copy of the observer that knows what the entry knows."""
    observer = copy.deepcopy(site.observer)
    try:
        state = _state_for(observer, entry, site)
        observer.load_state_dict({**observer.state_dict(), **state})
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch on tensors that do not fit
        raise CalibrationError(
            f"the calibration file says of {entry.name!r} what no data can have led to: {error}.\n"
            f"{indent(site.location, '  ')}\n  Calibrate again."
        ) from error
    return observer


def _state_for(observer: nn.Module, entry: Entry, site: Watched) -> dict[str, Tensor]:
    """All state of an entry of the same kind, the facts of another one.

    Raises:
        ValueError: it does not fit the observer, or no data can have led to it.
    """
    own, kind = state_of(observer), kind_of(observer)
    wanted = set(own) if kind.same(entry.kind) else set(kind.facts)
    packed = {key: value for key, value in entry.state.items() if kind.same(entry.kind) or key.split(":")[0] in wanted}
    state = unpack(packed, own)
    if set(state) != wanted:
        raise ValueError(f"it has {sorted(state)}, not {sorted(wanted)}")
    problem = misshapen(observer, own, state, site.example) or implausible(state, read_observer(observer).bounds)
    if problem:
        raise ValueError(problem)
    return state
