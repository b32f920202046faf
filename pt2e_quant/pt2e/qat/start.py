"""Training that starts from a calibration: the fake quantizers of activations begin with the grids that it found.

Before this: `prepare`, which inserted the fake quantizers. After it: the user's own training loop.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from textwrap import indent
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...errors import CalibrationError
from ...fake_quantize import LearnableFakeQuantize, enable_range_learning, is_fake_quantizer
from ...graph.attributes import attribute, own_written
from ...graph.constants import Constants
from ...graph.module import clone, finish
from ...graph.nested import graphs
from ...graph.run import batches_of, run_batch
from ...observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    PerTensor,
)
from ...qparams import storage_dtype
from ...specs import is_per_channel, is_symmetric
from ..observed import ObserverReading, QParams, read_observer, read_qparams
from ..record import PointRecord, Record, record_of

__all__ = ["shape_learned_scales", "start_from_calibration"]


class _Site(NamedTuple):
    """A fake quantizer of activations, as it is read, and the tensors that it rounds."""

    reading: ObserverReading
    points: list[PointRecord]

    @property
    def place(self) -> str:
        return indent(self.points[0].location, "  ")


Sites = dict[str, _Site]
"""By the name of the fake quantizer."""

_KINDS: tuple[type[Any], ...] = (MSEObserver, HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver)
"""Those that a calibration file may teach, the best informed first."""


def start_from_calibration(prepared: GraphModule, calibration: Any) -> None:
    """Let the static activations of a freshly prepared model round as calibration found, and keep to that.

    Their observers rest afterwards. Scales that are parameters are learned from there on, those of weights as well;
    other weights are rounded to the grid of their values of the moment, as ever.

    Args:
        calibration: a calibrated model that `prepare_pt2e` made of the same export by the same rules; the path of a
            file that `save_calibration` wrote of one; or batches, as `calibration_report` takes them, in which
            MSEObserver finds the ranges.

    Raises:
        CalibrationError: it is none of these, saw no data at a tensor, or has another number format there.
    """
    record: Record = record_of(prepared)  # type: ignore[assignment]
    weights = _weights(prepared)
    sites = _sites(prepared, record, weights)
    other = record_of(calibration)
    if other is not None and other.stage != "prepared":
        raise CalibrationError(
            "the model in calibration= is converted, and has no observers left. Pass the calibrated model that it was "
            "made of, or batches."
        )
    if other is not None:
        readings = {name: _of_prepared(calibration, other, site) for name, site in sites.items()}
    elif isinstance(calibration, (str, os.PathLike)):
        readings = _of_file(prepared, sites, calibration)
    else:
        readings = _of_batches(prepared, record, sites, calibration)
    for name, reading in readings.items():
        _start(attribute(prepared, name), read_qparams(reading))
    for name, weight in weights.items():
        _start_weight(attribute(prepared, name), weight)


@torch.no_grad()
def shape_learned_scales(prepared: GraphModule) -> None:
    """Show weights to the fake quantizers whose scales are parameters, which have their shapes then.

    Who wraps a model for several processes, or flattens its parameters, finds them as they will stay.
    """
    if any(isinstance(module, LearnableFakeQuantize) for module in prepared.modules()):
        for name, weight in _weights(prepared).items():
            if isinstance(module := attribute(prepared, name), LearnableFakeQuantize):
                module(weight)


def _weights(prepared: GraphModule) -> dict[str, Tensor]:
    """What observers and fake quantizers of constants see, by their names."""
    found = {}
    for path, part in graphs(prepared):
        constants = Constants(part)
        for call in part.graph.find_nodes(op="call_module"):
            if call.all_input_nodes and call.args[0] in constants:
                found[f"{path}.{call.target}" if path else str(call.target)] = constants.value(call.args[0])
    return found


def _sites(prepared: GraphModule, record: Record, weights: Collection[str]) -> Sites:
    sites: Sites = {}
    for point in record.points:
        observer = attribute(prepared, point.observer)
        reading = read_observer(observer)
        if is_fake_quantizer(observer) and reading.is_integer and not reading.is_dynamic:
            sites.setdefault(point.observer, _Site(reading, [])).points.append(point)
    sites = {name: site for name, site in sites.items() if name not in weights}
    for site in sites.values():
        if is_per_channel(site.reading.qscheme) or site.reading.granularity not in (None, PerTensor()):
            raise CalibrationError(
                f"calibration= starts activations with one scale in all, and this one has several:\n{site.place}\n"
                "  Leave calibration= out, and run batches through the prepared model after disable_fake_quant."
            )
    return sites


# --- where the grids come from ----------------------------------------------------------------------------------------


def _of_prepared(calibrated: GraphModule, record: Record, site: _Site) -> ObserverReading:
    """The observer of another model on the same tensors."""
    observers = {(point.producer, point.consumers): point.observer for point in record.points}
    names = {observers.get((point.producer, point.consumers)) for point in site.points}
    name = names.pop()
    if names or name is None:
        raise CalibrationError(
            f"the model in calibration= has {'several observers' if names else 'no observer'} where this one has one "
            f"fake quantizer:\n{site.place}\n  Prepare both from one export, by one quantizer with its configuration "
            "for calibration and that for training; or pass batches."
        )
    return _fitting(read_observer(attribute(calibrated, name)), site)


def _of_batches(prepared: GraphModule, record: Record, sites: Sites, data: Any) -> dict[str, ObserverReading]:
    """What MSEObserver finds while the model runs in evaluation, without rounding. The model stays as it was."""
    watching = {name: _watching(site.reading) for name, site in sites.items()}
    gm = clone(prepared)
    own_written(gm)
    for group in record.groups:
        gm.set_submodule(group.observer, watching.get(group.observer, nn.Identity()))
    gm = finish(gm).eval()
    for batch in batches_of(data, "prepare_qat_pt2e(..., calibration=data)"):
        run_batch(gm, batch)
    return {name: _fitting(read_observer(one), sites[name]) for name, one in watching.items()}


def _of_file(prepared: GraphModule, sites: Sites, path: str | os.PathLike[str]) -> dict[str, ObserverReading]:
    """What the first of several kinds of observers makes of the file that it can be taught by."""
    from ...calibration.merge import merged  # it knows pt2e
    from ...calibration.stored import from_file
    from ...calibration.watched import watched

    entries = from_file(path)

    def taught(site: Any, reading: ObserverReading) -> Any:
        problems = []
        for kind in _KINDS:
            try:
                return merged(replace(site, observer=_watching(reading, kind)), [entries])
            except CalibrationError as problem:
                problems.append(problem)
        raise problems[0]

    found = {one.name: one for one in watched(prepared)}
    return {name: _fitting(read_observer(taught(found[name], site.reading)), site) for name, site in sites.items()}


def _watching(reading: ObserverReading, kind: type[Any] = MSEObserver) -> Any:
    low, high = reading.bounds or (None, None)
    observer = kind(dtype=reading.dtype, qscheme=reading.qscheme, quant_min=low, quant_max=high)
    observer.site = reading.place
    return observer


def _fitting(found: ObserverReading, site: _Site) -> ObserverReading:
    """A reading of the same integers, with data."""
    if _words(found) != _words(site.reading):
        raise CalibrationError(
            f"the model in calibration= has {_words(found)} where this one has {_words(site.reading)}:\n{site.place}\n"
            "  Calibrate with the same integers, or pass batches."
        )
    if not found.has_data:
        raise CalibrationError(f"calibration= never reached this tensor:\n{site.place}\n  Give it data that does.")
    return found


def _words(reading: ObserverReading) -> str:
    """'int8 in (-128, 127), affine'."""
    stored = str(storage_dtype(reading.dtype) if reading.dtype and reading.is_integer else reading.dtype)
    scheme = "symmetric" if is_symmetric(reading.qscheme) else "affine"
    return f"{stored.removeprefix('torch.')} in {reading.bounds}, {scheme}{', dynamic' if reading.is_dynamic else ''}"


# --- where they go ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _start(module: Any, grid: QParams) -> None:
    """Show a fake quantizer that has seen nothing the two ends of a grid, so that it finds this grid, then no more."""
    scale, zero_point = cast(Tensor, grid.scale), cast(Tensor, grid.zero_point)
    span = (grid.quant_max - grid.quant_min) * scale
    low = -span / 2 if grid.symmetric else (grid.quant_min - zero_point) * scale
    ends = torch.cat([low.flatten(), (low + span).flatten()])
    module(ends.to(module.fake_quant_enabled.device, torch.float32))
    module.enable_observer(False)
    enable_range_learning(module)


@torch.no_grad()
def _start_weight(module: Any, weight: Tensor) -> None:
    """Round the weights of today; scales that are parameters are learned from there on."""
    if is_fake_quantizer(module):
        module(weight)
        enable_range_learning(module)
