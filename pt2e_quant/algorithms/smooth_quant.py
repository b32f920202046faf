"""SmoothQuant: move the outliers of activations into weights, where a scale for each channel takes them.

x @ W.T = (x / s) @ (W * s).T for any s > 0, one for each input channel. With s = max|x|^alpha / max|W|^(1 - alpha) both
become easy to quantize (Xiao et al., SmoothQuant, ICML 2023, arXiv:2211.10438, equation 4). The division is folded into
what produced x where the algebra allows: the weight of a norm, or the rows of a linear; elsewhere it stays as one
product with a vector. Comes before prepare: a float graph goes in, a float graph with the same outputs comes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph import Constants, ExportedModule, attribute, clone, emit, finish, free_name, insert_attribute, tidy
from ..ops import LINEAR, MUL, RELU, is_value_preserving
from ..qparams import affine_qparams, fake_quantize
from .calibrated import Batches, constant_linears, inputs_of, rounded_weight

__all__ = ["ALPHAS", "Smoothed", "smooth_quant"]

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What is tried for each group of linears; 0.0 stands for leaving it as it is."""


@dataclass(frozen=True)
class Smoothed:
    """What became of the linears that read one tensor.

    Args:
        input: name of the tensor's node.
        linears: names of the linears.
        alpha: the best of those tried; 0.0 left the group alone.
        folded_into: node that took the division; None where a product was inserted or nothing was done.
        gain: error of the group's outputs before over after, as powers; 1.0 where nothing was done.
    """

    input: str
    linears: tuple[str, ...]
    alpha: float
    folded_into: str | None
    gain: float


def smooth_quant(
    model: ExportedProgram | GraphModule,
    batches: Batches,
    *,
    alphas: Sequence[float] = ALPHAS,
    products: bool = True,
) -> tuple[ExportedModule, list[Smoothed]]:
    """Smooth the inputs of all linears with stored weights.

    Args:
        model: an exported float model; it stays as it was.
        batches: calibration data, tuples of positional arguments.
        alphas: candidates; for each group of linears the one with the smallest error of static int8 (activations per
            tensor, weights per channel) on the data is taken.
        products: insert one product with a vector where the division cannot be folded. False leaves such groups alone.

    Returns:
        The smoothed graph, to be prepared like the original, and what was done to each group.

    Raises:
        CalibrationError: there is no batch.
    """
    gm = clone(model.module() if isinstance(model, ExportedProgram) else model)
    tidy(gm)
    constants = Constants(gm)
    groups: dict[Node, list[Node]] = defaultdict(list)
    for linear in constant_linears(gm, constants):
        groups[bind(linear)["input"]].append(linear)
    peaks, rows = inputs_of(finish(clone(gm)), batches)
    done = []
    names = free_name(gm, "_smooth_")
    for x, linears in groups.items():
        weights = [constants.value(bind(linear)["weight"]) for linear in linears]
        producer = _foldable(x, linears)
        owned = all(len(bind(linear)["weight"].users) == 1 for linear in linears)
        alpha, gain, factor = 0.0, 1.0, None
        if owned and (producer is not None or products):
            alpha, gain, factor = _best(peaks[x.name], rows[x.name], weights, alphas)
        if factor is not None:
            _apply(gm, x, linears, producer, factor, names)
        folded = producer.name if producer is not None and factor is not None else None
        done.append(Smoothed(x.name, tuple(linear.name for linear in linears), alpha, folded, gain))
    return finish(tidy(gm)), done  # type: ignore[arg-type]  # tidy returns what it was given


def _best(
    peaks: Tensor, rows: Tensor, weights: list[Tensor], alphas: Sequence[float]
) -> tuple[float, float, Tensor | None]:
    """(alpha, gain, s) with the smallest error; (0.0, 1.0, None) when no candidate helps."""
    weight = torch.cat(weights)
    reach = weight.abs().amax(0)
    exact = rows @ weight.T
    base = _error(rows, weight, exact)
    best: tuple[float, float, Tensor | None] = (0.0, 1.0, None)
    for alpha in alphas:
        factor = peaks.clamp_min(1e-5) ** alpha / reach.clamp_min(1e-5) ** (1 - alpha)
        factor = (factor / factor.log().mean().exp()).clamp(1e-3, 1e3)
        gain = base / max(_error(rows / factor, weight * factor, exact), 1e-30)
        if alpha > 0 and gain > max(best[1], 1.02):
            best = alpha, gain, factor
    return best


