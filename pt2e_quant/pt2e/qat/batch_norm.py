"""Batch norm in training: a layer is rounded as it will be once the batch norm after it is folded into it.

The formula is in `pt2e_quant.batch_norm`.

Three steps. `fold_for_training` folds as for calibration, so that a quantizer sees the same graph; `unfold_batch_norm`
brings the batch norms back once the observers are in; `fold_trained` folds them again at convert.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ...arguments import bind, set_argument, training_argument
from ...batch_norm import by_channel, gamma_over_sigma
from ...errors import PlanError, QuantizationError
from ...graph.attributes import attribute, constant, insert_attribute, set_attribute
from ...graph.module import counts_batches, tidy
from ...graph.values import is_float_tensor
from ...graph.write import Symbol, Writer, nodes_of
from ...meta import SET_ASIDE_KEY, TRAINED_KEY
from ...ops import is_conv_transpose
from ...passes.fold_batch_norm import NORM_TENSORS, fold_batch_norm, folded_bias, is_batch_norm
from ...where import locate
from ..present import check_present

__all__ = ["SetAside", "TrainedNorm", "fold_for_training", "fold_trained", "unfold_batch_norm"]

aten = torch.ops.aten

_LAYER_TENSORS = ("weight", "bias")
Parameters = dict[str, tuple[str, Tensor] | None]
"""Name and value of the parameters of a node, by argument; None where it has none."""


# --- capture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SetAside:
    """A batch norm that was folded, with all that it takes to bring it back.

    layer, norm: names of the nodes
    of_layer, of_norm: their parameters before folding
    target, arguments, meta: of the batch norm
    """

    layer: str
    norm: str
    of_layer: Parameters
    of_norm: Parameters
    target: Any
    arguments: dict[str, Any]
    meta: dict[str, Any]


def fold_for_training(gm: GraphModule) -> GraphModule:
    """Fold every batch norm that can be brought back; `gm.meta[SET_ASIDE_KEY]` lists them."""
    found = [_look_at(node) for node in gm.graph.nodes if is_batch_norm(node) and _obstacle(node) is None]
    folded = fold_batch_norm(gm, unless=_obstacle)
    left = {node.name for node in folded.graph.nodes}
    folded.meta[SET_ASIDE_KEY] = [norm for norm in found if norm.norm not in left]
    return folded


def _obstacle(norm: Node) -> str | None:
    """Why training leaves a batch norm as it is, where calibration would fold it."""
    if training_argument(norm.target) is None or not is_float_tensor(norm):
        return f"{norm.target} is a form for inference; prepare the exported program as it is, without decompositions"
    arguments = bind(norm)
    layer = arguments["input"]
    if not isinstance(layer, Node) or not isinstance(layer.target, OpOverload) or "weight" not in bind(layer):
        return "its input is not computed by a convolution or linear"
    if is_batch_norm(layer):
        return "it comes after another batch norm"
    given = [*(bind(layer).get(name) for name in _LAYER_TENSORS), *(arguments[name] for name in NORM_TENSORS)]
    computed = next((value for value in given if value is not None and constant(value) is None), None)
    return None if computed is None else f"{computed} is computed, and training computes it in every step"


def _look_at(norm: Node) -> SetAside:
    arguments = bind(norm)
    layer: Node = arguments["input"]
    return SetAside(
        layer=layer.name,
        norm=norm.name,
        of_layer=_parameters(bind(layer), _LAYER_TENSORS),
        of_norm=_parameters(arguments, NORM_TENSORS),
        target=norm.target,
        arguments={name: value for name, value in arguments.items() if name not in (*NORM_TENSORS, "input")},
        meta=dict(norm.meta),
    )


def _parameters(arguments: dict[str, Any], names: Iterable[str]) -> Parameters:
    found: Parameters = {}
    for name in names:
        value = constant(arguments.get(name))
        found[name] = None if value is None else (str(arguments[name].target), value)
    return found


# --- prepare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedNorm:
    """A batch norm in a prepared graph that convert folds.

    layer, norm: names of the nodes
    guard:       name of the node that keeps the scale from being 0
    weight:      name of the node that gives the rounded weight, before the scale is undone
    bias:        name of the layer's own bias, None without one
    folded_bias: names of the node and of the parameter that were the bias of the folded layer
    """

    layer: str
    norm: str
    guard: str
    weight: str
    bias: str | None
    folded_bias: tuple[str, str]


def unfold_batch_norm(gm: GraphModule, norms: Iterable[SetAside], quantized: Collection[str]) -> None:
    """Bring back the batch norms of a graph that holds its observers; `gm.meta[TRAINED_KEY]` lists those to fold again.

    Layers in float get their own weights back, and convert folds them like any other.

    Args:
        gm: the graph.
        norms: what `fold_for_training` set aside.
        quantized: names of the nodes that an observer watches.

    Raises:
        QuantizationError: a rewrite of the quantizer replaced a layer.
        PlanError: a bias is to be rounded in training.
    """
    unfolder = _Unfolder(gm, quantized)
    weights: dict[Node, list[tuple[SetAside, Node]]] = defaultdict(list)
    for norm in norms:
        layer = unfolder.find_layer(norm)
        weights[_watched(layer, "weight")].append((norm, layer))
    for weight, shared in weights.items():
        unfolder.unfold(weight, shared)
    gm.meta[TRAINED_KEY] = unfolder.trained


class _Unfolder:
    def __init__(self, gm: GraphModule, quantized: Collection[str]) -> None:
        self.trained: list[TrainedNorm] = []
        self._gm = gm
        self._write = Writer(gm, "prepare_qat_pt2e")
        self._nodes: dict[str, Node] = {node.name: node for node in gm.graph.nodes}
        self._quantized = quantized

    def find_layer(self, norm: SetAside) -> Node:
        layer = self._nodes.get(norm.layer)
        if layer is None or constant(_watched(layer, "weight")) is None:
            raise QuantizationError(
                f"transform_for_annotation rewrote {norm.layer}, the layer of the batch norm {norm.norm}, which cannot "
                "be trained then. Let it leave layers before a batch norm, and their weights, as they are."
            )
        if bind(layer)["bias"] is not _watched(layer, "bias"):
            raise PlanError(
                f"the bias of this layer would be rounded in training, which makes it anew from a batch norm:\n"
                f"{locate(layer)}\n  Leave the bias in float, or derive its qparams (DerivedQuantizationSpec)."
            )
        return layer

    def unfold(self, weight: Node, shared: list[tuple[SetAside, Node]]) -> None:
        """One weight, and the layers that read it: of a reused module there are several, with equal batch norms."""
        norm, layer = shared[0]
        biases = {_watched(layer, "bias"): str(_watched(layer, "bias").target) for _, layer in shared}
        is_rounded = any(node.name in self._quantized for node in (weight, *biases))
        for parameter in (*norm.of_layer.values(), *norm.of_norm.values()):
            if parameter is not None:
                set_attribute(self._gm, *parameter)
        scale = self._replace_weight(weight, norm, layer, is_rounded)
        for norm, layer in shared:
            folded, rounded = _watched(layer, "bias"), bind(layer)["weight"]
            made = self._unfold_layer(norm, layer, scale)
            if scale is not None:
                own = norm.of_layer["bias"]
                names = (folded.name, biases[folded])
                self.trained.append(
                    TrainedNorm(
                        layer.name, made.name, scale.node.all_input_nodes[0].name, rounded.name, own and own[0], names
                    )
                )
        for node in biases:
            if not node.users:
                self._gm.graph.erase_node(node)

    def _replace_weight(self, weight: Node, norm: SetAside, layer: Node, is_rounded: bool) -> Symbol | None:
        """Put the layer's own weight in the place of the folded one; where it is rounded, scaled, by what is returned.

        The name stays, under which the record knows it.
        """
        scale = None
        with self._write.before(weight, like=layer):
            own = self._read(norm.of_layer["weight"])
            if is_rounded:
                of_norm = norm.of_norm
                variance = self._read(of_norm["running_var"])
                scale = gamma_over_sigma(self._read(of_norm["weight"]), variance, norm.arguments["eps"])
                own = by_channel(operator.mul, own, scale, _transposed_groups(layer))
        self._write.replace(weight, own).name = weight.name
        return scale

    def _unfold_layer(self, norm: SetAside, layer: Node, scale: Symbol | None) -> Node:
        with self._write.before(layer):
            bias = self._read(norm.of_layer["bias"])
            tensors = {name: self._read(norm.of_norm[name]) for name in NORM_TENSORS}
            if scale is not None:
                rounded = self._write(bind(layer)["weight"])
                unscaled = by_channel(operator.truediv, rounded, scale, _transposed_groups(layer))
                set_argument(layer, "weight", unscaled.node)

        def normalized(y: Any) -> Symbol:
            arguments = nodes_of((y, *tensors.values(), *norm.arguments.values()))
            return self._write(self._write.without_value(norm.target, arguments, {}))  # norm.meta has it

        set_argument(layer, "bias", None if bias is None else bias.node)
        made = self._write.follow(layer, normalized)
        made.name = norm.norm
        made.meta.update(norm.meta)
        return made

    def _read(self, parameter: tuple[str, Tensor] | None) -> Any:
        if parameter is None:
            return None
        return self._write(insert_attribute(self._gm, *parameter, self._write.like, "prepare_qat_pt2e"))


def _transposed_groups(layer: Node) -> int | None:
    return bind(layer)["groups"] if is_conv_transpose(layer) else None


def _watched(layer: Node, name: str) -> Node:
    """What a layer reads, seen through the observers before it."""
    node: Any = bind(layer)[name]
    while isinstance(node, Node) and node.op == "call_module":
        node = node.args[0]
    return cast(Node, node)


# --- convert ----------------------------------------------------------------------------------------------------------


def fold_trained(gm: GraphModule) -> GraphModule:
    """Fold the batch norms of a prepared graph in evaluation: the bias takes them in, the weight stays scaled.

    Raises:
        ConversionError: a node is gone.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    biases: dict[str, Node] = {}
    for norm in gm.meta.pop(TRAINED_KEY, ()):
        check_present((norm.layer, norm.norm, norm.guard, norm.weight), nodes)
        layer, old = nodes[norm.layer], nodes[norm.norm]
        name, target = norm.folded_bias
        if target not in biases:
            value = _folded_bias(gm, norm, old)
            with gm.graph.inserting_before(layer):
                biases[target] = insert_attribute(gm, target, value, layer, "convert_pt2e")
            biases[target].name = name
        set_argument(layer, "weight", nodes[norm.weight])
        set_argument(layer, "bias", biases[target])
        set_argument(nodes[norm.guard], "at_zero", 0.0)  # where gamma is 0, so is the folded weight
        old.replace_all_uses_with(layer)
        gm.graph.erase_node(old)
    for node in filter(counts_batches, nodes.values()):
        gm.graph.erase_node(node)
    return fold_batch_norm(tidy(gm))


def _folded_bias(gm: GraphModule, norm: TrainedNorm, node: Node) -> nn.Parameter:
    arguments = bind(node)
    tensors = {name: constant(arguments[name]) for name in NORM_TENSORS}
    own = None if norm.bias is None else attribute(gm, norm.bias)
    with torch.no_grad():
        value = folded_bias(own, tensors, float(arguments["eps"]))
    return nn.Parameter(value.to(tensors["running_mean"].dtype), requires_grad=False)  # type: ignore[union-attr]
