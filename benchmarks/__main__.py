"""All benchmarks, one after the other: `python -m benchmarks`."""

from __future__ import annotations

from benchmarks import engine, observers, report

engine.main()
observers.main()
report.main()
