"""The reference's numeric debugger: handles on nodes, loggers that keep every value, and pairs of what they kept.

    generate_numeric_debug_handle(exported)
    ...                                                  # prepare, calibrate, convert exported.module() as ever
    logged = [prepare_for_propagation_comparison(gm) for gm in (exported.module(), converted)]
    for gm in logged:
        gm(*inputs)
    compare_results(*map(extract_results_from_loggers, logged))

`debug.compare` needs no handles, keeps no tensors, and tells own errors from inherited ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..checks import check_fields, checked
from ..errors import CaptureError, QuantizationError
from ..graph.attributes import free_name
from ..graph.constants import Constants
from ..graph.handles import give_handles, handle_of
from ..ops import CHOOSE_QPARAMS, is_quantize
from ..sqnr import sqnr

__all__ = [
    "NodeAccuracySummary",
    "OutputLogger",
    "QuantizationComparisonResult",
    "compare_results",
    "extract_results_from_loggers",
    "generate_numeric_debug_handle",
    "prepare_for_propagation_comparison",
]

Logged = tuple[str | None, object, list[object]]
"""Name of a node, its nn_module_stack, and its value in each run."""


class OutputLogger(nn.Module):
    """Keeps what flows through it, detached.

    Args:
        debug_handle: the handle of the node.
        node_name, nn_module_stack: where it comes from.
    """

    _is_impure = True  # dead-code elimination keeps what nobody reads

    @checked(CaptureError)
    def __init__(self, debug_handle: int, node_name: str | None = None, nn_module_stack: Any = None) -> None:
        super().__init__()
        self.debug_handle = debug_handle
        self.node_name = node_name
        self.nn_module_stack = nn_module_stack
        self.stats: list[object] = []

    def forward(self, x: Any) -> Any:
        self.stats.append(_mapped(lambda tensor: tensor.detach().clone(), x))
        return x


@dataclass(frozen=True)
class QuantizationComparisonResult:
    """One value in two models: a tensor, or a list, tuple or dictionary of tensors, of equal structure and shapes.

    Raises:
        QuantizationError: they are not.
    """

    actual: Any
    ref: Any

    def __post_init__(self) -> None:
        check_fields(self, QuantizationError)
        if not _alike(self.ref, self.actual):
            raise QuantizationError(
                f"values of different structure or shape cannot be compared: {_shape(self.ref)} in the reference, "
                f"{_shape(self.actual)} in the other model"
            )

    @property
    def mse_loss(self) -> Any:
        """Mean of the squared differences, for each tensor."""
        return self.loss(torch.nn.functional.mse_loss)

    @property
    def sqnr(self) -> Any:
        """Signal-to-quantization-noise ratio in dB, for each tensor; the signal is the reference."""
        return self.loss(lambda actual, ref: torch.tensor(sqnr(ref, actual)))

    @checked(QuantizationError)
    def loss(self, loss_function: Callable[[Tensor, Tensor], Any]) -> Any:
        """loss_function(actual, ref) of each tensor, in float32 and in their structure; None of the rest."""
        return _mapped(lambda one, other: loss_function(one.float(), other.float()), self.actual, self.ref)

    def __repr__(self) -> str:
        return f"QuantizationComparisonResult(mse_loss={self.mse_loss}, sqnr={self.sqnr})"


@dataclass(frozen=True)
class NodeAccuracySummary:
    """One node in two models; `results` has an entry for each run."""

    handle: int
    actual_node_name: str
    actual_module_stack: str
    ref_node_name: str
    ref_module_stack: str
    results: Sequence[QuantizationComparisonResult]


@checked(CaptureError)
def generate_numeric_debug_handle(ep: ExportedProgram | GraphModule) -> None:
    """Give every op a handle, in place: a number that survives prepare, convert, copies, exports and files.

    It stands in `node.meta["custom"]["numeric_debug_handle"]`. Ops that have one keep it.

    Raises:
        CaptureError: `ep` is no exported program and no graph.
    """
    give_handles(ep)


@checked(CaptureError)
def prepare_for_propagation_comparison(model: GraphModule) -> GraphModule:
    """A copy with a logger for each handle.

    Of nodes that share a handle, as they stem from one op, the last is logged: where a tensor is quantized, that is its
    dequantize, which gives what the readers see.

    Raises:
        CaptureError: `model` is no graph, or no node in it has a handle.
    """
    logged = copy.deepcopy(model)
    constants = Constants(logged)
    last = {
        handle: node
        for node in logged.graph.nodes
        if (handle := handle_of(node)) is not None and node not in constants and not _is_of_codes(node)
    }
    if not last:
        raise CaptureError(
            "no node of this model has a debug handle; call generate_numeric_debug_handle(exported_program) before "
            "prepare_pt2e, and pass what is made of that program"
        )
    names = free_name(logged, "_output_logger_")
    for handle, node in last.items():
        _log(logged, node, next(names), handle)
    logged.recompile()
    return logged


@checked(CaptureError)
def extract_results_from_loggers(model: GraphModule) -> dict[int, Logged]:
    """What the loggers of a model kept: (name of the node, nn_module_stack, values of all runs), by handle."""
    loggers = (module for module in model.children() if isinstance(module, OutputLogger) and module.stats)
    return {one.debug_handle: (one.node_name, one.nn_module_stack, one.stats) for one in loggers}


@checked(QuantizationError)
def compare_results(
    ref_results: Mapping[int, Logged], actual_results: Mapping[int, Logged]
) -> dict[int, NodeAccuracySummary]:
    """Pair what two models kept, by handle; handles that only one of them has are left out.

    Raises:
        QuantizationError: two values differ in structure or shape; the message names the nodes.
    """
    shared = [handle for handle in ref_results if handle in actual_results]
    return {handle: _summary(handle, ref_results[handle], actual_results[handle]) for handle in shared}


def _summary(handle: int, ref: Logged, actual: Logged) -> NodeAccuracySummary:
    try:
        results = [QuantizationComparisonResult(one, other) for one, other in zip(actual[2], ref[2], strict=False)]
    except QuantizationError as error:
        raise QuantizationError(f"debug handle {handle}, {ref[0]} and {actual[0]}: {error}") from error
    return NodeAccuracySummary(
        handle, actual[0] or "", _innermost(actual[1]), ref[0] or "", _innermost(ref[1]), results
    )


def _innermost(stack: Any) -> str:
    """Path of the innermost module, from the value of an nn_module_stack."""
    return str(list(stack.values())[-1][0]) if isinstance(stack, dict) and stack else str(stack)


def _is_of_codes(node: Node) -> bool:
    source = node.args[0] if node.args else None
    of_qparams = isinstance(source, Node) and source.target in CHOOSE_QPARAMS
    return is_quantize(node) or node.target in CHOOSE_QPARAMS or of_qparams


def _log(gm: GraphModule, node: Node, name: str, handle: int) -> None:
    gm.add_module(name, OutputLogger(handle, node.name, node.meta.get("nn_module_stack")))
    with gm.graph.inserting_after(node):
        logger = gm.graph.call_module(name, (node,))
    node.replace_all_uses_with(logger, delete_user_cb=lambda user: user is not logger)
    logger.meta.update({key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta})


def _mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """A structure with what the function makes of each tensor, and of those at the same place in others."""
    if isinstance(value, Tensor):
        return function(value, *others)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, *parts) for parts in zip(value, *others, strict=True))
    if isinstance(value, dict):
        return {key: _mapped(function, one, *(other[key] for other in others)) for key, one in value.items()}
    return value if not others else None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    return type(one) is type(other)


def _shape(value: Any) -> Any:
    return _mapped(lambda tensor: tuple(tensor.shape), value)
