"""pt2e_quant: quantize models that torch.export captured, for ExecuTorch and other backends.

prepare_pt2e -> calibrate -> convert_pt2e -> lower, or prepare_qat_pt2e -> train -> convert_pt2e; explain() tells what
happened at any point.
"""

from .errors import QuantizationError
from .pt2e import (
    QATSchedule,
    QuantizedIO,
    check_converted,
    convert_pt2e,
    disable_fake_quant,
    disable_observer,
    disable_range_learning,
    enable_fake_quant,
    enable_observer,
    enable_range_learning,
    freeze_bn_stats,
    prepare_pt2e,
    prepare_qat_pt2e,
    update_bn_stats,
)
from .qtensor import QTensor, dequantize, quantize_per_channel, quantize_per_tensor, quantize_per_tensor_dynamic
from .report import Report, explain
from .shadows import explain_hidden_quantizers

__version__ = "0.1.0"

__all__ = [
    "QATSchedule",
    "QTensor",
    "QuantizationError",
    "QuantizedIO",
    "Report",
    "check_converted",
    "convert_pt2e",
    "dequantize",
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "explain",
    "freeze_bn_stats",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_tensor_dynamic",
    "update_bn_stats",
]

explain_hidden_quantizers()
