"""What one observer kept, in a form that outlives it: an entry of a calibration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError
from ..observer import ObserverBase

__all__ = ["Entry", "Kind", "kind_of", "state_of"]

_CONFIGURATION = "eps"
"""The smallest scale is told to the constructor, and a buffer only for the sake of the reference's checkpoints."""


@dataclass(frozen=True)
class Kind:
    """Which observers are alike.

    name:      class, with its module
    arguments: what the constructor was told, in words
    facts:     state that depends on the data alone, see `ObserverBase.facts`
    """

    name: str
    arguments: Mapping[str, str]
    facts: frozenset[str]

    def same(self, other: Kind) -> bool:
        """True when all of the state of one means the same in the other."""
        return (self.name, self.arguments) == (other.name, other.arguments)


@dataclass(frozen=True)
class Entry:
    """What one observer kept.

    name:    of the observer's submodule
    tensors: the graph nodes that it watched
    state:   its buffers; counts are packed, see `counts`
    """

    name: str
    tensors: frozenset[str]
    kind: Kind
    state: Mapping[str, Tensor]


def kind_of(observer: nn.Module) -> Kind:
    """The kind of an observer; of a fake quantizer, the observer inside is one of the arguments."""
    arguments: dict[str, Any] = observer._signature() if isinstance(observer, ObserverBase) else {}
    inner = getattr(observer, "activation_post_process", None)
    if isinstance(inner, nn.Module):
        inside = kind_of(inner)
        arguments = {"observer": inside.name, **{f"observer.{key}": text for key, text in inside.arguments.items()}}
    return Kind(
        f"{type(observer).__module__}.{type(observer).__qualname__}",
        {key: str(value) for key, value in arguments.items()},
        frozenset(getattr(observer, "facts", ())),
    )


def state_of(observer: nn.Module) -> dict[str, Tensor]:
    """What the observer learned, without what its constructor was told.

    Raises:
        CalibrationError: part of it is no ordinary tensor, or stands in attributes that are no buffers.
    """
    state = observer.state_dict()
    outside = [name for name, value in vars(observer).items() if isinstance(value, Tensor)]
    if outside:
        raise CalibrationError(
            f"{type(observer).__name__} keeps {', '.join(outside)} in plain attributes, and a file holds buffers only; "
            "register them as buffers, or calibrate and convert in one process"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized:
            raise CalibrationError(f"{type(observer).__name__} keeps {key!r}, {value!r}, which no file can hold")
    return {key: value for key, value in state.items() if key.rpartition(".")[2] != _CONFIGURATION}
