"""A sketch under construction: the values so far, from which steps choose their operands, and the calls that made them.

It knows neither the kinds of steps (`kinds`) nor who plays them (`sketch`). A draft computes as it grows, so that
steps see shapes, and what no model should do (values without end, writes to overlapping memory) becomes part of none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["Draft", "SketchNet", "Step", "one", "without_defaults"]

T = TypeVar("T")
Fits = Callable[[Tensor], bool]

_LARGEST = 4096  # elements of one value; steps that would make more do nothing
_LOUDEST = 1e3  # magnitude of one value: float16 ends at 65,504, and quantized values reach beyond those of the draft


@dataclass(frozen=True)
class Step:
    """One op (or a few) of a model. The numbers are taken modulo what there is to choose from, so all are legal.

    Args:
        op: a name in `kinds.OPS`.
        at: which of the values that fit is read; 0 is the newest.
        other: which value is the second operand, where there is one.
        variant: which form of the op.
    """

    op: str
    at: int = 0
    other: int = 0
    variant: int = 0

    def __repr__(self) -> str:
        return without_defaults(self, "op")


def without_defaults(value: Any, *positional: str) -> str:
    """The call that makes a dataclass, with its defaults left out: what a failing test prints can be pasted."""
    words = [repr(getattr(value, name)) for name in positional]
    for field in fields(value):
        if field.name not in positional and getattr(value, field.name) != field.default:
            words.append(f"{field.name}={getattr(value, field.name)!r}")
    return f"{type(value).__name__}({', '.join(words)})"


def one(options: Sequence[T], number: int) -> T:
    """The option of that number, modulo their count."""
    return options[number % len(options)]


@dataclass(frozen=True)
class Played:
    """One call of a model: a submodule by name, or a function, on values by number; None is an input."""

    function: str | Callable[..., Any] | None
    operands: tuple[int, ...]


class SketchNet(nn.Module):
    """What a sketch builds: a list of calls, played one after the other.

    nested: takes one dictionary {"x": first input, "rest": (others)} and returns {"last": ..., "others": (...)}.
    """

    def __init__(self, calls: list[Played], parts: dict[str, nn.Module], kinds: tuple[Any, ...], nested: bool) -> None:
        super().__init__()
        self._calls = calls
        self.kinds, self.nested = kinds, nested
        for name, part in parts.items():
            self.add_module(name, part)
        used = {operand for call in calls for operand in call.operands}
        self._inputs = [number for number, call in enumerate(calls) if call.function is None]
        self._outputs = [number for number in range(len(calls)) if number not in used and number not in self._inputs]
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Any) -> Any:
        if self.nested:
            inputs = (inputs[0]["x"], *inputs[0]["rest"])
        values: list[Any] = [None] * len(self._calls)
        for number, value in zip(self._inputs, inputs, strict=True):
            values[number] = value
        for number, call in enumerate(self._calls):
            if call.function is not None:
                function = getattr(self, call.function) if isinstance(call.function, str) else call.function
                values[number] = function(*(values[operand] for operand in call.operands))
        outputs = [values[number] for number in self._outputs]
        if self.nested:
            return {"last": outputs[-1], "others": tuple(outputs[:-1])}
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Draft:
    """A model under construction: the values so far, on which the steps choose, and how they were made."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._calls: list[Played] = []
        self._parts: dict[str, nn.Module] = {}
        self._seen: dict[str, torch.Size] = {}  # shape that each submodule was first called on

    def input(self, value: Tensor) -> int:
        """Add an input of the model; its number."""
        self._values.append(value)
        self._calls.append(Played(None, ()))
        return len(self._values) - 1

    def pick(self, place: int, fits: Fits = lambda value: True, *, fresh: bool = False) -> int | None:
        """Number of the `place`-th newest float value that fits, None when none does.

        fresh: no input of the model, and each element in a place of its own, so that it may be written to.
        """
        found = [number for number in reversed(range(len(self._values))) if self._fits(number, fits, fresh)]
        return found[place % len(found)] if found else None

    def _fits(self, number: int, fits: Fits, fresh: bool) -> bool:
        value = self._values[number]
        if not isinstance(value, Tensor) or value.dtype is not torch.float32 or not value.numel():
            return False  # what ended in another type would meet parameters of this one
        if fresh and (self._is_input(value) or _overlaps_itself(value)):
            return False
        return fits(value)

    def _is_input(self, value: Tensor) -> bool:
        """It is an input of the model, or a view of one."""
        inputs = [self._values[number] for number, call in enumerate(self._calls) if call.function is None]
        return any(_same_memory(value, one) for one in inputs)

    def value(self, number: int) -> Tensor:
        """The value of that number, for its shape."""
        found: Tensor = self._values[number]
        return found

    def integers(self) -> int:
        """Number of the integer input, which the first step that asks for it adds."""
        for number, value in enumerate(self._values):
            if isinstance(value, Tensor) and not value.is_floating_point() and self._calls[number].function is None:
                return number
        return self.input(torch.randint(0, 4, self._values[0].shape[:1]))

    def second_input(self, like: int) -> int:
        """Add one more float input, of the shape of a value."""
        return self.input(torch.randn(self.value(like).shape))

    def apart(self, number: int) -> Fits:
        """Fits values that may be read while that one is written: in other memory, or the very same view."""
        written = self.value(number)
        return lambda value: not _same_memory(value, written) or value.is_set_to(written)

    def call(self, function: nn.Module | Callable[..., Any], *operands: int) -> int | None:
        """Apply a new submodule or a function to values; the number of the result, None when there is none.

        A result too large, too loud or not finite makes the call undone. Of several results the first three tensors
        become values of their own. A function must compute the same whenever it is called: tensors of its own belong
        into a submodule.
        """
        if isinstance(function, nn.Module):
            name = f"{type(function).__name__.lower()}{len(self._parts)}"
            self._parts[name] = function.eval()
            number = self._record(name, operands)
            if number is None:
                del self._parts[name]
        else:
            number = self._record(function, operands)
        if number is not None and isinstance(self._values[number], (tuple, list)):
            for item in range(min(3, len(self._values[number]))):
                self._record(lambda several, item=item: several[item], (number,))
        return number

    def again(self, which: int, x: int) -> int | None:
        """Call a submodule that was called on the same shape before."""
        shape = self.value(x).shape
        names = [name for name, seen in self._seen.items() if seen == shape]
        return self._record(names[which % len(names)], (x,)) if names else None

    def _record(self, function: str | Callable[..., Any], operands: tuple[int, ...]) -> int | None:
        run = self._parts[function] if isinstance(function, str) else function
        read = [self._values[operand] for operand in operands]
        kept = [value.clone() if isinstance(value, Tensor) else value for value in read]
        result = run(*read)
        if not _is_moderate(result):
            for value, before in zip(read, kept, strict=True):  # the function may have written to them
                if isinstance(value, Tensor) and not value.equal(before):
                    value.copy_(before)
            return None
        if isinstance(function, str):
            self._seen.setdefault(function, self.value(operands[0]).shape)
        self._values.append(result)
        self._calls.append(Played(function, operands))
        return len(self._values) - 1

    def net(self, nested: bool) -> SketchNet:
        """The finished model; relu of the input when no step fitted."""
        if all(call.function is None for call in self._calls):
            self.call(torch.relu, 0)
        inputs = [value for value, call in zip(self._values, self._calls, strict=True) if call.function is None]
        return SketchNet(self._calls, self._parts, tuple((value.shape, value.dtype) for value in inputs), nested)


def _is_moderate(result: Any) -> bool:
    """Some elements, not too many, none too large."""
    tensors = [value for value in _pytree.tree_leaves(result) if isinstance(value, Tensor)]
    if not 0 < sum(value.numel() for value in tensors) <= _LARGEST:
        return False
    floats = [value for value in tensors if value.is_floating_point() and value.numel()]
    return all(float(value.abs().max()) <= _LOUDEST for value in floats)  # no comparison holds for NaN


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _overlaps_itself(value: Tensor) -> bool:
    """Two elements may lie in one place, as those of an expanded tensor or of overlapping windows do."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
