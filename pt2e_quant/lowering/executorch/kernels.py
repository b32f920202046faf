"""Operators outside every delegate, held against the kernels that ExecuTorch's runtime has in this process.

Without a kernel a program lowers, and then does not load. Comes after partitioning, when it is known what is outside;
checked again on the finished program, which ExecuTorch's last passes have changed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import LoweringError
from ...where import locate_all
from ..common.entry import by_origin, origin
from ..common.program import Remark
from . import runtime
from .account import nodes_outside

__all__ = ["check_kernels", "check_out_variants", "registered", "unchecked"]


@functools.cache
def registered() -> tuple[frozenset[str], str]:
    """Names of the kernels of this process's runtime, such as 'aten::add.out'; and why they are not known, or ''."""
    try:
        return frozenset(runtime.runtime().operator_registry.operator_names), ""
    except Exception as error:  # noqa: BLE001  # a build without the runtime, or an older one
        return frozenset(), f"{type(error).__name__}: {error}"


def unchecked() -> tuple[Remark, ...]:
    """Says so where the runtime cannot be asked for its kernels."""
    _, reason = registered()
    text = f"whether the runtime has a kernel for every operator was not checked: it cannot be asked ({reason})"
    return (Remark("program", text),) if reason else ()


def check_out_variants(lowered: GraphModule, converted: GraphModule) -> None:
    """Raise for operators that ExecuTorch cannot write into memory that it planned: it has no out variant of them.

    Raises:
        LoweringError: there is one; each is named.
    """
    left = _operators_outside(lowered)
    _raise({_name(node): [] for node in left if _out_variant(node) is None}, left, converted)


def check_kernels(program: Any, method: str, lowered: GraphModule, converted: GraphModule) -> None:
    """Raise for instructions of a finished program for which the runtime has no kernel. Nothing, if it cannot be asked.

    Args:
        program: what ExecuTorch made of all methods.
        method: the one to check.
        lowered, converted: its graph after partitioning, and before it was exported.

    Raises:
        LoweringError: a kernel is missing; each node that needs it is named.
    """
    known, unknown = registered()
    plan = next(plan for plan in program.executorch_program.execution_plan if plan.name == method)
    called = {f"{one.name}.{one.overload}" if one.overload else one.name for one in plan.operators}
    missing = set() if unknown else called - known
    _raise({name: [] for name in sorted(missing)}, _operators_outside(lowered), converted)


def _operators_outside(lowered: GraphModule) -> list[Node]:
    return [node for node in nodes_outside(lowered) if hasattr(node.target, "_schema")]  # no cond, which has a graph


def _raise(missing: dict[str, list[Node]], left: list[Node], converted: GraphModule) -> None:
    if not missing:
        return
    for node in left:
        for name in missing.keys() & {_name(node), _out_variant(node)}:
            missing[name].append(node)
    sources = by_origin(converted)
    listing = "\n".join(f"- {name}\n{_places(nodes, sources)}" for name, nodes in missing.items())
    raise LoweringError(
        f"ExecuTorch's runtime has no kernel for {len(missing)} operator{'s' * (len(missing) > 1)} that no backend "
        f"takes:\n{listing}\n"
        "  Write them with other operators in the model, or keep them out of it. For a runtime that links kernels of "
        "its own: preflight=False, verify=False."
    )


def _places(nodes: list[Node], sources: dict[str, Node]) -> str:
    named = {origin(node): sources.get(origin(node), node) for node in nodes}
    return locate_all(named.values(), limit=len(named))


def _name(node: Node) -> str:
    return str(node.target._schema.name)  # type: ignore[union-attr]


def _out_variant(node: Node) -> str | None:
    """'aten::add.out' of an add; None where there is none."""
    from executorch.exir.operator.convert import to_out_variant

    target: Any = node.target
    try:
        out = to_out_variant(target)[0] if isinstance(target, torch._ops.OpOverload) else target.to_out_variant()
    except RuntimeError:
        return None
    return str(out.name())
