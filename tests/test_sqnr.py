"""SQNR by hand arithmetic."""

import math

import pytest
import torch

from pt2e_quant.errors import QuantizationError
from pt2e_quant.sqnr import decibels, sqnr


def test_a_tenth_of_the_amplitude_is_20_db():
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.3, 4.4])) == pytest.approx(20, rel=1e-6)  # float32 inputs


def test_all_tensors_of_a_structure_count_together_and_integers_do_not():
    exact = {"a": torch.tensor([6.0]), "b": (torch.tensor([8.0]), torch.tensor([7]))}
    other = {"a": torch.tensor([6.0]), "b": (torch.tensor([9.0]), torch.tensor([0]))}
    assert sqnr(exact, other) == pytest.approx(10 * math.log10(100 / 1))


@pytest.mark.parametrize(
    ("signal", "noise", "found"),
    [(1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (1.0, math.inf, -math.inf)],
)
def test_the_ends_of_the_scale(signal, noise, found):
    assert decibels(signal, noise) == found


def test_no_number_stays_no_number():
    assert math.isnan(sqnr(torch.ones(2), torch.tensor([1.0, math.nan])))


def test_other_shapes_are_an_error_and_not_broadcast():
    with pytest.raises(QuantizationError, match=r"\(2, 3\).*\(3,\)"):
        sqnr(torch.zeros(2, 3), torch.zeros(3))
