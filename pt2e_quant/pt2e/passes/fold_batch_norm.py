"""Fold batch norm in inference mode into the convolution or linear before it, for post-training quantization.

With s = gamma / sqrt(var + eps), one value per output channel:
    weight' = weight * s        bias' = (bias - mean) * s + beta
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 3.2). Done only where it leaves the model's values as they are: the batch norm is the only
user of the convolution, runs on its running statistics, and all parameters are constants. Otherwise the batch norm
stays and the reason is recorded on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from ...graph import Constants, free_name, insert_attribute, tidy
from ...ops import BATCH_NORM, LINEAR, bind, is_conv, is_conv_transpose, set_argument, training_argument
from ...quantizer.base import refuse

__all__ = ["fold_batch_norm"]

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def fold_batch_norm(gm: GraphModule, notes: list[str] | None = None) -> GraphModule:
    """Fold every batch norm that can be folded.

    Args:
        gm: exported graph.
        notes: receives one line for each fold.
    """
    norms = [node for node in gm.graph.nodes if _is_batch_norm(node)]
    if not norms:
        return gm
    constants = Constants(gm)
    folder = _Folder(gm, constants)
    for node in norms:
        reason = _obstacle(node, constants)
        if reason is not None:
            refuse(node, "fold_batch_norm", reason)
            continue
        producer = bind(node)["input"]
        if notes is not None:
            notes.append(f"{node.name} into {producer.name}")
        folder.fold(producer, node)
    return tidy(gm)


def _is_batch_norm(node: Node) -> bool:
    return node.op == "call_function" and node.target in BATCH_NORM


def _obstacle(norm: Node, constants: Constants) -> str | None:
    """Why this batch norm cannot be folded into its input, None when it can."""
    arguments = bind(norm)
    producer = arguments["input"]
    if arguments.get("running_mean") is None or arguments.get("running_var") is None:
        return "it has no running statistics (track_running_stats=False)"
    if _trains(norm, arguments):
        return (
            "captured in training mode, it normalizes with the batch's own statistics; call model.eval() before export"
        )
    if not _is_foldable(producer):
        return "its input is not computed by a convolution or linear"
    if len(producer.users) != 1:
        return f"{producer.name} has {len(producer.users)} users, folding would change what the others see"
    if any(not _used_as_tensor(user) for user in norm.users):
        return "its saved statistics are used by the graph"
    inputs = [bind(producer)["weight"], bind(producer)["bias"], *(arguments[name] for name in _NORM_TENSORS)]
    moving = next((value for value in inputs if value is not None and value not in constants), None)
    if moving is not None:
        return f"{moving.name} is not a constant of the model"
    value = producer.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != constants.value(inputs[0]).dim():
        # a linear on 3-d input, a convolution without a batch
        return f"it normalizes dimension 1, which does not hold the channels of {producer.name}"
    return None


def _trains(norm: Node, arguments: dict[str, Any]) -> bool:
    flag = training_argument(norm.target)
    if flag is None:  # forms of one mode only, such as _native_batch_norm_legit_no_training
        return "with_update" in str(norm.target)
    return bool(arguments[flag])


def _is_foldable(node: object) -> bool:
    return isinstance(node, Node) and (node.target in LINEAR or is_conv(node) or is_conv_transpose(node))


def _used_as_tensor(user: Node) -> bool:
    """Functional batch norms return (output, saved mean, saved variance): only item 0 survives folding."""
    return getattr(user.target, "__name__", "") != "getitem" or bool(user.args[1] == 0)


class _Folder:
    """Folds one batch norm after the other in one graph; equal folds (a module called twice) share their parameters."""

    def __init__(self, gm: GraphModule, constants: Constants) -> None:
        self._gm = gm
        self._constants = constants
        self._names = free_name(gm, "_folded_param")
        self._done: dict[tuple[object, ...], tuple[Node, Node]] = {}

    def fold(self, producer: Node, norm: Node) -> None:
        key = self._key(producer, norm)
        if key not in self._done:
            self._done[key] = self._make(producer, norm)
        for name, parameter in zip(("weight", "bias"), self._done[key], strict=True):
            old = bind(producer)[name]
            set_argument(producer, name, parameter)
            if isinstance(old, Node) and not old.users:
                self._gm.graph.erase_node(old)  # so that a second batch norm behind this one can keep the names
        _remove(norm, producer)

    @staticmethod
    def _key(producer: Node, norm: Node) -> tuple[object, ...]:
        arguments, statistics = bind(producer), bind(norm)
        nodes = [arguments["weight"], arguments["bias"], *(statistics[name] for name in _NORM_TENSORS)]
        return (*nodes, statistics["eps"], arguments.get("groups", 1), is_conv_transpose(producer))

    def _make(self, producer: Node, norm: Node) -> tuple[Node, Node]:
        def value(node: Any) -> Tensor | None:
            return None if node is None else self._constants.value(node)

        arguments, statistics = bind(producer), bind(norm)
        folded = _folded(
            self._constants.value(arguments["weight"]),
            value(arguments["bias"]),
            {key: value(statistics[key]) for key in _NORM_TENSORS},
            float(statistics["eps"]),
            groups=arguments["groups"] if is_conv_transpose(producer) else None,
        )
        made = []
        with self._gm.graph.inserting_after(arguments["weight"]):  # before every op that shares it
            for old, new in zip((arguments["weight"], arguments["bias"]), folded, strict=True):
                target = self._keep_name(old) or next(self._names)
                like = producer if old is None else old
                node = insert_attribute(
                    self._gm, target, nn.Parameter(new, requires_grad=False), like, "fold_batch_norm"
                )
                self._constants.note(node)
                made.append(node)
        return made[0], made[1]

    def _keep_name(self, old: Node | None) -> str | None:
        """The parameter's own name when nothing else in the graph reads it, so that state_dict keys stay as they were.

        The clone owns its module tree, so the caller's parameter is left alone.
        """
        if old is None or old.op != "get_attr" or len(old.users) != 1:
            return None
        return str(old.target) if len(self._gm.graph.find_nodes(op="get_attr", target=old.target)) == 1 else None


def _folded(
    weight: Tensor, bias: Tensor | None, norm: dict[str, Tensor | None], eps: float, groups: int | None
) -> tuple[Tensor, Tensor]:
    """The formula of the module docstring: s and the bias in float64, the product in float32 or better.

    `groups` is given for a transposed convolution, whose weight is (in, out / groups, *kernel); all others have the
    output channels in dimension 0.
    """
    mean, var = norm["running_mean"].double(), norm["running_var"].double()  # type: ignore[union-attr]
    scale = torch.rsqrt(var + eps)
    if norm["weight"] is not None:
        scale = scale * norm["weight"].double()
    new_bias = ((0.0 if bias is None else bias.double()) - mean) * scale
    if norm["bias"] is not None:
        new_bias = new_bias + norm["bias"].double()
    factor = scale.to(torch.promote_types(weight.dtype, torch.float32))
    if groups is None:
        new_weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        per_group = weight.unflatten(0, (groups, -1))
        new_weight = (per_group * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def _remove(norm: Node, producer: Node) -> None:
    """Let the users of the batch norm read the convolution, which now computes the same value."""
    items = [user for user in norm.users if getattr(user.target, "__name__", "") == "getitem"]
    for user in items:
        user.replace_all_uses_with(producer)
        user.graph.erase_node(user)
    norm.replace_all_uses_with(producer)
    origin = NodeSource(norm, "fold_batch_norm", NodeSourceAction.REPLACE)
    producer.meta["from_node"] = [*producer.meta.get("from_node", ()), origin]  # copies of a graph share the old list
    norm.graph.erase_node(norm)
