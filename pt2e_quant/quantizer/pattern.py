"""Patterns: ordinary functions over op declarations, and how one is matched against an exported graph.

    conv = op(*ops.CONV)
    relu = op(torch.ops.aten.relu.default)

    def conv_relu(x, w, b):
        return relu(conv(x, w, b))

`trace(conv_relu)` calls the function once with captures in place of tensors; calling a declaration builds the tree that
`Pattern.match` looks for. Matching reads op targets and schema-bound arguments only, never names, modules or sources.
Rules put specs on the captures; see `rule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..arguments import bind
from ..checks import checked
from ..errors import AnnotationError, QuantizationError
from ..graph.constants import Constants
from ..ops import is_commutative, memory_of, twins
from .config import QuantizationConfig

__all__ = ["Capture", "Match", "Op", "Pattern", "op", "trace"]


@dataclass(frozen=True, eq=False)
class Op:
    """A declared op: any of `targets`, which take their operands in the same positions."""

    targets: tuple[torch._ops.OpOverload, ...]
    commutative: bool

    def __call__(self, *args: Any, **kwargs: Any) -> OpCall:
        return OpCall(self, tuple(map(_whole_list, args)), {name: _whole_list(arg) for name, arg in kwargs.items()})

    def __repr__(self) -> str:
        return f"op({', '.join(str(target) for target in self.targets)})"


def _whole_list(argument: Any) -> Any:
    """Inside `def cat(*tensors)`, tensors is a tuple that holds the one capture which stands for the whole list."""
    if isinstance(argument, tuple) and len(argument) == 1 and isinstance(argument[0], Capture) and argument[0].variadic:
        return argument[0]
    return argument


@checked(AnnotationError)
def op(*targets: torch._ops.OpOverload, commutative: bool | None = None) -> Op:
    """Declare an op. In-place and _copy twins of each target are included, commutativity comes from the op table.

    Raises:
        AnnotationError: a target is no OpOverload (torch.ops.aten.relu.default is one, torch.ops.aten.relu is not).
    """
    for target in targets:
        if not isinstance(target, torch._ops.OpOverload):
            raise AnnotationError(f"op() takes overloads such as torch.ops.aten.relu.default, got {target!r}")
    known = dict.fromkeys(twin for target in targets for twin in (target, *sorted(twins(target), key=str)))
    if commutative is None:
        commutative = all(is_commutative(target) for target in targets)
    return Op(tuple(known), commutative)


@dataclass(frozen=True)
class Capture:
    """A parameter of the pattern function. A `*name` parameter captures a list of tensors, as cat takes."""

    name: str
    variadic: bool = False


@dataclass(frozen=True, eq=False)
class OpCall:
    """One op of a pattern, applied to captures, other calls or literal values."""

    op: Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """A pattern found in a graph.

    calls:    each op declaration of the pattern with the node that it matched, innermost (the anchor) first
    captures: node, tuple of nodes, or None (an argument that is absent, such as a bias), by parameter name
    users:    the matched node that reads each capture
    config:   what the user selected for the anchor
    explicit: a selector narrower than the global one said so
    """

    calls: tuple[tuple[Op, Node], ...]
    captures: dict[str, Node | tuple[Node, ...] | None]
    users: dict[str, Node]
    constants: Constants = field(repr=False)
    config: QuantizationConfig | None = None
    explicit: bool = False

    @property
    def root(self) -> Node:
        """The node whose value the pattern computes."""
        return self.calls[-1][1]

    @property
    def anchor(self) -> Node:
        """The innermost node; user selectors that name it decide the configuration of the whole match."""
        return self.calls[0][1]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for _, node in self.calls)

    @property
    def memory(self) -> Node:
        """Where the root's value lies: the root itself, or what it is a view of or writes to (get_attr: a buffer)."""
        base = self.root
        while (source := memory_of(base)) is not None:
            base = source
        return base

    def argument(self, declared: Op, name: str) -> Any:
        """Value of a schema argument (given or default) of the innermost node that `declared` matched.

        None when the overload that matched has no such argument, or the pattern does not use `declared`.
        """
        node = next((node for known, node in self.calls if known is declared), None)
        return None if node is None else bind(node).get(name)

    def value(self, name: str) -> torch.Tensor | None:
        """The fake tensor (shape, dtype) that export recorded for a capture; None when absent or not recorded."""
        node = self.captures[name]
        return node.meta.get("val") if isinstance(node, Node) else None

    def is_constant(self, name: str) -> bool:
        """True when the capture is a parameter, a buffer, or computed from such only."""
        return self.captures[name] in self.constants

    def pairs(self) -> Iterator[tuple[str, Node]]:
        """(capture name, node) for each captured tensor; a list capture yields each of its nodes."""
        for name, found in self.captures.items():
            if isinstance(found, Node):
                yield name, found
            elif found is not None:
                yield from ((name, node) for node in found)


