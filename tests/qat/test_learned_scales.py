"""Scales that are parameters (LSQ, LSQ+), as a configuration that any quantizer takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import (
    check_converted,
    convert_pt2e,
    disable_range_learning,
    enable_range_learning,
    prepare_qat_pt2e,
)
from pt2e_quant.errors import TargetingError
from pt2e_quant.fake_quantize import LearnableFakeQuantize, LearnablePerGroupFakeQuantize
from pt2e_quant.observer import PerGroupMSEObserver
from pt2e_quant.qparams import fake_quantize
from pt2e_quant.quantizer import with_learned_scales
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import STATIC, Toy
from tests.qat.kit import images, settle, sgd


def xnnpack(per_channel: bool) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(with_learned_scales(get_symmetric_quantization_config(per_channel)))


def x86() -> X86InductorQuantizer:
    config = with_learned_scales(get_default_x86_inductor_quantization_config(), learn_zero_points=False)
    return X86InductorQuantizer().set_global(config)


def learned(graph: GraphModule) -> dict[str, LearnableFakeQuantize]:
    return {name: module for name, module in graph.named_modules() if isinstance(module, LearnableFakeQuantize)}


def scales(graph: GraphModule) -> dict[str, torch.Tensor]:
    return {name: module.scale.detach().clone() for name, module in learned(graph).items()}


def moved(graph: GraphModule, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, scale in scales(graph).items() if not torch.equal(scale, before[name])}


@pytest.mark.parametrize(
    "make",
    [lambda: xnnpack(False), lambda: xnnpack(True), x86, lambda: Toy().set_global(with_learned_scales(STATIC))],
    ids=["per tensor", "per channel", "x86, scales alone", "toy"],
)
def test_learned_scales_train_and_convert_to_the_grid_that_they_trained(make):
    x = images(1, 4, 3, 16, 16)
    graph = prepare_qat_pt2e(export(ConvNet(), x, train=True), make())
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.02)  # before any data: the parameters stay the same objects
    graph(x)
    before = scales(graph)
    count = enable_range_learning(graph)
    assert count == len(before) > 0
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (graph(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert moved(graph, before) == {*before}
    check_converted(graph.eval(), convert_pt2e(graph), [x, images(2, 4, 3, 16, 16)])


def test_scales_of_weights_have_their_shapes_before_any_data():
    """For DDP and FSDP, which take parameters as they find them."""
    graph = prepare_qat_pt2e(export(ConvNet(), images(1, 4, 3, 16, 16)), xnnpack(True))
    shapes = [tuple(parameter.shape) for parameter in graph.parameters() if parameter.dim() == 1]
    found = [tuple(module.scale.shape) for module in learned(graph).values()]
    assert {(12,), (5,)} <= set(found)  # channels of the convolutions, and of the linear
    graph(images(2, 4, 3, 16, 16))
    assert [tuple(parameter.shape) for parameter in graph.parameters() if parameter.dim() == 1] == shapes


def test_lsq_keeps_the_zero_points_that_lsq_plus_trains():
    x = images(1, 4, 3, 16, 16)
    for learn, expected in ((True, True), (False, False)):
        config = with_learned_scales(get_symmetric_quantization_config(), learn_zero_points=learn)
        graph = prepare_qat_pt2e(export(ConvNet(), x), XNNPACKQuantizer().set_global(config))
        graph(x)
        enable_range_learning(graph)
        graph(x).square().sum().backward()
        assert any(module.zero_point.grad is not None for module in learned(graph).values()) is expected


def test_scales_follow_data_until_they_learn_and_stay_once_that_ends():
    x = images(1, 4, 3, 16, 16)
    graph = prepare_qat_pt2e(export(ConvNet(), x), xnnpack(True)).train()
    graph(x).sum().backward()
    assert all(module.scale.grad is None for module in learned(graph).values())
    enable_range_learning(graph)
    disable_range_learning(graph)
    before = scales(graph)
    resumed = copy.deepcopy(graph)
    resumed.load_state_dict(graph.state_dict())
    for module in learned(resumed).values():
        module.scale.requires_grad_(True)  # as in a model that was prepared anew: it is in no checkpoint
    for model in (graph, resumed):
        sgd(model, [x] * 2)
        assert moved(model, before) == set()


def test_a_model_without_learned_scales_cannot_learn_them():
    graph = prepare_qat_pt2e(
        export(MLP(), images(1, 4, 10)), XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True))
    )
    with pytest.raises(TargetingError, match="with_learned_scales"):
        enable_range_learning(graph)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_the_scale_of_a_group_gets_the_gradient_of_lsq():
    """Esser et al. 2020, eq. 3, group by group: v = 1.2, 9 (beyond 7) and -2.4, 0.6 with scales 0.5 and 0.25."""
    fake = LearnablePerGroupFakeQuantize(group_size=2, dtype=torch.int8, qscheme=torch.per_channel_symmetric)
    fake(torch.ones(1, 4))
    fake.enable_range_learning()
    fake.scale.data = torch.tensor([[0.5, 0.25]])
    w = torch.tensor([[0.6, 4.5, -0.6, 0.15]], requires_grad=True)
    out = fake(w)
    torch.testing.assert_close(out, torch.tensor([[0.5, 3.5, -0.5, 0.25]]))
    out.sum().backward()
    torch.testing.assert_close(fake.scale.grad, torch.tensor([[(1 - 1.2) + 7, (-2 + 2.4) + (1 - 0.6)]]))
    torch.testing.assert_close(w.grad, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))


def test_learned_scales_of_groups_round_as_the_backend_stores_them():
    """XNNPACK keeps them in bfloat16, of which a step is 2 ** -8 of a value between 1 and 2; training moves less."""
    fake = LearnablePerGroupFakeQuantize(PerGroupMSEObserver, group_size=32, scale_dtype=torch.bfloat16)
    w = images(1, 3, 64)
    fake(w)
    fake.enable_range_learning()
    with torch.no_grad():
        fake.scale.fill_(1.0 + 2**-10)
    scale, zero_point = fake.calculate_qparams()
    assert torch.equal(scale, torch.ones(3, 2))
    assert torch.equal(fake(w).detach(), fake_quantize(w, scale, zero_point, -8, 7, group_size=32))
    fake(w).sum().backward()
    assert fake.scale.grad.shape == (3, 2)


@pytest.mark.parametrize(
    ("model", "x", "make"),
    [
        (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), images(1, 6, 64),
         lambda: XNNPACKQuantizer().set_global(with_learned_scales(get_8da4w_config()))),
        (nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 8)), torch.arange(12).reshape(3, 4),
         lambda: EmbeddingQuantizer(with_learned_scales(get_embedding_config(4, 32)))),
    ],
    ids=["linear", "embedding"],
)  # fmt: skip
def test_weights_in_groups_learn_their_scales(model, x, make):
    graph = prepare_qat_pt2e(export(model, x, train=True), make())
    graph(x)
    before = scales(graph)
    enable_range_learning(graph)
    sgd(graph, [x] * 3)
    assert before
    assert moved(graph, before) == {*before}
    assert {type(module) for module in learned(graph).values()} == {LearnablePerGroupFakeQuantize}
    check_converted(settle(graph), convert_pt2e(graph), [x])
