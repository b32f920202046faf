"""Training configurations, data and loops that the tests of QAT share. Bounds and literals are nobody's default."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import disable_observer, prepare_qat_pt2e
from pt2e_quant.quantizer import for_training, op, rule
from tests.nets import export
from tests.pt2e.kit import INPUT, OUTPUT, STATIC, WEIGHT, Toy

__all__ = ["TRAINED", "AllConvs", "images", "prepared", "settle", "sgd"]

aten = torch.ops.aten

TRAINED = for_training(STATIC, averaging_constant=0.2)
"""int8 with bounds that are nobody's; per channel weights."""

conv = op(
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding, aten.linear.default,
)  # fmt: skip
transposed = op(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
relu = op(aten.relu.default, aten.relu_.default)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def conv_relu(x, w, b):
    return relu(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT)
def transposed_only(x, w, b):
    return transposed(x, w, b)


class AllConvs(Toy):
    """A backend that takes every layer that a batch norm can be folded into."""

    rules = (conv_relu, conv_only, transposed_only)


def prepared(model: nn.Module, *inputs: Tensor, train: bool = False, **kwargs: object) -> GraphModule:
    return prepare_qat_pt2e(export(model, *inputs, train=train, **kwargs), AllConvs().set_global(TRAINED))


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module, batches: list[Tensor], lr: float = 0.05) -> list[float]:
    """The losses of one step on each batch, towards an output of ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def settle(model: GraphModule) -> GraphModule:
    """The end of training: evaluation, with ranges as they are."""
    disable_observer(model)
    return model.eval()
