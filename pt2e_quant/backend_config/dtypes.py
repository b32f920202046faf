"""What a backend computes with: types of activations, weights and biases, and the grids that it takes of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..checks import check_fields, checked
from ..errors import SpecError

__all__ = ["DTypeConfig", "DTypeWithConstraints", "ObservationType"]


class ObservationType(Enum):
    """Which tensors of a pattern have a grid of their own."""

    OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT = 0
    """Inputs and output each: convolution, softmax."""

    OUTPUT_SHARE_OBSERVER_WITH_INPUT = 1
    """The output has that of the input: max pool, concatenation."""

    INPUT_OUTPUT_NOT_OBSERVED = 2
    """None: what is asked of a tensor is no tensor, such as its shape."""


@dataclass
class DTypeWithConstraints:
    """A type, and which of its grids the backend takes. None leaves a field open.

    Args:
        dtype: type of q; torch.float for a tensor that stays one.
        quant_min_lower_bound, quant_max_upper_bound: the qconfig's range of q lies in between.
        scale_min_lower_bound: the smallest scale; the qconfig's observer has an eps of that or more.
        scale_max_upper_bound: the largest scale; kept for the reference's dictionaries, and not looked at.
        scale_exact_match, zero_point_exact_match: the grid itself, of operators whose range is known.
    """

    dtype: torch.dtype | None = None
    quant_min_lower_bound: int | float | None = None
    quant_max_upper_bound: int | float | None = None
    scale_min_lower_bound: int | float | None = None
    scale_max_upper_bound: int | float | None = None
    scale_exact_match: float | None = None
    zero_point_exact_match: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, SpecError)


_Given = torch.dtype | DTypeWithConstraints | None
_KEYS = ("input_dtype", "output_dtype", "weight_dtype", "bias_dtype", "is_dynamic")


@dataclass
class DTypeConfig:
    """One combination of types that a pattern runs in; a qconfig with these types is carried out, another is not.

    Args:
        input_dtype, output_dtype, weight_dtype: torch.quint8, torch.qint8, ...; None for anything.
        bias_dtype: torch.float, or None.
        is_dynamic: inputs are quantized while the model runs.
    """

    input_dtype_with_constraints: DTypeWithConstraints
    output_dtype_with_constraints: DTypeWithConstraints
    weight_dtype_with_constraints: DTypeWithConstraints
    bias_dtype: torch.dtype | None
    is_dynamic: bool | None

    @checked(SpecError)
    def __init__(
        self,
        input_dtype: torch.dtype | DTypeWithConstraints | None = None,
        output_dtype: torch.dtype | DTypeWithConstraints | None = None,
        weight_dtype: torch.dtype | DTypeWithConstraints | None = None,
        bias_dtype: torch.dtype | None = None,
        is_dynamic: bool | None = None,
    ) -> None:
        self.input_dtype_with_constraints = _constrained(input_dtype)
        self.output_dtype_with_constraints = _constrained(output_dtype)
        self.weight_dtype_with_constraints = _constrained(weight_dtype)
        self.bias_dtype, self.is_dynamic = bias_dtype, is_dynamic

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The type of inputs."""
        return self.input_dtype_with_constraints.dtype

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The type of the output."""
        return self.output_dtype_with_constraints.dtype

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The type of the weight."""
        return self.weight_dtype_with_constraints.dtype

    @classmethod
    @checked(SpecError)
    def from_dict(cls, dtype_config_dict: dict[str, Any]) -> DTypeConfig:
        """What `to_dict` gave; every key may be missing."""
        return cls(**{key: dtype_config_dict[key] for key in _KEYS if key in dtype_config_dict})

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary, without what is None."""
        held: dict[str, Any] = {"bias_dtype": self.bias_dtype, "is_dynamic": self.is_dynamic}
        for name in ("input", "output", "weight"):
            constrained = getattr(self, f"{name}_dtype_with_constraints")
            held[f"{name}_dtype"] = None if constrained.dtype is None else constrained
        return {key: held[key] for key in _KEYS if held[key] is not None}


def _constrained(given: _Given) -> DTypeWithConstraints:
    return given if isinstance(given, DTypeWithConstraints) else DTypeWithConstraints(given)
