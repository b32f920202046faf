"""What calibration learned, as a file: stop and resume, in parts, for several configurations; and how well it covers.

    save_calibration(prepared, path)              what every observer of activations keeps
    load_calibration(prepared, path, *others)     back into a model prepared in the same way, or in another one
    calibration_report(prepared, held_back)       sites never reached, and values outside of the range on held-back data

A file has one entry for each observer: the tensors it watched, by the names of their graph nodes, and its state. What
depends on the data alone (`ObserverBase.facts`: a range, exact counts) fits any observer that wants the same facts of
the same tensors, whatever its dtype, bounds or scheme: calibrate once with MSEObserver, and load into models prepared
for int8 and int4, MinMaxObserver or PercentileObserver. Weights are not in the file: they are observed at convert.

Before this: `pt2e` prepares the model. Needs safetensors (the extra `calibration`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .errors import CalibrationError
from .graph.attributes import attribute
from .graph.module import clone, finish
from .observer import ObserverBase
from .observer.derived import DerivedObserver
from .observer.fixed import FixedQParamsObserver
from .pt2e.observers import has_data
from .pt2e.qdq import read_qparams
from .pt2e.record import PointRecord, Record, record_of

__all__ = ["CalibrationReport", "SiteCoverage", "calibration_report", "load_calibration", "save_calibration"]

_FORMAT = "pt2e_quant calibration 1"


@dataclass(frozen=True)
class _Entry:
    """What one observer kept."""

    name: str
    tensors: frozenset[str]  # the nodes it watched
    kind: str
    arguments: dict[str, str]
    facts: frozenset[str]
    state: dict[str, Tensor]


def save_calibration(prepared: GraphModule, path: str | PathLike[str]) -> None:
    """Write the state of the observers of activations. The same state gives the same bytes.

    Raises:
        CalibrationError: `prepared` is not what `prepare_pt2e` returned.
    """
    from safetensors.torch import save_file

    entries, tensors = [], {}
    for name, points in _watched(prepared).items():
        observer = attribute(prepared, name)
        entries.append({"name": name, "tensors": sorted({point.producer for point in points}), **_identity(observer)})
        for key, value in observer.state_dict().items():
            tensors.update(_pack(f"{name}.{key}", value.cpu()))
    text = json.dumps({"format": _FORMAT, "observers": entries}, sort_keys=True)
    save_file(tensors, path, metadata={"pt2e_quant": text})  # one key: the order of several is not defined


def load_calibration(prepared: GraphModule, path: str | PathLike[str], *others: str | PathLike[str]) -> None:
    """Replace what the observers of activations know by what files say.

    Args:
        prepared: what `prepare_pt2e` returned, for the same exported model.
        path, others: files of `save_calibration`. Several are parts of one calibration; their states are merged.

    Raises:
        CalibrationError: a file is none, or does not know the tensors that an observer watches, or not the facts that
            it needs, or watched them together with others. Nothing has been changed then.
    """
    parts = [_read(one) for one in (path, *others)]
    filled: dict[str, nn.Module] = {}
    for name, points in _watched(prepared).items():
        observer = attribute(prepared, name)
        wanted = frozenset(point.producer for point in points)
        pieces = [_with_state(observer, entry) for part in parts for entry in _cover(observer, wanted, part, points)]
        for piece in pieces[1:]:
            _mergeable(pieces[0], name).merge(piece)  # type: ignore[arg-type]
        filled[name] = pieces[0]
    for name, source in filled.items():
        attribute(prepared, name).load_state_dict(source.state_dict())


# --- coverage ---------------------------------------------------------------------------------------------------------


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
        self.calibrated = has_data(observer)
        self.axis: int | None = None
        if self.calibrated:
            qparams = read_qparams(observer)
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
        CalibrationError: `prepared` is not what `prepare_pt2e` returned.
    """
    watched = _watched(prepared)
    gm = clone(prepared)
    counters = {name: _Counter(attribute(prepared, name)) for name in watched}
    for name, counter in counters.items():
        gm.set_submodule(name, counter)
    gm = finish(gm)
    with torch.no_grad():
        for batch in data:
            if isinstance(batch, Mapping):
                gm(**batch)
            else:
                gm(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    sites = [
        SiteCoverage(
            name,
            watched[name][0].location,
            one.calibrated,
            one.calls,
            one.values,
            one.saturated if one.calibrated else None,
        )
        for name, one in counters.items()
    ]
    return CalibrationReport(tuple(sorted(sites, key=lambda site: (site.calibrated, -site.share))))


# --- observers and files ----------------------------------------------------------------------------------------------


def _watched(prepared: GraphModule) -> dict[str, list[PointRecord]]:
    """The points of each observer that learns from calibration data."""
    record: Record | None = record_of(prepared)
    if record is None or record.stage != "prepared":
        raise CalibrationError(
            "calibration belongs to a prepared model; pass what prepare_pt2e returned, before it is converted"
        )
    found: dict[str, list[PointRecord]] = {}
    for point in record.points:
        observer = attribute(prepared, point.observer)
        learns = not isinstance(observer, (DerivedObserver, FixedQParamsObserver)) and bool(observer.state_dict())
        if learns and not point.constant and not getattr(observer, "is_dynamic", False):
            found.setdefault(point.observer, []).append(point)
    return found


def _identity(observer: nn.Module) -> dict[str, Any]:
    arguments = observer._signature() if isinstance(observer, ObserverBase) else {}
    return {
        "kind": f"{type(observer).__module__}.{type(observer).__qualname__}",
        "arguments": {key: str(value) for key, value in arguments.items()},
        "facts": sorted(getattr(observer, "facts", ())),
    }


def _cover(observer: nn.Module, wanted: frozenset[str], part: list[_Entry], points: list[PointRecord]) -> list[_Entry]:
    """Entries that together watched exactly the tensors `wanted`, and know what the observer needs."""
    identity = _identity(observer)
    same = [one for one in part if (one.kind, one.arguments) == (identity["kind"], identity["arguments"])]
    facts = frozenset(identity["facts"])
    usable = same + [one for one in part if facts and facts <= one.facts and one not in same]
    missing, chosen = set(wanted), []
    for one in sorted(usable, key=lambda entry: -len(entry.tensors & wanted)):
        if one.tensors <= missing:
            missing -= one.tensors
            chosen.append(one)
    if not missing:
        return chosen
    others = sorted(
        {f"{one.kind.rpartition('.')[2]} on {', '.join(sorted(one.tensors))}" for one in part if one.tensors & missing}
    )
    raise CalibrationError(
        f"the calibration has nothing for {type(observer).__name__} on {', '.join(sorted(missing))}:\n  "
        + points[0].location.replace("\n", "\n  ")
        + f"\n  It has {'; '.join(others) or 'no observer there'}. Facts of the data (MinMaxObserver: a range; "
        "MSEObserver and its kin: counts) serve every observer that needs no more; all else serves the same class and "
        "arguments only. Tensors that shared an observer cannot be told apart."
    )


def _with_state(observer: nn.Module, entry: _Entry) -> nn.Module:
    """A copy of the observer that knows what the entry knows."""
    filled = copy.deepcopy(observer)
    state = dict(filled.state_dict())
    facts = getattr(observer, "facts", ())
    same = (entry.kind, entry.arguments) == tuple(_identity(observer)[key] for key in ("kind", "arguments"))
    state.update({key: value for key, value in entry.state.items() if same or key in facts})
    filled.load_state_dict(state)
    return filled


def _mergeable(observer: nn.Module, name: str) -> ObserverBase:
    if isinstance(observer, ObserverBase):
        return observer
    raise CalibrationError(f"{name} is a {type(observer).__name__}, which cannot merge parts of a calibration")


def _read(path: str | PathLike[str]) -> list[_Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = json.loads((file.metadata() or {}).get("pt2e_quant", "{}"))
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CalibrationError(f"{path} is not a file of save_calibration: {error}") from error
    if text.get("format") != _FORMAT:
        raise CalibrationError(f"{path} is not a file of save_calibration: its format is {text.get('format')!r}")
    entries = []
    for one in text["observers"]:
        prefix = one["name"] + "."
        state = _unpack({key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)})
        entries.append(
            _Entry(
                one["name"], frozenset(one["tensors"]), one["kind"], one["arguments"], frozenset(one["facts"]), state
            )
        )
    return entries


def _pack(key: str, value: Tensor) -> dict[str, Tensor]:
    """Counts are mostly zero: only the others are stored."""
    if value.dtype is not torch.int64 or value.dim() != 1:
        return {key: value.contiguous()}
    places = value.nonzero().squeeze(1)
    return {f"{key}:size": torch.tensor(value.numel()), f"{key}:places": places, f"{key}:values": value[places]}


def _unpack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key: value for key, value in stored.items() if ":" not in key}
    for key in [key.removesuffix(":size") for key in stored if key.endswith(":size")]:
        whole = torch.zeros(int(stored[f"{key}:size"]), dtype=torch.int64)
        whole[stored[f"{key}:places"]] = stored[f"{key}:values"]
        state[key] = whole
    return state