class Pattern:
    """A traced pattern function; `root` is its outermost call."""

    def __init__(self, root: OpCall, captures: tuple[Capture, ...]) -> None:
        self.root = root
        self.captures = captures

    def match(self, node: Node, constants: Constants) -> Match | None:
        """The match whose root is `node`, or None. Interior nodes must have this match as their only user."""
        found = _Attempt()
        if not found.call(self.root, node):
            return None
        captures = {c.name: found.captures.get(c.name) for c in self.captures}
        return Match(tuple(reversed(found.calls)), captures, found.users, constants)


@checked(AnnotationError)
def trace(function: Callable[..., Any]) -> Pattern:
    """Call a pattern function with captures and keep the tree that it builds.

    Raises:
        AnnotationError: the function does not return a call of a declared op.
    """
    name = getattr(function, "__name__", repr(function))
    captures = []
    try:
        for parameter in inspect.signature(function).parameters.values():
            captures.append(Capture(parameter.name, parameter.kind is inspect.Parameter.VAR_POSITIONAL))
        root = function(*captures)
    except QuantizationError:
        raise
    except Exception as error:  # a pattern is code of a backend's author
        raise AnnotationError(
            f"pattern {name!r} cannot be read: {type(error).__name__}: {error}. It is called once with captures in the "
            "place of tensors, and may call nothing but what op(...) declared"
        ) from error
    if not isinstance(root, OpCall):
        raise AnnotationError(f"pattern {name!r} must return a declared op applied to its parameters, got {root!r}")
    return Pattern(root, tuple(captures))


class _Attempt:
    """One try at matching; `calls` fills from the outermost op inwards."""

    def __init__(self) -> None:
        self.calls: list[tuple[Op, Node]] = []
        self.captures: dict[str, Node | tuple[Node, ...] | None] = {}
        self.users: dict[str, Node] = {}

    def call(self, wanted: OpCall, node: Node) -> bool:
        if node.op != "call_function" or node.target not in wanted.op.targets:
            return False
        self.calls.append((wanted.op, node))
        bound = bind(node)
        positions = [argument.name for argument in node.target._schema.arguments]
        expected = {**dict(zip(positions, wanted.args, strict=False)), **wanted.kwargs}
        first = self._operands(wanted, expected, bound, node)
        if first or not (wanted.op.commutative and len(wanted.args) == 2 and bound.get("alpha", 1) == 1):
            return first
        left, right = positions[:2]
        swapped = {**bound, left: bound[right], right: bound[left]}
        return self._operands(wanted, expected, swapped, node)

    def _operands(self, wanted: OpCall, expected: dict[str, Any], bound: dict[str, Any], node: Node) -> bool:
        before = list(self.calls), dict(self.captures), dict(self.users)
        if all(name in bound and self._operand(want, bound[name], node) for name, want in expected.items()):
            return True
        self.calls, self.captures, self.users = before
        return False

    def _operand(self, want: Any, got: Any, user: Node) -> bool:
        if isinstance(want, OpCall):
            return isinstance(got, Node) and len(got.users) == 1 and self.call(want, got)
        if isinstance(want, Capture):
            return self._capture(want, got, user)
        return bool(want == got)

    def _capture(self, want: Capture, got: Any, user: Node) -> bool:
        if want.variadic:
            if not isinstance(got, (list, tuple)) or not all(isinstance(item, Node) for item in got):
                return False
            got = tuple(got)
        elif not (got is None or isinstance(got, Node)):
            return False  # a Python number: nothing to put a spec on
        if want.name in self.captures and self.captures[want.name] is not got:
            return False
        self.captures[want.name] = got
        self.users.setdefault(want.name, user)
        return True
