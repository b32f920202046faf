"""Requantization: integer formulas against float32 arithmetic of numpy, exact fractions, and gemmlowp's C by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pt2e_quant.grid import Grid
from pt2e_quant.pt2e.representation import NoIntegerForm, Rounding
from pt2e_quant.requantization import Term, requantize, requantize_sum

EVEN, AWAY = Rounding.FLOAT32_HALF_EVEN, Rounding.FIXED_POINT_HALF_AWAY
WIDE = (-(2**62), 2**62, torch.int64)  # no clamp, so that every rounding shows

sums = st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=20)
factors = st.floats(2.0**-30, 200.0, width=32, allow_subnormal=False)
zero_points = st.integers(-128, 255)


def run(values: list[int], factor: float, rounding: Rounding, zero_point: int = 0, **options: bool) -> list[int]:
    """Requantize with an output scale of 1, so that the factor is the scale itself."""
    bound = max(1, *map(abs, values))
    term = Term(torch.tensor(values), torch.tensor(factor, dtype=torch.float64), bound)
    out = Grid(1.0, zero_point, *WIDE)
    return requantize(term, out, rounding, lambda constant: constant, **options).tolist()


@given(sums, factors, zero_points)
def test_half_even_is_bit_for_bit_the_float32_product_and_rint(values, factor, zero_point):
    product = np.array(values, dtype=np.int32).astype(np.float32) * np.float32(factor)
    expected = (np.rint(product).astype(np.int64) + zero_point).tolist()
    assert run(values, factor, EVEN, zero_point) == expected


@given(sums, factors, zero_points)
def test_half_even_is_the_exact_product_rounded_unless_float32_cannot_tell_it_from_a_tie(values, factor, zero_point):
    """The sum and the product are each rounded to 24 bits: together at most 2^-23 (1 + 2^-24) of the product."""
    for value, got in zip(values, run(values, factor, EVEN, zero_point), strict=True):
        exact = Fraction(value) * Fraction(factor)
        slack = abs(exact) * Fraction(2**24 + 1, 2**47)
        assert abs(got - zero_point - exact) <= Fraction(1, 2) + slack
        if abs(exact - math.floor(exact) - Fraction(1, 2)) > slack and abs(exact) < 2**22:
            assert got - zero_point == round(exact)


@given(st.lists(st.integers(-(2**23), 2**23), min_size=1, max_size=20), st.integers(1, 12), zero_points)
def test_ties_go_to_the_even_difference_or_with_the_zero_point_first_to_the_even_code(halves, shift, zero_point):
    """Factors that are powers of two are exact, and odd sums of halves are ties."""
    values = [(2 * half + 1) << (shift - 1) for half in halves if abs(half) < 2**18]
    if values:
        exact = [Fraction(value, 2**shift) for value in values]
        assert run(values, 2.0**-shift, EVEN, zero_point) == [round(e) + zero_point for e in exact]
        first = run(values, 2.0**-shift, EVEN, zero_point, zero_point_first=True)
        assert first == [round(e + zero_point) for e in exact]


@given(sums, st.floats(2.0**-30, 0.999), zero_points)
def test_fixed_point_is_gemmlowp_by_hand(values, factor, zero_point):
    fraction, exponent = math.frexp(factor)
    multiplier = round(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, exponent = 2**30, exponent + 1
    expected = []
    for value in values:
        product = value * multiplier
        nudge = 2**30 if product >= 0 else 1 - 2**30
        high = int(Fraction(product + nudge, 2**31))  # C divides towards zero
        right = -exponent
        remainder, threshold = high & (2**right - 1), ((2**right - 1) >> 1) + (high < 0)
        expected.append((high >> right) + (remainder > threshold) + zero_point)
    assert run(values, factor, AWAY, zero_point) == expected


@given(sums, st.floats(2.0**-20, 0.999))
def test_fixed_point_is_within_one_code_of_the_exact_product(values, factor):
    """Two roundings of at most one half each, and a multiplier that is off by at most 2^-32 of 2^-1."""
    for value, got in zip(values, run(values, factor, AWAY), strict=True):
        assert abs(got - Fraction(value) * Fraction(factor)) <= 1 + Fraction(abs(value), 2**31)


@pytest.mark.parametrize("rounding", Rounding, ids=lambda rounding: rounding.name)
@given(a=st.integers(-255, 255), b=st.integers(-255, 255), scale_a=st.floats(0.01, 3), scale_b=st.floats(0.01, 3))
def test_a_sum_is_within_one_half_and_what_its_multipliers_lose(rounding, a, b, scale_a, scale_b):
    """21-bit multipliers: 255 * 2^-21 for each operand. Fixed point: three roundings, two of them of 2^-20 steps."""
    terms = [Term(torch.tensor([a]), torch.tensor(scale_a, dtype=torch.float64), 255)]
    terms.append(Term(torch.tensor([b]), torch.tensor(scale_b, dtype=torch.float64), 255, sign=-1))
    out = Grid(1.0, 0, -(2**31), 2**31 - 1, torch.int32)
    (got,) = requantize_sum(terms, out, rounding, lambda constant: constant).tolist()
    slack = 2 * 255 * 2.0**-20 * max(scale_a, scale_b)
    assert abs(got - (a * scale_a - b * scale_b)) <= 0.5 + slack


@pytest.mark.parametrize("rounding", Rounding, ids=lambda rounding: rounding.name)
def test_a_factor_for_each_channel_is_the_same_as_channel_by_channel(rounding):
    sums_, factors_ = torch.randint(-90, 90, (50, 4)), torch.tensor([0.9, 0.37, 2.0**-5, 0.011]).double()
    out = Grid(0.7, 3, -128, 127, torch.int8)
    together = requantize(Term(sums_, factors_, 2**25), out, rounding, lambda constant: constant)
    for channel in range(4):
        term = Term(sums_[:, channel], factors_[channel], 2**25)
        assert torch.equal(requantize(term, out, rounding, lambda constant: constant), together[:, channel])
    assert together.dtype is torch.int8
    assert all(together[:, channel].unique().numel() > 2 for channel in range(4))


@pytest.mark.parametrize(
    ("factor", "bound", "rounding"), [(2.0**24, 255, EVEN), (0.5, 2**38, EVEN), (8.0, 2**29, AWAY)]
)
def test_what_leaves_64_bits_is_refused(factor, bound, rounding):
    term = Term(torch.tensor([1]), torch.tensor(factor, dtype=torch.float64), bound)
    with pytest.raises(NoIntegerForm, match="do not fit"):
        requantize(term, Grid(1.0, 0, *WIDE), rounding, lambda constant: constant)


def test_a_factor_that_reaches_no_half_gives_the_zero_point():
    assert run([127 * 10_000, -3], 2.0**-60, EVEN, 5) == [5, 5]
    assert run([127 * 10_000, -3], 2.0**-60, AWAY, 5) == [5, 5]
