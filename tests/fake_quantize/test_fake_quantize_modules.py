"""What fake quantizers do beyond the reference: errors, switches that count, one grid for training and convert."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pt2e_quant import qparams
from pt2e_quant.errors import CalibrationError, CalibrationWarning, SpecError, TargetingError
from pt2e_quant.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    default_embedding_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_weight_fake_quant,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    toggle_fake_quantizers,
)
from pt2e_quant.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

INT8 = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}
PER_CHANNEL = {"observer": PerChannelMinMaxObserver, **INT8, "qscheme": torch.per_channel_symmetric}


def test_values_are_rounded_by_hand_arithmetic():
    fake = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    out = fake(torch.tensor([-12.75, 0.0, 12.74, 0.06]))  # scale 25.49 / 255 ~ 0.1, zero point 128
    assert (fake.zero_point.item(), fake.scale.item()) == (128, pytest.approx(25.49 / 255))
    assert [round(value / fake.scale.item()) for value in out.tolist()] == [-128, 0, 127, 1]


def test_the_gradient_passes_inside_the_range_only():
    fake = FakeQuantize(MinMaxObserver, **INT8, qscheme=torch.per_tensor_symmetric)
    fake(torch.tensor([-12.7, 12.7]))
    fake.disable_observer()
    x = torch.tensor([0.33, -13.5, 12.0, 14.0], requires_grad=True)
    (fake(x) * torch.tensor([2.0, 3.0, 5.0, 7.0])).sum().backward()
    assert x.grad.tolist() == [2.0, 0.0, 5.0, 0.0]


def test_one_bound_alone_is_honoured():
    assert FakeQuantize(MinMaxObserver, quant_min=-7, dtype=torch.int8).quant_min == -7


def test_a_negative_axis_counts_from_the_end():
    fake = FakeQuantize(**PER_CHANNEL, ch_axis=-1)
    assert torch.equal(fake(torch.tensor([[1.27, 12.7], [0.02, 0.2]])), torch.tensor([[1.27, 12.7], [0.02, 0.2]]))
    assert fake.scale.shape == (2,)


# --- switches ---------------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A fake quantizer of somebody else: no common base class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1]))
        self.register_buffer("observer_enabled", torch.tensor([1]))

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self.fake_quant_enabled[0] = int(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        self.observer_enabled[0] = int(enabled)


def switches(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (module.fake_quant_enabled.item(), module.observer_enabled.item())
        for module in model.modules()
        if hasattr(module, "fake_quant_enabled")
    ]


def nest() -> nn.Module:
    shared = FakeQuantize()
    return nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(default_fused_act_fake_quant(), Foreign()), shared)


def test_one_call_switches_all_and_counts_them():
    model = nest()
    assert toggle_fake_quantizers(model, fake_quant=False) == 3  # a shared one is one
    assert switches(model) == [(0, 1)] * 3
    assert toggle_fake_quantizers(model, fake_quant=True, observer=False) == 3
    assert switches(model) == [(1, 0)] * 3
    assert toggle_fake_quantizers(FakeQuantize(), observer=False) == 1


def test_switching_nothing_is_an_error():
    with pytest.raises(TargetingError, match="Sequential holds no fake quantizer"):
        toggle_fake_quantizers(nn.Sequential(nn.Linear(2, 2), MinMaxObserver()), fake_quant=False)


def test_apply_switches_as_in_the_reference():
    model = nest()
    for function, expected in (
        (disable_fake_quant, (0, 1)),
        (disable_observer, (0, 0)),
        (enable_fake_quant, (1, 0)),
        (enable_observer, (1, 1)),
    ):
        model.apply(function)
        assert switches(model) == [expected] * 3


def test_a_learnable_one_rests_its_observer_through_the_same_switch():
    fake = LearnableFakeQuantize(MinMaxObserver, **INT8)
    toggle_fake_quantizers(fake, observer=False)
    assert fake.static_enabled.item() == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FakeQuantize(PlaceholderObserver, dtype=torch.float16),
            "no quant_min, quant_max, so there is no grid",
        ),
        (lambda: FakeQuantize(MinMaxObserver()), "is MinMaxObserver, an object"),
        (lambda: FakeQuantize(MinMaxObserver, dtype=torch.int8, quant_max=200), r"is not a range of torch\.int8"),
        (lambda: FixedQParamsFakeQuantize(MinMaxObserver), "takes its qparams from a FixedQParamsObserver"),
        (lambda: FusedMovingAvgObsFakeQuantize(HistogramObserver), "got HistogramObserver"),
        (lambda: FusedMovingAvgObsFakeQuantize(dtype=torch.int8), r"\[0, 255\] is not a range"),
        (
            lambda: FusedMovingAvgObsFakeQuantize(
                MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine_float_qparams
            ),
            "integer zero points",
        ),
        (lambda: LearnableFakeQuantize(MinMaxObserver, channel_len=0), "channel_len=0"),
        (
            lambda: LearnableFakeQuantize(MovingAverageMinMaxObserver, is_dynamic=True, averaging_constant=1),
            "is_dynamic=True",
        ),
    ],
)
def test_illegal_arguments_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: FakeQuantize(**PER_CHANNEL), default_fused_per_channel_wt_fake_quant])
def test_another_number_of_channels_is_an_error_that_names_the_site(make):
    fake = make()
    fake.site = "node conv2d_7"
    fake(torch.randn(5, 3))
    with pytest.raises(CalibrationError, match=r"node conv2d_7: saw 5 channels along dimension 0 before, and now 4"):
        fake(torch.randn(4, 3))
    fake.disable_observer()
    with pytest.raises(CalibrationError, match=r"node conv2d_7: there are scales for 5 channels along dimension 0"):
        fake(torch.randn(4, 3))
    with pytest.raises((SpecError, CalibrationError), match="node conv2d_7: "):
        fake(torch.tensor(2.0))


# --- fused ------------------------------------------------------------------------------------------------------------


def grid(fake: FakeQuantizeBase, x: torch.Tensor) -> torch.Tensor:
    """What convert makes of x: q/dq with the qparams that it asks for."""
    scale, zero_point = fake.calculate_qparams()
    bounds = fake.quant_min, fake.quant_max
    return qparams.fake_quantize(x, scale, zero_point, *bounds, axis=fake.ch_axis if fake.is_per_channel else None)


FUSED = {
    "activation": default_fused_act_fake_quant,
    "weight": default_fused_wt_fake_quant,
    "channels": default_fused_per_channel_wt_fake_quant,
    "narrow channels": fused_per_channel_wt_fake_quant_range_neg_127_to_127,
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 0.0, 3e38])
def test_the_fused_kernel_trains_on_the_grid_that_is_converted(kind, size):
    """The reference's kernel and observer differ: by 127.5 / 127, by eps, and in the zero point of zeros."""
    fake = FUSED[kind]()
    x = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)).sub(0.4).clamp(max=0.9) * size
    x[2] = 0.0  # a dead channel
    assert torch.equal(fake(x), grid(fake, x))
    scale, zero_point = fake.calculate_qparams()
    assert bool((scale >= fake.activation_post_process.eps).all())
    assert bool(scale.isfinite().all())
    if fake.is_symmetric_quant:
        assert zero_point.unique().tolist() == [0]


