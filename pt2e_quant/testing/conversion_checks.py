"""Checks of the whole way: prepare, calibrate and convert a model, and look for every claim in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..errors import LoweringError
from ..graph.attributes import attribute
from ..graph.module import is_guard
from ..ops import CHOOSE_QPARAMS, QUANTIZE
from ..pt2e.authors import code_of
from ..pt2e.convert import convert_pt2e
from ..pt2e.prepare import prepare_pt2e
from ..pt2e.record import record_of
from .annotation_checks import Found, first_line
from .claims import Claim, claims
from .converted import broken_rules
from .running import run

__all__ = ["Backend", "conversion_findings"]

Backend = Callable[[GraphModule], Iterable[object] | None]
"""What a backend says to a converted graph: things that it cannot run (with .node and .fatal, if they have them)."""

_CASTS = (torch.ops.quantized_decomposed.convert_element_type.no_fuse,)


def conversion_findings(
    model: ExportedProgram, quantizer: Any, annotated: GraphModule, backend: Backend | None
) -> Found:
    """becomes-integer, backend-runs-it and the rules of `broken_rules`; "runs" when the engine refuses.

    Args:
        model: float model with example inputs.
        quantizer: a quantizer whose annotations are sound.
        annotated: the graph that it annotated.
        backend: see Backend.
    """
    try:
        prepared = prepare_pt2e(model, quantizer, allow_empty=True)
        run(prepared, model)
        converted = convert_pt2e(prepared)
        run(converted, model)
    except Exception as error:  # noqa: BLE001  # whatever the observers of somebody else raise
        yield "runs", "", f"{type(error).__name__}: {first_line(error)}"
        return
    yield from _claims(annotated, prepared, converted)
    inputs, keywords = model.example_inputs or ((), {})
    for finding in broken_rules(converted, None if keywords else inputs):
        yield finding.rule, finding.where, finding.message
    if backend is not None:
        yield from _backend(converted, backend)


def _claims(annotated: GraphModule, prepared: GraphModule, converted: GraphModule) -> Found:
    nodes = {node.name: node for node in converted.graph.nodes}
    record = record_of(prepared)
    writes_its_own = {
        point.producer
        for point in (record.points if record else ())
        if hasattr(attribute(prepared, point.observer), "convert")
    }
    for claim in claims(annotated):
        node = nodes.get(claim.node.name)
        if node is None or claim.tensor.name in writes_its_own:
            continue  # it was dead code, or an observer puts ops of its own there
        reason = _float_use(claim, node)
        if reason is not None:
            yield "becomes-integer", claim.where, reason


def _float_use(claim: Claim, node: Node) -> str | None:
    """Where the converted graph still uses the claimed tensor in float; None where it does not."""
    if not claim.is_output:
        read = [source for source in node.all_input_nodes if source.name == claim.tensor.name]
        return f"{node.name} still reads {claim.tensor.name} in float" if read else None
    for user in node.users:
        if user.target in QUANTIZE or user.target in CHOOSE_QPARAMS or user.target in _CASTS or is_guard(user):
            continue
        return f"{user.name} still reads it in float"
    return None


def _backend(converted: GraphModule, backend: Backend) -> Found:
    try:
        with code_of("the backend that check_quantizer was given"):
            objections = list(backend(converted) or ())
    except LoweringError as error:
        yield "backend-runs-it", "", first_line(error)
        return
    for objection in objections:
        if getattr(objection, "fatal", True):
            node = getattr(objection, "node", None)
            yield "backend-runs-it", getattr(node, "name", ""), str(objection).partition("\n")[0]
