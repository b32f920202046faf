"""What quantizers of several backends share: the operators that hand on their input, and reasons in the same words."""

from __future__ import annotations

from pt2e_quant.ops import COPY, DROPOUT
from pt2e_quant.quantizer import Match, QuantizationConfig, because, op
from pt2e_quant.specs import FOUR_BITS

__all__ = ["SYMMETRIC_RANGES", "computed_table", "config_of", "copying", "drops_values"]

SYMMETRIC_RANGES = {8: (-127, 127), 4: FOUR_BITS}
"""Bounds of weights and tables with zero point 0, by their bits."""

copying = op(*DROPOUT, *COPY)


def config_of(match: Match) -> QuantizationConfig:
    """What the user selected for a match; all float when nothing was."""
    return match.config or QuantizationConfig(None, None, None)


def drops_values(match: Match) -> str | None:
    """Of a pattern that ends in `copying`."""
    training = match.argument(copying, "train")
    why = "captured in training mode, it drops values; call model.eval() before export"
    return because("training", why) if training else None


def computed_table(match: Match) -> str | None:
    """Of an embedding whose table is the capture `w`."""
    why = f"{match.captures['w']} is computed at run time; no table is stored"
    return None if match.is_constant("w") else because("computed_operand", why)