@pytest.mark.parametrize("kind", FUSED)
def test_a_batch_with_nan_is_refused_and_leaves_no_trace(kind):
    fake, x = FUSED[kind](), torch.linspace(-2, 3, 24).reshape(4, 6)
    bad = x.clone().index_fill_(1, torch.tensor([3]), float("nan"))
    fresh = {key: tensor.tolist() for key, tensor in fake.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"4 NaN among 24 values .* None of this batch was recorded"):
        fake(bad)
    assert {key: tensor.tolist() for key, tensor in fake.state_dict().items()} == fresh
    fake(x)
    kept = copy.deepcopy(fake.state_dict())
    with pytest.raises(CalibrationError, match="4 NaN"):
        fake(bad)
    for key, tensor in fake.state_dict().items():
        assert torch.equal(tensor, kept[key])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask", [float("inf"), -float("inf"), torch.finfo(torch.float32).min, "finfo.max of half"])
@pytest.mark.parametrize("kind", FUSED)
def test_masks_are_left_out_with_one_warning(kind, mask, first):
    """The range is that of the other values, as in the observer; masks saturate."""
    fake, x = FUSED[kind](), torch.linspace(-2, 3, 24).reshape(4, 6)
    x, mask = (x.half(), 65504.0) if isinstance(mask, str) else (x, mask)
    observer = copy.deepcopy(fake.activation_post_process)
    batches = [x / 2, x.clone().index_fill_(1, torch.tensor([3]), mask)][1 if first else 0 :]
    for batch in batches[:-1]:
        fake(batch)
        observer(batch)
    with pytest.warns(CalibrationWarning, match=r"4 of 24 values .* left out of the range"):
        out = fake(batches[-1])
    with pytest.warns(CalibrationWarning):
        observer(batches[-1])
    torch.testing.assert_close(fake.activation_post_process.min_val, observer.min_val)
    torch.testing.assert_close(fake.activation_post_process.max_val, observer.max_val)
    assert torch.equal(out, grid(fake, batches[-1]))
    fake(batches[-1])  # no second warning


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", FUSED)
def test_other_dtypes_than_float32_work_and_come_back(kind, dtype):
    fake = FUSED[kind]()
    out = fake(torch.randn(3, 8, dtype=dtype))
    assert out.dtype is dtype


