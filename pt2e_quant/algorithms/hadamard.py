"""Orthogonal matrices that spread each channel over all: Hadamard matrices with random signs.

A Hadamard matrix H has entries 1 and -1 and H H^T = n I. Of order 2n it is [[H, H], [H, -H]] (Sylvester 1867); of order
q + 1 and 2 (q + 1), for primes q of the form 4k + 3 and 4k + 1, it follows from which numbers are squares modulo q
(Paley 1933). A random sign for each row makes it random (Tseng et al., QuIP#, ICML 2024, arXiv:2402.04396).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["hadamard", "rotation_matrix"]

_ROOT = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
_OTHER_ROOT = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)


def rotation_matrix(size: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """A random orthogonal matrix, (size, size), float64, and its kind: "hadamard", or "random" where none is known."""
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    spread = hadamard(size)
    if spread is not None:
        return signs * spread / math.sqrt(size), "hadamard"
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal).Q * signs, "random"


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix, (size, size), float64; None where neither Sylvester nor Paley has one."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley(size)
    if found is None and size % 2 == 0:
        half = hadamard(size // 2)
        found = None if half is None else torch.kron(_ROOT, half)
    return found


def _paley(size: int) -> Tensor | None:
    if size % 4 == 0 and _is_prime(size - 1):  # then size - 1 is 3 modulo 4
        return _conference(size - 1, -1) + torch.eye(size, dtype=torch.float64)
    prime = size // 2 - 1
    if size % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        unit = torch.eye(prime + 1, dtype=torch.float64)
        return torch.kron(_conference(prime, 1), _ROOT) + torch.kron(unit, _OTHER_ROOT)
    return None


def _conference(prime: int, corner: int) -> Tensor:
    """C with C C^T = q I and zeros on the diagonal: the characters of i - j, bordered by ones and `corner`s."""
    numbers = torch.arange(prime)
    character = -torch.ones(prime, dtype=torch.float64)
    character[(numbers * numbers) % prime] = 1.0
    character[0] = 0.0
    made = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1.0, corner
    made[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return made


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
