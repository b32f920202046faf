"""The reference's import path of the engine: `from pt2e_quant.quantize_pt2e import prepare_pt2e, convert_pt2e`."""

from .pt2e import (
    check_converted,
    convert_pt2e,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    prepare_pt2e,
    prepare_qat_pt2e,
    update_bn_stats,
)

__all__ = [
    "check_converted",
    "convert_pt2e",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "freeze_bn_stats",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "update_bn_stats",
]
