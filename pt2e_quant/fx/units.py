"""Modules that FX mode takes as one operator: custom ones, of classes of the user's, and standalone ones.

A custom module is made by `from_float` and converted by `from_observed`; it takes and returns quantized tensors. A
standalone module is prepared and converted by itself; its own config says where it takes and returns integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..eager.helpers import QuantType
from ..eager.hooks import watch
from ..errors import ConversionError, ConversionWarning, TargetingError, did_you_mean
from ..graph.attributes import attribute, set_attribute
from ..meta import FX_KEY
from ..qconfig import QConfigAny
from ..qtensor.tensor import NAMES
from ..where import copy_origin
from . import functions
from .custom_config import ConvertCustomConfig, PrepareCustomConfig, StandaloneModuleConfigEntry
from .grids import grid_of, is_dequantize

__all__ = ["Unit", "check_names", "convert_units", "give_integers", "put_units", "take_integers"]

_BY = "convert_fx"


@dataclass(frozen=True)
class Unit:
    """One such module.

    takes: positions of arguments that are to be quantized
    rule:  what it is called in reports
    """

    takes: tuple[int, ...]
    rule: str


def check_names(model: nn.Module, custom: PrepareCustomConfig) -> None:
    """Every path of a config is one of the model's.

    Raises:
        TargetingError: one is not; names the nearest.
    """
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for path in (*custom.standalone_module_names, *custom.non_traceable_module_names):
        if path not in paths:
            raise TargetingError(f"{type(model).__name__} has no module {path!r}.{did_you_mean(path, paths)}")


def put_units(
    gm: GraphModule,
    custom: PrepareCustomConfig,
    qconfigs: Mapping[Node, QConfigAny],
    prepare: Callable[[nn.Module, StandaloneModuleConfigEntry, tuple[Any, ...]], nn.Module],
) -> dict[str, Unit]:
    """Put observed modules in the place of custom and standalone ones; what they are, by path.

    Args:
        qconfigs: of the nodes; a custom module without one stays as it is.
        prepare: prepares a standalone module, given its entry and example inputs.
    """
    units: dict[str, Unit] = {}
    observed = custom.float_to_observed_mapping.get(QuantType.STATIC, {})
    for node in gm.graph.find_nodes(op="call_module"):
        path, module = str(node.target), attribute(gm, str(node.target))
        entry = custom.standalone_module_names.get(path) or custom.standalone_module_classes.get(type(module))
        if path in units or not isinstance(module, nn.Module):
            continue
        if entry is not None:
            set_attribute(gm, path, prepare(module, entry, entry.example_inputs or _seen(node)))
            inside = entry.prepare_custom_config or PrepareCustomConfig()
            units[path] = Unit(tuple(inside.input_quantized_indexes), "standalone module")
        elif type(module) in observed and qconfigs.get(node) is not None:
            set_attribute(gm, path, _observed(observed[type(module)], module, qconfigs[node]))
            units[path] = Unit(_TAKES.get(type(module), (0,)), f"custom module {type(module).__name__}")
    return units


def _observed(kind: Any, module: Any, qconfig: Any) -> nn.Module:
    """A custom module that observes its output, by itself or by the observer that `from_observed` finds on it."""
    module.qconfig = qconfig
    made = kind.from_float(module)
    made.qconfig = qconfig
    if not hasattr(made, "activation_post_process") and not getattr(made, "_observes_inside", False):
        first = next(module.parameters(), torch.empty(0))
        watch(made, qconfig.activation().to(first.device))
    return made.train(module.training)  # type: ignore[no-any-return]


_TAKES: dict[type, tuple[int, ...]] = {nn.MultiheadAttention: (0, 1, 2)}
"""Arguments of custom modules that are quantized, where that is not the first alone."""


def _seen(node: Node) -> tuple[Any, ...]:
    """Arguments like those of a call, of zeros: sizes and types are all that counts."""
    values: Any = map_arg(node.args, lambda used: used.meta["val"])
    return tuple(pytree.tree_map_only(Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype), values))


def convert_units(
    gm: GraphModule,
    units: Mapping[str, Unit],
    custom: ConvertCustomConfig,
    convert: Callable[[Any], nn.Module],
    *,
    to_reference: bool,
) -> None:
    """Put quantized modules in their place. They take quantized tensors, and what they return is dequantized.

    Args:
        convert: converts a standalone module.
        to_reference: quantized tensors are made where they are taken, as the rest of the graph has codes.
    """
    quantized = {old: new for pairs in custom.observed_to_quantized_mapping.values() for old, new in pairs.items()}
    done: set[str] = set()
    for node in list(gm.graph.find_nodes(op="call_module")):
        path = str(node.target)
        if path not in units:
            continue
        if path not in done:
            set_attribute(gm, path, _converted(attribute(gm, path), quantized, convert))
            done.add(path)
        for index in units[path].takes:
            if index < len(node.args) and is_dequantize(node.args[index]):
                node.update_arg(index, _codes(gm, node.args[index], to_reference))
        _dequantize_after(gm, node)


def _converted(module: Any, quantized: Mapping[type, type], convert: Callable[[Any], nn.Module]) -> nn.Module:
    if FX_KEY in getattr(module, "meta", {}):
        return convert(module)
    made: Any = quantized.get(type(module))
    if made is None:
        raise ConversionError(
            f"nothing says what an observed {type(module).__name__} becomes: "
            "ConvertCustomConfig().set_observed_to_quantized_mapping(observed class, quantized class)"
        )
    with warnings.catch_warnings():  # alone, its inputs look like floats; in this graph they are not
        warnings.simplefilter("ignore", ConversionWarning)
        return made.from_observed(module)  # type: ignore[no-any-return]


def _codes(gm: GraphModule, dequantize: Node, to_reference: bool) -> Node:
    """A quantized tensor in the place of a dequantized one."""
    if not to_reference:
        return dequantize.args[0]  # type: ignore[return-value]  # lowered, it gives one
    grid = grid_of(dequantize)
    with gm.graph.inserting_after(dequantize):
        made = gm.graph.call_function(functions.quantize, (dequantize, grid.scale, grid.zero_point, NAMES[grid.dtype]))
    return copy_origin(made, dequantize, _BY)


def _dequantize_after(gm: GraphModule, node: Node) -> None:
    with gm.graph.inserting_after(node):
        made = copy_origin(gm.graph.call_function(functions.dequantize, (node,)), node, _BY)
    made.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def take_integers(gm: GraphModule, indexes: list[int], *, to_reference: bool) -> None:
    """Inputs that come as quantized tensors are quantized no more. In float they are real numbers of their own grid."""
    inputs = gm.graph.find_nodes(op="placeholder")
    for index in indexes:
        if not 0 <= index < len(inputs):
            raise ConversionError(f"input_quantized_indexes names input {index}; the model has {len(inputs)}")
        for quantize in [user for user in inputs[index].users if user.target is _QUANTIZE]:
            quantize.replace_all_uses_with(inputs[index])
            gm.graph.erase_node(quantize)
        for read in filter(is_dequantize, list(inputs[index].users) if to_reference else ()):
            with gm.graph.inserting_before(read):
                made = copy_origin(gm.graph.call_method("dequantize", (inputs[index],)), read, _BY)
            read.replace_all_uses_with(made)
            gm.graph.erase_node(read)


def give_integers(gm: GraphModule, indexes: list[int], *, to_reference: bool) -> None:
    """Outputs that are to be quantized tensors are dequantized no more."""
    output = gm.graph.output_node()
    given = output.args[0]
    results = list(given) if isinstance(given, (tuple, list)) else [given]
    for index in indexes:
        last = results[index] if 0 <= index < len(results) else None
        if not isinstance(last, Node) or not (
            is_dequantize(last) or last.target in ("dequantize", functions.dequantize)
        ):
            raise ConversionError(
                f"output_quantized_indexes names output {index}, which no quantized operator computes; the model has "
                f"{len(results)} outputs"
            )
        results[index] = _codes(gm, last, to_reference)
    output.args = (type(given)(results) if isinstance(given, (tuple, list)) else results[0],)


_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
