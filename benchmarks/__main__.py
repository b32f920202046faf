"""All benchmarks, one after the other: `python -m benchmarks`."""

from __future__ import annotations

from benchmarks import (
    accuracy,
    accuracy_peers,
    debug,
    decoder_accuracy,
    eager,
    engine,
    fx,
    memory,
    modules,
    observers,
    qat,
    qat_accuracy,
    report,
    report_page,
    tiny_llama,
    transformers_models,
    x86,
)

engine.main()
observers.main()
report.main()
report_page.main()
x86.main()
modules.main()
transformers_models.main()
tiny_llama.main()
memory.main()
qat.main()
qat_accuracy.main()
debug.main()
accuracy.main()
accuracy_peers.main()
decoder_accuracy.main()
eager.main()
fx.main()
