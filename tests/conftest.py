"""What all tests share: reproducible random numbers, one thread, and hypothesis without a stopwatch."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first example of a test compiles or imports what the others reuse. Under CI the examples are the same
# in every run, so that a red run is the fault of the change that it judges.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)  # small tensors: a second thread only waits


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random numbers, in whatever order tests run."""
    torch.manual_seed(0)
