"""A row of the table of kinds: the forms of one op, and which values they take.

Most kinds are one of four sorts of row: `op` applies a function to a value, `layer` a new submodule, `pair` a function
to two values, `ids` a function to a value and integers. What fits no row is a function of (draft, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..draft import Draft, Step, one

__all__ = ["Fits", "Kind", "OpKind", "alike", "anything", "at_least", "ids", "layer", "op", "pair", "rank", "sized"]

Fits = Callable[[Tensor], bool]
Kind = Callable[[Draft, Step], None]
"""Looks for operands that fit, and returns without doing anything where there are none."""

Mate = Callable[[Draft, Step, int], "int | None"]
"""The second operand beside the first, by number."""


def anything(value: Tensor) -> bool:
    """Fits every value."""
    return True


def rank(*ranks: int) -> Fits:
    """Fits values of these numbers of dimensions."""
    return lambda value: value.dim() in ranks


def at_least(dims: int, size: int = 1) -> Fits:
    """Fits values of so many dimensions or more, each dimension but the first of this size or more."""
    return lambda value: value.dim() >= dims and min(value.shape[1:], default=1) >= size


def sized(*ranks: int, least: int) -> Fits:
    """Fits values of these numbers of dimensions whose dimensions after batch and channels have at least a size."""
    return lambda value: value.dim() in ranks and min(value.shape[2:], default=0) >= least


@dataclass(frozen=True)
class OpKind:
    """One row.

    forms: functions of the operands, of which the variant of a step picks one
    takes: what fits the first operand
    mate:  finds the second operand; None where there is none
    makes: the forms take the value of the first operand and make the submodule to call
    fresh: the forms write to their first operand
    """

    forms: tuple[Callable[..., Any], ...]
    takes: Fits = anything
    mate: Mate | None = None
    makes: bool = False
    fresh: bool = False

    def __call__(self, draft: Draft, step: Step) -> None:
        x = draft.pick(step.at, self.takes, fresh=self.fresh)
        if x is None:
            return
        form, operands = one(self.forms, step.variant), [x]
        if self.mate is not None:
            other = self.mate(draft, step, x)
            if other is None:
                return
            operands.append(other)
        draft.call(form(draft.value(x)) if self.makes else form, *operands)


def op(*forms: Callable[[Tensor], Any], takes: Fits = anything, fresh: bool = False) -> OpKind:
    """Functions of one value."""
    return OpKind(forms, takes, fresh=fresh)


def layer(*forms: Callable[[Tensor], nn.Module], takes: Fits = anything) -> OpKind:
    """Submodules, each made to fit a value."""
    return OpKind(forms, takes, makes=True)


def alike(draft: Draft, step: Step, x: int) -> int | None:
    """A value of the same shape, which may be the first one itself."""
    shape, apart = draft.value(x).shape, draft.apart(x)
    return draft.pick(step.other, lambda value: value.shape == shape and apart(value))


def pair(
    *forms: Callable[[Tensor, Tensor], Any], takes: Fits = anything, mate: Mate = alike, fresh: bool = False
) -> OpKind:
    """Functions of two values."""
    return OpKind(forms, takes, mate, fresh=fresh)


def ids(*forms: Callable[[Tensor, Tensor], Any], takes: Fits = anything) -> OpKind:
    """Functions of a value and of integers in [0, 4), one for each item of the batch."""
    return OpKind(forms, takes, _integers)


def _integers(draft: Draft, step: Step, x: int) -> int | None:
    if draft.value(x).dim() == 0:
        return None
    found = draft.integers()
    return found if draft.value(found).shape[0] == draft.value(x).shape[0] else None
