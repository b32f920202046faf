"""Which modules of a model hand a tensor to one other module alone: found by one call of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["find_chains"]

_NO_VALUES = ("shape", "size", "dim", "ndim", "numel", "dtype", "device", "layout", "requires_grad")
"""What can be asked of a tensor without reading its values."""

_LONGEST = 3  # a product, its batch norm, its activation


def find_chains(
    model: nn.Module, example_inputs: tuple[Any, ...], fits: Callable[[Sequence[nn.Module]], bool]
) -> list[list[str]]:
    """Paths of modules that run once, one after another, and that nothing else reads in between.

    Args:
        example_inputs: positional arguments of the model. Its mode is kept, its buffers are not written to.
        fits: whether modules in this order are wanted; the longest that are wins.
    """
    watch = _Watch(model)
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        watch.run(example_inputs)
        model.load_state_dict(state, strict=False)
    names = {module: name for name, module in model.named_modules()}
    chains, taken = [], set[nn.Module]()
    for start in watch.calls:
        chain = watch.chain(start, taken)
        while len(chain) > 1 and not fits(chain):
            chain.pop()
        if len(chain) > 1:
            taken.update(chain)
            chains.append([names[module] for module in chain])
    return chains


class _Watch(TorchFunctionMode):
    """Who wrote each tensor, and who reads it: a module without children, or None for code between modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: Counter[nn.Module] = Counter()
        self.readers: dict[nn.Module, set[nn.Module | None]] = {}
        self.writer: dict[int, nn.Module] = {}
        self.alive: list[Any] = []  # so that no other tensor gets the id of one that was seen
        self.running: nn.Module | None = None

    def run(self, inputs: tuple[Any, ...]) -> None:
        leaves = [module for module in self.model.modules() if not any(module.children())]
        handles = [leaf.register_forward_pre_hook(self._enter) for leaf in leaves]
        handles += [leaf.register_forward_hook(self._leave) for leaf in leaves]
        try:
            with self:
                made = self.model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        self._read(made, None)

    def chain(self, start: nn.Module, taken: set[nn.Module]) -> list[nn.Module]:
        """From a module on, as far as each is read by the next alone."""
        found: list[nn.Module] = []
        at: nn.Module | None = start
        while at is not None and at not in taken and self.calls[at] == 1 and len(found) < _LONGEST:
            found.append(at)
            readers = self.readers.get(at, set())
            at = next(iter(readers)) if len(readers) == 1 else None
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else func
        if getattr(attribute, "__name__", "") not in _NO_VALUES:
            self._read((args, kwargs), self.running)
        return func(*args, **(kwargs or {}))

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._read(inputs, module)
        self.running = module
        self.calls[module] += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running = None
        self.alive.append(output)
        for one in _tensors(output):
            self.writer[id(one)] = module

    def _read(self, values: Any, reader: nn.Module | None) -> None:
        for one in _tensors(values):
            writer = self.writer.get(id(one))
            if writer is not None and writer is not reader:
                self.readers.setdefault(writer, set()).add(reader)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
