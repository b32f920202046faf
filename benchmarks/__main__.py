"""All benchmarks, one after the other: `python -m benchmarks`."""

from __future__ import annotations

from benchmarks import engine, report

engine.main()
report.main()
