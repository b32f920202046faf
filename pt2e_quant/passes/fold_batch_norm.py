"""Fold batch norm in inference mode into the convolution or linear before it, for post-training quantization.

With s = gamma / sqrt(var + eps), one value per output channel:
    weight' = weight * s        bias' = (bias - mean) * s + beta
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 3.2). Done only where it leaves the model's values as they are: the batch norm is the only
user of the convolution, runs on its running statistics, and all parameters are constants. Otherwise the batch norm
stays and the reason is recorded on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from ..arguments import bind, set_argument, training_argument
from ..graph.attributes import free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import tidy
from ..meta import FOLDED_KEY, HANDLE_KEY, mark, marks
from ..ops import BATCH_NORM, LINEAR, is_conv, is_conv_transpose
from ..reasons import Folded, refuse
from ..where import module_path, module_type, node_id, source_line

__all__ = ["NORM_TENSORS", "fold_batch_norm", "folded_bias", "is_batch_norm"]

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def fold_batch_norm(gm: GraphModule, *, unless: Callable[[Node], str | None] | None = None) -> GraphModule:
    """Fold every batch norm that can be folded; `gm.meta[FOLDED_KEY]` lists them.

    Args:
        gm: the graph.
        unless: why a batch norm is not to be folded although it could be, if so.
    """
    norms = [node for node in gm.graph.nodes if is_batch_norm(node)]
    if not norms:
        return gm
    constants = Constants(gm)
    layer_of: dict[Node, Node] = {}
    for norm in norms:
        source = _source(norm)
        layer = layer_of.get(source, source) if isinstance(source, Node) else source
        reason = _obstacle(norm, layer, constants) or (unless and unless(norm))
        if reason:
            refuse(norm, "fold_batch_norm", reason, "not_folded")
            continue
        layer_of[norm] = layer
    gm.meta[FOLDED_KEY] = [_folded_norm(norm, layer) for norm, layer in layer_of.items()]
    _Folder(gm, constants, layer_of).run()
    return tidy(gm)


def _folded_norm(norm: Node, layer: Node) -> Folded:
    return Folded(
        node=node_id(norm),
        into=node_id(layer),
        module=module_path(norm),
        kind=module_type(norm),
        into_module=module_path(layer),
        source=source_line(norm),
    )


def is_batch_norm(node: Node) -> bool:
    """Whether a node is a batch norm, in any of its forms."""
    return node.op == "call_function" and node.target in BATCH_NORM


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _source(norm: Node) -> Any:
    """What computes the input of a batch norm; functional batch norms return a tuple, which a getitem takes apart."""
    source = bind(norm)["input"]
    return source.args[0] if isinstance(source, Node) and _is_getitem(source) else source


def _readers(node: Node) -> int:
    """How many nodes read the tensor that a layer or a batch norm computes."""
    return sum(len(user.users) if _is_getitem(user) else 1 for user in node.users)


def _obstacle(norm: Node, layer: Any, constants: Constants) -> str | None:
    """Why this batch norm cannot be folded into a layer (through those before it), None when it can."""
    arguments = bind(norm)
    if arguments.get("running_mean") is None or arguments.get("running_var") is None:
        return "it has no running statistics (track_running_stats=False)"
    if _trains(norm, arguments):
        return (
            "captured in training mode, it normalizes with the batch's own statistics; call model.eval() before export"
        )
    if not _is_foldable(layer):
        return "its input is not computed by a convolution or linear"
    source = _source(norm)
    if _readers(source) != 1:
        return f"{source.name} has {_readers(source)} users, folding would change what the others see"
    if any(_is_getitem(user) and user.args[1] != 0 for user in norm.users):
        return "its saved statistics are used by the graph"
    inputs = [bind(layer)["weight"], bind(layer)["bias"], *(arguments[name] for name in NORM_TENSORS)]
    moving = next((value for value in inputs if value is not None and value not in constants), None)
    if moving is not None:
        return f"{moving.name} is not a constant of the model"
    value = layer.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != constants.value(inputs[0]).dim():
        # a linear on 3-d input, a convolution without a batch
        return f"it normalizes dimension 1, which does not hold the channels of {layer.name}"
    return None


def _trains(norm: Node, arguments: dict[str, Any]) -> bool:
    flag = training_argument(norm.target)
    if flag is None:  # forms of one mode only, such as _native_batch_norm_legit_no_training
        return "with_update" in str(norm.target)
    return bool(arguments[flag])


def _is_foldable(node: object) -> bool:
    return isinstance(node, Node) and (node.target in LINEAR or is_conv(node) or is_conv_transpose(node))


Key = tuple[object, ...]


class _Folder:
    """Folds the batch norms of one graph; layers that are equal in all that matters share the result."""

    def __init__(self, gm: GraphModule, constants: Constants, layer_of: dict[Node, Node]) -> None:
        self._gm = gm
        self._constants = constants
        self._names = free_name(gm, "_folded_param")
        self._norms: dict[Node, list[Node]] = defaultdict(list)
        for norm, layer in layer_of.items():
            self._norms[layer].append(norm)

    def run(self) -> None:
        equal: dict[Key, list[Node]] = defaultdict(list)
        for layer in self._norms:
            equal[self._key(layer)].append(layer)
        for layers in equal.values():
            weight, bias = self._make(layers)
            for layer in layers:
                set_argument(layer, "weight", weight)
                set_argument(layer, "bias", bias)
                for norm in self._norms[layer]:
                    _remove(norm, layer)

    def _key(self, layer: Node) -> Key:
        arguments = bind(layer)
        key: Key = (arguments["weight"], arguments["bias"], arguments.get("groups", 1), is_conv_transpose(layer))
        for norm in self._norms[layer]:
            statistics = bind(norm)
            key += (*(statistics[name] for name in NORM_TENSORS), statistics["eps"])
        return key

    def _make(self, layers: list[Node]) -> list[Node]:
        """get_attr nodes of the folded weight and bias of equal layers."""
        arguments = bind(layers[0])
        old = [arguments["weight"], arguments["bias"]]
        weight, bias = self._constants.value(old[0]), self._value(old[1])
        for norm in self._norms[layers[0]]:
            statistics = bind(norm)
            weight, bias = _folded(
                weight,
                bias,
                {name: self._value(statistics[name]) for name in NORM_TENSORS},
                float(statistics["eps"]),
                groups=arguments["groups"] if is_conv_transpose(layers[0]) else None,
            )
        made = []
        with self._gm.graph.inserting_after(old[0]):  # before every layer that shares it
            for before, value in zip(old, (weight, bias), strict=True):
                target = self._kept_name(before, layers) or next(self._names)
                parameter = nn.Parameter(value, requires_grad=False)
                like = layers[0] if before is None else before
                made.append(insert_attribute(self._gm, target, parameter, like, "fold_batch_norm"))
        return made

    def _value(self, node: Any) -> Tensor | None:
        return None if node is None else self._constants.value(node)

    def _kept_name(self, old: Node | None, layers: list[Node]) -> str | None:
        """The parameter's own name when nobody else reads it, so that state_dict keys stay as they were.

        The clone owns its module tree, so the caller's parameter is left alone.
        """
        if old is None or old.op != "get_attr":
            return None
        reading = self._gm.graph.find_nodes(op="get_attr", target=old.target)
        return str(old.target) if {user for node in reading for user in node.users} <= set(layers) else None


def _folded(
    weight: Tensor, bias: Tensor | None, norm: dict[str, Tensor | None], eps: float, groups: int | None
) -> tuple[Tensor, Tensor]:
    """The formula of the module docstring: s and the bias in float64, the product in float32 or better.

    `groups` is given for a transposed convolution, whose weight is (in, out / groups, *kernel); all others have the
    output channels in dimension 0.
    """
    scale = _scale(norm, eps)
    factor = scale.to(torch.promote_types(weight.dtype, torch.float32))
    if groups is None:
        new_weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        per_group = weight.unflatten(0, (groups, -1))
        new_weight = (per_group * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return new_weight.to(weight.dtype), folded_bias(bias, norm, eps).to(weight.dtype)


def folded_bias(bias: Tensor | None, norm: dict[str, Tensor | None], eps: float) -> Tensor:
    """bias' of the module docstring, in float64."""
    shifted = (0.0 if bias is None else bias.double()) - norm["running_mean"].double()  # type: ignore[union-attr]
    scaled = shifted * _scale(norm, eps)
    return scaled if norm["bias"] is None else scaled + norm["bias"].double()


def _scale(norm: dict[str, Tensor | None], eps: float) -> Tensor:
    """s of the module docstring, in float64."""
    scale = torch.rsqrt(norm["running_var"].double() + eps)  # type: ignore[union-attr]
    return scale if norm["weight"] is None else scale * norm["weight"].double()


def _remove(norm: Node, producer: Node) -> None:
    """Let the users of the batch norm read the convolution, which now computes the same value."""
    for user in list(norm.users):
        if _is_getitem(user):
            user.replace_all_uses_with(producer)
            user.graph.erase_node(user)
    norm.replace_all_uses_with(producer)
    origin = NodeSource(norm, "fold_batch_norm", NodeSourceAction.REPLACE)
    producer.meta["from_node"] = [*producer.meta.get("from_node", ()), origin]  # copies of a graph share the old list
    if HANDLE_KEY in marks(norm):
        mark(producer, HANDLE_KEY, marks(norm)[HANDLE_KEY])
    norm.graph.erase_node(norm)
