"""Observers on exact counts: what they count and the range they choose, against exhaustive searches and by hand."""

from __future__ import annotations

import functools
import math
import time

import pytest
import torch
from observer_data import KINDS, values
from torch import Tensor

import pt2e_quant.observer as ours
from pt2e_quant.errors import SpecError
from pt2e_quant.observer.float_bins import BINS, bin_edges, count_values, in_order
from pt2e_quant.qparams import affine_qparams, fake_quantize

DISTRIBUTION_OBSERVERS = ["MSEObserver", "LpNormObserver", "PercentileObserver", "EntropyObserver"]

SYNTHETIC = {
    "gaussian": lambda n: torch.randn(n),
    "laplace": lambda n: torch.empty(n).exponential_() * torch.randn(n).sign(),
    "relu of half a gaussian": lambda n: torch.randn(n).relu(),
    "1e-4 outliers at 100 sigma": lambda n: torch.where(
        torch.rand(n) < 1e-4, torch.randn(n).sign() * 100, torch.randn(n)
    ),
    "bimodal": lambda n: torch.randn(n) * 0.5 + torch.randn(n).sign() * 3,
    "two unequal bumps": lambda n: torch.where(torch.rand(n) < 0.4, torch.randn(n) * 0.5 - 1, torch.randn(n) * 0.5 + 6),
}
BITS = {"int8": (-128, 127), "int8 without -128": (-127, 127), "int4": (-8, 7), "int2": (-2, 1)}


@functools.cache
def sample(kind: str) -> Tensor:
    torch.manual_seed(5)
    return SYNTHETIC[kind](200_000)


def error_of(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], p: float = 2.0) -> float:
    return (fake_quantize(x, scale, zero_point, *bounds) - x).abs().pow(p).mean().item()


