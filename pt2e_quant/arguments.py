"""Arguments of operators by the names of their schemas: read them, set one, and which of them an operator writes to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.immutable_collections import immutable_list

from .errors import CaptureError
from .where import locate

__all__ = [
    "argument_index",
    "bind",
    "dropout_argument",
    "is_in_place",
    "mutated_arguments",
    "mutates",
    "sees_padding_only",
    "set_argument",
    "training_argument",
    "written_values",
]

_REQUIRED = object()
# torch hands out the defaults of these types as bare numbers.
_ENUMS = {("MemoryFormat", 0): torch.contiguous_format, ("ScalarType", 4): torch.int64}


@dataclass(frozen=True)
class _Signature:
    positions: dict[str, int]
    defaults: dict[str, Any]  # every argument in the order of the schema; _REQUIRED where there is no default
    required: tuple[str, ...]


@functools.cache
def _signature(op: OpOverload) -> _Signature:
    arguments = op._schema.arguments
    defaults = {a.name: _default(a) if a.has_default_value() else _REQUIRED for a in arguments}
    return _Signature(
        {a.name: position for position, a in enumerate(a for a in arguments if not a.kwarg_only)},
        defaults,
        tuple(name for name, value in defaults.items() if value is _REQUIRED),
    )


def _default(argument: Any) -> Any:
    value = argument.default_value
    if isinstance(value, list):
        return immutable_list(value)  # equal to a list, and safe to hand out more than once
    kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
    return _ENUMS.get((kind, value), value) if isinstance(value, int) else value


def bind(node: Node) -> dict[str, Any]:
    """The arguments of a call_function node by the names of its op's schema, in their order, defaults filled in.

    Raises:
        CaptureError: the node calls no ATen (or custom) op, or its arguments do not fit the schema.
    """
    signature = _signature(_op_of(node))
    bound = signature.defaults.copy()
    bound.update(zip(signature.positions, node.args, strict=False))
    bound.update(node.kwargs)
    absent = [name for name in signature.required if bound[name] is _REQUIRED]
    if absent or len(node.args) > len(signature.positions) or len(bound) > len(signature.defaults):
        raise CaptureError(f"the arguments do not fit the schema {_op_of(node)._schema}\n{locate(node)}")
    return bound


def argument_index(op: OpOverload, name: str) -> int | None:
    """Position of the argument `name` in node.args; None for one that is passed by keyword only.

    Raises:
        CaptureError: the op has no such argument.
    """
    signature = _signature(op)
    if name not in signature.defaults:
        raise CaptureError(f"{op} has no argument {name!r}; it takes {', '.join(signature.defaults)}")
    return signature.positions.get(name)


def set_argument(node: Node, name: str, value: Any) -> bool:
    """Give one argument of a node another value, by position or by keyword as before; True when that changed it.

    An argument that was left to its default is added by position, as torch.export writes it, where the ones before it
    stand by position too.

    Raises:
        CaptureError: the op has no such argument.
    """
    op = _op_of(node)
    index = argument_index(op, name)
    bound = bind(node)
    if _is_same(bound[name], value):
        return False
    if index is None or name in node.kwargs:
        node.update_kwarg(name, value)
    elif index < len(node.args):
        node.update_arg(index, value)
    else:
        between = list(_signature(op).positions)[len(node.args) : index]
        if any(other in node.kwargs for other in between):
            node.update_kwarg(name, value)
        else:
            node.args = (*node.args, *(bound[other] for other in between), value)
    return True


def _op_of(node: Node) -> OpOverload:
    if not isinstance(node.target, OpOverload):
        raise CaptureError(f"expected a call of an ATen op, which has a schema\n{locate(node)}")
    return node.target


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list):  # a graph keeps lists as immutable_list
        return len(old) == len(new) and all(map(_is_same, old, new))
    return old is new or (type(old) is type(new) and not isinstance(old, Tensor) and bool(old == new))


@functools.cache
def training_argument(op: object) -> str | None:
    """Name of the argument that switches `op` between training and inference (batch_norm: "training"), if any."""
    if not isinstance(op, OpOverload):
        return None
    names = (a.name for a in op._schema.arguments if str(a.type) in ("bool", "Optional[bool]"))
    return next((name for name in names if name in ("train", "training")), None)


@functools.cache
def dropout_argument(op: object) -> str | None:
    """Name of the probability of a dropout in `op` that has no switch: attention's "dropout_p", 0 in inference."""
    if not isinstance(op, OpOverload) or training_argument(op) is not None:
        return None
    return next((a.name for a in op._schema.arguments if a.name == "dropout_p" and str(a.type) == "float"), None)


@functools.cache
def mutated_arguments(op: object) -> tuple[int, ...]:
    """Positions in the schema of the arguments that `op` writes to.

    The running statistics that a batch norm in training writes to are not among them unless its schema says so
    (aten.batch_norm and aten.native_batch_norm do not).
    """
    if not isinstance(op, OpOverload):
        return ()
    aliases = ((index, argument.alias_info) for index, argument in enumerate(op._schema.arguments))
    return tuple(index for index, alias in aliases if alias is not None and alias.is_write)


def written_values(node: Node) -> list[Node]:
    """The nodes whose values a node writes to, given by position or by name (`out=`)."""
    found = []
    for index in mutated_arguments(node.target):
        name = node.target._schema.arguments[index].name  # type: ignore[union-attr]  # an OpOverload, or none mutate
        given: object = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        found += [
            value for value in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(value, Node)
        ]
    return found


def mutates(op: object) -> bool:
    """Whether `op` writes to any of its arguments."""
    return bool(mutated_arguments(op))


def is_in_place(op: object) -> bool:
    """Whether `op` writes its result into its first argument, as add_ does and add.out does not."""
    return 0 in mutated_arguments(op)


def sees_padding_only(sizes: Sequence[Any], kernel: Sequence[int], **steps: Any) -> bool:
    """Whether some window of a convolution lies in its padding with all its weights.

    Args:
        sizes: of the input, its spatial dimensions; of one that is dynamic, only the first window is looked at.
        kernel: spatial sizes of the weight.
        steps: stride, padding (a string too) and dilation, as the operator takes them.
    """
    spread = {name: _spread(given, len(kernel)) for name, given in steps.items() if not isinstance(given, str)}
    same = [(size - 1) * step // 2 for size, step in zip(kernel, spread["dilation"], strict=True)]
    padding = spread.get("padding") or (same if steps["padding"] == "same" else [0] * len(kernel))
    return any(map(_misses, sizes, kernel, spread["stride"], padding, spread["dilation"]))


def _spread(given: Any, dimensions: int) -> list[int]:
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return numbers * dimensions if len(numbers) == 1 else numbers


def _misses(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    if not isinstance(size, int):
        return padding > (kernel - 1) * dilation
    count = (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1
    starts = range(-padding, -padding + count * stride, stride) if padding else ()
    return any(not any(0 <= start + tap * dilation < size for tap in range(kernel)) for start in starts)
