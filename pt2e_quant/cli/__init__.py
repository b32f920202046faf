"""The command line: `pt2e-quant quantizers`, `pt2e-quant show report.json`, `pt2e-quant why report.json layer1.0`."""

from .main import main

__all__ = ["main"]
