"""The reference's import path of the engine: `from pt2e_quant.quantize_pt2e import prepare_pt2e, convert_pt2e`."""

from .pt2e import convert_pt2e, prepare_pt2e

__all__ = ["convert_pt2e", "prepare_pt2e"]
