"""The state of all observers of a model as one state dict: what the reference saves beside the weights.

`pt2e_quant.calibration` saves more: which tensors were watched, and how.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import CalibrationError
from .base import ObserverBase

__all__ = ["get_observer_state_dict", "load_observer_state_dict"]

_NAME = "activation_post_process"


@checked(CalibrationError)
def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Any]:
    """The part of the state dict of `mod` that belongs to observers: keys that contain 'activation_post_process'."""
    whole = mod.state_dict()
    part: Any = OrderedDict((key, value) for key, value in whole.items() if _NAME in key)
    part._metadata = whole._metadata  # type: ignore[attr-defined]  # versions, for classes that migrate old states
    return part  # type: ignore[no-any-return]


@checked(CalibrationError)
def load_observer_state_dict(mod: nn.Module, obs_dict: dict[str, Any]) -> None:
    """Put what `get_observer_state_dict` returned, here or in the reference, back into the observers of `mod`.

    Raises:
        CalibrationError: a key is missing, fits no observer of `mod`, or has another shape.
    """
    state, versions = dict(obs_dict), getattr(obs_dict, "_metadata", {})
    missing: list[str] = []
    unexpected: list[str] = []
    wrong: list[str] = []
    prefixes = []
    for name, module in mod.named_modules():
        if isinstance(module, ObserverBase) or hasattr(module, "fake_quant_enabled"):
            prefixes.append(f"{name}." if name else "")
            arguments = (versions.get(name, {}), True, missing, unexpected, wrong)
            module._load_from_state_dict(state, prefixes[-1], *arguments)
    unexpected += [key for key in obs_dict if _NAME in key and not key.startswith(tuple(prefixes))]
    missing = [key for key in missing if _NAME in key]
    named = (("missing", missing), ("without an observer here", unexpected))
    problems = [f"{what}: {', '.join(sorted(set(keys)))}" for what, keys in named if keys]
    if problems or wrong:
        raise CalibrationError(
            "the state does not fit the observers of this model; " + "; ".join([*problems, *wrong]) + ".\n"
            "  Load it into a model that was prepared in the same way."
        )
