"""The Quantizer contract, and how a quantizer says why it left a node alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from ..specs import EdgeOrNode

__all__ = ["REFUSALS_KEY", "UNUSED_RULES_KEY", "Quantizer", "Refusal", "refusals", "refuse"]

REFUSALS_KEY = "quantization_refusals"
"""node.meta key: the list of Refusal values that quantizers left on the node."""

UNUSED_RULES_KEY = "quantization_unused_rules"
"""GraphModule.meta key: names of the rules that fitted no node."""


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
    """Why a rule, or a whole quantizer, left a node in floating point."""

    by: str
    reason: str


def refuse(node: Node, by: str, reason: str) -> None:
    """Record a reason on a node; reports print it."""
    recorded = node.meta.setdefault(REFUSALS_KEY, [])
    if Refusal(by, reason) not in recorded:
        recorded.append(Refusal(by, reason))


def refusals(node: Node) -> list[Refusal]:
    """The reasons recorded on a node, in the order of recording."""
    return list(node.meta.get(REFUSALS_KEY, ()))
