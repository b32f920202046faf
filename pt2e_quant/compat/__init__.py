"""For programs and files that know torch.ao.quantization: its import roots, its checkpoints."""

from .checkpoints import load_file
from .finder import install, is_installed, uninstall

__all__ = ["install", "is_installed", "load_file", "uninstall"]
