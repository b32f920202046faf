"""An exported graph as an ONNX model: torch's exporter with translations of ours, then what only the model can say.

A node of the model is named after the node of the converted graph that it comes from, 'linear_1/Gemm'; runtimes keep
the names in their profiles, and `account` joins by them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import onnx
import torch
from onnxscript import ir, optimizer
from torch.export import ExportedProgram

from ...errors import LoweringError
from ...specs import FOUR_BITS
from ..common.entry import origin
from .translations import TRANSLATIONS

__all__ = ["write_model"]

_FOLDED = 1 << 26
"""Values of the largest constant that is computed ahead: zero points of tables, transposed weights."""

_FX_NODE = "pkg.torch.onnx.fx_node"
_NAME = re.compile(r"%(\w+)")
_LARGEST_FILE = 2**31 - 1


def write_model(exported: ExportedProgram, opset: int) -> bytes:
    """The content of the .onnx file.

    Raises:
        LoweringError: it would be larger than 2 GiB, which one file cannot hold.
    """
    made = torch.onnx.export(
        exported, dynamo=True, opset_version=opset, verbose=False, optimize=False,
        custom_translation_table=TRANSLATIONS,
    )  # fmt: skip
    if made is None:
        raise LoweringError("torch.onnx.export returned no model")
    optimizer.optimize_ir(made.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    _name_after_origins(made.model, made.exported_program)
    _store_in_4_bits(made.model)
    _drop_metadata(made.model)
    return _checked(made.model)


def _checked(model: ir.Model) -> bytes:
    proto = ir.serde.serialize_model(model)
    if proto.ByteSize() > _LARGEST_FILE:
        raise LoweringError(f"the model has {proto.ByteSize()} bytes, an ONNX file holds at most {_LARGEST_FILE}")
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Of the graph and of those nested in it."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _name_after_origins(model: ir.Model, exported: ExportedProgram | None) -> None:
    origins = {node.name: origin(node) for node in exported.graph.nodes} if exported is not None else {}
    used: Counter[str] = Counter()
    for node in _nodes(model):
        name = f"{_origin(node, origins)}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _origin(node: ir.Node, origins: dict[str, str]) -> str:
    """By what the exporter noted, or by the value that it computes where the optimizer has put it in."""
    found = _NAME.match(node.metadata_props.get(_FX_NODE, ""))
    name = str(node.outputs[0].name) if found is None else found.group(1)
    return origins.get(name, name)


def _store_in_4_bits(model: ir.Model) -> None:
    """Weights in blocks whose integers all lie in -8..7: two in a byte."""
    stored: set[int] = set()
    for node in _nodes(model):
        if node.op_type != "DequantizeLinear" or "block_size" not in node.attributes:
            continue
        values = [value for value in (node.inputs[0], *node.inputs[2:]) if value is not None]
        if all(id(value) in stored or _fits(value) for value in values):
            for value in values:
                _store(value)
                stored.add(id(value))


def _fits(value: ir.Value) -> bool:
    if value.const_value is None or value.const_value.dtype is not ir.DataType.INT8:
        return False
    low, high = FOUR_BITS
    array = value.const_value.numpy()
    return bool(((array >= low) & (array <= high)).all())


def _store(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype is ir.DataType.INT8:
        four = value.const_value.numpy().astype(ir.DataType.INT4.numpy())
        value.const_value = ir.tensor(four, dtype=ir.DataType.INT4, name=value.name)
        value.dtype = ir.DataType.INT4


def _drop_metadata(model: ir.Model) -> None:
    """What the exporter notes of graphs and source files, with paths of this machine in it."""
    for node in _nodes(model):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
