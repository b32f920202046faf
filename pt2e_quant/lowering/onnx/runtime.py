"""The one door to `onnx`, `onnxscript` and `onnxruntime`: nothing of them is imported before it is asked for.

It opens sessions that compute what the file says: onnxruntime by itself would round the float inputs of products with
integer weights to 8 bits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...errors import LoweringError
from ..common.entry import quietly

__all__ = ["EXACT_INPUTS", "FUSED", "open_session", "optimized", "require"]

EXACT_INPUTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""A configuration entry of onnxruntime: products with weights of 4 or 8 bits keep their inputs in float32."""

FUSED = "fused "
"""What onnxruntime puts before the name of a product that computes the activation after it, too."""

_ERRORS_ONLY = 3


def require() -> None:
    """Import the exporter, the checker and the runtime.

    Raises:
        LoweringError: one is not there; says how to install it.
    """
    try:
        with quietly():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise LoweringError(
            f"lowering to ONNX needs packages that cannot be imported here ({error}). "
            'Install them with: pip install "pt2e_quant[onnx]"'
        ) from error


def open_session(model: bytes, optimized_to: Path | None = None, profile_to: Path | None = None) -> Any:
    """A session of onnxruntime on the processor, which computes what the file says.

    Args:
        model: the content of an ONNX file.
        optimized_to: where to write the graph that onnxruntime runs.
        profile_to: what the name of the file begins with that `end_profiling` writes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(*EXACT_INPUTS)
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def optimized(model: bytes) -> Any:
    """The graph that onnxruntime runs on this processor, an onnx.ModelProto."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="pt2e_quant") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, path)
        return onnx.load(str(path))
