"""Write a converted graph as an ONNX file of quantize-dequantize pairs, and say what onnxruntime makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.lazy import lazily

if TYPE_CHECKING:
    from .lower import lower_to_onnx
    from .program import OnnxProgram

__all__ = ["OnnxProgram", "lower_to_onnx"]

__getattr__ = lazily(__name__, lower_to_onnx="lower", OnnxProgram="program")
