"""The formula of batch norm in training: a layer is rounded as it will be once the batch norm after it is folded in.

With scale = gamma / sqrt(running_var + eps), one value per output channel:

    batch_norm(layer(x, fake_quantize(weight * scale) / scale, bias))

What is rounded is the weight that will be stored, with the scale of the running statistics, which move little from
batch to batch; the division undoes that scale, so that the batch's own statistics train as in the float model
(Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv:1806.08342,
section 3.2.2; Jacob et al., arXiv:1712.05877, section 3.2). They divide the output of the layer, and so do our modules,
whose losses are the reference's to the bit. The layer is linear, so the same but for float rounding comes of dividing
its weight, which is smaller, and autograd need not keep the output twice: so graphs do. In evaluation this is the
folded layer, but for float rounding.

The scale is one operator, `pt2e_quant::gamma_over_sigma`. Written as several, compilers keep the running variance for
backward, and compute the rest from it there: by then the batch norm has moved it.

On tensors these functions compute, on symbols of `graph.write` they insert nodes. After this: `nn.intrinsic.qat` has it
in modules, `pt2e.qat.batch_norm` in graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .graph.write import call

__all__ = ["by_channel", "gamma_over_sigma"]

aten = torch.ops.aten

_LIBRARY = Library("pt2e_quant", "FRAGMENT")
_LIBRARY.define("gamma_over_sigma(Tensor? gamma, Tensor running_var, float eps, float at_zero=1.) -> Tensor")


def gamma_over_sigma(gamma: Any, running_var: Any, eps: float) -> Any:
    """What folding multiplies each output channel with; 1 where gamma is 0, so that a division undoes it there too."""
    both = call(torch.ops.pt2e_quant.gamma_over_sigma.default, gamma, running_var, eps)
    return call(aten.select.int, both, 0, 0)


@torch.library.impl(_LIBRARY, "gamma_over_sigma", "CompositeExplicitAutograd")
def _scale_and_sigma(gamma: Tensor | None, running_var: Tensor, eps: float, at_zero: float = 1.0) -> Tensor:
    """Two rows: the scale, `at_zero` where it is 0; and sigma, of which backward has need."""
    variance = running_var + eps
    sigma = variance.sqrt()
    scale = sigma / variance if gamma is None else gamma / sigma
    return torch.stack((torch.where(scale == 0, at_zero, scale), sigma))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
    """Of gamma alone: running statistics are not trained, and sigma is read by nothing else."""
    gamma, (_, sigma) = ctx.saved_tensors
    return None if gamma is None else torch.where(gamma == 0, 0.0, gradient[0] / sigma), None, None, None


torch.library.register_autograd("pt2e_quant::gamma_over_sigma", _gradient, setup_context=_keep, lib=_LIBRARY)


def by_channel(operation: Callable[[Any, Any], Any], weight: Any, scale: Any, groups: int | None) -> Any:
    """operation(weight, scale) by output channel.

    `groups` is given for a transposed convolution, whose weight is (in, out / groups, *kernel); all others have the
    output channels in dimension 0.
    """
    inputs, outputs, *kernel = weight.shape
    if groups is None:
        return operation(weight, scale.reshape([-1, 1, *[1] * len(kernel)]))
    per_group = weight.reshape([groups, inputs // groups, outputs, *kernel])
    factor = scale.reshape([groups, 1, outputs, *[1] * len(kernel)])
    return operation(per_group, factor).reshape([inputs, outputs, *kernel])
