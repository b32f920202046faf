"""What all tests share: reproducible random numbers, one thread, and hypothesis without a stopwatch."""

from __future__ import annotations

import importlib.util
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import untraced

# No deadline: the first example of a test compiles or imports what the others reuse. Under CI the examples are the same
# in every run, so that a red run is the fault of the change that it judges.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# pytest listens to every logger that does not propagate, and torch writes thousands of records to this one per export
# as soon as anybody listens. Propagating, and without the listener that torch gives it, it stays silent.
_trace = logging.getLogger("torch.__trace")
_trace.propagate = True
_trace.handlers.clear()

torch.set_num_threads(1)  # small tensors: a second thread only waits


@pytest.fixture(scope="session", autouse=True)
def _look_away() -> None:
    """Under coverage alone, since it imports what a single test may not need."""
    if sys.gettrace() is None:
        return
    untraced.look_away(untraced.TORCH + untraced.INDUCTOR)
    if importlib.util.find_spec("executorch"):
        untraced.look_away(untraced.EXECUTORCH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random numbers, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 6000 bytes: the second half of writing a larger one fails as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)
