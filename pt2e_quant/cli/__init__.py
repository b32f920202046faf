"""The command line: `pt2e-quant quantize model.pt2 --data inputs.npz --target xnnpack`, and `pt2e-quant --help`."""

from .main import main

__all__ = ["main"]
