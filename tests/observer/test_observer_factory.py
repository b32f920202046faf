"""with_args and with_callable_args: recipes for observers are values."""

from __future__ import annotations

import copy
import pickle
from itertools import count

import pytest
import torch
from observer_data import torch_ao

from pt2e_quant.observer import MinMaxObserver, MovingAverageMinMaxObserver, PartialWrapper, PerChannelMinMaxObserver
from pt2e_quant.specs import QuantizationSpec

RECIPE = MinMaxObserver.with_args(dtype=torch.int8, quant_min=-120, quant_max=110)


def test_a_recipe_makes_an_observer_with_its_arguments():
    observer = RECIPE()
    assert type(observer) is MinMaxObserver
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.int8, -120, 110)
    assert RECIPE() is not observer


def test_arguments_of_the_call_win_over_those_of_the_recipe():
    assert RECIPE(quant_max=99).quant_max == 99
    assert MovingAverageMinMaxObserver.with_args(eps=0.25)(0.125).averaging_constant == 0.125


def test_recipes_can_be_refined_and_the_last_word_counts():
    refined = RECIPE.with_args(quant_max=90).with_args(eps=2**-12)
    assert refined.p.func is MinMaxObserver
    assert refined.p.keywords == {"dtype": torch.int8, "quant_min": -120, "quant_max": 90, "eps": 2**-12}
    assert RECIPE.p.keywords["quant_max"] == 110


@pytest.mark.parametrize("module", [None, torch_ao], ids=["ours", "torch.ao"])
def test_callable_arguments_are_made_for_each_observer(module):
    kind = MinMaxObserver if module is None else module.MinMaxObserver
    numbers = count(3)
    recipe = (
        kind.with_args(quant_min=-7).with_callable_args(quant_max=lambda: next(numbers)).with_args(dtype=torch.int8)
    )
    assert [recipe().quant_max, recipe().quant_max] == [3, 4]
    assert recipe(quant_max=50).quant_max == 50
    assert recipe.with_args(quant_max=60)().quant_max == 60
    assert recipe.with_args(quant_max=60).with_callable_args(quant_max=lambda: 70)().quant_max == 70
    assert next(numbers) == 5  # overruled functions were not called


def test_equal_recipes_are_equal_and_hash_equal():
    same = MinMaxObserver.with_args(quant_max=110, quant_min=-120).with_args(dtype=torch.int8)
    assert same == RECIPE
    assert hash(RECIPE) == hash(same)
    specs = [QuantizationSpec(torch.int8, recipe, -120, 110, torch.per_tensor_affine) for recipe in (RECIPE, same)]
    assert specs[0] == specs[1]
    assert len(set(specs)) == 1


@pytest.mark.parametrize(
    "other",
    [
        RECIPE.with_args(quant_max=111),
        RECIPE.with_args(eps=2**-12),
        MovingAverageMinMaxObserver.with_args(**RECIPE.p.keywords),
        RECIPE.with_callable_args(eps=float),
        MinMaxObserver,
    ],
)
def test_other_recipes_are_not_equal(other):
    assert other != RECIPE


def test_recipes_compare_arguments_that_have_no_truth_value():
    def recipe(*numbers: float) -> PartialWrapper:
        return PerChannelMinMaxObserver.with_args(hint=[torch.tensor(numbers), {"device": "cpu"}])

    assert recipe(1.5, 2.5) == recipe(1.5, 2.5)
    assert hash(recipe(1.5, 2.5)) == hash(recipe(1.5, 2.5))
    assert recipe(1.5, 2.5) != recipe(1.5, 2.25)
    assert recipe(1.5, 2.5) != PerChannelMinMaxObserver.with_args(hint=None)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda recipe: pickle.loads(pickle.dumps(recipe))])
def test_recipes_can_be_copied_and_pickled(copied):
    recipe = RECIPE.with_args(qscheme=torch.per_tensor_symmetric).with_callable_args(eps=float)
    assert copied(recipe) == recipe


def test_a_recipe_prints_as_it_is_written():
    assert repr(RECIPE) == "MinMaxObserver.with_args(dtype=torch.int8, quant_min=-120, quant_max=110)"
    assert (
        repr(MinMaxObserver.with_callable_args(eps=float)) == "MinMaxObserver.with_callable_args(eps=<class 'float'>)"
    )
    assert RECIPE.__name__ == "MinMaxObserver"
