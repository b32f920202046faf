"""on_grid gives the bits of torch's kernels, values and gradients, in every layout, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pt2e_quant.fake_quantize.rounding import on_grid

SCALE, ZERO_POINT = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)
BOUNDS = (-128, 127)  # from -2.62 to 2.48: some of normal random numbers lie outside
BIG = (5, 8, 31, 67)  # more than one part, the last of another size


def layouts() -> dict[str, Tensor]:
    x = torch.randn(BIG)
    return {
        "contiguous": x, "channels last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(1, 3),
        "with gaps": torch.randn(5, 8, 31, 134)[..., ::2], "expanded": torch.randn(1, 8, 31, 67).expand(BIG),
        "small": x[0, 0], "a number": x[0, 0, 0, 0], "all inside": x / 4, "bfloat16": x.bfloat16(),
        "double": x.double(),
    }  # fmt: skip


def value_and_gradient(rounded: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad((rounded * torch.arange(1.0, 1 + rounded.numel()).reshape(x.shape)).sum(), x)
    return rounded.detach(), gradient


@pytest.mark.parametrize("layout", layouts())
def test_one_scale_gives_the_bits_of_the_kernel(layout):
    x = layouts()[layout].detach().requires_grad_()
    mine = value_and_gradient(on_grid(x, SCALE, ZERO_POINT, *BOUNDS), x)
    kernels = value_and_gradient(torch.fake_quantize_per_tensor_affine(x, SCALE, ZERO_POINT, *BOUNDS), x)
    assert all(map(torch.equal, mine, kernels))
    assert mine[0].stride() == kernels[0].stride()


@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_scales_of_channels_give_the_bits_of_the_kernel(axis, zero):
    x = torch.randn(BIG).requires_grad_()
    scale = torch.rand(BIG[axis]) / 20 + 1e-3
    zero_point = torch.arange(BIG[axis], dtype=torch.int32).remainder(3) * zero
    mine = value_and_gradient(on_grid(x, scale, zero_point, *BOUNDS, axis), x)
    kernels = value_and_gradient(torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *BOUNDS), x)
    assert all(map(torch.equal, mine, kernels))


def test_infinity_saturates_and_nan_stays():
    x = torch.zeros(BIG)
    x[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = on_grid(x, SCALE, ZERO_POINT, *BOUNDS)[0, 0, 0, :4]
    torch.testing.assert_close(found, torch.tensor([124 * 0.02, -131 * 0.02, torch.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("axis", [None, 1])
def test_what_is_compiled_gives_the_bits_of_the_kernel(monkeypatch, axis):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(BIG)
    x[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).min])
    x.requires_grad_()
    qparams = (SCALE, ZERO_POINT) if axis is None else (SCALE.repeat(BIG[axis]), ZERO_POINT.repeat(BIG[axis]))
    mine = value_and_gradient(on_grid(x, *qparams, *BOUNDS, axis), x)
    kernels = value_and_gradient(
        torch.fake_quantize_per_tensor_affine(x.clamp(-1e6, 1e6), SCALE, ZERO_POINT, *BOUNDS), x
    )
    assert all(map(torch.equal, mine, kernels))


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_a_model_may_write_to_what_was_rounded(factor):
    """As residual connections do: y += x. Whether a mask is kept or not."""
    x = (torch.randn(BIG) * factor).requires_grad_()
    (on_grid(x, SCALE, ZERO_POINT, *BOUNDS).add_(x)).sum().backward()
    inside = ((x / 0.02).round() + 3).clamp(*BOUNDS) == (x / 0.02).round() + 3
    assert torch.equal(x.grad, inside + 1.0)


def test_where_nothing_is_clipped_autograd_keeps_nothing():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        x = torch.randn(BIG).requires_grad_()
        on_grid(x / 4, SCALE, ZERO_POINT, *BOUNDS)
        assert kept == []
        on_grid(x, SCALE, ZERO_POINT, *BOUNDS)
        assert kept == [BIG]
