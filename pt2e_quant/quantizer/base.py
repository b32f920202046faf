"""The Quantizer contract, and how a quantizer says why it left a node alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from ..specs import EdgeOrNode

__all__ = [
    "FOLDED_KEY",
    "REFUSALS_KEY",
    "UNUSED_RULES_KEY",
    "WAYS_OUT",
    "Folded",
    "Quantizer",
    "Refusal",
    "refusals",
    "refuse",
]

REFUSALS_KEY = "quantization_refusals"
"""node.meta key: the list of Refusal values that quantizers left on the node."""

UNUSED_RULES_KEY = "quantization_unused_rules"
"""GraphModule.meta key: names of the rules that fitted no node."""

FOLDED_KEY = "quantization_folded"
"""GraphModule.meta key: the list of Folded values of the batch norms that are gone."""

WAYS_OUT = {
    "unsupported_op": "write a rule for it, if the backend has a kernel",
    "arguments": "change these arguments in the model, or write a rule that takes them",
    "input_not_quantized": "quantize what computes its input; it then passes those integers on",
    "output_not_read": "quantize what reads its output, or leave it: integers alone between floats cost time",
    "not_selected": "add a selector that covers it, such as set_global",
    "config_none": "remove the selector that keeps it in float",
    "already_annotated": "put this quantizer first in the composition, or narrow the other one",
    "not_annotated": "ask the quantizer that was used, or compose it with one that has a rule for this op",
    "dtype": "cast to float32, float16 or bfloat16 in the model",
    "non_float": "nothing to do: integers and booleans stay what they are",
    "no_value": "export the model again, so that the graph records dtypes and shapes",
    "mask": "nothing to do: masks stay in float",
    "constant": "nothing to do: no input of the model flows through it",
    "overwritten": "write `x = x + y` instead of the in-place op in the model",
    "not_folded": "see the reason; batch norm has no integer kernel of its own",
    "composite_op": "take it apart, as the reason says",
    "nested_graph": "move the op out of the branch or the loop body",
}
"""Codes of the reasons for which an op stays in float, each with what could be done about it."""


class Quantizer(ABC):
    """Says which tensors of a graph become integers and how. Subclass RuleQuantizer unless rules cannot say it.

    `prepare_pt2e` works on a copy of the model and calls, in this order: transform_for_annotation, annotate, validate
    and, once observers exist, prepare_obs_or_fq_callback.

    decompose: fused ops that the backend wants written as simple ones first, by the names that prepare_pt2e takes.
    """

    decompose: frozenset[str] = frozenset()

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite the graph so that it can be annotated, for example decompose a fused op. Default: as it is."""
        return model

    @abstractmethod
    def annotate(self, model: GraphModule) -> GraphModule:
        """Put a QuantizationAnnotation in node.meta["quantization_annotation"] of each node to be quantized."""

    @abstractmethod
    def validate(self, model: GraphModule) -> None:
        """Raise when the annotated graph is one that the backend cannot run."""

    # Optional, hence neither abstract nor of any effect here.
    def prepare_obs_or_fq_callback(  # noqa: B027
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, nn.Module]
    ) -> None:
        """See and change the observer of each edge and node before any is inserted. Shared ones appear repeatedly."""


@dataclass(frozen=True)
class Refusal:
    """Why a rule, or a whole quantizer, left a node in floating point. `code`: a key of WAYS_OUT."""

    by: str
    reason: str
    code: str = "arguments"


@dataclass(frozen=True)
class Folded:
    """A batch norm that is part of the layer before it now. `kind`: qualified name of its module's class."""

    node: str
    into: str
    module: str | None
    kind: str
    into_module: str | None
    source: str | None

    def __str__(self) -> str:
        return f"{self.node} into {self.into}"


def refuse(node: Node, by: str, reason: str, code: str = "arguments") -> None:
    """Record a reason on a node; reports print it, with the way out that WAYS_OUT has for its code."""
    recorded = node.meta.setdefault(REFUSALS_KEY, [])
    if all((known.by, known.reason) != (by, reason) for known in recorded):
        recorded.append(Refusal(by, reason, code))


def refusals(node: Node) -> list[Refusal]:
    """The reasons recorded on a node, in the order of recording."""
    return list(node.meta.get(REFUSALS_KEY, ()))