def exhaustive(x: Tensor, bounds: tuple[int, int], symmetric: bool) -> float:
    """Smallest squared error over a fine grid of ranges; both ends on a coarser one, then finely around the best."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    few = x[:: 20 if low < 0.0 and not symmetric else 1]

    def search(values: Tensor, lows: list[float], highs: list[float]) -> tuple[float, float, float]:
        pairs = [(-b, b) for b in highs] if symmetric else [(a, b) for a in lows for b in highs]
        return min(
            (error_of(values, *affine_qparams(a, b, *bounds, dtype=torch.int8, symmetric=symmetric), bounds), a, b)
            for a, b in pairs
        )

    if symmetric or low == 0.0:
        ends = [max(-low, high) * share / 200 for share in range(1, 201)]
        return search(few, [0.0], ends)[0]
    shares = [0.82**power for power in range(24)]
    _, a, b = search(few, [low * share for share in shares], [high * share for share in shares])
    close = [0.92 + 0.02 * step for step in range(9)]
    return search(x, [a * share for share in close], [b * share for share in close])[0]


def counted(x: Tensor) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    count_values(x, counts)
    return counts


# --- counting ---------------------------------------------------------------------------------------------------------


def test_every_finite_float_lies_between_the_edges_of_its_bin():
    x = torch.randint(-(2**31), 2**31, (50_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() > 1e-38)]  # smaller ones count as zero
    edges = bin_edges()
    assert bool((edges.diff() > 0).all())
    for value in x[:300]:
        (bin_,) = in_order(counted(value.reshape(1))).nonzero().flatten().tolist()
        assert edges[bin_] <= value.double() <= edges[bin_ + 1]
    assert int(in_order(counted(x)).sum()) == x.numel()


def test_a_bin_is_at_most_a_64th_of_its_value_wide():
    edges = bin_edges()
    positive = edges[edges >= torch.finfo(torch.float32).tiny]
    assert (positive.diff() / positive[:-1]).max().item() == 1 / 64


def test_counts_are_exact_integers_beyond_float32():
    observer = ours.MSEObserver()
    observer.counts[-40] = 2**40
    observer(torch.tensor([1.0, 1.0, -0.5]))
    assert observer.counts.dtype is torch.int64
    assert int(observer.counts.sum()) == 2**40 + 3
    assert (observer.min_val.item(), observer.max_val.item()) == (-0.5, 1.0)


def test_large_tensors_in_any_layout_are_counted_in_full():
    x = torch.randn(2, 8, 200, 200)
    expected = counted(x.flatten())
    assert int(expected.sum()) == x.numel()  # three chunks
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x.expand(1, *x.shape)):
        assert torch.equal(counted(view), expected)
    assert not counted(x[:0]).any()


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", SYNTHETIC)
def test_the_squared_error_is_within_one_percent_of_an_exhaustive_search(kind, bits):
    x, bounds = sample(kind), BITS[bits]
    for symmetric in (False, True):
        scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        observer = ours.MSEObserver(dtype=torch.int8, quant_min=bounds[0], quant_max=bounds[1], qscheme=scheme)
        for part in x.split(70_000):
            observer(part)
        assert error_of(x, *observer.calculate_qparams(), bounds) <= 1.01 * exhaustive(x, bounds, symmetric)


def test_one_large_value_among_zeros_is_kept():  # where the reference's first clip loses it
    observer = ours.MSEObserver(dtype=torch.uint8)
    observer(torch.cat([torch.zeros(200_000), torch.tensor([100.0])]))
    scale, zero_point = observer.calculate_qparams()
    assert scale.item() == pytest.approx(100 / 255, rel=1e-6)
    assert zero_point.item() == 0


def test_a_spike_inside_does_not_hide_the_tail():
    x = torch.cat([torch.full((100_000,), 1.0), torch.linspace(-1.0, 8.0, 20_000)])
    bounds = (-128, 127)
    observer = ours.MSEObserver(dtype=torch.int8)
    observer(x)
    # 1.0 is an exact multiple of some scales and not of others, which counts cannot know: the spread of a bin is 1/64.
    assert error_of(x, *observer.calculate_qparams(), bounds) <= 4 * exhaustive(x, bounds, symmetric=False)
    assert observer.calculate_qparams()[0].item() == pytest.approx(9 / 255, rel=0.02)


@pytest.mark.parametrize("p", [1.0, 2.4, 4.0])
def test_the_p_norm_is_smaller_than_that_of_ranges_nearby(p):
    x = sample("laplace")
    observer = ours.LpNormObserver(p=p, dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-7, quant_max=7)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    chosen = error_of(x, scale, zero_point, (-7, 7), p)
    assert chosen <= 1.01 * min(
        error_of(x, scale * share, zero_point, (-7, 7), p) for share in (0.7, 0.9, 0.97, 1.03, 1.1, 1.4)
    )


def test_a_larger_exponent_keeps_more_of_the_tail():
    ranges = []
    for p in (1.0, 2.0, 3.0, 5.0):
        observer = ours.LpNormObserver(p=p, dtype=torch.int8, quant_min=-8)
        observer(sample("laplace"))
        ranges.append(observer.calculate_qparams()[0].item())
    assert ranges == sorted(ranges)
    assert ranges[-1] > 1.5 * ranges[0]


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy tails", "negative", "integers", "ten decades"])
@pytest.mark.parametrize("percentile", [100.0, 99.9, 90.0])
def test_a_percentile_leaves_out_that_share_of_the_values(kind, percentile):
    torch.manual_seed(1)
    x = values(kind, 30_000)
    observer = ours.PercentileObserver(percentile=percentile, dtype=torch.int8, eps=1e-30)
    observer(x)
    low, high = (x.double().quantile(q).item() for q in ((100 - percentile) / 200, (100 + percentile) / 200))
    expected = affine_qparams(low, high, -128, 127, dtype=torch.int8, eps=1e-30)[0].item()
    # An end is right to the width of its bin, 1/64 of its value; integers leave most of a bin empty.
    assert observer.calculate_qparams()[0].item() == pytest.approx(expected, rel=2 / 64)


def test_a_symmetric_percentile_counts_magnitudes():
    observer = ours.PercentileObserver(percentile=50.0, dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
    observer(torch.tensor([0.0, -0.125, 0.25, 64.0, -100.0]))
    assert observer.calculate_qparams()[0].item() == pytest.approx(0.25 / 127.5, rel=1 / 64)


def test_the_entropy_range_spares_a_gaussian_and_cuts_its_far_outliers():
    scales = {}
    for kind in ("gaussian", "1e-4 outliers at 100 sigma"):
        observer = ours.EntropyObserver(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
        observer(sample(kind))
        scales[kind] = observer.calculate_qparams()[0].item() * 127.5
    assert 2.5 < scales["gaussian"] < 6.0
    assert 2.5 < scales["1e-4 outliers at 100 sigma"] < 10.0


def test_a_uniform_distribution_has_nothing_to_clip():
    x = torch.linspace(-2.0, 6.0, 100_001)
    for name in ("MSEObserver", "EntropyObserver", "LpNormObserver"):
        observer = getattr(ours, name)(dtype=torch.int8)
        observer(x)
        assert observer.calculate_qparams()[0].item() == pytest.approx(8 / 255, rel=0.02)


def test_the_range_of_16_bits_is_kept_nearly_whole():
    for name in DISTRIBUTION_OBSERVERS[:2] + DISTRIBUTION_OBSERVERS[3:]:
        observer = getattr(ours, name)(dtype=torch.int16)
        observer(sample("gaussian"))
        whole = (observer.max_val - observer.min_val).item()
        assert whole * 0.9 <= observer.calculate_qparams()[0].item() * 65535 <= whole * 1.0001


@pytest.mark.parametrize("name", DISTRIBUTION_OBSERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_distribution_gives_a_range_wider_than_what_was_seen(name, kind):
    torch.manual_seed(2)
    for scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        observer = getattr(ours, name)(dtype=torch.int8, qscheme=scheme, eps=1e-37)
        observer(values(kind, 3000))
        scale, zero_point = observer.calculate_qparams()
        whole = affine_qparams(
            observer.min_val,
            observer.max_val,
            -128,
            127,
            dtype=torch.int8,
            symmetric="symmetric" in str(scheme),
            eps=1e-37,
        )[0]
        assert 0.0 < scale.item() <= whole.item() * (1 + 1e-6)
        assert -128 <= zero_point.item() <= 127
        assert (scale.shape, zero_point.shape) == ((1,), (1,))


def test_the_bounds_of_q_are_what_the_search_works_with():
    x = sample("gaussian")
    scales = []
    for bounds in ((-128, 127), (-8, 7)):
        observer = ours.MSEObserver(dtype=torch.int8, quant_min=bounds[0], quant_max=bounds[1])
        observer(x)
        scales.append(observer.calculate_qparams()[0].item() * (bounds[1] - bounds[0]))
    assert scales[1] < 0.7 * scales[0]  # four bits clip a Gaussian near 2.6 sigma, eight near 4


def test_the_search_takes_the_same_time_for_spiky_data():
    spiky = torch.zeros(200_000).index_fill_(0, torch.tensor([7]), 93.5)
    durations = {}
    for kind, x in (("spiky", spiky), ("smooth", sample("gaussian"))):
        observer = ours.MSEObserver(dtype=torch.int8)
        observer(x)
        observer.calculate_qparams()
        start = time.process_time()
        for _ in range(5):
            observer.calculate_qparams()
        durations[kind] = time.process_time() - start
    assert durations["spiky"] < 2 * durations["smooth"]


def test_all_classes_have_the_state_of_one_calibration():
    counted = ours.MSEObserver(dtype=torch.int8)
    counted(sample("laplace"))
    for name in DISTRIBUTION_OBSERVERS[1:]:
        mine, direct = getattr(ours, name)(dtype=torch.int8), getattr(ours, name)(dtype=torch.int8)
        mine.load_state_dict(counted.state_dict())
        direct(sample("laplace"))
        assert [end.tolist() for end in mine.calculate_qparams()] == [
            end.tolist() for end in direct.calculate_qparams()
        ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MSEObserver", {"is_dynamic": True}, "use PlaceholderObserver"),
        ("MSEObserver", {"dtype": torch.float8_e5m2}, "needs an integer dtype"),
        ("MSEObserver", {"qscheme": torch.per_channel_affine}, "pass one of"),
        ("LpNormObserver", {"p": 0.5}, "at least 1, got 0.5"),
        ("LpNormObserver", {"p": math.nan}, "at least 1, got nan"),
        ("PercentileObserver", {"percentile": 0.0}, r"in \(0, 100\], got 0.0"),
        ("PercentileObserver", {"percentile": 100.5}, r"in \(0, 100\], got 100.5"),
    ],
)
def test_illegal_arguments_of_the_counting_observers_are_refused(name, arguments, message):
    with pytest.raises(SpecError, match=message):
        getattr(ours, name)(**arguments)
