"""The Quantizer contract, and how a quantizer says why it left a node alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn
from torch.fx import GraphModule

from ..specs import EdgeOrNode

__all__ = ["Quantizer"]


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
