"""Calibration data of every unpleasant kind, and the reference's observers to compare with."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both warn on import; here they are the oracle
    import torch.ao.quantization.observer as torch_ao
    import torchao.quantization.pt2e.observer as torchao_pt2e

__all__ = ["KINDS", "REFERENCES", "batches", "torch_ao", "torchao_pt2e", "values"]

REFERENCES = {"torch.ao": torch_ao, "torchao": torchao_pt2e}

KINDS = {
    "normal": lambda n: torch.randn(n) * 2.3 - 0.7,
    "far from zero": lambda n: torch.randn(n) * 0.01 + 41.5,
    "relu": lambda n: torch.randn(n).relu() * 7.1,
    "heavy tails": lambda n: torch.randn(n) ** 7,
    "ten decades": lambda n: 10 ** (torch.rand(n) * 10 - 6) * torch.randn(n).sign(),
    "one spike": lambda n: torch.zeros(n).index_fill_(0, torch.tensor([n // 3]), 93.5),
    "all zero": lambda n: torch.zeros(n),
    "constant": lambda n: torch.full((n,), 3.7),
    "negative constant": lambda n: torch.full((n,), -0.11),
    "huge constant": lambda n: torch.full((n,), -3e8),
    "negative": lambda n: -torch.rand(n) * 5 - 1.25,
    "positive": lambda n: torch.empty(n).exponential_() + 0.3,
    "tiny": lambda n: torch.randn(n) * 1e-7,
    "denormal": lambda n: torch.randn(n) * 1e-41,
    "large": lambda n: torch.randn(n).clamp(-3, 3) * 1e33,
    "few float32 steps": lambda n: 1e6 + torch.rand(n),
    "integers": lambda n: torch.randint(-21, 18, (n,)).float(),
}
"""Name of a distribution -> a function that draws n values from it."""


def values(kind: str, n: int) -> Tensor:
    return KINDS[kind](n)


def batches(kind: str, seed: int) -> list[Tensor]:
    """A few batches of different sizes; those of kind "changing" come from different distributions."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    kinds = [dice.choice(list(KINDS)) if kind == "changing" else kind for _ in range(dice.randint(1, 5))]
    sizes = [dice.choice([1, 2, 37, 1000, 9000, 40000]) for _ in kinds]
    return [values(each, size) * dice.choice([1.0, 1.0, 0.6, 1.9]) for each, size in zip(kinds, sizes, strict=True)]
