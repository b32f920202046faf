"""ComposableQuantizer: several quantizers on one model, the first of them with the highest priority."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import AnnotationError, CaptureError
from ..meta import ANNOTATION_KEY
from ..specs import EdgeOrNode
from ..where import locate
from .base import Quantizer

__all__ = ["ComposableQuantizer", "callback_of", "quantizer_name"]


class ComposableQuantizer(Quantizer):
    """Run quantizers one after the other; a node belongs to the first one that annotates it.

    All methods of the Quantizer contract reach every part. When the nodes that the parts claim are disjoint, their
    order does not matter.

    Args:
        quantizers: in order of priority.
    """

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.quantizers = (
            list(quantizers) if isinstance(quantizers, Iterable) and not isinstance(quantizers, Tensor) else []
        )
        if not self.quantizers or not all(callable(getattr(part, "annotate", None)) for part in self.quantizers):
            raise AnnotationError(f"ComposableQuantizer needs a list of at least one quantizer, got {quantizers!r}")

    @property
    def name(self) -> str:
        return " + ".join(quantizer_name(part) for part in self.quantizers)

    @property
    def decompose(self) -> frozenset[str]:  # type: ignore[override]  # the parts say it
        return frozenset().union(*(getattr(part, "decompose", ()) for part in self.quantizers))

    @checked(CaptureError)
    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        for part in self.quantizers:
            model = part.transform_for_annotation(model)
        return model

    @checked(CaptureError)
    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate part by part.

        Raises:
            AnnotationError: a part changed or removed the annotation that an earlier one made.
        """
        claims: dict[Node, tuple[str, Any]] = {}
        for part in self.quantizers:
            model = part.annotate(model) or model  # the reference ignores what annotate returns
            for node in model.graph.nodes:
                said = _frozen(node.meta.get(ANNOTATION_KEY))
                if node not in claims and said is not None:
                    claims[node] = (quantizer_name(part), said)
                elif node in claims and claims[node][1] != said:
                    raise AnnotationError(
                        f"{quantizer_name(part)} changed what {claims[node][0]} had annotated on\n{locate(node)}\n"
                        "  A node belongs to the first quantizer that claims it. Change the order, or keep the later "
                        "one away from this node (set_filter_function, or a narrower selector)."
                    )
        return model

    def validate(self, model: GraphModule) -> None:
        for part in self.quantizers:
            part.validate(model)

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, nn.Module]
    ) -> None:
        for part in self.quantizers:
            callback = callback_of(part)
            if callback is not None:
                callback(model, edge_or_node_to_obs_or_fq)


def callback_of(quantizer: object) -> Callable[[GraphModule, dict[EdgeOrNode, nn.Module]], None] | None:
    """What a quantizer, of this package or of another, wants to be called with the observers; None: nothing."""
    return getattr(quantizer, "prepare_obs_or_fq_callback", None)


def quantizer_name(quantizer: object) -> str:
    """The name that reports use for a quantizer, of this package or of another."""
    return str(getattr(quantizer, "name", type(quantizer).__name__))


def _frozen(annotation: Any) -> tuple[Any, ...] | None:
    return None if annotation is None else (copy.copy(annotation.input_qspec_map), annotation.output_qspec)
