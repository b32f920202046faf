"""Fake quantizers on anything: 0, infinity, NaN, the largest and the smallest numbers, scalars, nothing, constants.

Never an error of a kernel, never qparams that no grid has, never memory that grows; masks are left out with one named
warning, and NaN is an error of ours that leaves the state as it was.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pt2e_quant import qparams
from pt2e_quant.errors import CalibrationError, CalibrationWarning, SpecError
from pt2e_quant.fake_quantize import (
    FakeQuantize,
    LearnableFakeQuantize,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
)
from pt2e_quant.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from pt2e_quant.schemes import Scheme, SchemeFakeQuantize

CHANNELS = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "ch_axis": -1}
MAKERS = {
    "per tensor": lambda: FakeQuantize(MinMaxObserver, quant_min=-8, quant_max=7, dtype=torch.int8),
    "histogram": lambda: FakeQuantize(HistogramObserver.with_args(bins=64), dtype=torch.int8),
    "per channel": lambda: FakeQuantize(PerChannelMinMaxObserver, quant_min=-127, quant_max=127, **CHANNELS),
    "weight": default_weight_fake_quant,
    "dynamic": default_dynamic_fake_quant,
    "embedding": default_embedding_fake_quant,
    "fixed": default_fixed_qparams_range_0to1_fake_quant,
    "fused": default_fused_act_fake_quant,
    "fused channels": default_fused_per_channel_wt_fake_quant,
    "fused narrow": fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    "learnable": lambda: LearnableFakeQuantize(MinMaxObserver, dtype=torch.quint8),
    "learnable channels": lambda: LearnableFakeQuantize(PerChannelMinMaxObserver, -127, 127, **CHANNELS),
    "float8": lambda: SchemeFakeQuantize(Scheme(dtype="float8_e4m3fn")),
    "tokens": lambda: SchemeFakeQuantize(Scheme(dtype="int8", granularity="token", timing="dynamic")),
    "groups": lambda: SchemeFakeQuantize(Scheme(dtype="int4", granularity="group", timing="weight_only", group_size=2)),
}
NASTY = [0.0, -0.0, 1.0, -3.7, 1e-45, -1e-38, 6e4, 1e30, -3.3e38, 3.4028234663852886e38, -3.4028234663852886e38]
BEYOND = [float("inf"), -float("inf"), float("nan")]
SHAPES = [(), (1,), (0,), (4,), (3, 4), (2, 3, 4), (0, 4), (1, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def batches(draw: st.DrawFn) -> list[Tensor]:
    """Up to four tensors, of one shape or of several, constant ones among them."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
        value = st.sampled_from(NASTY + BEYOND) if draw(st.booleans()) else st.floats(-5, 5, width=32)
        count = torch.Size(shape).numel()
        values = [draw(value)] * count if draw(st.booleans()) else [draw(value) for _ in range(count)]
        made.append(torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype))
    return made


def state(module: torch.nn.Module) -> dict[str, list]:
    return {key: torch.nan_to_num(tensor.float()).tolist() for key, tensor in module.state_dict().items()}


def check_qparams(fake: torch.nn.Module) -> None:
    if not fake.has_data or (isinstance(fake, SchemeFakeQuantize) and not fake.scale.numel()):
        return
    scale, zero_point = (tensor.detach().to(torch.float64) for tensor in fake.calculate_qparams())
    assert bool((scale.isfinite() & (scale > 0) & zero_point.isfinite()).all())
    if fake.qscheme is not torch.per_channel_affine_float_qparams:
        assert bool(((zero_point >= min(fake.quant_min, 0)) & (zero_point <= fake.quant_max)).all())


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25)
@given(data=batches())
@example(data=[torch.zeros(3, 4), torch.full((3, 4), float("inf")), torch.tensor([[1.0, -3.4e38, 2.0, float("nan")]])])
def test_anything_is_rounded_or_refused_in_our_words(kind, data):
    fake = MAKERS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in data:
            before = state(fake)
            try:
                out = fake(x)
            except (CalibrationError, SpecError):
                assert state(fake) == before
                continue
            assert (out.shape, out.dtype) == (x.shape, x.dtype)
            check_qparams(fake)
    assert {warning.category for warning in caught} <= {CalibrationWarning}
    assert len(caught) <= 1


@pytest.mark.parametrize("kind", ["per tensor", "per channel", "weight", "fused", "fused channels"])
@settings(max_examples=25)
@given(values=st.lists(st.sampled_from(NASTY[:9]), min_size=8, max_size=8), dtype=st.sampled_from(DTYPES[:3]))
def test_what_comes_out_is_what_the_ops_make_of_it(kind, values, dtype):
    """Bit for bit, from denormal numbers to 1e38: the kernels for training and the arithmetic of convert are one."""
    fake, x = MAKERS[kind](), torch.tensor(values).clamp(-6e4, 6e4).to(dtype).reshape(2, 4)
    out = fake(x)
    axis = fake.ch_axis if fake.is_per_channel else None
    scale, zero_point = fake.calculate_qparams()
    grid = qparams.fake_quantize(x, scale, zero_point, fake.quant_min, fake.quant_max, axis=axis)
    assert torch.equal(out, grid)


@pytest.mark.parametrize("kind", MAKERS)
def test_memory_does_not_grow_with_batches(kind):
    fake = MAKERS[kind]()
    sizes = []
    for number in range(60):
        fake(torch.randn(4, 4) * (1 + number % 7))
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in fake.state_dict().values()))
    assert sizes[-1] == sizes[1]
    attributes = [value for module in fake.modules() for value in vars(module).values()]
    assert not any(isinstance(value, (list, Tensor)) and len(value) > 4 for value in attributes if value is not fake)
