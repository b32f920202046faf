"""PerGroupMSEObserver takes, of each group's range, the part that rounds best."""

from __future__ import annotations

import torch
from torch import Tensor

from pt2e_quant.observer import PerGroupMinMaxObserver, PerGroupMSEObserver

KEYWORDS = {"group_size": 16, "quant_min": -8, "quant_max": 7, "scale_dtype": torch.bfloat16}


def error(weight: Tensor, scale: Tensor) -> Tensor:
    """Squared error of rounding, one number for each group."""
    groups = weight.reshape(*scale.shape, -1)
    steps = scale.unsqueeze(-1)
    return (torch.clamp(torch.round(groups / steps), -8, 7) * steps - groups).pow(2).sum(-1)


def scales(observer: PerGroupMinMaxObserver, weight: Tensor) -> Tensor:
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert not zero_point.any()
    assert scale.shape == (len(weight), weight.shape[1] // 16)
    return scale


def test_each_group_has_the_best_of_the_scales_that_are_tried():
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    reach = weight.reshape(5, 3, 16).abs().amax(-1)
    tried = [(2 * reach * (1 - step / 32) / 15).to(torch.bfloat16).float() for step in range(13)]
    best = torch.stack([error(weight, scale) for scale in tried]).amin(0)
    found = scales(PerGroupMSEObserver(**KEYWORDS), weight)
    torch.testing.assert_close(error(weight, found), best, rtol=1e-6, atol=0)
    assert found.to(torch.bfloat16).float().equal(found)


def test_values_on_a_grid_keep_their_grid():
    """-8..7 has its scale from 16/15 of a step where the range decides; two parts less is the step itself."""
    weight = torch.arange(-8.0, 8.0).repeat(1, 2)
    assert scales(PerGroupMSEObserver(**KEYWORDS), weight).tolist() == [[1.0, 1.0]]


def test_normal_weights_of_4_bits_lose_a_tenth_of_their_error_or_more():
    """13 % in groups of 32; the range alone serves the largest value of each group, and no other."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    whole, part = (
        error(weight, scales(kind(**KEYWORDS), weight)) for kind in (PerGroupMinMaxObserver, PerGroupMSEObserver)
    )
    assert float(part.sum()) < 0.9 * float(whole.sum())
    assert bool((part <= whole).all())