def test_the_fused_one_compiles_into_one_graph():
    fake = default_fused_act_fake_quant()
    compiled = torch.compile(copy.deepcopy(fake), backend="eager", fullgraph=True)
    x = torch.linspace(-2, 5, 40)
    assert torch.equal(compiled(x), fake(x))


# --- learnable --------------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_any_data_trains_scale_and_zero_point():
    fake = LearnableFakeQuantize(
        PerChannelMinMaxObserver, 0, 15, dtype=torch.uint8, qscheme=torch.per_channel_affine, ch_axis=0
    )
    optimizer = torch.optim.Adam(fake.parameters(), lr=1e-2)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    fake(x)
    fake.enable_param_learning()
    start = [parameter.detach().clone() for parameter in fake.parameters()]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (fake(x) - x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [tuple(parameter.shape) for parameter in fake.parameters()] == [(3,), (3,)]
    assert all(not torch.equal(new, old) for new, old in zip(fake.parameters(), start, strict=True))
    assert losses[-1] < losses[0]


def test_the_gradient_of_the_scale_is_that_of_lsq():
    """Esser et al. 2020, eq. 3: round(v) - v inside, the bound outside; times 1 / sqrt(N Qp)."""
    fake = LearnableFakeQuantize(
        MinMaxObserver, **INT8 | {"quant_max": 7, "quant_min": -8}, qscheme=torch.per_tensor_symmetric, scale=0.5,
        use_grad_scaling=True,
    )  # fmt: skip
    fake.enable_param_learning()
    x = torch.tensor([0.6, 1.1, 9.0, -9.0])  # v = 1.2, 2.2, 18, -18
    fake(x).sum().backward()
    assert fake.scale.grad.item() == pytest.approx((-0.2 - 0.2 + 7 - 8) / (4 * 7) ** 0.5, rel=1e-5)  # float32
    assert fake.zero_point.grad is None


def test_learned_qparams_that_a_step_made_illegal_are_put_right():
    fake = LearnableFakeQuantize(MinMaxObserver, **INT8, qscheme=torch.per_tensor_symmetric)
    fake.enable_param_learning()
    fake.scale.data.fill_(-0.3)
    fake.zero_point.data.fill_(2.0)
    scale, zero_point = fake.calculate_qparams()
    assert (scale.item(), zero_point.item(), zero_point.dtype) == (2**-23, 0, torch.int64)


def test_learning_and_convert_share_one_grid():
    fake = LearnableFakeQuantize(MovingAverageMinMaxObserver, 0, 255, dtype=torch.uint8, scale=0.11, zero_point=19.4)
    fake.enable_param_learning()
    x = torch.linspace(-4, 26, 301)
    assert torch.equal(fake(x).detach(), grid(fake, x))


def test_the_three_phases_of_learning():
    fake = LearnableFakeQuantize(MinMaxObserver, dtype=torch.quint8)
    x = torch.tensor([-1.3, 2.5])
    assert torch.equal(fake.enable_static_observation()(x), x)
    assert fake.scale.item() == pytest.approx(3.8 / 255)
    assert not torch.equal(fake.enable_static_estimate()(x * 3), x * 3)
    assert fake.scale.item() == pytest.approx(3 * 3.8 / 255)
    fake.enable_param_learning()(x * 50)
    assert fake.scale.item() == pytest.approx(3 * 3.8 / 255)


# --- values that travel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: FakeQuantize(**PER_CHANNEL),
        default_weight_fake_quant,
        default_embedding_fake_quant,
        default_fused_act_fake_quant,
        lambda: FixedQParamsFakeQuantize(FixedQParamsObserver.with_args(scale=0.25, zero_point=3)),
        lambda: LearnableFakeQuantize(MinMaxObserver, **INT8),
    ],
    ids=["per channel", "weight", "embedding", "fused", "fixed", "learnable"],
)
def test_copies_and_pickles_round_alike(make):
    fake, x = make(), torch.linspace(-3, 2, 20).reshape(4, 5)
    fake(x)
    for twin in (copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        assert torch.equal(twin(x / 2), copy.deepcopy(fake)(x / 2))
        assert repr(twin) == repr(copy.deepcopy(fake)) or twin.observer_enabled[0] == 1


def test_recipes_are_values():
    assert FakeQuantize.with_args(**INT8) == FakeQuantize.with_args(**INT8)
    assert FakeQuantize.with_args(**INT8) != FakeQuantize.with_args(dtype=torch.uint8)
    made = FakeQuantize.with_args(**INT8).with_callable_args(averaging_constant=lambda: 0.2)()
    assert made.activation_post_process.averaging_constant == 0.2
    assert LearnableFakeQuantize.with_callable_args(observer=lambda: MinMaxObserver)().scale.item() == 1.0
