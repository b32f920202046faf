"""One net of the zoo: how it is built, what it takes, and which recipes fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BOTH", "DYNAMIC", "NETS", "STATIC", "Net", "enter"]

STATIC, DYNAMIC = ("static",), ("dynamic",)
BOTH = STATIC + DYNAMIC

Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Net:
    """A net with example inputs.

    Args:
        name: how it is asked for.
        family: 'transformers', or 'by hand'.
        build: makes the module and its example inputs.
        recipes: 'static', 'dynamic' or both.
        ids: integer inputs are drawn below this number.
    """

    name: str
    family: str
    build: Build
    recipes: tuple[str, ...]
    ids: int

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module in eval mode, with batch-norm statistics other than (0, 1), and its inputs."""
        torch.manual_seed(0)
        module, inputs = self.build()
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.running_mean.normal_(0, 0.2)
                child.running_var.uniform_(0.5, 1.5)
        return module.eval(), inputs

    def batch(self, inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
        """Other inputs of the same shapes."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(x.shape, generator=generator)
            if x.is_floating_point()
            else torch.randint(0, self.ids, x.shape, generator=generator)
            for x in inputs
        )


NETS: dict[str, Net] = {}


def enter(family: str, recipes: tuple[str, ...] = STATIC, ids: int = 80) -> Callable[[Build], Build]:
    """Enter a builder under its own name."""

    def note(build: Build) -> Build:
        name = build.__name__
        NETS[name] = Net(name, family, build, recipes, ids)
        return build

    return note
