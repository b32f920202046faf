"""While a compiler runs, nodes of its thread share the records of where they come from; others notice nothing."""

from __future__ import annotations

import copy
import threading

import pytest
from torch.fx.traceback import NodeSource

from pt2e_quant.lowering.common.provenance import sharing_provenance


def record() -> NodeSource:
    made = NodeSource(None, "a pass")
    made.from_node = [NodeSource(None, "an earlier pass")]
    return made


def test_inside_records_are_shared_and_outside_copied():
    source = record()
    with sharing_provenance():
        assert copy.deepcopy([source])[0] is source
    copied = copy.deepcopy(source)
    assert copied is not source
    assert copied.from_node[0] is not source.from_node[0]


def test_another_thread_copies_all_the_same():
    source, copies = record(), []
    with sharing_provenance():
        other = threading.Thread(target=lambda: copies.append(copy.deepcopy([source, source])))
        other.start()
        other.join()
    first, second = copies[0]
    assert first is second
    assert first is not source
    assert (first.pass_name, first.from_node[0].pass_name) == ("a pass", "an earlier pass")
    assert first.from_node[0] is not source.from_node[0]


def test_blocks_that_overlap_in_two_threads_leave_the_class_as_it_was():
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with sharing_provenance():
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with sharing_provenance():
        thread.start()
        entered.wait()
    source = record()
    assert copy.deepcopy(source) is not source
    left.set()
    thread.join()
    assert "__deepcopy__" not in vars(NodeSource)


def test_an_error_inside_leaves_the_class_as_it_was():
    with pytest.raises(ValueError, match="of a compiler"), sharing_provenance(), sharing_provenance():
        raise ValueError("of a compiler")
    assert "__deepcopy__" not in vars(NodeSource)
