"""For programs and files that know torch.ao.quantization: its import roots, its checkpoints, and the way to PT2E."""

from .bridge import Bridge, eager_to_pt2e
from .checkpoints import load_file
from .finder import install, is_installed, uninstall

__all__ = ["Bridge", "eager_to_pt2e", "install", "is_installed", "load_file", "uninstall"]
