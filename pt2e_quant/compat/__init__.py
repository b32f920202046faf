"""For programs written for torch.ao.quantization: its import roots."""

from .finder import install, is_installed, uninstall

__all__ = ["install", "is_installed", "uninstall"]
