"""Checks of one annotated graph: each looks at the claims alone and yields (rule, where, what is wrong)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..errors import AnnotationError, QuantizationError, SharingError
from ..graph.constants import Constants
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY
from ..ops import BATCH_NORM, EMBEDDING, PRODUCTS
from ..pt2e.making import make_observers
from ..pt2e.plan import make_plan
from ..quantizer.reading import read_spec
from ..reasons import refusals
from ..specs import integer_range, is_per_channel
from .claims import Claim, claims, is_claimable

__all__ = ["Found", "annotation_findings", "first_line"]

Found = Iterator[tuple[str, str, str]]

_WITH_WEIGHT = PRODUCTS.union(EMBEDDING)


def annotation_findings(gm: GraphModule) -> list[tuple[str, str, str]]:
    """Everything that is wrong with the annotations of a graph; the plan is tried only when each one is sound."""
    every = list(claims(gm))
    found = [finding for claim in every for finding in (*_tensor(claim), *_spec(claim))]
    found += [*_weights(gm, every), *_batch_norms(gm)]
    return found or list(_plan(gm))


def _tensor(claim: Claim) -> Found:
    """keys-are-inputs, one-tensor, floats-only."""
    node, tensor = claim.node, claim.tensor
    if not claim.is_output and (not isinstance(tensor, Node) or tensor not in node.all_input_nodes):
        inputs = ", ".join(source.name for source in node.all_input_nodes)
        yield "keys-are-inputs", claim.where, f"{tensor} is not among the inputs of {node.name}: {inputs}"
        return
    value = tensor.meta.get("val")
    if value is None and tensor.op == "get_attr":
        return
    if not isinstance(value, Tensor):
        what = "no recorded value" if value is None else f"a {type(value).__name__} of outputs"
        yield "one-tensor", claim.where, f"{tensor.name} has {what}; annotate the getitem nodes that take one tensor"
    elif not is_float_tensor(tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        yield "floats-only", claim.where, f"{tensor.name} is {dtype}, only floating-point tensors are quantized"


def _spec(claim: Claim) -> Found:
    """legal-specs: every spec of every origin, by its fields."""
    try:
        kind = read_spec(claim.spec).kind
    except AnnotationError as error:
        yield "legal-specs", claim.where, first_line(error)
        return
    if kind == "shared":
        return
    rank = None
    if is_claimable(claim) and "val" in claim.tensor.meta:
        rank = claim.tensor.meta["val"].dim()
    problems = [*_range(claim.spec), *_scheme(claim.spec, rank)]
    if kind == "fixed":
        problems += _fixed(claim.spec)
    elif kind == "observed" and not callable(claim.spec.observer_or_fake_quant_ctr):
        problems.append("observer_or_fake_quant_ctr makes no observer: it cannot be called")
    elif kind == "derived" and not claim.spec.derived_from:
        problems.append("derived_from is empty")
    for problem in problems:
        yield "legal-specs", claim.where, problem


def _range(spec: Any) -> Iterator[str]:
    if not isinstance(spec.dtype, torch.dtype):
        yield f"dtype is {spec.dtype!r}, not a torch.dtype"
        return
    whole, low, high = integer_range(spec.dtype), spec.quant_min, spec.quant_max
    if whole is None:
        if low is not None or high is not None:
            yield f"{spec.dtype} is not an integer type, quant_min and quant_max have no meaning for it"
        return
    low, high = whole[0] if low is None else low, whole[1] if high is None else high
    if not whole[0] <= low < high <= whole[1]:
        yield f"[{low}, {high}] is not a range of {spec.dtype}, which holds [{whole[0]}, {whole[1]}]"


def _scheme(spec: Any, rank: int | None) -> Iterator[str]:
    qscheme, axis = getattr(spec, "qscheme", None), getattr(spec, "ch_axis", None)
    if qscheme is not None and not isinstance(qscheme, torch.qscheme):
        yield f"qscheme is {qscheme!r}, not a torch.qscheme"
    elif is_per_channel(qscheme):
        if getattr(spec, "is_dynamic", False):
            yield "dynamic and per channel: run-time qparams exist per tensor or per token"
        if axis is None:
            yield f"{qscheme} without ch_axis"
        elif rank is not None and not -rank <= axis < rank:
            yield f"ch_axis={axis}, the tensor has {rank} dimensions"


def _fixed(spec: Any) -> Iterator[str]:
    if not 0.0 < spec.scale < math.inf:
        yield f"scale={spec.scale}, it must be finite and greater than 0"
    whole = integer_range(spec.dtype) if isinstance(spec.dtype, torch.dtype) else None
    if whole is not None:
        low = whole[0] if spec.quant_min is None else spec.quant_min
        high = whole[1] if spec.quant_max is None else spec.quant_max
        if not low <= spec.zero_point <= high:
            yield f"zero_point={spec.zero_point} lies outside [{low}, {high}]"


def _weights(gm: GraphModule, every: list[Claim]) -> Found:
    """constant-weights: what is claimed as a weight can be stored as integers."""
    constants: Constants | None = None
    for claim in every:
        node = claim.node
        if claim.is_output or node.target not in _WITH_WEIGHT or claim.tensor is not bind(node)["weight"]:
            continue
        constants = constants or Constants(gm)
        if claim.tensor not in constants and not refusals(node):
            yield (
                "constant-weights",
                claim.where,
                f"{claim.tensor.name} is computed from the model's input, no integer weight can be stored for it; "
                "skip it and record the reason (refuse)",
            )


def _batch_norms(gm: GraphModule) -> Found:
    """folds-possible: those that could be folded are gone before a quantizer sees the graph."""
    for node in gm.graph.nodes:
        annotation = node.meta.get(ANNOTATION_KEY)
        if node.target in BATCH_NORM and getattr(annotation, "_annotated", annotation is not None):
            why = "; ".join(said.reason for said in refusals(node) if said.code == "not_folded")
            yield "folds-possible", node.name, f"claimed, but it cannot be folded: {why or 'it is in training mode'}"


def _plan(gm: GraphModule) -> Found:
    """sharing-solvable, and legal-specs for what only the observers know."""
    try:
        make_observers(make_plan(gm, "the quantizer"))
    except (SharingError, AnnotationError) as error:
        yield "sharing-solvable", "", first_line(error)
    except QuantizationError as error:
        yield "legal-specs", "", first_line(error)
    except Exception as error:  # noqa: BLE001  # a constructor of somebody else
        yield "legal-specs", "", f"no observer can be made: {type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The message of an error without its further lines."""
    return str(error).partition("\n")[0]
