"""The converted model in integer arithmetic, to compare kernels with."""

from .rewrite import reference_representation_rewrite
from .rounding import NoIntegerForm, Rounding

__all__ = ["NoIntegerForm", "Rounding", "reference_representation_rewrite"]
