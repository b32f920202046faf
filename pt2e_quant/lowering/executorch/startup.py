"""Starts the threads of ExecuTorch's runtime without the lines that it prints on machines that are not Arm phones.

The runtime counts the cores of the machine once, when its thread pool starts. It tells on standard error of each file
that only phones have, from C++, past every logger. These lines are known and harmless; nothing else is left out.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["standard_error_without", "start_threads"]

_HARMLESS = re.compile(
    rb"\[cpuinfo_utils\.cpp:\d+\] "
    rb"(Reading file /sys/|Failed to open midr file /sys/|CPU info and manual query on # of cpus dont match)"
)
_STANDARD_ERROR = 2


@functools.cache
def start_threads() -> None:
    """Start the thread pool, which the first delegate would do."""
    from executorch.extension.pybindings import portable_lib

    count_threads = getattr(portable_lib, "_threadpool_get_thread_count", None)
    if count_threads is not None:  # a build without threads prints nothing
        with standard_error_without(_HARMLESS):
            count_threads()


@contextmanager
def standard_error_without(known: re.Pattern[bytes]) -> Iterator[None]:
    """Hold back what is written to standard error meanwhile, by any language, then write all lines but the known."""
    try:
        screen = os.dup(_STANDARD_ERROR)
    except OSError:  # this process has no standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STANDARD_ERROR)
        try:
            yield
        finally:
            os.dup2(screen, _STANDARD_ERROR)
            os.close(screen)
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if known.match(line) is None:
                    os.write(_STANDARD_ERROR, line)
