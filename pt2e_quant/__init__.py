"""pt2e_quant: quantize models that torch.export captured, for ExecuTorch and other backends.

prepare_pt2e -> calibrate -> convert_pt2e -> lower; explain() tells what happened at any point.
"""

from .errors import QuantizationError
from .pt2e import QuantizedIO, convert_pt2e, prepare_pt2e
from .report import Report, explain
from .shadows import explain_hidden_quantizers

__version__ = "0.1.0"

__all__ = ["QuantizationError", "QuantizedIO", "Report", "convert_pt2e", "explain", "prepare_pt2e"]

explain_hidden_quantizers()
