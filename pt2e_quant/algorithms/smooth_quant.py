"""SmoothQuant: move the outliers of activations into weights, where a scale for each channel takes them.

x @ W.T = (x / s) @ (W * s).T for any s > 0, one for each input channel. With s = max|x|^alpha / max|W|^(1 - alpha) both
become easy to quantize (Xiao et al., SmoothQuant, ICML 2023, arXiv:2211.10438, equation 4). The division is folded into
what produced x where the algebra allows (`folds`): the weight of a norm, or the rows of a linear; elsewhere it
stays as one product with a vector. Comes before prepare: a float graph goes in, a float graph with the same outputs
comes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind, set_argument
from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import attribute, free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import ExportedModule, clone, finish, tidy
from ..graph.write import Writer
from ..passes.private_copy import private_copy
from ..qparams import affine_qparams, fake_quantize
from .calibrated import Batches, constant_linears, inputs_of, rounded_weight
from .folds import Fold, Place, find_fold

__all__ = ["ALPHAS", "Choice", "Inputs", "Smoothed", "fold_factors", "largest_of_equals", "smooth_quant"]

aten = torch.ops.aten
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
        reason: why nothing was folded, or nothing was done at all; None where the division was folded.
    """

    input: str
    linears: tuple[str, ...]
    alpha: float
    folded_into: str | None
    gain: float
    reason: str | None = None

    def __str__(self) -> str:
        done = f"alpha {self.alpha}, error divided by {self.gain:.1f}" if self.alpha else "left alone"
        where = f", folded into {self.folded_into}" if self.folded_into else ""
        return f"{', '.join(self.linears)}: {done}{where}{f' ({self.reason})' if self.reason else ''}"