def _error(rows: Tensor, weight: Tensor, exact: Tensor) -> float:
    scale, zero_point = affine_qparams(rows.amin(), rows.amax(), -128, 127, dtype=torch.int8)
    rounded = fake_quantize(rows, float(scale), int(zero_point), -128, 127)
    return float((rounded @ rounded_weight(weight).T - exact).pow(2).mean())


# --- where the division goes ------------------------------------------------------------------------------------------


def _foldable(x: Node, linears: list[Node]) -> Node | None:
    """The norm or linear whose parameters can take the division of x, channel by channel; None when there is none."""
    if set(x.users) != set(linears):
        return None
    node = x
    while node.op == "call_function" and (node is x or len(node.users) == 1):
        if node.target in _NORMS:
            bound = bind(node)
            return node if node is x and len(bound["normalized_shape"]) == 1 and _own(bound["weight"]) else None
        if node.target in LINEAR:
            bound = bind(node)
            own = _own(bound["weight"]) and (bound["bias"] is None or _own(bound["bias"]))
            return node if own and bound["weight"].meta["val"].shape[0] == x.meta["val"].shape[-1] else None
        following = next((source for source in _sources(node) if _keeps_channels(node, source)), None)
        if following is None:
            return None
        node = following
    return None


def _own(parameter: object) -> bool:
    return isinstance(parameter, Node) and parameter.op == "get_attr" and len(parameter.users) == 1


def _sources(node: Node) -> Iterator[Node]:
    """Through which input a factor for each channel of the output can pass: that of relu, the last one of products."""
    if node.target in RELU:
        yield node.args[0]  # type: ignore[misc]
    elif node.target in MUL:
        yield from (source for source in reversed(node.all_input_nodes) if source.target in LINEAR)
    elif node.target is aten.matmul.default:
        yield node.args[1]  # type: ignore[misc]
    elif node.target is aten.scaled_dot_product_attention.default and not bind(node)["enable_gqa"]:
        yield node.args[2]  # type: ignore[misc]
    elif is_value_preserving(node):
        yield node.all_input_nodes[0]


def _keeps_channels(node: Node, source: Node) -> bool:
    """Heads may be split off the last dimension and merged into it again: the order of channels stays.

    That is the case for view (..., h * d) -> (..., h, d), the exchange of h with the dimension before it, and back.
    """
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        dims = sorted(int(dim) % node.meta["val"].dim() for dim in node.args[1:])  # type: ignore[arg-type]
        return dims == [1, 2] and node.meta["val"].dim() == 4
    if node.target in (aten.view.default, aten.reshape.default):
        old, new = source.meta["val"].shape, node.meta["val"].shape
        split = len(new) == len(old) + 1 == 4 and new[-1] * new[-2] == old[-1]
        same = tuple(map(str, old)) == tuple(map(str, new))
        merged = len(old) == len(new) + 1 == 4 and old[-1] * old[-2] == new[-1]
        return bool(same or split or merged)
    if node.target in (aten.matmul.default, aten.scaled_dot_product_attention.default):
        return bool(node.meta["val"].dim() == 4 and node.meta["val"].shape[1] == source.meta["val"].shape[1])
    moved = aten.clone.default, aten.contiguous.default, aten.dropout.default
    return node.target in (*RELU, *MUL, *moved)


def _apply(
    gm: GraphModule, x: Node, linears: list[Node], producer: Node | None, factor: Tensor, names: Iterator[str]
) -> None:
    for linear in linears:
        _scale(gm, linear, "weight", factor, names)
    if producer is None:
        with gm.graph.inserting_after(x):
            stored = insert_attribute(gm, next(names), 1 / factor, like=x, by="smooth_quant")
        with gm.graph.inserting_before(linears[0]):
            product = emit(x, "smooth_quant", aten.mul.Tensor, x, stored)
        for linear in linears:
            linear.replace_input_with(x, product)
        return
    rows = (1 / factor).unsqueeze(-1) if producer.target in LINEAR else 1 / factor
    _scale(gm, producer, "weight", rows, names)
    if bind(producer).get("bias") is not None:
        _scale(gm, producer, "bias", 1 / factor, names)


def _scale(gm: GraphModule, node: Node, name: str, factor: Tensor, names: Iterator[str]) -> None:
    """Let a node read its parameter times a factor; the caller's parameter stays as it is."""
    old = bind(node)[name]
    value = nn.Parameter(attribute(gm, str(old.target)).detach() * factor, requires_grad=False)
    with gm.graph.inserting_before(node):
        node.replace_input_with(old, insert_attribute(gm, next(names), value, like=old, by="smooth_quant"))
