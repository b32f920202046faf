"""The key of everything that pt2e_quant keeps in the meta of nodes and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

__all__ = [
    "ANNOTATION_KEY",
    "AROUND_KEY",
    "DROPOUTS_KEY",
    "DROPOUT_P_KEY",
    "DROPPED_KEY",
    "FOLDED_KEY",
    "FROZEN_NORMS_KEY",
    "FX_KEY",
    "HANDLE_KEY",
    "INITIALIZED_KEY",
    "MERGED_KEY",
    "NESTED_KEY",
    "ORIGIN_KEY",
    "PORTABLE",
    "PRESERVED_KEY",
    "RANKS_KEY",
    "RECORD_KEY",
    "REFUSALS_KEY",
    "SET_ASIDE_KEY",
    "TAG_KEY",
    "TRAINED_KEY",
    "UNUSED_RULES_KEY",
    "WEIGHT_OBSERVERS_KEY",
    "mark",
    "marks",
]

AROUND_KEY = "pt2e_quant_around"
"""GraphModule.meta key: a function that takes the module and returns what each of its runs happens inside."""

HANDLE_KEY = "numeric_debug_handle"
"""A mark, of the reference: the number by which the numeric debugger knows one value in every version of a model."""

INITIALIZED_KEY = "et_init_buffer"
"""node.meta key, of ExecuTorch: True on a buffer whose first values are to be stored."""

NESTED_KEY = "pt2e_quant_nested_in"
"""GraphModule.meta key: dotted path of a graph that is nested in another one, such as 'true_graph_0'."""

ORIGIN_KEY = "pt2e_quant"
"""A mark: the name that the node had in the converted graph."""

PORTABLE = "pt2e_quant_portable"
"""A mark of a node that no delegate may take: the reason."""

DROPOUT_P_KEY = "pt2e_quant_dropout_p"
"""A mark of an op whose dropout has no switch, set in evaluation: its probability in training."""

DROPPED_KEY = "pt2e_quant_dropped"
"""GraphModule.meta key: names of the quantizes that Inductor's passes dropped, since no integer kernel reads them."""

MERGED_KEY = "pt2e_quant_merged"
"""node.meta key of a linear made of several that read one tensor: their names."""

PRESERVED_KEY = "_user_preserved_attributes"
"""GraphModule.meta key, of torch.fx: attributes that copies of the module keep, by name."""

RANKS_KEY = "pt2e_quant_ranks"
"""GraphModule.meta key: the observers hold what all processes saw, so that merging again would count it twice."""

RECORD_KEY = "pt2e_quant"
"""GraphModule.meta key: the Record of what the engine did."""

REFUSALS_KEY = "quantization_refusals"
"""node.meta key: the list of Refusal values that quantizers left on the node."""

WEIGHT_OBSERVERS_KEY = "pt2e_quant_weight_observers"
"""GraphModule.meta key: the observers of constants by name. Nothing calls them before convert, so that dead-code
elimination drops their nodes, and copies of the module then lack them."""

TAG_KEY = "quantization_tag"
"""node.meta key, of the reference: what a Quantizer calls the part of the model that an op belongs to. Partitioners of
other packages read it, on the op and on its q/dq."""

UNUSED_RULES_KEY = "quantization_unused_rules"
"""GraphModule.meta key: names of the rules that fitted no node."""

FOLDED_KEY = "quantization_folded"
"""GraphModule.meta key: the list of Folded values of the batch norms that are gone."""

SET_ASIDE_KEY = "pt2e_quant_set_aside"
"""GraphModule.meta key: the list of SetAside values of the batch norms that training brings back."""

TRAINED_KEY = "pt2e_quant_trained"
"""GraphModule.meta key: the list of TrainedNorm values of the batch norms that convert folds."""

DROPOUTS_KEY = "pt2e_quant_dropouts"
"""GraphModule.meta key: the list of PassedOver values of the observer calls that training leaves out."""

FROZEN_NORMS_KEY = "pt2e_quant_frozen_norms"
"""GraphModule.meta key: present where batch norms keep their running statistics, in training too."""

FX_KEY = "pt2e_quant_fx"
"""GraphModule.meta key: the FXState of a model that FX mode prepared."""

ANNOTATION_KEY = "quantization_annotation"
"""The node.meta key under which a Quantizer leaves its QuantizationAnnotation."""

_MARKS = "custom"  # what torch.export keeps of a node's meta


def marks(node: Node) -> Mapping[str, Any]:
    """What was noted on a node for copies, exports, decompositions and files to pass on."""
    return node.meta.get(_MARKS) or {}


def mark(node: Node, key: str, value: object) -> None:
    """Note something on a node that is passed on. Copies of a graph share the notes so far, so they are not edited."""
    node.meta[_MARKS] = {**marks(node), key: value}
