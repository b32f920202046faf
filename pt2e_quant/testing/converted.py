"""What must hold for every graph that convert_pt2e returns, whatever the quantizer: as a list of small checks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

from ..checks import checked
from ..errors import CaptureError
from ..graph.constants import Constants
from ..graph.module import is_guard
from ..graph.run import Watcher
from ..meta import ANNOTATION_KEY
from ..ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from .finding import Finding
from .running import state_kept

__all__ = ["CONVERTED_RULES", "broken_rules"]

CONVERTED_RULES = {
    "one-dequantize-per-use": "every dequantize is read once, by one node",
    "pairs-agree": "a dequantize has the qparams of the quantize that it undoes",
    "no-float-copy": "a constant that is quantized is stored as integers, and only what the graph reads is stored",
    "nothing-left-over": "no observer, no annotation and no call that computes nothing is left",
    "values-recorded": "meta['val'] says what each node computes: dtype and shape",
}
"""The rules of `broken_rules`, with what each demands."""


@checked(CaptureError)
def broken_rules(converted: GraphModule, inputs: tuple[object, ...] | None = None, model: str = "") -> list[Finding]:
    """Where a converted graph breaks one of CONVERTED_RULES.

    Args:
        converted: what convert_pt2e returned.
        inputs: run once, to compare the values with those recorded; that rule is left out without them.
        model: name for the findings.
    """
    found = [*_dequantizes(converted), *_constants(converted), *_leftovers(converted)]
    if inputs is not None:
        found += _values(converted, inputs)
    return [Finding(rule, model, where, message) for rule, where, message in found]


Found = Iterator[tuple[str, str, str]]


def _dequantizes(gm: GraphModule) -> Found:
    for node in gm.graph.nodes:
        if node.target not in DEQUANTIZE:
            continue
        reads = sum(
            _reads(user, node) for user in node.users if user.target not in CHOOSE_QPARAMS or _alone(user, node)
        )
        if reads != 1:
            yield "one-dequantize-per-use", node.name, f"read {reads} times, by {', '.join(map(str, node.users))}"
        source = node.args[0]
        if isinstance(source, Node) and source.target in QUANTIZE:
            mine, theirs = _qparams(node), _qparams(source)
            if mine != theirs:
                yield "pairs-agree", node.name, f"it has {mine}, {source.name} has {theirs}"


def _alone(choose: Node, node: Node) -> bool:
    """False for the first half of a dynamic quantization of the same value, which is one use of it with the second."""
    chosen = {item for getitem in choose.users for item in getitem.users}
    return not any(user in chosen for user in node.users)


def _reads(user: Node, node: Node) -> int:
    found = 0

    def count(used: Node) -> Node:
        nonlocal found
        found += used is node
        return used

    torch.fx.node.map_arg((user.args, user.kwargs), count)
    return found


def _qparams(node: Node) -> tuple[object, ...]:
    """Scale, zero point, bounds and dtype, as they stand in the arguments; buffers by the name that they have."""
    count = len(node.target._schema.arguments)  # type: ignore[union-attr]
    arguments = node.args[1 : min(len(node.args), count)]
    plain = [a.target if isinstance(a, Node) and a.op == "get_attr" else a for a in arguments]
    names = [argument.name for argument in node.target._schema.arguments][1:]  # type: ignore[union-attr]
    return tuple(value for name, value in zip(names, plain, strict=False) if name not in ("output_dtype", "out_dtype"))


def _constants(gm: GraphModule) -> Found:
    constants = Constants(gm)
    for node in gm.graph.nodes:
        if node.target in QUANTIZE and node in constants:
            yield "no-float-copy", node.name, f"{node.args[0]} is a constant, but quantized on every call"
    read = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    for name in (*dict(gm.named_parameters(remove_duplicate=False)), *dict(gm.named_buffers(remove_duplicate=False))):
        if name not in read and not any(name.startswith(f"{owner}.") for owner in read):
            yield "no-float-copy", name, "stored, but nothing reads it"


def _leftovers(gm: GraphModule) -> Found:
    for node in gm.graph.nodes:
        if node.op == "call_module" and not is_guard(node):
            yield "nothing-left-over", node.name, f"still calls {node.target}"
        if ANNOTATION_KEY in node.meta:
            yield "nothing-left-over", node.name, "still carries its annotation"
        if not node.users and (node.target in QUANTIZE or node.target in DEQUANTIZE or node.target in CHOOSE_QPARAMS):
            yield "nothing-left-over", node.name, "computes what nobody reads"


def _values(gm: GraphModule, inputs: tuple[object, ...]) -> Found:
    found: list[tuple[str, str, str]] = []

    def see(node: Node, value: object) -> None:
        difference = _recorded_otherwise(node, value) if node.op == "call_function" else None
        if difference is not None:
            found.append(("values-recorded", node.name, difference))

    with state_kept(gm):
        Watcher(gm, see).run_batch(tree_map_only(Tensor, torch.clone, inputs))
    yield from found


def _recorded_otherwise(node: Node, value: object) -> str | None:
    """How meta['val'] differs from what the node computes."""
    recorded = node.meta.get("val")
    if recorded is None and isinstance(value, Tensor):
        return "no value is recorded"
    if not isinstance(value, Tensor) or not isinstance(recorded, Tensor):
        return None
    is_same = value.dtype == recorded.dtype and value.dim() == recorded.dim()
    fits = all(not isinstance(r, int) or r == v for v, r in zip(value.shape, recorded.shape, strict=False))
    if is_same and fits:
        return None
    return f"recorded as {recorded.dtype} {list(recorded.shape)}, it computes {value.dtype} {list(value.shape)}"
