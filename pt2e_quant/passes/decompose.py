"""Fused operators written as simple ones before annotation, where the user or the backend asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from ..errors import CaptureError, did_you_mean
from .decompose_attention import decompose_attention
from .decompose_rnn import decompose_rnn
from .runner import Pass

__all__ = ["DECOMPOSITIONS", "decompositions"]

DECOMPOSITIONS: MappingProxyType[str, Pass] = MappingProxyType({"sdpa": decompose_attention, "rnn": decompose_rnn})
"""What `prepare_pt2e(..., decompose=...)` takes, by name."""


def decompositions(asked: Iterable[str] | None, quantizer: object) -> list[Pass]:
    """The passes that were asked for, or with None those that the quantizer's backend needs (`Quantizer.decompose`).

    Raises:
        CaptureError: a name that is not in DECOMPOSITIONS.
    """
    names = getattr(quantizer, "decompose", ()) if asked is None else asked
    names = {names} if isinstance(names, str) else set(names)
    for name in sorted(names - set(DECOMPOSITIONS)):
        raise CaptureError(f"decompose={name!r} is not known.{did_you_mean(name, DECOMPOSITIONS)}")
    return [step for name, step in DECOMPOSITIONS.items() if name in names]
