"""Typed errors, and what to say after a name that does not exist.

Every error that a user can cause derives from QuantizationError. A message says what happened, where (graph node,
module path, source line), why, and the way out; `locate` (where.py) writes the "where" part, so that all messages look
alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AnnotationError",
    "CalibrationError",
    "CalibrationWarning",
    "CaptureError",
    "CaptureWarning",
    "ConversionError",
    "ConversionWarning",
    "CoverageError",
    "DistributedError",
    "FileError",
    "LegacyImportError",
    "LoweringError",
    "PlanError",
    "QuantizationError",
    "QuantizedTensorError",
    "RecipeError",
    "SharingError",
    "SpecError",
    "TargetingError",
    "did_you_mean",
]

_SUGGESTED = 5


class QuantizationError(Exception):
    """Base class of every error that pt2e_quant raises on purpose."""


class SpecError(QuantizationError, ValueError):
    """A specification of how to quantize one tensor contradicts itself."""


class CaptureError(QuantizationError, TypeError):
    """The model is not in a form that the engine can work on (not exported, already prepared, ...)."""


class AnnotationError(QuantizationError):
    """A quantization annotation does not fit the graph that carries it."""


class PlanError(QuantizationError):
    """The annotations of a graph cannot all be realised."""


class SharingError(PlanError):
    """A set of tensors that must share qparams cannot; the message shows the chain."""


class CoverageError(PlanError):
    """Nothing, or less than the caller demands, would be quantized."""


class TargetingError(QuantizationError):
    """A selector (module name, module type, operator, node) matches nothing, or cannot be understood."""


class CalibrationError(QuantizationError):
    """An observer saw no data, or data that has no range (NaN); or what observers saw does not fit together."""


class CalibrationWarning(UserWarning):
    """An observer left values out of a range: infinity, or the largest number of their type, as in attention masks."""


class CaptureWarning(UserWarning):
    """The model was exported in a form that is quantized worse than it could be."""


class DistributedError(QuantizationError):
    """Processes that work together cannot: one died, is late, saw no data, or holds another model."""


class FileError(QuantizationError, OSError):
    """A file cannot be written or read: a full disk, a missing folder, no permission. It holds what it held before."""


class LegacyImportError(QuantizationError, ModuleNotFoundError):
    """A name below torch.ao, or one of the other old roots, that this package has not."""


class ConversionError(QuantizationError):
    """A prepared graph cannot be converted."""


class ConversionWarning(UserWarning):
    """A converted model will stop where a float tensor meets a quantized one."""


class LoweringError(QuantizationError):
    """A converted graph breaks a rule of the backend; raised before anything is lowered."""


class RecipeError(QuantizationError, ValueError):
    """A recipe asks for what nothing bears the name of, for a value of the wrong kind, or for a budget out of reach."""


class QuantizedTensorError(QuantizationError, RuntimeError):
    """Something that a quantized tensor, or a quantized module, cannot do; the message names who can."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence to put after a message on a name that does not exist, with a blank before it; '' for no suggestion.

    Names the nearest of the known names, or the first ones where none is near. An empty name (the root module) is none.
    """
    names = sorted({one for one in known if one})
    close = difflib.get_close_matches(name, names, n=_SUGGESTED, cutoff=0.3)
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    more = " and others" if len(names) > _SUGGESTED else ""
    return f" Known names: {', '.join(map(repr, names[:_SUGGESTED]))}{more}." if names else ""
