"""Convert a prepared model of FX mode: to a reference model, and from that to quantized modules.

prepared --the engine's replace_observers--> q/dq --to_reference_modules--> reference model
         --lower--> quantized modules and functions on QTensors
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from ..backend_config import BackendConfig
from ..errors import ConversionError
from ..graph.module import ExportedModule, clone, tidy
from ..meta import FX_KEY, RECORD_KEY
from ..pt2e.convert import convert_pt2e, converted_record, prepared_record, replace_observers
from ..pt2e.histograms import with_histograms
from .custom_config import ConvertCustomConfig
from .lower import lower
from .prepare import FXState, kept_attribute, preserve
from .trace import finish_in_modes
from .units import convert_units, give_integers, take_integers
from .weights import to_reference_modules

__all__ = ["How", "convert"]


@dataclass(frozen=True)
class How:
    """How to convert: the arguments of convert_fx, read."""

    custom: ConvertCustomConfig
    backend_config: BackendConfig
    to_reference: bool
    allow_uncalibrated: bool
    by: str


def convert(model: Any, how: How) -> ExportedModule:
    """The converted model; the prepared one stays as it was."""
    record = prepared_record(model, how.by, "prepare_fx")
    state: FXState | None = model.meta.get(FX_KEY)
    if state is None:
        raise ConversionError(
            f"prepare_fx did not prepare this model ({record.quantizer} annotated it); convert_pt2e it"
        )
    if not state.is_traced:
        made = convert_pt2e(model, allow_uncalibrated=how.allow_uncalibrated)
        return preserve(made)
    record = with_histograms(record, model)
    gm = clone(model)
    qparams = replace_observers(gm, record, how.allow_uncalibrated)
    take_integers(gm, state.custom.input_quantized_indexes, to_reference=how.to_reference)
    inside = functools.partial(convert, how=how)
    convert_units(gm, state.units, how.custom, inside, to_reference=how.to_reference)
    to_reference_modules(gm, record, how.backend_config)
    if not how.to_reference:
        lower(gm)
    give_integers(gm, state.custom.output_quantized_indexes, to_reference=how.to_reference)
    tidy(gm)
    finish_in_modes(gm, model.training)
    gm.meta[RECORD_KEY] = converted_record(gm, record, qparams)
    names = [*how.custom.preserved_attributes]
    gm.meta[FX_KEY] = replace(state, kept={**state.kept, **{name: kept_attribute(model, name) for name in names}})
    return preserve(gm)
