"""Coverage looks away while others work, and looks on afterwards."""

from __future__ import annotations

import sys
import types

import pytest

from tests.untraced import look_away


@pytest.fixture
def others(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("others_of_a_test")
    exec(
        "def work(fail=False):\n    import sys\n    if fail: raise KeyError(7)\n    return sys.gettrace()", vars(module)
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    look_away(("others_of_a_test.work",))
    return module


def test_the_tracer_rests_while_others_work_and_is_back_afterwards(others):
    called = []

    def tracer(frame, event, arg):
        called.append(frame.f_code.co_name)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        inside = others.work()
        with pytest.raises(KeyError):
            others.work(fail=True)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert inside is None
    assert after is tracer
    assert "work" not in called
    assert "run" in called  # the tracer was on
