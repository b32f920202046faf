"""Every name of torch.ao.quantization in one module, for programs that reach them as attributes of one.

`import torch.ao.quantization as tq` becomes `import pt2e_quant.quantization as tq`. Each name is at home in one of the
modules imported here, where a new program imports it.
"""

from __future__ import annotations

from . import eager, fake_quantize, observer, qconfig, qconfig_mapping
from .eager import helpers

_HOMES = (eager, helpers, observer, fake_quantize, qconfig, qconfig_mapping)
_NAMES = {name: getattr(home, name) for home in reversed(_HOMES) for name in home.__all__}
globals().update(_NAMES)

__all__ = sorted(_NAMES)  # the reference's names, so without the function below


def find_home(name: str) -> str | None:
    """The module that a name of this one is at home in; None for a name that nothing here has."""
    return next((home.__name__ for home in _HOMES if name in home.__all__), None)
