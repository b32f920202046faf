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


def test_an_outlier_is_cut_and_what_rounds_exactly_is_kept():
    exact = torch.arange(-8.0, 8.0).repeat(1, 2)
    outlier = torch.cat([torch.ones(1, 15), torch.full((1, 1), 30.0)], 1)
    observer = PerGroupMSEObserver(**KEYWORDS)
    assert float(scales(observer, exact)[0, 0]) == float(scales(PerGroupMinMaxObserver(**KEYWORDS), exact)[0, 0])
    cut = scales(PerGroupMSEObserver(**KEYWORDS), outlier)
    assert float(error(outlier, cut)) < float(error(outlier, scales(PerGroupMinMaxObserver(**KEYWORDS), outlier)))
