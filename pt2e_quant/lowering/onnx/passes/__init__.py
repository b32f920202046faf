"""Passes of the lowering to ONNX: each writes integers in the form that onnxruntime has a kernel for."""
