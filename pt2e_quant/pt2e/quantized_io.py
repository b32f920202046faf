"""Integer inputs and outputs: take the quantize at an input, and the dequantize at an output, out of the graph.

For microcontrollers, NPUs and cameras, which hold integers at the border of the model anyway. Last step of convert, on
request. The integers that go in and come out are those that the float signature would have computed inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..checks import check_fields
from ..errors import ConversionError
from ..graph.module import is_guard, tidy
from ..graph.values import with_value
from ..grid import Grid
from ..ops import is_dequantize, is_quantize
from ..where import locate
from .record import Record

__all__ = ["QuantizedIO", "quantize_io"]

_Q = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class QuantizedIO:
    """Which inputs and outputs of the model are integers, by their position among the flattened tensors."""

    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_fields(self, ConversionError)


def quantize_io(gm: GraphModule, wanted: QuantizedIO, record: Record) -> Record:
    """Change the signature of a converted graph in place; the record with the qparams and with integer example inputs.

    Raises:
        ConversionError: there is no such input or output, or it is not quantized per tensor with static qparams, or
            float ops read the input as well.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    inputs = {index: _take_input(_pick(placeholders, index, "input")) for index in wanted.inputs}
    outputs = {}
    for index in wanted.outputs:
        results[index], outputs[index] = _take_output(_pick(results, index, "output"))
    output.args = (tuple(results),)
    if inputs:
        for node in filter(is_guard, list(gm.graph.nodes)):
            gm.graph.erase_node(node)  # it checks the dtypes that the inputs had
    tidy(gm)
    return replace(
        record, inputs=inputs, outputs=outputs, example_inputs=_integer_examples(record.example_inputs, inputs)
    )


def _pick(items: list[Any], index: int, what: str) -> Node:
    if not isinstance(index, int) or not 0 <= index < len(items):
        raise ConversionError(f"quantized_io names {what} {index!r}; the model has {what}s 0 to {len(items) - 1}")
    if not isinstance(items[index], Node):
        raise ConversionError(f"quantized_io names {what} {index}, which is {items[index]!r}, not a tensor")
    return items[index]  # type: ignore[no-any-return]


def _take_input(node: Node) -> Grid:
    readers = [user for user in node.users if not is_guard(user)]
    kinds = {Grid.of(user) if is_quantize(user) else None for user in readers}
    if len(kinds) != 1 or None in kinds:
        raise ConversionError(
            f"input {node.name} cannot become integers: read by {', '.join(str(user.target) for user in readers)}, "
            "where one static per-tensor quantize must stand.\n"
            f"  {locate(readers[0]) if readers else locate(node)}\n"
            "  Quantize every op that reads it with one spec, or leave this input in float."
        )
    qparams = next(iter(kinds))
    for quantize in readers:
        quantize.replace_all_uses_with(node)
        node.graph.erase_node(quantize)
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        with_value(node, node, lambda: value.to(qparams.dtype))  # type: ignore[union-attr]
    return qparams  # type: ignore[return-value]


def _take_output(node: Node) -> tuple[Node, Grid]:
    grid = Grid.of(node)
    if grid is None or not is_dequantize(node):
        raise ConversionError(
            f"output {node.name} cannot become integers: it is computed in float.\n  {locate(node)}\n"
            "  Quantize the op that computes it with a static per-tensor output spec, or leave this output in float."
        )
    return node.args[0], grid  # type: ignore[return-value]


def _integer_examples(examples: Any, inputs: dict[int, Grid]) -> Any:
    """The example inputs in the dtypes of the new signature, so that the graph can be exported again."""
    if examples is None:
        return None
    leaves, tree = pytree.tree_flatten(examples)
    for index, qparams in inputs.items():
        leaves[index] = qparams.quantize(leaves[index])
    return pytree.tree_unflatten(leaves, tree)
