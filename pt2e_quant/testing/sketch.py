"""Small float models as values: a sketch is a start shape, a list of steps and a seed. Nothing here is random.

Every list of steps is a legal model: a step picks its operands among the values that fit, and does nothing where none
does. So a test that fails on a sketch can drop steps one after the other until the model is minimal, which is what
hypothesis does (see `strategy`), and a sketch printed in a report can be pasted into a test.

    sketch = Sketch("image", (Step("conv"), Step("relu"), Step("add", other=2)))
    sketch.exported, sketch.inputs, sketch.batches(4)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import QuantizationError
from .draft import Draft, SketchNet, Step, without_defaults
from .kinds import OPS
from .running import state_kept

__all__ = ["STARTS", "Sketch"]

STARTS = {"features": (2, 8), "sequence": (2, 5, 8), "image": (2, 4, 6, 6), "volume": (2, 2, 3, 4, 4)}
"""Shapes of the inputs, batch first."""


@dataclass(frozen=True)
class Sketch:
    """A small float model with inputs, see the module docstring.

    Args:
        start: shape of the first input, a name in STARTS.
        steps: the ops, in order; values that no later step reads are the outputs.
        seed: of weights, batch-norm statistics and inputs.
        dtype: of parameters and inputs.
        dynamic: export with a free batch size where the model allows one; `batches` then differ in theirs.
        nested: inputs and outputs are dictionaries with tuples in them.
    """

    start: str
    steps: tuple[Step, ...]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    nested: bool = False

    def __repr__(self) -> str:
        return without_defaults(self, "start", "steps")

    def module(self) -> SketchNet:
        """The model, in eval mode; the same parameters on every call."""
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
            return draft.net(self.nested).to(self.dtype)

    @functools.cached_property
    def exported(self) -> ExportedProgram:
        """The model as torch.export captures it with `inputs`."""
        free = torch.utils._pytree.tree_map(lambda _: {0: torch.export.Dim.AUTO}, self.inputs)
        return torch.export.export(self.module(), self.inputs, dynamic_shapes=(free,) if self.dynamic else None)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Example inputs: floats from a normal distribution, integers in [0, 4)."""
        return self._batches([2])[0]

    def batches(self, count: int) -> list[tuple[Any, ...]]:
        """Inputs for calibration; the first of them is `inputs`."""
        return self._batches([2 + number % 2 * self._extra for number in range(count)])

    def _batches(self, sizes: list[int]) -> list[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        flat = [tuple(self._sample(size, *kind, generator) for kind in self._kinds) for size in sizes]
        return [({"x": batch[0], "rest": batch[1:]},) for batch in flat] if self.nested else list(flat)

    def _sample(self, size: int, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = torch.Size((size, *shape[1:]))
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        return torch.randint(0, 4, shape, generator=generator)

    @functools.cached_property
    def _extra(self) -> int:
        """By how much every second batch is larger: 0 where the exported model takes batches of one size only."""
        if not self.dynamic:
            return 0
        model = self.exported.module()
        try:
            with state_kept(model):
                model(*self._batches([3])[0])
        except (AssertionError, RuntimeError):  # of a guard; of a linear whose width is that of the batch
            return 0
        return 1

    @functools.cached_property
    def _kinds(self) -> tuple[tuple[torch.Size, torch.dtype], ...]:
        kinds: tuple[tuple[torch.Size, torch.dtype], ...] = self.module().kinds
        return kinds
