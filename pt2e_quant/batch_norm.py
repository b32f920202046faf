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

On tensors these functions compute, on symbols of `graph.write` they insert nodes. After this: `nn.intrinsic.qat` has it
in modules, `pt2e.qat.batch_norm` in graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .graph.write import call

__all__ = ["by_channel", "gamma_over_sigma"]

aten = torch.ops.aten


def gamma_over_sigma(gamma: Any, running_var: Any, eps: float) -> Any:
    """What folding multiplies each output channel with; 1 where gamma is 0, so that a division undoes it there too."""
    variance = running_var + eps
    sigma = call(aten.sqrt.default, variance)
    scale = sigma / variance if gamma is None else gamma / sigma
    return call(aten.where.ScalarSelf, call(aten.eq.Scalar, scale, 0), 1.0, scale)


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
