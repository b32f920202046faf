"""Runs an ONNX file under onnxruntime's profiler, which writes down the time of each node of the graph that it runs."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...latency import Profile, Sample, profile_of
from .runtime import FUSED, open_session

__all__ = ["take_profile"]

_WARM = 3
_SUFFIX = "_kernel_time"
_BLOCKED = "_nchwc"


def take_profile(model: bytes, feed: dict[str, Any], runs: int) -> Profile:
    """Run a file so many times on these inputs; the runs that warm it up are counted, which medians forgive.

    Args:
        model: the content of an ONNX file, whose nodes are named after those of the converted graph ('conv2d/Conv').
        feed: its inputs by name, as numpy arrays.
        runs: how often.
    """
    with tempfile.TemporaryDirectory(prefix="pt2e_quant") as folder:
        session = open_session(model, profile_to=Path(folder) / "profile")
        walls = [_timed(lambda: session.run(None, feed)) for _ in range(_WARM + runs)]
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return profile_of(walls, _samples(events))


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _samples(events: list[dict[str, Any]]) -> Iterator[Sample]:
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            node = _node(event["name"].removesuffix(_SUFFIX))
            yield event["args"]["op_name"], (node,) if node else (), float(event["dur"])


def _node(name: str) -> str:
    """'conv2d' of 'conv2d/Conv_token_1' and of 'fused conv2d/Conv'; 'relu' of 'relu_nchwc', a float convolution that is
    named after its result; '' of what onnxruntime adds by itself, such as transposes.
    """
    if name.endswith(_BLOCKED):
        return name.removesuffix(_BLOCKED)
    node, slash, _ = name.removeprefix(FUSED).partition("/")
    return node if slash else ""