@checked(CaptureError)
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
        products: insert one product with a vector where the division cannot be folded. False leaves such groups alone:
            take it with a quantizer that rounds products too, as XNNPACK's static recipe does. That rounds the outliers
            before they are divided, and the vector to 8 bits, which costs more than smoothing gains.

    Returns:
        The smoothed graph, to be prepared like the original, and what was done to each group.

    Raises:
        CalibrationError: there is no batch.
    """

    def choose(linears: list[Node], inputs: Inputs, weights: list[Tensor], sharing: Tensor | None) -> Choice:
        return _best(inputs.peaks, inputs.rows, weights, alphas, sharing)

    return fold_factors(model, batches, choose, products=products)


class Inputs(NamedTuple):
    """What some linears read: the largest magnitude of each channel, and a sample of rows."""

    peaks: Tensor
    rows: Tensor


Choice = tuple[float, float, Tensor | None]
"""(alpha, gain, s) of a group of linears; (0.0, 1.0, None) when no candidate helps."""
Choose = Callable[[list[Node], Inputs, list[Tensor], "Tensor | None"], Choice]
"""From linears that read one tensor, that, their weights, and numbers of rows, where equal ones share a factor."""


def fold_factors(
    model: ExportedProgram | GraphModule, batches: Batches, choose: Choose, *, products: bool
) -> tuple[ExportedModule, list[Smoothed]]:
    """Divide the input of each group of linears by the factors that `choose` has for it; see `smooth_quant`."""
    gm = private_copy(model)
    constants = Constants(gm)
    groups: dict[Node, list[Node]] = defaultdict(list)
    for linear in constant_linears(gm, constants):
        groups[bind(linear)["input"]].append(linear)
    peaks, rows = inputs_of(finish(clone(gm)), batches)
    done = []
    names = free_name(gm, "_smooth_")
    for x, linears in groups.items():
        weights = [constants.value(bind(linear)["weight"]) for linear in linears]
        fold = find_fold(x, linears)
        reason = fold if isinstance(fold, str) else None
        rows_of = None if isinstance(fold, str) else fold.rows
        alpha, gain, factor = 0.0, 1.0, None
        if any(len(bind(linear)["weight"].users) > 1 for linear in linears):
            reason = "other operators read the weight too"
        elif reason is None or products:
            inputs = Inputs(peaks[x.name], rows[x.name])
            alpha, gain, factor = choose(linears, inputs, weights, rows_of)
            reason = reason if factor is not None else "no alpha lowers the error"
        if factor is not None:
            _apply(gm, x, linears, fold, factor, names)
        folded = fold.producer.name if factor is not None and not isinstance(fold, str) else None
        done.append(Smoothed(x.name, tuple(linear.name for linear in linears), alpha, folded, gain, reason))
    return finish(tidy(gm)), done  # type: ignore[arg-type]  # tidy returns what it was given


def _best(
    peaks: Tensor, rows: Tensor, weights: list[Tensor], alphas: Sequence[float], sharing: Tensor | None
) -> Choice:
    """The candidate with the smallest error.

    Channels with the same number in `sharing` get one factor: they come from one row, which was repeated.
    """
    weight = torch.cat(weights)
    reach = weight.abs().amax(0)
    if sharing is not None:
        peaks, reach = (largest_of_equals(values, sharing) for values in (peaks, reach))
    exact = rows @ weight.T
    base = _error(rows, weight, exact)
    best: Choice = (0.0, 1.0, None)
    for alpha in alphas:
        factor = peaks.clamp_min(1e-5) ** alpha / reach.clamp_min(1e-5) ** (1 - alpha)
        factor = (factor / factor.log().mean().exp()).clamp(1e-3, 1e3)
        gain = base / max(_error(rows / factor, weight * factor, exact), 1e-30)
        if alpha > 0 and gain > max(best[1], 1.02):
            best = alpha, gain, factor
    return best


def largest_of_equals(values: Tensor, numbers: Tensor) -> Tensor:
    """Of each channel, the largest value of those with the same number."""
    largest = values.new_zeros(int(numbers.max()) + 1).scatter_reduce(0, numbers, values, "amax")
    return largest[numbers]


def _error(rows: Tensor, weight: Tensor, exact: Tensor) -> float:
    scale, zero_point = affine_qparams(rows.amin(), rows.amax(), -128, 127, dtype=torch.int8)
    rounded = fake_quantize(rows, float(scale), int(zero_point), -128, 127)
    return float((rounded @ rounded_weight(weight).T - exact).pow(2).mean())


def _apply(
    gm: GraphModule, x: Node, linears: list[Node], fold: Fold | str, factor: Tensor, names: Iterator[str]
) -> None:
    for linear in linears:
        _scale(gm, linear, "weight", factor, names)
    if isinstance(fold, Fold):
        for place in fold.places:
            _divide(gm, place, factor, names)
        return
    with gm.graph.inserting_after(x):
        stored = insert_attribute(gm, next(names), 1 / factor, like=x, by="smooth_quant")
    write = Writer(gm, "smooth_quant")
    with write.before(linears[0], like=x):
        product = write(x) * write(stored)
    for linear in linears:
        linear.replace_input_with(x, product.node)


def _divide(gm: GraphModule, place: Place, factor: Tensor, names: Iterator[str]) -> None:
    old = bind(place.node)[place.name]
    if old is None:
        width = int(place.node.meta["val"].shape[-1])
        divisor = torch.ones(width).index_put_((place.rows,), factor)
        value = nn.Parameter(1 / divisor, requires_grad=False)
        with gm.graph.inserting_before(place.node):
            new = insert_attribute(gm, next(names), value, like=place.node, by="smooth_quant")
        set_argument(place.node, place.name, new)
        return
    shape = old.meta["val"].shape
    divisor = torch.ones(int(shape[0])).index_put_((place.rows,), factor)
    _scale(gm, place.node, place.name, (1 / divisor).reshape(-1, *[1] * (len(shape) - 1)), names)


def _scale(gm: GraphModule, node: Node, name: str, factor: Tensor, names: Iterator[str]) -> None:
    """Let a node read its parameter times a factor; the caller's parameter stays as it is."""
    old = bind(node)[name]
    value = nn.Parameter(attribute(gm, str(old.target)).detach() * factor, requires_grad=False)
    with gm.graph.inserting_before(node):
        node.replace_input_with(old, insert_attribute(gm, next(names), value, like=old, by="smooth_quant"))
