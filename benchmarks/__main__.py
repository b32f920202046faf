"""All benchmarks, one after the other: `python -m benchmarks`."""

from __future__ import annotations

from benchmarks import engine, observers, report, x86

engine.main()
observers.main()
report.main()
x86.main()
