"""From a model to a symbolic graph of its modules, functions and methods, with the value of each node."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.utils import _pytree as pytree

from ..eager.helpers import QuantType
from ..errors import CaptureError
from ..graph.module import ExportedModule, finish
from ..nn.functional_modules import FloatFunctional, FXFloatFunctional
from .custom_config import PrepareCustomConfig

__all__ = ["finish_in_modes", "record_values", "trace"]

_WHOLE = ("torch.nn.", "pt2e_quant.nn.")


def trace(model: nn.Module, custom: PrepareCustomConfig, *, to_train: bool = False) -> ExportedModule:
    """A draft of a graph whose nodes call the modules of torch.nn, and those that `custom` names, as they are.

    The model stays as it was: the graph has modules of its own, and to be trained parameters, too.

    Raises:
        Whatever the model raises on symbols, such as torch.fx.proxy.TraceError.
    """
    if isinstance(model, GraphModule):
        model = copy.copy(model)
    tensors = () if to_train else (*model.parameters(), *model.buffers())
    root = copy.deepcopy(model, {id(one): one for one in tensors})
    for module in list(root.modules()):
        for name, child in module.named_children():
            if type(child) is FloatFunctional:
                setattr(module, name, FXFloatFunctional())
    tracer = _Tracer(custom)
    graph = tracer.trace(root)
    made = ExportedModule(root, graph, type(model).__name__, draft=True)
    modes = {name: module.training for name, module in root.named_modules()}
    for name, module in made.named_modules():  # each keeps its own
        module.training = modes.get(name, model.training)
    return made


def finish_in_modes(gm: ExportedModule, training: bool) -> ExportedModule:
    """`finish` for a symbolic graph, whose modules keep the modes that they have; `training` is that of the whole."""
    modes = {module: module.training for module in gm.modules()}
    finish(gm)
    for module in gm.modules():
        module.training = modes.get(module, training)
    gm.training = training
    return gm


class _Tracer(Tracer):
    def __init__(self, custom: PrepareCustomConfig) -> None:
        super().__init__()
        self.record_stack_traces = True
        self._paths = {*custom.non_traceable_module_names, *custom.standalone_module_names}
        self._kinds = {
            *custom.non_traceable_module_classes,
            *custom.standalone_module_classes,
            *custom.float_to_observed_mapping.get(QuantType.STATIC, {}),
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._paths or type(m) in self._kinds:
            return True
        whole = type(m).__module__.startswith(_WHOLE) and not isinstance(m, FXFloatFunctional)
        return whole and type(m) is not nn.Sequential


def record_values(gm: GraphModule, example_inputs: tuple[Any, ...]) -> GraphModule:
    """Note on each node what its value looks like, as torch.export does: meta["val"] holds fake tensors.

    Raises:
        CaptureError: the model does not run on the example inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _evaluating(gm), torch.no_grad():
        try:
            with _without_values(gm) as device:
                _Recorder(gm, mode, device).run(*_without(example_inputs))
        except Exception:  # noqa: BLE001  # code of the model that reads values, or makes some elsewhere: then it runs
            _run(gm, mode, example_inputs)
    return gm


def _run(gm: GraphModule, mode: FakeTensorMode, example_inputs: tuple[Any, ...]) -> None:
    state = {name: value.clone() for name, value in gm.state_dict().items() if isinstance(value, Tensor)}
    try:
        _Recorder(gm, mode, None).run(*example_inputs)
    except Exception as error:
        raise CaptureError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}\n  Pass a tuple of "
            "arguments that it can be called with: example_inputs=(torch.randn(1, 3, 224, 224),)"
        ) from error
    finally:
        gm.load_state_dict(state, strict=False)


def _without(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda value: value.detach().to("meta"), values)


@contextmanager
def _without_values(gm: nn.Module) -> Iterator[torch.device]:
    """Parameters and buffers on the device meta, which computes sizes and types: a third of the time of fake tensors.

    Yields the device that they are on; a model on several raises, as there values are moved.
    """
    both = (tensors for module in gm.modules() for tensors in (module._parameters, module._buffers))
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [(tensors, dict(tensors)) for tensors in both]
    devices = {one.device for _, tensors in held for one in tensors.values() if one is not None}
    if len(devices) > 1:
        raise CaptureError(f"parameters and buffers are on {', '.join(sorted(map(str, devices)))}")
    try:
        for tensors, old in held:
            tensors.update({name: None if one is None else _without(one) for name, one in old.items()})
        yield next(iter(devices), torch.device("cpu"))
    finally:
        for tensors, old in held:
            tensors.update(old)


class _Recorder(Interpreter):
    """device: where values are that run as meta tensors; None where they run as they are."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode, device: torch.device | None) -> None:
        super().__init__(gm)
        self._mode, self._device = mode, device

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = pytree.tree_map_only(Tensor, self._fake, result)
        return result

    def _fake(self, value: Tensor) -> Tensor:
        if self._device is None:
            return self._mode.from_tensor(value.detach(), static_shapes=True)
        if not value.is_meta:
            raise CaptureError("the model makes a tensor of its own")
        return FakeTensor(self._mode, value.detach(), self._device)


@contextmanager
def _evaluating(gm: nn.Module) -> Iterator[None]:
    """Without dropout and statistics of batches: values look the same, and no buffer is written to."""
    modes = {module: module.training for module in gm.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
