"""Small float models as values: a sketch is a start shape, a list of steps and a seed. Nothing here is random.

Every list of steps is a legal model: a step picks its operands among the values that fit, and does nothing where none
does. So a test that fails on a sketch can drop steps one after the other until the model is minimal, which is what
hypothesis does (see `strategy`), and a sketch printed in a report can be pasted into a test.

    sketch = Sketch("image", (Step("conv"), Step("relu"), Step("add", other=2)))
    sketch.exported, sketch.inputs, sketch.batches(4)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import QuantizationError

__all__ = ["STARTS", "Draft", "Sketch", "SketchNet", "Step", "one", "rank"]

STARTS = {"features": (2, 8), "sequence": (2, 5, 8), "image": (2, 4, 6, 6)}
"""Shapes of the inputs, batch first."""

T = TypeVar("T")

_LARGEST = 4096  # elements of one value; steps that would make more do nothing


@dataclass(frozen=True)
class Step:
    """One op (or a few) of a model. The numbers are taken modulo what there is to choose from, so all are legal.

    Args:
        op: a name in `steps.OPS`.
        at: which of the values that fit is read; 0 is the newest.
        other: which value is the second operand, where there is one.
        variant: which form of the op.
    """

    op: str
    at: int = 0
    other: int = 0
    variant: int = 0

    def __repr__(self) -> str:
        return _without_defaults(self, "op")


@dataclass(frozen=True)
class Sketch:
    """A small float model with inputs, see the module docstring.

    Args:
        start: shape of the first input, a name in STARTS.
        steps: the ops, in order; values that no later step reads are the outputs.
        seed: of weights, batch-norm statistics and inputs.
        dtype: of parameters and inputs.
        dynamic: export with a free batch size; `batches` then differ in theirs.
    """

    start: str
    steps: tuple[Step, ...]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    dynamic: bool = False

    def __repr__(self) -> str:
        return _without_defaults(self, "start", "steps")

    def module(self) -> SketchNet:
        """The model, in eval mode; the same parameters on every call."""
        from .steps import OPS  # the table draws on this file

        if self.start not in STARTS:
            raise QuantizationError(f"a sketch starts with one of {', '.join(STARTS)}, not with {self.start!r}")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            draft = Draft()
            draft.input(torch.randn(STARTS[self.start]))
            for step in self.steps:
                if step.op not in OPS:
                    raise QuantizationError(f"there is no step {step.op!r}; there is {', '.join(OPS)}")
                OPS[step.op](draft, step)
            return draft.net().to(self.dtype)

    @functools.cached_property
    def exported(self) -> ExportedProgram:
        """The model as torch.export captures it with `inputs`."""
        shapes = (tuple({0: torch.export.Dim.AUTO} for _ in self.inputs),) if self.dynamic else None
        return torch.export.export(self.module(), self.inputs, dynamic_shapes=shapes)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Example inputs: floats from a normal distribution, integers in [0, 4)."""
        return self.batches(1)[0]

    def batches(self, count: int) -> list[tuple[Tensor, ...]]:
        """Inputs for calibration; the first of them is `inputs`."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [2 + number % 2 if self.dynamic else 2 for number in range(count)]
        return [tuple(self._sample(size, *kind, generator) for kind in self._kinds) for size in sizes]

    def _sample(self, size: int, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = torch.Size((size, *shape[1:]))
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        return torch.randint(0, 4, shape, generator=generator)

    @functools.cached_property
    def _kinds(self) -> tuple[tuple[torch.Size, torch.dtype], ...]:
        return self.module().kinds


def _without_defaults(value: Any, *positional: str) -> str:
    """The call that makes a dataclass, with its defaults left out: what a failing test prints can be pasted."""
    words = [repr(getattr(value, name)) for name in positional]
    for field in fields(value):
        if field.name not in positional and getattr(value, field.name) != field.default:
            words.append(f"{field.name}={getattr(value, field.name)!r}")
    return f"{type(value).__name__}({', '.join(words)})"


@dataclass(frozen=True)
class _Call:
    """One call of a model: a submodule by name, or a function, on values by number; None is an input."""

    function: str | Callable[..., Any] | None
    operands: tuple[int, ...]


class SketchNet(nn.Module):
    """What a sketch builds: a list of calls, played one after the other."""

    def __init__(self, calls: list[_Call], parts: dict[str, nn.Module], kinds: tuple[Any, ...]) -> None:
        super().__init__()
        self._calls = calls
        self.kinds = kinds
        for name, part in parts.items():
            self.add_module(name, part)
        used = {operand for call in calls for operand in call.operands}
        self._inputs = [number for number, call in enumerate(calls) if call.function is None]
        self._outputs = [number for number in range(len(calls)) if number not in used and number not in self._inputs]
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Any:
        values: list[Any] = [None] * len(self._calls)
        for number, value in zip(self._inputs, inputs, strict=True):
            values[number] = value
        for number, call in enumerate(self._calls):
            if call.function is not None:
                function = getattr(self, call.function) if isinstance(call.function, str) else call.function
                values[number] = function(*(values[operand] for operand in call.operands))
        outputs = [values[number] for number in self._outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def one(options: Sequence[T], number: int) -> T:
    """The option of that number, modulo their count."""
    return options[number % len(options)]


def rank(*ranks: int) -> Callable[[Tensor], bool]:
    """Fits values of these numbers of dimensions."""
    return lambda value: value.dim() in ranks


class Draft:
    """A model under construction: the values so far, on which the steps choose, and how they were made."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._calls: list[_Call] = []
        self._parts: dict[str, nn.Module] = {}
        self._seen: dict[str, torch.Size] = {}  # shape that each submodule was first called on

    def input(self, value: Tensor) -> int:
        """Add an input of the model; its number."""
        self._values.append(value)
        self._calls.append(_Call(None, ()))
        return len(self._values) - 1

    def pick(
        self, place: int, fits: Callable[[Tensor], bool] = lambda value: True, *, fresh: bool = False
    ) -> int | None:
        """Number of the `place`-th newest float value that fits, None when none does.

        fresh: no input of the model, and each element in a place of its own, so that it may be written to.
        """
        found = [number for number in reversed(range(len(self._values))) if self._fits(number, fits, fresh)]
        return found[place % len(found)] if found else None

    def _fits(self, number: int, fits: Callable[[Tensor], bool], fresh: bool) -> bool:
        value = self._values[number]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        if fresh and (self._calls[number].function is None or 0 in value.stride()):
            return False
        return fits(value)

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

    def call(self, function: nn.Module | Callable[..., Any], *operands: int) -> int | None:
        """Apply a new submodule or a function to values; the number of the result, None when it would be too large.

        A function must compute the same whenever it is called: tensors of its own belong into a submodule.
        """
        if isinstance(function, nn.Module):
            name = f"{type(function).__name__.lower()}{len(self._parts)}"
            function.eval()
            self._parts[name] = function
            return self._record(name, operands)
        return self._record(function, operands)

    def again(self, which: int, x: int) -> int | None:
        """Call a submodule that was called on the same shape before."""
        shape = self.value(x).shape
        names = [name for name, seen in self._seen.items() if seen == shape]
        return self._record(names[which % len(names)], (x,)) if names else None

    def _record(self, function: str | Callable[..., Any], operands: tuple[int, ...]) -> int | None:
        run = self._parts[function] if isinstance(function, str) else function
        result = run(*(self._values[operand] for operand in operands))
        size = sum(value.numel() for value in (result if isinstance(result, (tuple, list)) else (result,)))
        if not 0 < size <= _LARGEST:
            if isinstance(function, str) and function not in self._seen:
                del self._parts[function]
            return None
        if isinstance(function, str):
            self._seen.setdefault(function, self.value(operands[0]).shape)
        self._values.append(result)
        self._calls.append(_Call(function, operands))
        return len(self._values) - 1

    def net(self) -> SketchNet:
        """The finished model; relu of the input when no step fitted."""
        if all(call.function is None for call in self._calls):
            self.call(torch.relu, 0)
        inputs = [value for value, call in zip(self._values, self._calls, strict=True) if call.function is None]
        return SketchNet(self._calls, self._parts, tuple((value.shape, value.dtype) for value in inputs))
