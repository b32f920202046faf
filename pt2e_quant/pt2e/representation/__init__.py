"""The converted model in integer arithmetic, to compare kernels with."""

from ...requantization import NoIntegerForm, Rounding
from .rewrite import reference_representation_rewrite

__all__ = ["NoIntegerForm", "Rounding", "reference_representation_rewrite"]
