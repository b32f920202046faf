"""Typed errors, and the one way to say where in a model something went wrong.

Every error that a user can cause derives from QuantizationError. A message says what happened, where (graph node,
module path, source line), why, and the way out; `locate` writes the "where" part, so that all messages look alike.
"""

from __future__ import annotations

__all__ = [
    "AnnotationError",
    "CalibrationError",
    "CalibrationWarning",
    "CaptureError",
    "ConversionError",
    "CoverageError",
    "LoweringError",
    "PlanError",
    "QuantizationError",
    "SharingError",
    "SpecError",
    "TargetingError",
]


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


class ConversionError(QuantizationError):
    """A prepared graph cannot be converted."""


class LoweringError(QuantizationError):
    """A converted graph breaks a rule of the backend; raised before anything is lowered."""
