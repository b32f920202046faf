"""save_calibration and load_calibration: what observers learned, in a file.

A file has one entry for each observer: the tensors it watched, by the names of their graph nodes, and its state.
Weights are not in it: they are observed at convert. `merge` decides which entries an observer can use, `stored` what a
file looks like.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

from torch.fx import GraphModule

from ..checks import checked
from ..errors import CalibrationError
from ..files import write_file
from ..pt2e.observed import read_observer
from .counts import pack
from .entry import Entry, kind_of, state_of
from .merge import merged
from .plausible import implausible, show
from .stored import from_file, to_bytes
from .watched import Watched, watched

__all__ = ["entries_of", "load_calibration", "save_calibration", "teach"]


@checked(CalibrationError)
def save_calibration(prepared: GraphModule, path: str | PathLike[str]) -> None:
    """Write the state of the observers of activations. The same state gives the same bytes.

    Raises:
        CalibrationError: `prepared` is not what `prepare_pt2e` returned, or an observer holds what no data can have led
            to, such as NaN.
        FileError: the file cannot be written; what was there before is still there.
    """
    write_file(path, to_bytes(entries_of(watched(prepared))))


@checked(CalibrationError)
def load_calibration(prepared: GraphModule, path: str | PathLike[str], *others: str | PathLike[str]) -> None:
    """Replace what the observers of activations know by what files say.

    Args:
        prepared: what `prepare_pt2e` returned, for the same exported model.
        path, others: files of `save_calibration`. Several are parts of one calibration; their states are merged.

    Raises:
        CalibrationError: a file is none, cannot be read, is damaged or says what no data can have led to; or it does
            not know the tensors that an observer watches, or not the facts that it needs, or watched them together with
            others. Nothing has been changed then.
    """
    teach(watched(prepared), [from_file(one) for one in (path, *others)])


def entries_of(sites: Iterable[Watched]) -> list[Entry]:
    """What observers keep, with their counts packed.

    Raises:
        CalibrationError: an observer holds what no data can have led to.
    """
    return [_entry(site) for site in sites]


def teach(sites: list[Watched], parts: list[list[Entry]]) -> None:
    """Replace what observers know by what the parts of one calibration know.

    Raises:
        CalibrationError: as in `load_calibration`.
    """
    taught = [merged(site, parts) for site in sites]
    for site, source in zip(sites, taught, strict=True):
        if read_observer(site.observer).awaits_block:
            show(site.observer, site.example)  # the shape of a block is learned, and is no state
        site.observer.load_state_dict(source.state_dict())


def _entry(site: Watched) -> Entry:
    state = state_of(site.observer)
    problem = implausible(state)
    if problem:
        raise CalibrationError(
            f"{site.name} is not a result of calibration, so it is not saved: {problem}.\n{site.location}\n"
            "  Prepare the model anew and calibrate again."
        )
    return Entry(site.name, site.tensors, kind_of(site.observer), pack(state))
