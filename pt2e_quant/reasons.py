"""Why an operator stays in float: refusals, their codes and the ways out; and batch norms that are gone."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .checks import checked
from .errors import AnnotationError
from .meta import REFUSALS_KEY

__all__ = ["WAYS_OUT", "Folded", "Reason", "Refusal", "because", "refusals", "refuse"]

WAYS_OUT = {
    "unsupported_op": "write a rule for it, if the backend has a kernel",
    "arguments": "change these arguments in the model, or write a rule that takes them",
    "factor": "multiply in an op of its own: x + alpha * y instead of torch.add(x, y, alpha=alpha)",
    "bounds": "clamp between two numbers, the smaller one first",
    "stride": "pool with a stride of 1 and slice the result, such as [..., ::3, ::3]",
    "average": "average whole images: to 1 x 1, or over dimensions 2 and 3 with keepdim=True; or leave it in float",
    "conversion": "leave dtype out, and cast in an op of its own",
    "sum_in_float": "nothing to do: the product is quantized without the sum, which stays in float",
    "single": "nothing to do: one tensor alone is not moved; leave the op out of the model",
    "bag_mode": "take mode='sum', and divide in the model by how many rows each bag has",
    "accumulate": "read the buffer, add to what was read, and write the sum",
    "configuration": "give it another configuration, as the reason says, by operator, module or name",
    "not_asked_for": "ask for it by operator, module or name, as the reason says",
    "shape": "reshape its input in the model, as the reason says",
    "dynamic_shape": "export with fewer dynamic dimensions: fix the sizes that it depends on",
    "padding": "pad in an operator of its own before it, with zeros, or by as much on both sides",
    "groups": "give it weights with one scale in all, or one group in the model",
    "group_size": "choose a group size that divides its rows, or weights with one scale for each channel",
    "computed_operand": "make it a constant of the model, a parameter or a buffer, or leave the op in float",
    "range": "clamp the constant in the model: -1e4 masks as well as -1e9 does",
    "training": "call model.eval() before export",
    "input_not_quantized": "quantize what computes its input; it then passes those integers on",
    "output_not_read": "quantize what reads its output, or leave it: integers alone between floats cost time",
    "not_selected": "add a selector that covers it, such as set_global",
    "config_none": "remove the selector that keeps it in float",
    "already_annotated": "put this quantizer first in the composition, or narrow the other one",
    "not_annotated": "ask the quantizer that was used, or compose it with one that has a rule for this op",
    "dtype": "cast to float32, float16 or bfloat16 in the model",
    "non_float": "nothing to do: integers and booleans stay what they are",
    "no_value": "export the model again, so that the graph records dtypes and shapes",
    "normalized": "nothing to do; where integers are worth their error, select it by operator, module or name",
    "magnified": "nothing to do; where integers are worth their error, select it by operator, module or name",
    "recurrence": "nothing to do; where integers are worth their error, select it by operator, module or name",
    "mask": "nothing to do: masks stay in float",
    "constant": "nothing to do: no input of the model flows through it",
    "overwritten": "write `x = x + y` instead of the in-place op in the model, or make all ops functional: "
    "prepare_pt2e(exported.run_decompositions({}), ...)",
    "not_folded": "see the reason; batch norm has no integer kernel of its own",
    "composite_op": "take it apart, as the reason says",
    "nested_graph": "move the op out of the branch or the loop body",
}
"""Codes of the reasons for which an op stays in float, each with what could be done about it."""


class Reason(str):
    """A reason of a certain kind. `code`: a key of WAYS_OUT."""

    __slots__ = ("code",)
    code: str


@checked(AnnotationError)
def because(code: str, reason: str) -> Reason:
    """What a check of a rule, an `unless`, returns: the reason, with a key of WAYS_OUT that says how to mend it.

    Raises:
        AnnotationError: there is no such code.
    """
    if code not in WAYS_OUT:
        raise AnnotationError(f"{code!r} is no code of a reason; there are {', '.join(WAYS_OUT)}")
    made = Reason(reason)
    made.code = code
    return made


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


@checked(AnnotationError)
def refuse(node: Node, by: str, reason: str, code: str = "arguments") -> None:
    """Record a reason on a node; reports print it, with the way out that WAYS_OUT has for its code."""
    recorded = node.meta.setdefault(REFUSALS_KEY, [])
    if all((known.by, known.reason) != (by, reason) for known in recorded):
        recorded.append(Refusal(by, reason, code))


@checked(AnnotationError)
def refusals(node: Node) -> list[Refusal]:
    """The reasons recorded on a node, in the order of recording."""
    return list(node.meta.get(REFUSALS_KEY, ()))
