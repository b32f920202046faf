"""Counts as a file holds them: mostly zero, so that only the others are stored.

counts           int64, one per bin
counts:size      how many there are
counts:places    which of them are not zero, ascending
counts:values    those
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_SIZE, _PLACES, _VALUES = ":size", ":places", ":values"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its vectors of int64 as places and values, on the CPU, in memory of its own."""
    packed: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.detach().cpu()
        if value.dtype is torch.int64 and value.dim() == 1:
            places = value.nonzero().squeeze(1)
            packed |= {
                key + _SIZE: torch.tensor(value.numel()),
                key + _PLACES: places,
                key + _VALUES: value[places],
            }
        else:
            packed[key] = value.clone(memory_format=torch.contiguous_format)
    return packed


def unpack(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that was packed. No vector gets longer than that of the same name in `like`.

    Raises:
        ValueError: these are not what `pack` makes of vectors as in `like`.
    """
    state = {key: value for key, value in packed.items() if ":" not in key}
    for key in [key.removesuffix(_SIZE) for key in packed if key.endswith(_SIZE)]:
        size, places, values = (packed.get(key + part) for part in (_SIZE, _PLACES, _VALUES))
        if size is None or places is None or values is None or key not in like:
            raise ValueError(f"{key} is incomplete, or known to no observer of this kind")
        state[key] = _spread(key, size, places, values, like[key].numel())
    return state


def _spread(key: str, size: Tensor, places: Tensor, values: Tensor, length: int) -> Tensor:
    if any(part.dtype is not torch.int64 for part in (size, places, values)):
        raise ValueError(f"{key} is stored as {size.dtype}, {places.dtype}, {values.dtype}, not as torch.int64")
    if size.dim() or places.dim() != 1 or values.shape != places.shape:
        raise ValueError(f"{key} has {tuple(values.shape)} values for {tuple(places.shape)} places")
    if int(size) != length:
        raise ValueError(f"{key} has {int(size)} elements, the observer {length}")
    fence = torch.tensor([-1]), torch.tensor([length])
    if not bool((torch.cat((fence[0], places, fence[1])).diff() > 0).all()):
        raise ValueError(f"{key} has places outside of 0 to {length - 1}, or out of order")
    return torch.zeros(length, dtype=torch.int64).index_put_((places,), values)
